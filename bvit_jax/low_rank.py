"""Mixture of experts that differ from shared matrices by matrices of low rank: W_i = W + U_i V_i.

An expert's own are four thin matrices, R (D + F) numbers for the up matrix and as many for the down matrix: between
stored experts, of 2 D F numbers each, and rotated ones, of a few angles. One product with W serves all experts, and for
the up matrix all K experts of a token at once; the differences are two thin products for each row.

Axes: B batch, T tokens (of all images, within `_by`), K experts of a token, S slots (sorted and padded rows),
D d_model, F d_ff, E experts, R rank.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685: the form of the differences and
    their start, V = 0 beside a random U, so that all experts start equal. LoRA trains them beside a frozen W; here
    everything is trained together, without its factor alpha / R.
"""

import functools

import flax.linen as nn
import jax

from bvit_jax import dispatch, mixture, platforms, sharding
from bvit_jax.model_config import ModelConfig

Params = dict[str, jax.Array]

_kernel_init = nn.initializers.xavier_uniform()
_left_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=(0,))
_zeros = nn.initializers.zeros

PARAMS: dict[str, tuple[nn.initializers.Initializer, str]] = {
    "up_kernel": (_kernel_init, "DF"),
    "up_left": (_left_init, "EDR"),
    "up_right": (_zeros, "ERF"),
    "up_bias": (_zeros, "F"),
    "down_kernel": (_kernel_init, "FD"),
    "down_left": (_left_init, "EFR"),
    "down_right": (_zeros, "ERD"),
    "down_bias": (_zeros, "D"),
}
"""Parameters: how they start, and their axes; those with an axis E are the experts' own, the others shared."""


class LowRankMoe(nn.Module):
    """Mixture of experts y = (W_down + U'_i V'_i)^T gelu((W_up + U_i V_i)^T x + b_up) + b_down; exact, none dropped.

    Biases are shared by all experts. On a mesh every device holds all parameters and applies them to its own tokens:
    none travels.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None = None) -> mixture.FfnOutput:
        c = self.config
        x_BxTxD = sharding.constrain(x_BxTxD, "rotated_batch", "tokens", "embed")
        routed, report = mixture.Router(c, name="router")(x_BxTxD, train=train, weight_B=weight_B)
        params = {name: self._parameter(name) for name in PARAMS}
        return mixture.combine(apply(c, params, x_BxTxD, routed.experts_BxTxK), routed), report

    def _parameter(self, name: str) -> jax.Array:
        c = self.config
        init, axes = PARAMS[name]
        sizes = {"E": c.num_experts, "D": c.d_model, "F": c.d_ff, "R": c.rank}
        logical = (
            {"E": "rotations", "R": "rank"}.get(axis, "outputs" if place == len(axes) - 1 else "inputs")
            for place, axis in enumerate(axes)
        )
        return self.param(name, sharding.named(init, *logical), tuple(sizes[axis] for axis in axes))


def apply(config: ModelConfig, params: Params, x_BxTxD: jax.Array, expert_BxTxK: jax.Array) -> jax.Array:
    """Returns the output of each choice's expert, (B, T, K, D) of `config.compute_dtype`, before the gates.

    Args:
        config: of the model.
        params: those of `PARAMS`, as they are trained.
        x_BxTxD: tokens; on a mesh, B must divide over the devices.
        expert_BxTxK: int32, their experts.
    """
    params = {name: params[name].astype(config.compute_dtype) for name in PARAMS}
    return mixture.in_each_shard(_apply, params, x_BxTxD.astype(config.compute_dtype), expert_BxTxK)


def _apply(params: Params, x_BxTxD: jax.Array, expert_BxTxK: jax.Array) -> jax.Array:
    """Applies experts to the tokens of one device, grouped as suits the platform that this is lowered for."""
    x_TxD, expert_TxK = x_BxTxD.reshape(-1, x_BxTxD.shape[-1]), expert_BxTxK.reshape(-1, expert_BxTxK.shape[-1])
    block = dispatch.default_block(expert_TxK.size, params["up_left"].shape[0])
    y_NxD = platforms.dependent(
        params,
        x_TxD,
        expert_TxK,
        tpu=functools.partial(_by, 0, dispatch.TILE),
        cpu=functools.partial(_by, block, 0),
        default=functools.partial(_by, 0, 0),
    )
    return y_NxD.reshape(*expert_BxTxK.shape, -1)


def _by(block: int, tile: int, params: Params, x_TxD: jax.Array, expert_TxK: jax.Array) -> jax.Array:
    """Returns the output of each row, (N, D); `block` and `tile` as in `dispatch.group`."""
    top_k = expert_TxK.shape[1]
    grouping = dispatch.group(expert_TxK.reshape(-1), params["up_left"].shape[0], block, tile)

    def difference(side: str, x_SxI: jax.Array) -> jax.Array:
        thin_SxR = dispatch.grouped_matmul(x_SxI, params[f"{side}_left"], grouping)
        return dispatch.grouped_matmul(thin_SxR, params[f"{side}_right"], grouping)

    shared_TxF = x_TxD @ params["up_kernel"] + params["up_bias"].reshape(1, -1)
    x_SxD, shared_SxF = (dispatch.to_slots(of_tokens, grouping, top_k) for of_tokens in (x_TxD, shared_TxF))
    h_SxF = nn.gelu(shared_SxF + difference("up", x_SxD))
    y_SxD = h_SxF @ params["down_kernel"] + difference("down", h_SxF)
    return dispatch.to_rows(y_SxD, grouping) + params["down_bias"].reshape(1, -1)
