"""Do the experts of a layer differ? Their diversity, 1 - cosine, of each two by their weights and by their outputs.

By weights the cosine is that of two matrices as vectors; by outputs it is the mean over tokens of that of two experts'
outputs for the same token. Diversity is 0 for experts that are alike but for scale, and about 1 for experts that have
nothing to do with each other.

Axes: E experts, n of them that are compared, b rows, I inputs, O outputs, N tokens, D d_model.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from bvit_jax import calibration, expert_maps, expert_use, moe, platforms
from bvit_jax.model_config import ModelConfig
from bvit_jax.opened import Opened
from bvit_jax.seen_routing import SeenRouting

MOST = 64
"""Experts that are compared, at most: of more, some spread evenly."""
_NUMBERS = 2**22
"""Of the experts' matrices, made at a time."""
_TINY = 1e-30


@dataclasses.dataclass(frozen=True, eq=False)
class Diversity:
    """How far the experts of one layer differ, each two.

    Attributes:
        layer: its number.
        of: `up weights`, `down weights` or `outputs`.
        experts_n: int, the experts compared.
        values_nxn: float64, 1 - cosine, 0 to 2; 0 on the diagonal.
    """

    layer: int
    of: str
    experts_n: np.ndarray
    values_nxn: np.ndarray

    @property
    def pairs(self) -> np.ndarray:
        """The values of each two different experts, once; none of a single expert."""
        return self.values_nxn[np.triu_indices(len(self.experts_n), 1)]


def weight_diversity(opened: Opened, most: int = MOST) -> list[Diversity]:
    """Compares the experts of each layer by the matrices that they amount to (`expert_maps`), map by map."""
    experts_n = _spread(opened.model.num_experts, most)
    return [
        Diversity(layer.index, f"{name} weights", experts_n, _apart(_normed(_gram(opened, layer, name, experts_n))))
        for layer in opened.mixtures
        for name in expert_maps.names(opened.model)
    ]


def _gram(opened: Opened, layer: calibration.Layer, name: str, experts_n: np.ndarray) -> np.ndarray:
    """Returns the inner products of each two matrices, float64 (n, n), of some rows after another."""
    model, ffn = opened.model, opened.ffn(layer)
    inputs, outputs = expert_maps.shape(model, name)
    count = min(max(_NUMBERS // (len(experts_n) * outputs), 1), inputs)
    total_nxn = np.zeros((len(experts_n), len(experts_n)))
    for start in range(0, inputs, count):
        rows_nxbxO = expert_maps.rows(model, name, ffn, jnp.asarray(experts_n), start, count=count)
        flat = np.asarray(rows_nxbxO, np.float64).reshape(len(experts_n), -1)
        total_nxn += flat @ flat.T
    return total_nxn


def output_diversity(opened: Opened, seen: SeenRouting, most: int = MOST) -> list[Diversity]:
    """Compares the experts of each layer by what they give for the same tokens, whatever the router says.

    The tokens are drawn from those of all images, always the same: as many as make `expert_use.PAIRS` rows with all
    experts.
    """
    experts_n = _spread(opened.model.num_experts, most)
    found = []
    for layer, x_BxTxD in zip(opened.mixtures, seen.x_MxBxTxD, strict=True):
        x_NxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
        count = max(expert_use.PAIRS // opened.model.num_experts, 1)
        wanted = np.random.default_rng(0).permutation(len(x_NxD))[:count]
        y_1xNxExD = _outputs(opened.model, opened.ffn(layer), jnp.asarray(x_NxD[wanted])[None])
        y_Nxnxd = np.asarray(y_1xNxExD[0][:, experts_n], np.float64)
        unit = y_Nxnxd / np.maximum(np.linalg.norm(y_Nxnxd, axis=-1, keepdims=True), _TINY)
        cosine_nxn = np.einsum("aid,ajd->ij", unit, unit, optimize=True) / len(unit)
        found.append(Diversity(layer.index, "outputs", experts_n, _apart(cosine_nxn)))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _outputs(model: ModelConfig, ffn: Any, x_1xNxD: jax.Array) -> jax.Array:
    with platforms.lowered_here():
        return moe.expert_outputs(model, ffn, x_1xNxD)


def diversity_table(found: list[Diversity]) -> pd.DataFrame:
    """Sums up; a row for each layer and kind, none where there is a single expert.

    Columns: layer, of; experts: that were compared; mean, least, most: diversity over all pairs.
    """
    columns = ["layer", "of", "experts", "mean", "least", "most"]
    rows = [
        (one.layer, one.of, len(one.experts_n), one.pairs.mean(), one.pairs.min(), one.pairs.max())
        for one in found
        if len(one.pairs)
    ]
    return pd.DataFrame(rows, columns=columns)


def _spread(of: int, most: int) -> np.ndarray:
    """Returns at most `most` of the numbers up to `of`, evenly spaced."""
    count = min(of, most)
    return np.arange(count) * of // count


def _normed(gram_nxn: np.ndarray) -> np.ndarray:
    """Returns cosines from inner products; a vector of zeros has cosine 0 to all others."""
    norm_n = np.sqrt(np.maximum(np.diag(gram_nxn), _TINY))
    cosine_nxn: np.ndarray = gram_nxn / np.outer(norm_n, norm_n)
    return cosine_nxn


def _apart(cosine_nxn: np.ndarray) -> np.ndarray:
    """Returns 1 - cosine, 0 between an expert and itself."""
    values = 1 - cosine_nxn
    np.fill_diagonal(values, 0.0)
    return np.clip(values, 0.0, 2.0)
