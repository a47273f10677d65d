"""Feed-forward layers of the Vision Transformer: dense, mixture of stored experts (floats or ternary), mixture of
rotated ternary experts; `bvit_jax.low_rank` has one more.

All map (B, T, D) to (B, T, D) and return a `RouterReport` (None from the dense layer) beside it. Parameters are
float32; activations and matrix products have `config.compute_dtype`.

Axes: B batch, T tokens, D d_model, F d_ff, E experts, K experts selected per token, A angles of one rotation.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from bvit_jax import butterfly, dispatch, exchange, low_rank, mixture, packing, platforms, rotated, sharding, ternary
from bvit_jax.model_config import ModelConfig

_kernel_init = nn.initializers.xavier_uniform()
_expert_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=(0,))
_zeros = nn.initializers.zeros


def _dense(features: int, dtype: str, inputs: str, outputs: str, name: str) -> nn.Dense:
    kernel_init, bias_init = sharding.named(_kernel_init, inputs, outputs), sharding.named(_zeros, outputs)
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


class DenseMlp(nn.Module):
    """y = W_down gelu(W_up x + b_up) + b_down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None = None) -> mixture.FfnOutput:
        del train, weight_B
        c = self.config
        h_BxTxF = nn.gelu(_dense(c.d_ff, c.compute_dtype, "embed", "mlp", "up")(x_BxTxD))
        return _dense(c.d_model, c.compute_dtype, "mlp", "embed", "down")(h_BxTxF), None


class StandardMoe(nn.Module):
    """Mixture of stored experts, each an FFN with biases of its own. Exact: no capacity, no token dropped.

    Matrices are floats in the family `standard`, and in `ternary` W_q, quantised matrix by matrix through the
    straight-through estimator of `bvit_jax.ternary`.

    On a mesh each device sorts its own rows by expert, and sends those of experts that are elsewhere along the axis
    `expert` (`bvit_jax.exchange`); hidden channels may be split over the axis `model`. The grouped products go by
    tiles on TPUs and by blocks on CPUs (`bvit_jax.dispatch`), as the platform is that the program is lowered for
    (`bvit_jax.platforms`).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None = None) -> mixture.FfnOutput:
        c = self.config
        routed, report = mixture.Router(c, name="router")(x_BxTxD, train=train, weight_B=weight_B)
        sizes = {"experts": c.num_experts, "embed": c.d_model, "mlp": c.d_ff}
        params = {
            name: self.param(name, sharding.named(init, *axes), tuple(sizes[axis] for axis in axes))
            for name, (init, axes) in _STORED.items()
        }
        return mixture.combine(_apply_stored(c, params, x_BxTxD, routed.experts_BxTxK), routed), report


_STORED: dict[str, tuple[nn.initializers.Initializer, tuple[str, ...]]] = {
    "up_kernel": (_expert_init, ("experts", "embed", "mlp")),
    "up_bias": (_zeros, ("experts", "mlp")),
    "down_kernel": (_expert_init, ("experts", "mlp", "embed")),
    "down_bias": (_zeros, ("experts", "embed")),
}
"""Parameters of stored experts: how they start, and their axes."""


def _apply_stored(
    config: ModelConfig, params: dict[str, jax.Array], x_BxTxD: jax.Array, expert_BxTxK: jax.Array
) -> jax.Array:
    """Returns the output of each choice's stored expert, (B, T, K, D); parameters as they are trained."""
    # Rounded before they are split over devices: a scale is that of all inputs, wherever these are.
    params = params | {name: _rounded(config, params[name]) for name in ("up_kernel", "down_kernel")}
    params = {name: leaf.astype(config.compute_dtype) for name, leaf in params.items()}
    x_BxTxD = x_BxTxD.astype(config.compute_dtype)
    mesh = sharding.active_mesh()
    if mesh is not None:
        return _on_mesh(mesh, params, x_BxTxD, expert_BxTxK)
    y_NxD = _stored_experts(params, mixture.rows(x_BxTxD, expert_BxTxK.shape[-1]), expert_BxTxK.reshape(-1))
    return y_NxD.reshape(*expert_BxTxK.shape, config.d_model)


def _on_mesh(
    mesh: AbstractMesh, params: dict[str, jax.Array], x_BxTxD: jax.Array, expert_BxTxK: jax.Array
) -> jax.Array:
    """Applies stored experts with each device's rows, experts and hidden channels as `sharding.RULES` split them."""

    def on_device(own: dict[str, jax.Array], x_bxTxD: jax.Array, expert_bxTxK: jax.Array) -> jax.Array:
        # Devices along `model` hold parts of one sum; the bias is to enter it once.
        first = (jax.lax.axis_index(sharding.MODEL) == 0).astype(x_bxTxD.dtype)
        own = own | {"down_bias": first * own["down_bias"]}
        rows_NxD = mixture.rows(x_bxTxD, expert_bxTxK.shape[-1])
        y_NxD = exchange.apply_experts(
            _stored_experts, own, rows_NxD, expert_bxTxK.reshape(-1), sharding.EXPERT, mesh.axis_names
        )
        return y_NxD.reshape(1, *expert_bxTxK.shape, x_bxTxD.shape[-1])

    rows = sharding.split("batch")
    by_axes = {name: sharding.split(*axes) for name, (_, axes) in _STORED.items()}
    parts_MxBxTxKxD = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(by_axes, rows, rows),
        out_specs=sharding.split("mlp", "batch"),
        check_vma=False,  # the number of rounds is the same everywhere, which is more than it can prove
    )(params, x_BxTxD, expert_BxTxK)
    return parts_MxBxTxKxD.sum(axis=0)


def _stored_experts(params: dict[str, jax.Array], rows_NxD: jax.Array, expert_N: jax.Array) -> jax.Array:
    """Applies the FFN of stored experts, each row by its expert's."""
    block = dispatch.default_block(expert_N.shape[0], params["up_kernel"].shape[0])
    return platforms.dependent(
        params,
        rows_NxD,
        expert_N,
        tpu=_stored_experts_by(tile=dispatch.TILE),
        cpu=_stored_experts_by(block=block),
        default=_stored_experts_by(),
    )


def _stored_experts_by(block: int = 0, tile: int = 0) -> exchange.Experts:
    """Returns the FFN of stored experts over rows; arguments as in `dispatch.group`."""

    def apply(params: dict[str, jax.Array], rows_NxD: jax.Array, expert_N: jax.Array) -> jax.Array:
        up_ExDxF, up_bias_ExF, down_ExFxD, down_bias_ExD = (params[name] for name in _STORED)
        grouping = dispatch.group(expert_N, up_ExDxF.shape[0], block, tile)
        x_SxD = dispatch.to_slots(rows_NxD, grouping)
        h_SxF = dispatch.grouped_matmul(x_SxD, up_ExDxF, grouping) + up_bias_ExF[grouping.expert_S]
        y_SxD = dispatch.grouped_matmul(nn.gelu(h_SxF), down_ExFxD, grouping) + down_bias_ExD[grouping.expert_S]
        return dispatch.to_rows(y_SxD, grouping)

    return apply


class ButterflyMoe(nn.Module):
    """Mixture of experts that are rotations of shared ternary matrices: W_i = B(phi_i) W_q B(theta_i)^T.

    Forms (`config.form`), for one expert i:

    - `separate`: y = W_down,i gelu(W_up,i x + b_up) + b_down; two prototypes, each with its own pair of rotations.
    - `tied`: y = W_i^T gelu(W_i x + b_up) + b_down; one prototype and one pair, used in both directions.
    - `reference`: h = sum_k gate_k B(theta_i) W_q B(phi_i) x, y = W_out h + b_out; no nonlinearity, and a dense d_ff ->
      d_model projection W_out shared by all experts, as in the public PyTorch code.

    Biases are shared by all experts. Every row (token x choice) is turned by its own expert's angles, and one dense
    product with the prototype serves them all: with more experts the router and padding (`bvit_jax.rotated`) cost more,
    and nothing else. On a mesh every device holds all angles and prototypes and turns its own tokens: none travels.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None = None) -> mixture.FfnOutput:
        c = self.config
        x_BxTxD = sharding.constrain(x_BxTxD, "rotated_batch", "tokens", "embed")
        routed, report = mixture.Router(c, name="router")(x_BxTxD, train=train, weight_B=weight_B)
        params = {name: self._parameter(name, sides) for name, sides in rotated.params_of(c).items()}
        x_BxTxD, expert_BxTxK = x_BxTxD.astype(c.compute_dtype), routed.experts_BxTxK
        y_BxTxKxF = mixture.in_each_shard(functools.partial(rotated.apply, c), params, x_BxTxD, expert_BxTxK)
        y_BxTxF = mixture.combine(y_BxTxKxF, routed)
        if c.form == "reference":
            y_BxTxF = _dense(c.d_model, c.compute_dtype, "outputs", "embed", "projection")(y_BxTxF)
        return y_BxTxF, report

    def _parameter(self, name: str, sides: str) -> jax.Array:
        """Makes a parameter of the sides in `sides` (D or F), as it is used."""
        c = self.config
        shape = tuple({"D": c.d_model, "F": c.d_ff}[side] for side in sides)
        if name.endswith("angles"):
            init = sharding.named(_uniform(c.angle_init), "rotations", "angles")
            shape = (c.num_experts, butterfly.num_angles(rotated.stages_of(c, sides)))
        elif name.endswith("bias"):
            init = sharding.named(_zeros, "outputs")
        else:
            init = sharding.named(_kernel_init, "inputs", "outputs")
        return _as_used(c, name, self.param(name, init, shape))


def _as_used(config: ModelConfig, name: str, leaf: jax.Array) -> jax.Array:
    """Rounds a parameter of rotated experts as the exported file will hold it; biases are not rounded here."""
    if name.endswith("angles"):
        return packing.quantise_angles(leaf, config.angle_bits)
    return (leaf if name.endswith("bias") else _rounded(config, leaf)).astype(config.compute_dtype)


def expert_outputs(config: ModelConfig, params: Any, x_BxTxD: jax.Array) -> jax.Array:
    """Applies all experts of a mixture to each token, whatever the router says, by the programs of the layer itself.

    A final bias that all experts share (`down_bias` of `separate`, `tied` and `low_rank`, that of the projection of
    `reference`) is left out: what remains is an expert's own. Stored experts have biases of their own, which stay.

    Args:
        config: of the model.
        params: of the layer, as trained.
        x_BxTxD: its inputs; on a mesh, B must divide over the devices.

    Returns:
        (B, T, E, D), of `config.compute_dtype`, before any gate.
    """
    every = dataclasses.replace(config, top_k=config.num_experts)
    expert_BxTxE = jnp.broadcast_to(
        jnp.arange(config.num_experts, dtype=jnp.int32), (*x_BxTxD.shape[:2], config.num_experts)
    )
    if config.stores_experts:
        return _apply_stored(every, {name: params[name] for name in _STORED}, x_BxTxD, expert_BxTxE)
    x_BxTxD = sharding.constrain(x_BxTxD, "rotated_batch", "tokens", "embed").astype(config.compute_dtype)
    if config.family == "low_rank":
        without_bias = params | {"down_bias": jnp.zeros_like(params["down_bias"])}
        return low_rank.apply(every, without_bias, x_BxTxD, expert_BxTxE)
    used = {name: _as_used(config, name, params[name]) for name in rotated.params_of(config)}
    if config.form != "reference":
        used["down_bias"] = jnp.zeros_like(used["down_bias"])
    y_BxTxExF = mixture.in_each_shard(functools.partial(rotated.apply, every), used, x_BxTxD, expert_BxTxE)
    if config.form != "reference":
        return y_BxTxExF
    return y_BxTxExF @ params["projection"]["kernel"].astype(config.compute_dtype)


def _rounded(config: ModelConfig, w_IxO: jax.Array) -> jax.Array:
    """Rounds matrices (..., I, O) of experts as the exported file will hold them, where training does."""
    if not config.has_ternary_experts or config.ternary_scale == "none":
        return w_IxO
    return ternary.quantise(w_IxO, config.ternary_scale)


def _uniform(limit: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)
