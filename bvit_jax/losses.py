"""Losses of the task and of the router, unweighted: `bvit_jax.train_step.total_loss` weights them, in one place.

Axes: B batch, T tokens, E experts, C classes.
"""

import chex
import jax
import jax.numpy as jnp


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` with `weights` of the same shape; 0 where all weights are 0."""
    chex.assert_equal_shape([values, weights])
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def cross_entropy(logits_BxC: jax.Array, labels_B: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each example, float32 (B,), in nats.

    Args:
        logits_BxC: (B, C), floating.
        labels_B: int (B,), 0 to C - 1.
        label_smoothing: probability mass spread evenly over all C classes.

    Raises:
        AssertionError: if the shapes are not (B, C) and (B,).
    """
    chex.assert_rank([logits_BxC, labels_B], [2, 1])
    chex.assert_equal_shape_prefix([logits_BxC, labels_B], 1)
    log_probs = jax.nn.log_softmax(logits_BxC.astype(jnp.float32))
    target = jnp.take_along_axis(log_probs, labels_B[:, None], axis=-1)[:, 0]
    return -(1 - label_smoothing) * target - label_smoothing * log_probs.mean(axis=-1)


def load_balance(probs_BxTxE: jax.Array, assignments_E: jax.Array, weight_BxT: jax.Array) -> jax.Array:
    """Load-balance loss E * sum_e f_e * P_e, float32 ().

    f_e is the share of assignments that went to expert e (a count: constant to the gradient), P_e the mean probability
    of e, through which the loss is differentiable. It is 1 when both are uniform.

    References:
        Fedus et al., "Switch Transformers", arXiv 2101.03961, equations 4 to 6, with f over all K choices.
    """
    num_experts = probs_BxTxE.shape[-1]
    share_E = jax.lax.stop_gradient(assignments_E / jnp.maximum(assignments_E.sum(), 1e-9))
    mean_E = jnp.einsum("bte,bt->e", probs_BxTxE, weight_BxT) / jnp.maximum(weight_BxT.sum(), 1e-9)
    return num_experts * jnp.sum(share_E * mean_E)


def router_z(logits_BxTxE: jax.Array, weight_BxT: jax.Array) -> jax.Array:
    """Router z-loss, the mean of logsumexp(logits)^2, float32 ().

    References:
        Zoph et al., "ST-MoE", arXiv 2202.08906, equation 5.
    """
    log_z = jax.nn.logsumexp(logits_BxTxE.astype(jnp.float32), axis=-1)
    return weighted_mean(log_z**2, weight_BxT)


def spatial_smoothness(probs_BxPxE: jax.Array, grid: tuple[int, int], weight_B: jax.Array) -> jax.Array:
    """Mean over horizontally and vertically adjacent patches a, b of ||p_a - p_b||^2, float32 (); 0 with no neighbours.

    Args:
        probs_BxPxE: routing probabilities of the patches in row order, without the class token.
        grid: rows and columns, rows * columns = P.
        weight_B: (B,), 1 for examples that count.

    Raises:
        ValueError: if the patches do not fill the grid.

    References:
        Karmore, "ButterflyViT", arXiv 2603.06746.
    """
    rows, columns = grid
    if probs_BxPxE.shape[1] != rows * columns:
        raise ValueError(f"{probs_BxPxE.shape[1]} patches do not fill a grid of {rows} x {columns}")
    p = probs_BxPxE.reshape(-1, rows, columns, probs_BxPxE.shape[-1])
    across_B = jnp.sum((p[:, :, 1:] - p[:, :, :-1]) ** 2, axis=(1, 2, 3))
    down_B = jnp.sum((p[:, 1:] - p[:, :-1]) ** 2, axis=(1, 2, 3))
    neighbours = rows * (columns - 1) + (rows - 1) * columns
    return weighted_mean(across_B + down_B, weight_B) / max(neighbours, 1)
