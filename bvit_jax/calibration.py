"""What the linear maps of a model see on calibration images, layer by layer.

A linear map is one matrix of attention, of a dense FFN or of a stored expert: y = x W. Matrices that experts share, or
that are ternary, are none. Two models may be walked through at a time, the one as trained and one whose first layers
are compressed already.

Axes: B images, T tokens, N rows (images x tokens), n rows that one map sees, D d_model, F d_ff, K experts selected,
I inputs, O outputs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from bvit_jax import components, data, mixture, pixels, platforms, vit
from bvit_jax.encoding import nest
from bvit_jax.model_config import ModelConfig

BATCH = 64
"""Images at a time; one more compilation for what is left over."""
Inputs = Literal["normed", "context", "ffn", "hidden"]
FlatParams = dict[str, np.ndarray]
"""Parameters by path, float32."""
_MAPS: dict[str, Inputs] = {
    "attention/query/kernel": "normed",
    "attention/key/kernel": "normed",
    "attention/value/kernel": "normed",
    "attention/out/kernel": "context",
    "ffn/up/kernel": "ffn",
    "ffn/down/kernel": "hidden",
    "ffn/up_kernel": "ffn",
    "ffn/down_kernel": "hidden",
}
"""What each kind of map is applied to, in the order in which a layer comes to them."""
_OF_EXPERTS = ("ffn/up_kernel", "ffn/down_kernel")
_MODULES: dict[str, Inputs] = {"query": "normed", "out": "context", "up": "ffn", "down": "hidden"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a model: its number, where its parameters lie, and whether its FFN is a mixture."""

    index: int
    segment: str
    block: str
    repeat: int
    is_moe: bool


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """One matrix W of a model.

    Attributes:
        layer: number of its layer in the model.
        path: of its parameter.
        repeat: its place along the axis of layers.
        expert: its place along that of experts; None if there is none.
        shape: (I, O); heads count as channels.
        inputs: what it is applied to.
    """

    layer: int
    path: str
    repeat: int
    expert: int | None
    shape: tuple[int, int]
    inputs: Inputs

    def of(self, params: FlatParams) -> np.ndarray:
        """Returns W, float32 (I, O)."""
        leaf = params[self.path][self.repeat]
        return (leaf if self.expert is None else leaf[self.expert]).reshape(self.shape)

    def put(self, params: FlatParams, w_IxO: np.ndarray) -> None:
        """Replaces W in place."""
        leaf = params[self.path][self.repeat]
        target = leaf if self.expert is None else leaf[self.expert]
        target[...] = w_IxO.reshape(target.shape)


def layers(model: ModelConfig) -> tuple[Layer, ...]:
    """Lists the layers, first to last."""
    places = [
        (f"segment_{index}", f"block_{place}", repeat, is_moe)
        for index, (pattern, repeats) in enumerate(vit.layer_segments(model.is_moe_by_layer))
        for repeat in range(repeats)
        for place, is_moe in enumerate(pattern)
    ]
    return tuple(Layer(index, *place) for index, place in enumerate(places))


def maps_of(model: ModelConfig, layer: Layer) -> tuple[LinearMap, ...]:
    """Lists the linear maps of a layer in the order in which it comes to them, experts one after another."""
    d, f = model.d_model, model.d_ff
    shapes = {"normed": (d, d), "context": (d, d), "ffn": (d, f), "hidden": (f, d)}
    found: list[LinearMap] = []
    for name, inputs in _MAPS.items():
        experts: list[int | None] = [None]
        if name in _OF_EXPERTS or (layer.is_moe and name.startswith("ffn/")):
            stored = layer.is_moe and name in _OF_EXPERTS and model.family == "standard"
            experts = [*range(model.num_experts)] if stored else []
        path = f"{layer.segment}/{layer.block}/{name}"
        found += [LinearMap(layer.index, path, layer.repeat, expert, shapes[inputs], inputs) for expert in experts]
    return tuple(found)


def maps(model: ModelConfig) -> tuple[LinearMap, ...]:
    """Lists the linear maps of a model, layer by layer."""
    return tuple(found for layer in layers(model) for found in maps_of(model, layer))


def flat(params: Any) -> FlatParams:
    """Returns copies of parameters by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {components.path_of(path): np.array(leaf, np.float32) for path, leaf in leaves}


def calibration_images(split: data.AnySplit, model: ModelConfig, seed: int, count: int) -> np.ndarray:
    """Returns so many images of the training split as evaluation has them: uint8 (count, H, W, c).

    They are the first that a run of this seed trains on.
    """
    found = data.train_batch(split, count, seed, 0, np.arange(count))
    return pixels.centre(found.images, model.image_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What the maps of one layer see, rows of all images in order, float32.

    Attributes:
        rows: (N, I) by kind of input; `hidden` is there in a dense layer alone.
        experts_NxK: which experts each row goes to; None in a dense layer.
    """

    rows: dict[str, np.ndarray]
    experts_NxK: np.ndarray | None

    def places(self, expert: int) -> np.ndarray:
        """Returns the indices of the rows that an expert gets."""
        if self.experts_NxK is None:
            raise ValueError("a dense layer has no experts")
        return np.flatnonzero((self.experts_NxK == expert).any(axis=1))

    def inputs(self, wanted: LinearMap, params: FlatParams, places: np.ndarray | None = None) -> np.ndarray:
        """Returns the inputs of one map, (n, I).

        Args:
            wanted: the map.
            params: of the model; an expert's hidden channels are worked out from them.
            places: for an expert's map, rows to take in place of those that go to it.
        """
        if wanted.expert is None:
            return self.rows[wanted.inputs]
        rows_nxD = self.rows["ffn"][self.places(wanted.expert) if places is None else places]
        if wanted.inputs == "ffn":
            return rows_nxD
        mixture = wanted.path.rpartition("/")[0]
        kernel, bias = (params[f"{mixture}/up_{name}"][wanted.repeat, wanted.expert] for name in ("kernel", "bias"))
        return gelu(rows_nxD @ kernel + bias)


def gelu(x: np.ndarray) -> np.ndarray:
    """The activation of all FFNs, `flax.linen.gelu`, in NumPy."""
    y: np.ndarray = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y.astype(x.dtype)


class Walk:
    """A model on its way through its layers with calibration images."""

    def __init__(self, model: ModelConfig, params: FlatParams, images_BxHxWxc: np.ndarray) -> None:
        self.params = params
        self._model = dataclasses.replace(model.deployed(), compute_dtype="float32")
        tree = nest(iter(params.items()))
        self._x_BxTxD = _in_batches(functools.partial(_embedded, self._model, tree), images_BxHxWxc)

    def see(self, layer: Layer) -> Seen:
        """Returns what the maps of the next layer see, with the parameters as they are now."""
        found = _in_batches(functools.partial(_run, self._model, layer.is_moe, self._of(layer)), self._x_BxTxD)[1]
        rows = {name: array.reshape(len(self._x_BxTxD) * self._x_BxTxD.shape[1], -1) for name, array in found.items()}
        return Seen(rows, rows.pop("experts", None))

    def step(self, layer: Layer) -> None:
        """Goes through a layer."""
        run = functools.partial(_run, self._model, layer.is_moe, self._of(layer))
        self._x_BxTxD = _in_batches(run, self._x_BxTxD)[0]

    def _of(self, layer: Layer) -> Any:
        start = f"{layer.segment}/{layer.block}/"
        own = ((path, leaf) for path, leaf in self.params.items() if path.startswith(start))
        return nest((path.removeprefix(start), leaf[layer.repeat]) for path, leaf in own)


def _in_batches(function: Callable[[Any], Any], images: np.ndarray) -> Any:
    parts = [jax.device_get(function(images[start : start + BATCH])) for start in range(0, len(images), BATCH)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


@functools.partial(jax.jit, static_argnums=0)
def _embedded(model: ModelConfig, params: Any, images_BxHxWxc: jax.Array) -> jax.Array:
    """Returns what the first layer gets; the compiler drops the rest."""
    with platforms.lowered_here():
        _, found = vit.Vit(model).apply({"params": params}, images_BxHxWxc, mutable=["intermediates"])
    embedded: jax.Array = found["intermediates"]["embedded"][0]
    return embedded


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(model: ModelConfig, is_moe: bool, params: Any, x_BxTxD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs one layer and notes what its maps see; heads come back as channels."""
    found: dict[str, jax.Array] = {}

    def note(call: Callable[..., Any], arguments: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*arguments, **options)
        if context.method_name == "__call__":
            if context.module.name in _MODULES:
                rows = arguments[0]
                found[_MODULES[context.module.name]] = rows.reshape(*rows.shape[:2], -1)
            elif isinstance(context.module, mixture.Router):
                found["ffn"], found["experts"] = arguments[0], result[0].experts_BxTxK
        return result

    with nn.intercept_methods(note), platforms.lowered_here():
        output, _ = vit.Block(model, is_moe, train=False).apply({"params": params}, x_BxTxD, None, None)
    return output, found
