"""FFN of experts that are rotations of shared prototypes, by three paths that give the same result.

Every path turns each row (a token and one of its experts) by the angles of its expert and multiplies all rows by the
same prototypes, so that the cost grows with the number of experts by padding alone. No row is dropped. They differ in
how rows meet their angles:

- `rows`: each row takes a copy of its expert's cosines and sines. For few rows.
- `blocks`: rows are sorted by expert and padded so that a block of them shares one copy. For XLA on any device.
- `fused`: sorted too, then everything in one kernel for TPUs (`bvit_jax.kernels`); elsewhere it is interpreted, slowly.

`auto` takes `fused` on TPUs if form and sizes allow it, `rows` for few rows on CPUs, and `blocks` otherwise. It chooses
for the platform that the program is lowered for (`bvit_jax.platforms`). A program for several platforms at once
(`jax.export`) needs `rows` or `blocks`: JAX lowers a TPU's kernels for all of them.

Axes: B batch, T tokens (of all images, within a path), K experts of a token, N rows, S slots (sorted and padded
rows), D d_model, F d_ff, O outputs of a layer.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bvit_jax import block_rotation, blocks, butterfly, dispatch, platforms
from bvit_jax.kernels import fused
from bvit_jax.kernels.cut import Cut, Side, UnfitError, choose
from bvit_jax.kernels.ffn import Weights
from bvit_jax.model_config import ConfigError, Form, ModelConfig

Params = dict[str, jax.Array]
Experts = Callable[[Params, jax.Array, jax.Array], jax.Array]
"""(parameters, tokens (T, D), experts (T, K)) -> (T, K, D), of `reference` (T, K, F)."""


class _Names(NamedTuple):
    """Names of the parameters of one layer; angles without their ending."""

    before: str
    weights: str
    after: str
    bias: str | None


_FORMS: dict[Form, tuple[_Names, ...]] = {
    "separate": (
        _Names("up_theta", "up_prototype", "up_phi", "up_bias"),
        _Names("down_theta", "down_prototype", "down_phi", "down_bias"),
    ),
    "tied": (_Names("theta", "prototype", "phi", "up_bias"), _Names("phi", "prototype", "theta", "down_bias")),
    "reference": (_Names("phi", "prototype", "theta", None),),
}

_PARAMS: dict[Form, dict[str, str]] = {
    "separate": {
        "up_theta_angles": "D",
        "up_phi_angles": "F",
        "down_theta_angles": "F",
        "down_phi_angles": "D",
        "up_prototype": "DF",
        "up_bias": "F",
        "down_prototype": "FD",
        "down_bias": "D",
    },
    "tied": {"theta_angles": "D", "phi_angles": "F", "prototype": "DF", "up_bias": "F", "down_bias": "D"},
    "reference": {"phi_angles": "D", "theta_angles": "F", "prototype": "DF"},
}
"""Parameters of each form and their sides, as `params_of` returns them, with all rotations."""

_CPU_TILE, _CPU_BLOCK = 128, 4
"""Rows of a tile that stays in a core's cache, and of a block; timed on a CPU."""
_TILE_NUMBERS, _BLOCK = 2**22, 16
"""Elsewhere: hidden numbers (rows x d_ff) of a tile, of which half a dozen arrays fit the VMEM of a TPU v5e; rows of a
block."""
_FEW_ROWS = 512
"""Rows up to which sorting them does not pay on a CPU."""


class Turned(NamedTuple):
    """y = B_after(B_before(x) W) + b, each B that of the row's expert."""

    before: Side
    weights_DxO: jax.Array
    after: Side
    bias_O: jax.Array


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
    width = config.d_ff if config.form == "reference" else config.d_model
    if not expert_BxTxK.size:
        return jnp.zeros((*expert_BxTxK.shape, width), x_BxTxD.dtype)
    x_TxD, expert_TxK = x_BxTxD.reshape(-1, config.d_model), expert_BxTxK.reshape(-1, config.top_k)
    paths = _PATHS[config.dispatch](config, x_TxD, expert_TxK)
    y_TxKxF = platforms.dependent(params, x_TxD, expert_TxK, **paths)
    return y_TxKxF.reshape(*expert_BxTxK.shape, width)


def stages_of(config: ModelConfig, side: str) -> butterfly.Stages:
    """Returns the stages of the rotations of a side, D of d_model channels or F of d_ff; none if it is not turned."""
    if side == "F" and config.rotations == "outer":
        return ()
    dim = {"D": config.d_model, "F": config.d_ff}[side]
    return butterfly.make_stages(dim, min(config.num_stages, butterfly.max_stages(dim)), config.stride_order)


def params_of(config: ModelConfig) -> dict[str, str]:
    """Returns the names of a layer's parameters and their sides, D of d_model channels and F of d_ff.

    Of angles it is the side that they turn, and one that is not turned has none; of prototypes inputs and outputs.
    """
    sides = _PARAMS[config.form]
    turned = {name: stages_of(config, side) for name, side in sides.items() if name.endswith("angles")}
    return {name: side for name, side in sides.items() if turned.get(name, True)}


def _choose_rows(config: ModelConfig, x_TxD: jax.Array, expert_TxK: jax.Array) -> dict[str, Experts]:
    del x_TxD, expert_TxK
    return {"default": functools.partial(_by_rows, config)}


def _choose_blocks(config: ModelConfig, x_TxD: jax.Array, expert_TxK: jax.Array) -> dict[str, Experts]:
    most = -(-expert_TxK.size // _BLOCK) * _BLOCK
    tile = min(max(_TILE_NUMBERS // (_BLOCK * config.d_ff), 1) * _BLOCK, most)
    return {
        "cpu": functools.partial(_by_blocks, config, _CPU_BLOCK, _CPU_TILE),
        "default": functools.partial(_by_blocks, config, _BLOCK, tile),
    }


def _choose_fused(config: ModelConfig, x_TxD: jax.Array, expert_TxK: jax.Array) -> dict[str, Experts]:
    try:
        cut = _cut(config, x_TxD, expert_TxK)
    except UnfitError as error:
        raise ConfigError(f"model.dispatch = 'fused' cannot run this model: {error}") from None
    return {
        "tpu": functools.partial(_fused, config, cut),
        "default": functools.partial(_fused, config, cut.interpreted),
    }


def _choose(config: ModelConfig, x_TxD: jax.Array, expert_TxK: jax.Array) -> dict[str, Experts]:
    paths = _choose_blocks(config, x_TxD, expert_TxK)
    if expert_TxK.size <= _FEW_ROWS:
        paths["cpu"] = functools.partial(_by_rows, config)
    with contextlib.suppress(UnfitError):
        paths["tpu"] = functools.partial(_fused, config, _cut(config, x_TxD, expert_TxK))
    return paths


_PATHS = {"rows": _choose_rows, "blocks": _choose_blocks, "fused": _choose_fused, "auto": _choose}
"""By the values of `ModelConfig.dispatch`, what returns the paths by platform for rows like those given."""


def _by_rows(config: ModelConfig, params: Params, x_TxD: jax.Array, expert_TxK: jax.Array) -> jax.Array:
    # Flat: XLA would transpose the gradients of products over several axes, which takes longer than the products.
    x_NxD, expert_N = jnp.repeat(x_TxD, config.top_k, axis=0), expert_TxK.reshape(-1)

    def turn(side: Side, x_NxD: jax.Array) -> jax.Array:
        if not side.stages:
            return x_NxD
        angles = params[f"{side.name}_angles"]
        return butterfly.rotate(x_NxD, angles, side.stages, inverse=side.inverse, expert=expert_N)

    for number, layer in enumerate(products(config, params)):
        h_NxO = turn(layer.before, nn.gelu(x_NxD) if number else x_NxD) @ layer.weights_DxO
        x_NxD = turn(layer.after, h_NxO) + layer.bias_O.reshape(1, -1)
    return x_NxD.reshape(*expert_TxK.shape, -1)


def _by_blocks(
    config: ModelConfig, block: int, tile: int, params: Params, x_TxD: jax.Array, expert_TxK: jax.Array
) -> jax.Array:
    grouping = dispatch.group(expert_TxK.reshape(-1), config.num_experts, block, tile)
    layers = products(config, params)
    rotations = tuple(
        (_rotation(layer.before, layer.weights_DxO.shape[0]), _rotation(layer.after, layer.weights_DxO.shape[1]))
        for layer in layers
    )
    of_layers = [
        blocks.Layer(
            _angles(config, params, layer.before),
            layer.weights_DxO,
            _angles(config, params, layer.after),
            layer.bias_O,
        )
        for layer in layers
    ]
    y_SxF = blocks.apply(rotations, dispatch.to_slots(x_TxD, grouping, config.top_k), of_layers, grouping)
    return dispatch.to_rows(y_SxF, grouping).reshape(*expert_TxK.shape, -1)


def _rotation(side: Side, dim: int) -> blocks.Rotation:
    return blocks.Rotation(block_rotation.make_plan(side.stages, dim), side.inverse)


def _cut(config: ModelConfig, x_TxD: jax.Array, expert_TxK: jax.Array) -> Cut:
    if config.form == "reference":
        raise UnfitError("form = reference: the fused kernels need separate or tied")
    sides = tuple(side for around in _sides(config) for side in around)
    return choose(sides, config.d_model, config.d_ff, expert_TxK.size, config.num_experts, x_TxD.dtype)


def _fused(config: ModelConfig, cut: Cut, params: Params, x_TxD: jax.Array, expert_TxK: jax.Array) -> jax.Array:
    up, down = products(config, params)
    angles = {side.name: _angles(config, params, side) for side in (up.before, up.after, down.before, down.after)}
    weights = Weights(up.weights_DxO, up.bias_O, down.weights_DxO)
    return fused.apply(cut, x_TxD, expert_TxK, angles, weights, down.bias_O)


def _angles(config: ModelConfig, params: Params, side: Side) -> jax.Array:
    """Returns the angles of a rotation, (E, A); (E, 0) of one without stages, which has no parameter."""
    return params[f"{side.name}_angles"] if side.stages else jnp.zeros((config.num_experts, 0))


def _sides(config: ModelConfig) -> list[tuple[Side, Side]]:
    """Lists the rotations before and after each product; those before it turn back, but in `reference`."""
    narrow, wide = stages_of(config, "D"), stages_of(config, "F")
    inverse = config.form != "reference"
    return [
        (Side(names.before, inputs, inverse), Side(names.after, outputs, False))
        for names, (inputs, outputs) in zip(_FORMS[config.form], ((narrow, wide), (wide, narrow)), strict=False)
    ]


def products(config: ModelConfig, params: Params) -> list[Turned]:
    """Lists the products that an expert is made of, with their rotations; parameters as for `apply`."""
    layers = []
    for number, (names, (before, after)) in enumerate(zip(_FORMS[config.form], _sides(config), strict=True)):
        weights = params[names.weights]
        weights = weights.T if number and config.form == "tied" else weights
        bias = params[names.bias] if names.bias else jnp.zeros(weights.shape[1], weights.dtype)
        layers.append(Turned(before, weights, after, bias))
    return layers
