"""Top-k routing: which experts see which token, with what weight, and what that says of the router.

The router returns data and unweighted losses; the training loss weights them (`bvit_jax.losses`).

Axes: B batch, T tokens (class token first), E experts, K experts selected per token.
"""

import jax
import jax.numpy as jnp
from flax import struct

from bvit_jax import losses


@struct.dataclass
class Routing:
    """Where each token goes.

    Attributes:
        probs_BxTxE: float32, softmax of the logits without noise.
        gates_BxTxK: float32, weight of each selected expert's output.
        experts_BxTxK: int32, the selected experts, by falling logit.
    """

    probs_BxTxE: jax.Array
    gates_BxTxK: jax.Array
    experts_BxTxK: jax.Array


@struct.dataclass
class RouterReport:
    """What one routing did, as data; every field float32, means and counts over the examples of weight 1.

    Attributes:
        load_balance: (), unweighted load-balance loss, 1 at its best.
        router_z: (), unweighted router z-loss.
        smoothness: (), unweighted spatial smoothness loss.
        assignments_E: (E,), number of (token, choice) pairs that each expert received.
        entropy: (), mean entropy of the routing probabilities, in nats; log E at its largest.
    """

    load_balance: jax.Array
    router_z: jax.Array
    smoothness: jax.Array
    assignments_E: jax.Array
    entropy: jax.Array


def select(logits_BxTxE: jax.Array, top_k: int, noise_BxTxE: jax.Array | None = None) -> Routing:
    """Selects the `top_k` most probable experts of each token.

    For top_k > 1 the gates are the selected probabilities divided by their sum. For top_k = 1 that would be the
    constant 1 and the task would send the router no gradient, so the gate is the probability itself.

    Args:
        logits_BxTxE: (..., experts), floating.
        top_k: experts a token, 1 to E.
        noise_BxTxE: added to the logits for selection and gates (exploration in training), not to `probs`.

    Raises:
        ValueError: if `top_k` is not between 1 and the number of experts.
    """
    num_experts = logits_BxTxE.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; with {num_experts} experts it must be 1 to {num_experts}")
    logits_BxTxE = logits_BxTxE.astype(jnp.float32)
    noisy_BxTxE = logits_BxTxE if noise_BxTxE is None else logits_BxTxE + noise_BxTxE
    top_BxTxK, experts_BxTxK = jax.lax.top_k(noisy_BxTxE, top_k)
    if top_k == 1:
        gates_BxTxK = jnp.exp(top_BxTxK - jax.nn.logsumexp(noisy_BxTxE, axis=-1, keepdims=True))
    else:
        gates_BxTxK = jax.nn.softmax(top_BxTxK, axis=-1)  # equals the selected probabilities over their sum
    return Routing(jax.nn.softmax(logits_BxTxE, axis=-1), gates_BxTxK, experts_BxTxK)


def report(
    logits_BxTxE: jax.Array, routing: Routing, grid: tuple[int, int], weight_B: jax.Array | None = None
) -> RouterReport:
    """Measures a routing.

    Args:
        logits_BxTxE: (B, T, E), the logits without noise.
        routing: what `select` made of them.
        grid: rows and columns of patches; T = rows * columns + 1.
        weight_B: (B,), 1 for examples that count, 0 for padding; all count if left out.
    """
    batch, tokens, num_experts = logits_BxTxE.shape
    weight_B = jnp.ones(batch) if weight_B is None else weight_B.astype(jnp.float32)
    weight_BxT = jnp.broadcast_to(weight_B[:, None], (batch, tokens))
    assignments_E = _count(routing.experts_BxTxK, weight_BxT, num_experts)
    probs = routing.probs_BxTxE
    entropy_BxT = -jnp.sum(jax.scipy.special.xlogy(probs, jnp.where(probs > 0, probs, 1.0)), axis=-1)
    return RouterReport(
        load_balance=losses.load_balance(probs, assignments_E, weight_BxT),
        router_z=losses.router_z(logits_BxTxE, weight_BxT),
        smoothness=losses.spatial_smoothness(probs[:, 1:], grid, weight_B),
        assignments_E=assignments_E,
        entropy=losses.weighted_mean(entropy_BxT, weight_BxT),
    )


def _count(experts_BxTxK: jax.Array, weight_BxT: jax.Array, num_experts: int) -> jax.Array:
    weights = jnp.broadcast_to(weight_BxT[..., None], experts_BxTxK.shape)
    return jnp.zeros(num_experts, jnp.float32).at[experts_BxTxK.reshape(-1)].add(weights.reshape(-1))
