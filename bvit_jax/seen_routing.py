"""How a model routes the patches of some images, layer by layer, as arrays and tables.

Axes: M mixture layers, B images, T tokens (class token first), P patches, D d_model, E experts, K experts selected,
C classes.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pandas as pd

from bvit_jax import expert_use, mixture, platforms, vit
from bvit_jax.model_config import ConfigError, ModelConfig
from bvit_jax.opened import Images, Opened

BATCH = 64
"""Images at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class SeenRouting:
    """What the routers of a model made of some images.

    Attributes:
        layers: numbers of the mixture layers in the model, from 0.
        grid: rows and columns of patches.
        x_MxBxTxD: float32, what each router and its experts were given.
        probs_MxBxTxE: float32, routing probabilities.
        gates_MxBxTxK: float32, weights of the selected experts.
        experts_MxBxTxK: int32, the selected experts, the most probable first.
        labels_B: int, of the images.
    """

    layers: tuple[int, ...]
    grid: tuple[int, int]
    x_MxBxTxD: np.ndarray
    probs_MxBxTxE: np.ndarray
    gates_MxBxTxK: np.ndarray
    experts_MxBxTxK: np.ndarray
    labels_B: np.ndarray

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.probs_MxBxTxE.shape[-1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.experts_MxBxTxK.shape[-1])

    def maps(self) -> np.ndarray:
        """Returns the most probable expert of every patch, where it lies in the image: int32 (M, B, rows, columns)."""
        first_MxBxP = self.experts_MxBxTxK[:, :, 1:, 0]
        return first_MxBxP.reshape(*first_MxBxP.shape[:2], *self.grid)


def route(opened: Opened, images: Images) -> SeenRouting:
    """Runs a model over images and keeps what its routers saw and did.

    Raises:
        ConfigError: if the model has no mixture layers.
        ValueError: if the images are of another shape than the model's.
    """
    if not opened.mixtures:
        raise ConfigError(f"{str(opened.path)!r} is a dense model: it routes nothing; open a mixture of experts")
    model, rows, columns = opened.model, *opened.model.grid
    shape = (len(opened.mixtures), len(images), rows * columns + 1)
    x = np.empty((*shape, model.d_model), np.float32)
    probs = np.empty((*shape, model.num_experts), np.float32)
    gates = np.empty((*shape, model.top_k), np.float32)
    experts = np.empty((*shape, model.top_k), np.int32)
    for start in range(0, len(images), BATCH):
        here = slice(start, start + BATCH)
        found = _routed(model, opened.params, images.pixels[here])
        for index, layer in enumerate(opened.mixtures):
            x_RxBxTxD, routed = found[layer.segment][layer.block]
            x[index, here] = x_RxBxTxD[layer.repeat]
            probs[index, here] = routed.probs_BxTxE[layer.repeat]
            gates[index, here] = routed.gates_BxTxK[layer.repeat]
            experts[index, here] = routed.experts_BxTxK[layer.repeat]
    return SeenRouting(
        layers=tuple(layer.index for layer in opened.mixtures),
        grid=model.grid,
        x_MxBxTxD=x,
        probs_MxBxTxE=probs,
        gates_MxBxTxK=gates,
        experts_MxBxTxK=experts,
        labels_B=images.labels,
    )


@functools.partial(jax.jit, static_argnums=0)
def _routed(model: ModelConfig, params: Any, images_BxHxWxc: jax.Array) -> Any:
    """Returns {segment: {block: (inputs (R, B, T, D), Routing with a leading axis R)}}."""

    def one(ffn: Any, x_BxTxD: jax.Array) -> Any:
        router = mixture.Router(model)
        routed, _ = router.apply({"params": ffn["router"]}, x_BxTxD, train=False, weight_B=None)
        return routed

    with platforms.lowered_here():
        inputs = vit.ffn_inputs(model, params, images_BxHxWxc)
    return {
        segment: {
            block: (x_RxBxTxD, jax.vmap(one)(params[segment][block]["ffn"], x_RxBxTxD))
            for block, x_RxBxTxD in blocks.items()
        }
        for segment, blocks in inputs.items()
    }


def load_table(seen: SeenRouting) -> pd.DataFrame:
    """Says what each expert of each layer gets; a row each.

    Columns: layer, expert; share: of all (token, choice) pairs, 1 / E if the load is in balance; probability: mean over
    all tokens; gate: mean weight where it is selected, nan if it never is; entropy: mean entropy of the routing
    probabilities of the tokens whose first choice it is, nats; labels: entropy of the labels of those tokens, nats, as
    large as that of all images' labels if it takes all classes alike, and smaller by chance where its tokens are few.
    The last two are nan where it is nobody's first choice.
    """
    rows = []
    for index, layer in enumerate(seen.layers):
        probs_NxE = _rows(seen.probs_MxBxTxE[index])
        chosen_NxK, gates_NxK = _rows(seen.experts_MxBxTxK[index]), _rows(seen.gates_MxBxTxK[index])
        entropy_N = _entropy(probs_NxE)
        label_N = np.repeat(seen.labels_B, seen.probs_MxBxTxE.shape[2])
        for expert in range(seen.num_experts):
            selected_NxK, first_N = chosen_NxK == expert, chosen_NxK[:, 0] == expert
            of_labels = np.bincount(label_N[first_N]) / max(first_N.sum(), 1)
            row = {
                "layer": layer,
                "expert": expert,
                "share": float(selected_NxK.mean()),
                "probability": float(probs_NxE[:, expert].mean(dtype=np.float64)),
                "gate": float(gates_NxK[selected_NxK].mean()) if selected_NxK.any() else np.nan,
                "entropy": float(entropy_N[first_N].mean()) if first_N.any() else np.nan,
                "labels": float(_entropy(of_labels)) if first_N.any() else np.nan,
            }
            rows.append(row)
    return pd.DataFrame(rows)


def layer_table(seen: SeenRouting) -> pd.DataFrame:
    """Sums up each layer; a row each.

    Columns: layer; experts_used: effective number (`expert_use.effective_numbers`); unused: experts that no token
    selected; entropy: mean of the routing probabilities, nats, log E if they are uniform.
    """
    chosen = (experts_BxTxK.reshape(-1) for experts_BxTxK in seen.experts_MxBxTxK)
    shares_MxE = np.stack([np.bincount(each, minlength=seen.num_experts) / len(each) for each in chosen])
    return pd.DataFrame(
        {
            "layer": seen.layers,
            "experts_used": expert_use.effective_numbers(shares_MxE),
            "unused": (shares_MxE == 0).sum(axis=1),
            "entropy": [_entropy(probs_BxTxE).mean() for probs_BxTxE in seen.probs_MxBxTxE],
        }
    )


def label_shares(seen: SeenRouting) -> np.ndarray:
    """Returns how the first choices of the tokens of each class spread over the experts, float64 (M, C, E).

    C is the number of labels up to the largest that occurs; the row of a class sums to 1, or is nan if it has no image.
    """
    classes = int(seen.labels_B.max()) + 1
    first_MxBxT = seen.experts_MxBxTxK[..., 0]
    shares = np.full((len(seen.layers), classes, seen.num_experts), np.nan)
    for label in np.unique(seen.labels_B):
        for index, first_BxT in enumerate(first_MxBxT):
            own = first_BxT[seen.labels_B == label].reshape(-1)
            shares[index, label] = np.bincount(own, minlength=seen.num_experts) / len(own)
    return shares


def _rows(leaf_BxTxX: np.ndarray) -> np.ndarray:
    return leaf_BxTxX.reshape(-1, leaf_BxTxX.shape[-1])


def _entropy(probs: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, nats, float64."""
    p = probs.astype(np.float64)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
