"""Whether a mixture's experts differ, and whether they are used: measures beside accuracy, of a trained model.

- Output cosine: how alike the experts' outputs are for the same token. It is a property of the experts alone.
- Experts used: how evenly the router spreads the tokens. It says nothing of what the experts do.
- Accuracy lost when experts change places, or are all replaced by one, while the router stays: what the model's answers
  owe to tokens meeting the experts that were trained for them.

Axes: M mixture layers, E experts, R repeats of a scanned segment, I images, T tokens, P places (tokens of an image that
are measured), D d_model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import batches, components, data, evaluate, moe, pixels, vit
from bvit_jax.model_config import ModelConfig
from bvit_jax.sharding import Placement

PAIRS = 16_384
"""Rows, a token and an expert each, that the cosine of a layer is taken over."""
_IMAGES = 64
"""Images that the tokens are of, at most: with few experts more tokens of each image, not more images."""
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class ExpertUse:
    """What the experts of a model's mixtures make of a split; None where there is but one expert a layer.

    Attributes:
        accuracy: share classified rightly, as the model is.
        experts_used_M: for each mixture layer, the effective number of experts used (`effective_numbers`), 1 to E.
        cosine_M: for each mixture layer, the mean over tokens of the mean cosine between the outputs that two of its
            experts have for the token (`mean_cosine`, `moe.expert_outputs`): 1 if all are alike, and about 0 if they
            have nothing to do with each other; -1 / (E - 1) at the least.
        accuracy_shuffled: the same share with the experts of each layer in each other's places (`derangements`).
        accuracy_one: with all experts of each layer replaced by the one that most tokens went to.
    """

    accuracy: float
    experts_used_M: tuple[float, ...]
    cosine_M: tuple[float, ...] | None = None
    accuracy_shuffled: float | None = None
    accuracy_one: float | None = None

    @property
    def lost_shuffled(self) -> float | None:
        """What `accuracy_shuffled` lacks of the accuracy; below 0 if it is higher."""
        return None if self.accuracy_shuffled is None else self.accuracy - self.accuracy_shuffled

    @property
    def lost_one(self) -> float | None:
        """What `accuracy_one` lacks of the accuracy; below 0 if it is higher."""
        return None if self.accuracy_one is None else self.accuracy - self.accuracy_one

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON; lists have a value for each mixture layer."""
        return {
            "output_cosine": None if self.cosine_M is None else list(self.cosine_M),
            "experts_used": list(self.experts_used_M),
            "accuracy_shuffled": self.accuracy_shuffled,
            "accuracy_one": self.accuracy_one,
            "lost_shuffled": self.lost_shuffled,
            "lost_one": self.lost_one,
        }


@dataclasses.dataclass(frozen=True)
class Means:
    """An `ExpertUse` in four numbers, means over the mixture layers; None where not known.

    Attributes:
        output_cosine, experts_used, lost_shuffled, lost_one: as there.
    """

    output_cosine: float | None = None
    experts_used: float | None = None
    lost_shuffled: float | None = None
    lost_one: float | None = None


def means(use: Mapping[str, Any] | None) -> Means:
    """Takes the means of what `ExpertUse.to_dict` gives; None, of a model without mixtures, has none."""
    if use is None:
        return Means()

    def mean(name: str) -> float | None:
        return None if use[name] is None else float(np.mean(use[name]))

    return Means(**{field.name: mean(field.name) for field in dataclasses.fields(Means)})


def measure(
    params: Any,
    config: ModelConfig,
    split: data.AnySplit,
    evaluation: evaluate.Evaluation,
    batch_size: int,
    placement: Placement,
    seed: int,
    between: Callable[[], None] | None = None,
) -> ExpertUse | None:
    """Measures the experts of a model on a split, which is passed over twice more; None if there is no mixture.

    Args:
        params: as `vit.init_params`; they stay as they are, beside a copy of the experts' at a time.
        config, split, batch_size, placement, between: as in `evaluate.evaluate`.
        evaluation: what that returned for the same.
        seed: of the order in which experts are shuffled.
    """
    if not evaluation.load_MxE:
        return None
    used_M = effective_numbers(np.array(evaluation.load_MxE))
    if config.num_experts == 1:
        return ExpertUse(evaluation.accuracy, used_M)

    def accuracy_with(source_MxE: np.ndarray) -> float:
        moved = rearranged(params, config, source_MxE, placement)
        return evaluate.evaluate(moved, config, split, batch_size, placement, between).accuracy

    most_used_Mx1 = np.argmax(evaluation.load_MxE, axis=1, keepdims=True)
    return ExpertUse(
        evaluation.accuracy,
        used_M,
        output_cosines(params, config, split, placement),
        accuracy_with(derangements(len(used_M), config.num_experts, seed)),
        accuracy_with(np.broadcast_to(most_used_Mx1, (len(used_M), config.num_experts))),
    )


def effective_numbers(load_MxE: np.ndarray) -> tuple[float, ...]:
    """Returns exp(entropy) of each row of shares: E if all are equal, 1 if one has all (a Hill number of order 1).

    References:
        Hill, "Diversity and Evenness: A Unifying Notation and Its Consequences", Ecology 54 (1973).
    """
    logs_MxE = np.log(np.where(load_MxE > 0, load_MxE, 1.0))
    return tuple(np.exp(-(load_MxE * logs_MxE).sum(axis=1)).tolist())


def derangements(layers: int, num_experts: int, seed: int) -> np.ndarray:
    """Draws for each layer one cycle through all experts, at random, int64 (layers, E): none stays in its place."""
    source_MxE = np.empty((layers, num_experts), np.int64)
    for layer in range(layers):
        order_E = np.random.default_rng([seed, layer]).permutation(num_experts)
        source_MxE[layer, order_E] = np.roll(order_E, 1)
    return source_MxE


def rearranged(params: Any, config: ModelConfig, source_MxE: np.ndarray, placement: Placement) -> Any:
    """Returns parameters in which expert e of mixture layer m is expert source_MxE[m, e]; all else is as it was.

    Args:
        params: as `vit.init_params`, placed as in an evaluation; in a run of several processes all of them call this.
        config: of the model.
        source_MxE: int (M, E).
        placement: where the parameters are.
    """
    paths = _expert_paths(config)
    leaves = {components.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    own = {path: leaves[path] for path in paths}
    sources = {path: source_MxE[numbers_R].astype(np.int32) for path, numbers_R in paths.items()}
    moved = _mover(config, placement)(own, sources)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: moved.get(components.path_of(path), leaf), params)


@functools.lru_cache(maxsize=4)
def _mover(config: ModelConfig, placement: Placement) -> jax.stages.Wrapped:
    """Compiles (experts' parameters (R, E, ...) by path, sources (R, E) by path) -> parameters, where they were."""

    def move(own: dict[str, jax.Array], sources: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: jax.vmap(lambda leaf, source: leaf[source])(own[path], sources[path]) for path in own}

    tree = placement.params(vit.param_axes(config), vit.param_shapes(config))
    by_path = {components.path_of(path): place for path, place in jax.tree_util.tree_leaves_with_path(tree)}
    places = {path: by_path[path] for path in _expert_paths(config)}
    return jax.jit(move, in_shardings=(places, placement.replicated), out_shardings=places)


def _expert_paths(config: ModelConfig) -> dict[str, np.ndarray]:
    """Lists the parameters whose axes are (layers, experts, ...): path -> numbers of its mixture layers, int64 (R,)."""
    axes = jax.tree_util.tree_leaves_with_path(
        vit.param_axes(config), is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec)
    )
    mixtures = _mixtures(config)
    found = {}
    for key_path, names in axes:
        path = components.path_of(key_path)
        if names[1:2] in (("experts",), ("rotations",)):
            segment, block, *_ = path.split("/")
            found[path] = mixtures[segment, block]
    return found


def _mixtures(config: ModelConfig) -> dict[tuple[str, str], np.ndarray]:
    """Says where the mixture layers are: (segment, block) -> their numbers among all of them, int64 (R,)."""
    found, first = {}, 0
    for index, (pattern, repeats) in enumerate(vit.layer_segments(config.is_moe_by_layer)):
        for place, block in enumerate(np.flatnonzero(pattern)):
            found[f"segment_{index}", f"block_{block}"] = first + place + sum(pattern) * np.arange(repeats)
        first += sum(pattern) * repeats
    return found


def output_cosines(params: Any, config: ModelConfig, split: data.AnySplit, placement: Placement) -> tuple[float, ...]:
    """Returns `ExpertUse.cosine_M`, over tokens that are spread evenly over the images of a split and their places.

    All experts are applied to a token, so the tokens are few: as many as make `PAIRS` pairs with the experts, but one
    for each device at least, of `_IMAGES` images at most. Arguments as in `measure`.
    """
    num_images, places = _sample(config, placement.mesh.size)
    rows = placement.host_rows(num_images)
    [batch] = split.batches(batches.SpreadPlan(len(split), num_images, rows), range(1))
    images = placement.put_batch(batch.images, rows, num_images)
    found = _make_cosine_step(config, placement, places)(params, images)
    cosine_M = np.empty(sum(config.is_moe_by_layer))
    for (segment, block), numbers_R in _mixtures(config).items():
        cosine_M[numbers_R] = found[segment][block]
    return tuple(cosine_M.tolist())


def _sample(config: ModelConfig, devices: int) -> tuple[int, int]:
    """Returns how many images, a multiple of the devices, and how many places in each."""
    tokens = max(PAIRS // config.num_experts, 1)
    images = max(min(tokens, _IMAGES) // devices, 1) * devices
    rows, columns = config.grid
    return images, min(max(tokens // images, 1), rows * columns + 1)


@functools.lru_cache(maxsize=4)
def _make_cosine_step(config: ModelConfig, placement: Placement, places: int) -> jax.stages.Wrapped:
    """Compiles (params, uint8 images (I, S, S, c)) -> {segment: {block: cosines (R,)}} over so many places of each."""

    def step(params: Any, images_IxSxSxc: jax.Array) -> Any:
        def cosine(layer: tuple[Any, jax.Array]) -> jax.Array:
            ffn, x_IxTxD = layer
            return mean_cosine(moe.expert_outputs(config, ffn, _thinned(x_IxTxD, places)))

        with placement.active():
            seen = vit.ffn_inputs(config, params, pixels.centre(images_IxSxSxc, config.image_size))
            return {
                segment: {
                    block: jax.lax.map(cosine, (params[segment][block]["ffn"], x_RxIxTxD))
                    for block, x_RxIxTxD in blocks.items()
                }
                for segment, blocks in seen.items()
            }

    params_place = placement.params(vit.param_axes(config), vit.param_shapes(config))
    return jax.jit(step, in_shardings=(params_place, placement.batch), out_shardings=placement.replicated)


def _thinned(x_IxTxD: jax.Array, places: int) -> jax.Array:
    """Takes so many tokens of each image, (I, P, D), evenly spaced and from image to image a little further on."""
    images, tokens, _ = x_IxTxD.shape
    start_Ix1 = np.arange(images)[:, None] * tokens // images
    place_IxP = (start_Ix1 + np.arange(places)[None] * tokens // places) % tokens
    return jnp.take_along_axis(x_IxTxD, place_IxP[:, :, None], axis=1)


def mean_cosine(y_IxPxExD: jax.Array) -> jax.Array:
    """Mean over tokens of the mean cosine between the vectors of two different experts, float32 ().

    With unit vectors u_e it is (|sum_e u_e|^2 - sum_e |u_e|^2) / (E (E - 1)): no table of pairs. A vector of zeros has
    cosine 0 to all.

    Args:
        y_IxPxExD: (..., E, D), floating, E at least 2.
    """
    y = y_IxPxExD.astype(jnp.float32)
    norms = jnp.linalg.norm(y, axis=-1, keepdims=True)
    unit = y / jnp.maximum(norms, _TINY)
    num_experts = y.shape[-2]
    between = jnp.square(unit.sum(axis=-2)).sum(axis=-1) - jnp.square(unit).sum(axis=(-2, -1))
    return between.mean() / (num_experts * (num_experts - 1))
