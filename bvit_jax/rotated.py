"""FFN of experts that are rotations of shared prototypes, by three paths that give the same result.

Every path turns each row (a token and one of its experts) by the angles of its expert and multiplies all rows by the
same prototypes, so that the cost does not grow with the number of experts. No row is dropped. They differ in how rows
meet their angles:

- `rows`: each row takes a copy of its expert's cosines and sines. For few rows.
- `blocks`: rows are sorted by expert and padded so that a block of them shares one copy. For XLA on any device.
- `fused`: sorted too, then everything in one kernel for TPUs (`bvit_jax.kernels`); elsewhere it is interpreted, slowly.

`auto` takes `fused` on TPUs if form and sizes allow it, and `blocks` or, for few rows, `rows` otherwise. It chooses
when the program is lowered, for the platform that it is lowered for.

Axes: B batch, T tokens, K experts of a token, N = B * T * K rows, S slots (sorted and padded rows), D d_model, F d_ff,
E experts, b rows of a block.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from bvit_jax import butterfly, dispatch
from bvit_jax.kernels import ffn, fused
from bvit_jax.kernels.cut import Side, UnfitError, choose
from bvit_jax.model_config import ConfigError, Form, ModelConfig

Params = dict[str, jax.Array]
Experts = Callable[[Params, jax.Array, jax.Array], jax.Array]
"""(parameters, tokens (B, T, D), experts (B, T, K)) -> (B, T, K, D), of `reference` (B, T, K, F)."""

_SIDES: dict[Form, tuple[tuple[str, bool], ...]] = {
    "separate": (("up_theta", True), ("up_phi", False), ("down_theta", True), ("down_phi", False)),
    "tied": (("theta", True), ("phi", False), ("phi", True), ("theta", False)),
    "reference": (("phi", False), ("theta", False)),
}
"""Of each form the rotations around the products, in order: the name of their angles, and whether they turn back."""

_FEW_ROWS = 512


def apply(config: ModelConfig, params: Params, x_BxTxD: jax.Array, expert_BxTxK: jax.Array) -> jax.Array:
    """Returns the output of each choice's expert, (B, T, K, D), before the gates; (B, T, K, F) of `reference`.

    Args:
        config: of the model; `dispatch` names the path.
        params: of the layer, in the dtype of `x_BxTxD` but for the angles, which are float32.
        x_BxTxD: tokens.
        expert_BxTxK: int32, their experts.

    Raises:
        ConfigError: for `fused` where the kernels cannot run the model.
    """
    by_rows, by_blocks = functools.partial(_by_rows, config), functools.partial(_by_blocks, config)
    if config.dispatch == "rows":
        return by_rows(params, x_BxTxD, expert_BxTxK)
    if config.dispatch == "blocks":
        return by_blocks(params, x_BxTxD, expert_BxTxK)
    try:
        on_tpu = _fused(config, x_BxTxD, expert_BxTxK, interpret=False)
    except UnfitError as error:
        if config.dispatch == "fused":
            raise ConfigError(f"model.dispatch = 'fused' cannot run this model: {error}") from None
        on_tpu = by_blocks
    if config.dispatch == "fused":
        paths = {"tpu": on_tpu, "default": _fused(config, x_BxTxD, expert_BxTxK, interpret=True)}
    else:
        paths = {"tpu": on_tpu, "default": by_rows if expert_BxTxK.size <= _FEW_ROWS else by_blocks}
    return jax.lax.platform_dependent(params, x_BxTxD, expert_BxTxK, **paths)


def stages_of(config: ModelConfig, dim: int) -> butterfly.Stages:
    """Returns the stages of the rotations of `dim` channels."""
    return butterfly.make_stages(dim, min(config.num_stages, butterfly.max_stages(dim)), config.stride_order)


def _by_rows(config: ModelConfig, params: Params, x_BxTxD: jax.Array, expert_BxTxK: jax.Array) -> jax.Array:
    x_BxTxKxD = jnp.broadcast_to(x_BxTxD[:, :, None], (*expert_BxTxK.shape, x_BxTxD.shape[-1]))
    return _ffn(config, params, x_BxTxKxD, expert_BxTxK)


def _by_blocks(config: ModelConfig, params: Params, x_BxTxD: jax.Array, expert_BxTxK: jax.Array) -> jax.Array:
    num_experts = config.num_experts
    block = dispatch.default_block(expert_BxTxK.size, num_experts)
    grouping = dispatch.group(expert_BxTxK.reshape(-1), num_experts, block)
    x_SxD = dispatch.to_slots(_tokens(x_BxTxD), grouping, copies=config.top_k)
    x_nxbxD = x_SxD.reshape(-1, block, x_SxD.shape[-1])
    y_nxbxF = _ffn(config, params, x_nxbxD, grouping.expert_S[::block, None])
    y_NxF = dispatch.to_rows(y_nxbxF.reshape(x_SxD.shape[0], -1), grouping)
    return y_NxF.reshape(*expert_BxTxK.shape, -1)


def _ffn(config: ModelConfig, params: Params, x: jax.Array, expert: jax.Array) -> jax.Array:
    """Applies the FFN along the last axis; `expert` has the other axes, 1 in place of those that share an expert."""

    def turn(side: int, x: jax.Array) -> jax.Array:
        name, inverse = _SIDES[config.form][side]
        stages = stages_of(config, x.shape[-1])
        return butterfly.rotate(x, params[f"{name}_angles"], stages, inverse=inverse, expert=expert)

    def bias(name: str, like: jax.Array) -> jax.Array:
        return params[name].reshape((1,) * (like.ndim - 1) + (-1,))

    up, down = _prototypes(config, params)
    h = turn(1, turn(0, x) @ up)
    if down is None:
        return h
    y = turn(3, turn(2, nn.gelu(h + bias("up_bias", h))) @ down)
    return y + bias("down_bias", y)


def _fused(config: ModelConfig, x_BxTxD: jax.Array, expert_BxTxK: jax.Array, interpret: bool) -> Experts:
    """Returns the `fused` path for arrays of these shapes.

    Raises:
        UnfitError: if the kernels cannot run them.
    """
    if config.form == "reference":
        raise UnfitError("form = reference: the fused kernels need separate or tied")
    sides = tuple(
        Side(name, stages_of(config, dim), inverse)
        for (name, inverse), dim in zip(
            _SIDES[config.form], (config.d_model, config.d_ff, config.d_ff, config.d_model), strict=True
        )
    )
    cut = choose(sides, config.d_model, config.d_ff, expert_BxTxK.size, config.num_experts, x_BxTxD.dtype, interpret)

    def apply(params: Params, x_BxTxD: jax.Array, expert_BxTxK: jax.Array) -> jax.Array:
        up, down = _prototypes(config, params)
        angles = {side.name: params[f"{side.name}_angles"] for side in sides}
        weights = ffn.Weights(up, params["up_bias"], down, params["down_bias"])
        expert_TxK = expert_BxTxK.reshape(-1, config.top_k)
        y_TxKxD = fused.apply(cut, _tokens(x_BxTxD), expert_TxK, angles, weights)
        return y_TxKxD.reshape(*expert_BxTxK.shape, -1)

    return apply


def _prototypes(config: ModelConfig, params: Params) -> tuple[jax.Array, jax.Array | None]:
    """Returns the matrices of the two products; `reference` has one."""
    if config.form == "separate":
        return params["up_prototype"], params["down_prototype"]
    return params["prototype"], params["prototype"].T if config.form == "tied" else None


def _tokens(x_BxTxD: jax.Array) -> jax.Array:
    return x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
