"""Vision Transformer with dense or mixture-of-experts feed-forward layers, its layers scanned.

Axes: B batch, H and W pixels, c channels, P patches, T tokens (class token, then patches in row order), D d_model,
C classes, M mixture layers.

References:
    Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929 (pre-norm blocks, class token).
    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382 (shares that rise evenly with depth).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bvit_jax import low_rank, moe, pixels, platforms, sharding
from bvit_jax.model_config import ModelConfig
from bvit_jax.routing import RouterReport

Params = Any
Segment = tuple[tuple[bool, ...], int]

FFN_OF_FAMILY: dict[str, type[moe.DenseMlp | moe.StandardMoe | moe.ButterflyMoe | low_rank.LowRankMoe]] = {
    "dense": moe.DenseMlp,
    "standard": moe.StandardMoe,
    "ternary": moe.StandardMoe,
    "butterfly": moe.ButterflyMoe,
    "low_rank": low_rank.LowRankMoe,
}

_kernel_init = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros


def layer_segments(is_moe: tuple[bool, ...]) -> tuple[Segment, ...]:
    """Splits the layers into (pattern, repeats), so that scanning each pattern compiles it once.

    Greedy: at each layer the pattern whose repetitions reach furthest, the shorter one of equals.
    (False, True, False, True, True) becomes ((False, True), 2), ((True,), 1).
    """
    segments = []
    start = 0
    while start < len(is_moe):
        best: Segment = (is_moe[start : start + 1], 1)
        for period in range(1, (len(is_moe) - start) // 2 + 1):
            pattern = is_moe[start : start + period]
            repeats = 1
            while is_moe[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > len(best[0]) * best[1]:
                best = (pattern, repeats)
        segments.append(best)
        start += len(best[0]) * best[1]
    return tuple(segments)


class Block(nn.Module):
    """One pre-norm Transformer layer: x + attention(norm(x)), then x + ffn(norm(x)).

    In training `skip` is the share of the images for which an addition is left out, each drawn for itself; the others
    are scaled up to make good for it (stochastic depth). Images that skip a mixture are routed and count in its report.
    """

    config: ModelConfig
    is_moe: bool
    train: bool

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, weight_B: jax.Array | None, skip: jax.Array | None
    ) -> tuple[jax.Array, RouterReport | None]:
        c = self.config
        x_BxTxD = sharding.constrain(x_BxTxD, "batch", "tokens", "embed")
        attention = nn.MultiHeadDotProductAttention(
            c.num_heads,
            dtype=c.compute_dtype,
            dropout_rate=c.attention_dropout,
            broadcast_dropout=False,
            deterministic=not self.train,
            kernel_init=sharding.named(_kernel_init, "embed", "heads", "head_dim"),
            bias_init=sharding.named(_zeros, "heads", "head_dim"),
            out_kernel_init=sharding.named(_kernel_init, "heads", "head_dim", "embed"),
            out_bias_init=sharding.named(_zeros, "embed"),
            name="attention",
        )
        attended_BxTxD = attention(nn.LayerNorm(dtype=c.compute_dtype, name="attention_norm")(x_BxTxD))
        x_BxTxD = x_BxTxD + self._kept(attended_BxTxD, skip)
        ffn = FFN_OF_FAMILY[c.family if self.is_moe else "dense"](c, name="ffn")
        normed_BxTxD = nn.LayerNorm(dtype=c.compute_dtype, name="ffn_norm")(x_BxTxD)
        y_BxTxD, report = ffn(normed_BxTxD, train=self.train, weight_B=weight_B)
        return x_BxTxD + self._kept(y_BxTxD, skip), report

    def _kept(self, y_BxTxD: jax.Array, skip: jax.Array | None) -> jax.Array:
        if skip is None:
            return y_BxTxD
        kept_B = jax.random.bernoulli(self.make_rng("depth"), 1 - skip, y_BxTxD.shape[:1])
        return y_BxTxD * (kept_B.astype(jnp.float32) / (1 - skip)).astype(y_BxTxD.dtype)[:, None, None]


class Pattern(nn.Module):
    """The layers of one pattern; returns the reports of its mixture layers."""

    config: ModelConfig
    is_moe: tuple[bool, ...]
    train: bool

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, weight_B: jax.Array | None, skips: jax.Array | None
    ) -> tuple[jax.Array, list[RouterReport]]:
        reports = []
        for index, is_moe in enumerate(self.is_moe):
            block = Block(self.config, is_moe, self.train, name=f"block_{index}")
            x_BxTxD, report = block(x_BxTxD, weight_B, None if skips is None else skips[index])
            if report is not None:
                reports.append(report)
        return x_BxTxD, reports


class Vit(nn.Module):
    """ButterflyViT, its standard mixture-of-experts twin or a plain ViT, by `config.family`.

    Attributes:
        config: the model.
        unpack: (name of a segment, its stored parameters) -> its parameters, called inside the scan for one layer
            pattern at a time; None for parameters that are stored as they are used.
    """

    config: ModelConfig
    unpack: Callable[[str, Any], Any] | None = None

    @nn.compact
    def __call__(
        self, images_BxHxWxc: jax.Array, *, train: bool = False, weight_B: jax.Array | None = None
    ) -> tuple[jax.Array, RouterReport | None]:
        """Classifies images.

        Args:
            images_BxHxWxc: (B, image_size, image_size, channels), floating from 0 to 1, or uint8 from 0 to 255.
            train: whether the router's noise, attention dropout and stochastic depth are on; those that the
                configuration has need the random streams `router`, `dropout` and `depth`.
            weight_B: 1 for images that count in the report, 0 for padding; all count if left out.

        Returns:
            Logits, float32 (B, C), and the router reports of the mixture layers, every field with a leading axis M in
            layer order; None if there are none.

        Raises:
            ValueError: if the images have another shape than the configuration says.
        """
        c = self.config
        expected = (c.image_size, c.image_size, c.channels)
        if images_BxHxWxc.shape[1:] != expected:
            raise ValueError(f"images have shape {images_BxHxWxc.shape}; this model needs (batch, {str(expected)[1:]}")
        x_BxTxD = self._embed((2 * pixels.to_unit(images_BxHxWxc) - 1).astype(c.compute_dtype))
        self.sow("intermediates", "embedded", x_BxTxD)
        reports: list[RouterReport] = []
        skips_L = jnp.linspace(0, c.stochastic_depth, c.num_layers) if train and c.stochastic_depth > 0 else None
        first = 0
        for index, (pattern, repeats) in enumerate(layer_segments(c.is_moe_by_layer)):
            name = f"segment_{index}"
            scanned = nn.scan(
                _unpacking(name, self.unpack),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "router": True, "dropout": True, "depth": True},
                in_axes=(nn.broadcast, 0),
                length=repeats,
                metadata_params={nn.PARTITION_NAME: "layers"},
                unroll=repeats if repeats <= 2 else 1,  # a loop of two costs more than it saves
            )
            layers = len(pattern) * repeats
            skips = None if skips_L is None else skips_L[first : first + layers].reshape(repeats, len(pattern))
            first += layers
            x_BxTxD, stacked = scanned(c, pattern, train, name=name)(x_BxTxD, weight_B, skips)
            if stacked:
                reports.append(_in_layer_order(stacked))
        x_BxD = nn.LayerNorm(dtype=c.compute_dtype, name="final_norm")(x_BxTxD[:, 0])
        head = nn.Dense(c.num_classes, kernel_init=sharding.named(_zeros, "embed", "classes"), name="head")
        logits_BxC = head(x_BxD.astype(jnp.float32))
        merged = jax.tree.map(lambda *fields: jnp.concatenate(fields), *reports) if reports else None
        return logits_BxC, merged

    def _embed(self, images_BxHxWxc: jax.Array) -> jax.Array:
        c = self.config
        batch, (rows, columns), patch = images_BxHxWxc.shape[0], c.grid, c.patch_size
        tiles = images_BxHxWxc.reshape(batch, rows, patch, columns, patch, c.channels).transpose(0, 1, 3, 2, 4, 5)
        patches_BxPx = tiles.reshape(batch, rows * columns, patch * patch * c.channels)
        kernel_init = sharding.named(_kernel_init, "pixels", "embed")
        embed = nn.Dense(c.d_model, dtype=c.compute_dtype, kernel_init=kernel_init, name="patch_embedding")
        x_BxPxD = embed(patches_BxPx)
        class_token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, c.d_model))
        positions = self.param("position_embedding", nn.initializers.normal(0.02), (1, rows * columns + 1, c.d_model))
        first = jnp.broadcast_to(class_token.astype(x_BxPxD.dtype), (batch, 1, c.d_model))
        return jnp.concatenate([first, x_BxPxD], axis=1) + positions.astype(x_BxPxD.dtype)


def _unpacking(name: str, unpack: Callable[[str, Any], Any] | None) -> Any:
    """Returns `Pattern`, reading its parameters through `unpack` if there is one."""
    if unpack is None:
        return Pattern
    return nn.map_variables(Pattern, "params", lambda stored: {"params": unpack(name, stored["params"])})


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Draws the parameters of a model, a nested dict of float32 arrays; layers of one segment share a leading axis."""
    return nn.unbox(_init_with_axes(config, key))


def param_axes(config: ModelConfig) -> Params:
    """Returns the logical axes of every parameter, PartitionSpecs in the structure of `init_params`."""
    return nn.get_partition_spec(_shapes_with_axes(config))


def _shapes_with_axes(config: ModelConfig) -> Params:
    """Describes the parameters: those of the fewest experts that will do, as many times as there are experts."""

    def multiplied(leaf: Any) -> Any:
        if not isinstance(leaf, nn.Partitioned):
            return leaf
        shape = [
            config.num_experts if name in _OF_EXPERTS else n
            for name, n in zip(leaf.names, leaf.value.shape, strict=True)
        ]
        return leaf.replace(value=jax.ShapeDtypeStruct(shape, leaf.value.dtype))

    few = _traced_shapes(dataclasses.replace(config, num_experts=config.top_k))
    return jax.tree.map(multiplied, few, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


_OF_EXPERTS = ("experts", "routes", "rotations")
"""Logical axes that are as long as there are experts."""


@functools.lru_cache(maxsize=64)
def _traced_shapes(config: ModelConfig) -> Params:
    """Traces the model, which takes a second, once."""
    return jax.eval_shape(lambda: _init_with_axes(config, jax.random.key(0)))


def _init_with_axes(config: ModelConfig, key: jax.Array) -> Params:
    image = jnp.zeros((1, config.image_size, config.image_size, config.channels))
    with platforms.lowered_for("cpu"):  # what the layers compute is dropped, so any platform's way will do
        return Vit(config).init(key, image)["params"]


def apply(
    config: ModelConfig,
    params: Params,
    images_BxHxWxc: jax.Array,
    *,
    train_key: jax.Array | None = None,
    weight_B: jax.Array | None = None,
) -> tuple[jax.Array, RouterReport | None]:
    """Runs a model as `Vit.__call__`, in training mode if `train_key`, for all that is random in it, is given."""
    streams = ("router", "dropout", "depth")
    outputs: Any = Vit(config).apply(
        {"params": params},
        images_BxHxWxc,
        train=train_key is not None,
        weight_B=weight_B,
        rngs=None if train_key is None else {name: jax.random.fold_in(train_key, i) for i, name in enumerate(streams)},
    )
    return outputs


def ffn_inputs(config: ModelConfig, params: Params, images_BxHxWxc: jax.Array) -> Any:
    """Runs a model in evaluation and returns what its mixture layers see.

    Args:
        config, params, images_BxHxWxc: as `apply`.

    Returns:
        {segment: {block: (R, B, T, D)}} with the names that these have in `params`, of `config.compute_dtype`; R is how
        often the segment repeats its pattern of blocks.
    """

    def is_wanted(module: nn.Module, method: str) -> bool:
        return module.name == "ffn_norm" and method == "__call__" and getattr(module.parent, "is_moe", False)

    _, found = Vit(config).apply(
        {"params": params}, images_BxHxWxc, capture_intermediates=is_wanted, mutable=["intermediates"]
    )
    return {
        segment: {block: captured["ffn_norm"]["__call__"][0] for block, captured in blocks.items()}
        for segment, blocks in found["intermediates"].items()
        if segment.startswith("segment_")
    }


def param_shapes(config: ModelConfig) -> Params:
    """Returns the shapes and dtypes of `init_params` without making the arrays: any size of model, at once."""
    return nn.unbox(_shapes_with_axes(config))


def _in_layer_order(stacked: list[RouterReport]) -> RouterReport:
    """Merges the reports of one scanned pattern, each (repeats, ...), into (repeats * reports, ...) by layer."""
    by_layer = jax.tree.map(lambda *fields: jnp.stack(fields, axis=1), *stacked)
    return jax.tree.map(lambda field: field.reshape(-1, *field.shape[2:]), by_layer)
