"""Do the rotations spread outliers? The inputs of rotated experts, before and after each is turned by its expert.

A token whose channels are few large ones and many small ones is hard to round, and hard on a ternary matrix. Two
measures of it, both of one token over its D channels, as means over tokens:

- crest: largest magnitude over root mean square; 1 if all channels are as large, sqrt(D) if only one is not 0.
- kurtosis: excess kurtosis, E[(x - m)^4] / s^4 - 3; about 0 of Gaussian channels.

And one of channels: the largest root mean square of a channel over the median one; 1 if all are as large.

Axes: N tokens, K experts selected, D d_model.
"""

import functools

import jax
import numpy as np
import pandas as pd
from scipy import stats

from bvit_jax import butterfly, calibration, intervals, rotated
from bvit_jax.kernels.cut import Side
from bvit_jax.opened import Opened
from bvit_jax.seen_routing import SeenRouting

_ROWS = 2048
"""Tokens that are turned at a time."""


def outlier_table(opened: Opened, seen: SeenRouting) -> pd.DataFrame:
    """Measures the inputs of each layer; two rows a layer, none of a model without rotations.

    Columns: layer; where: `before` or `after` the rotation; crest, kurtosis, channels; crest_interval,
    kurtosis_interval: half the 95 % confidence intervals of the means over images, nan for one. After the rotation a
    token counts once for each of its K experts, as each turns it otherwise.
    """
    rows = []
    for index, layer in enumerate(opened.mixtures if opened.model.family == "butterfly" else ()):
        x_NxD = seen.x_MxBxTxD[index].reshape(-1, opened.model.d_model)
        experts_NxK = seen.experts_MxBxTxK[index].reshape(len(x_NxD), -1)
        turned_NxKxD = turned(opened, layer, x_NxD, experts_NxK)
        images, channels = len(seen.labels_B), x_NxD.shape[-1]
        for where, x in (("before", x_NxD), ("after", turned_NxKxD)):
            rows.append({"layer": layer.index, "where": where, **_with_intervals(x.reshape(images, -1, channels))})
    columns = ["layer", "where", "crest", "crest_interval", "kurtosis", "kurtosis_interval", "channels"]
    return pd.DataFrame(rows, columns=columns)


def _with_intervals(x_BxnxD: np.ndarray) -> dict[str, float]:
    by_image = pd.DataFrame([measures(x_nxD) for x_nxD in x_BxnxD]).dropna()
    halves = {f"{name}_interval": intervals.half_interval(by_image[name]) for name in ("crest", "kurtosis")}
    return measures(x_BxnxD.reshape(-1, x_BxnxD.shape[-1])) | halves


def turned(opened: Opened, layer: calibration.Layer, x_NxD: np.ndarray, experts_NxK: np.ndarray) -> np.ndarray:
    """Turns tokens as their experts do before the first product, float32 (N, K, D)."""
    ffn = opened.ffn(layer)
    side = rotated.products(opened.model, ffn)[0].before
    x_NxKxD = np.repeat(x_NxD[:, None], experts_NxK.shape[1], axis=1)
    if not side.stages:
        return x_NxKxD
    angles_ExA = ffn[f"{side.name}_angles"]
    for start in range(0, len(x_NxKxD), _ROWS):
        here = slice(start, start + _ROWS)
        x_NxKxD[here] = _turn(side, angles_ExA, x_NxKxD[here], experts_NxK[here])
    return x_NxKxD


@functools.partial(jax.jit, static_argnums=0)
def _turn(side: Side, angles_ExA: jax.Array, x_nxKxD: jax.Array, experts_nxK: jax.Array) -> jax.Array:
    return butterfly.rotate(x_nxKxD, angles_ExA, side.stages, inverse=side.inverse, expert=experts_nxK)


def measures(x_NxD: np.ndarray) -> dict[str, float]:
    """Returns crest, kurtosis and channels of vectors; those of zeros are left out, all nan if there are no others.

    Vectors whose channels are all equal have no kurtosis.
    """
    x = x_NxD[np.abs(x_NxD).max(axis=1) > 0].astype(np.float64)
    if not len(x):
        return dict.fromkeys(("crest", "kurtosis", "channels"), float("nan"))
    varied = x[np.ptp(x, axis=1) > 0]
    rms_N, rms_D = (np.sqrt((x**2).mean(axis=axis)) for axis in (1, 0))
    return {
        "crest": float((np.abs(x).max(axis=1) / rms_N).mean()),
        "kurtosis": float(stats.kurtosis(varied, axis=1).mean()) if len(varied) else float("nan"),
        "channels": float(rms_D.max() / median) if (median := float(np.median(rms_D))) > 0 else float("inf"),
    }
