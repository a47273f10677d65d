"""Do the rotations spread outliers? The inputs of rotated experts, before and after each is turned by its expert.

A token whose channels are few large ones and many small ones is hard to round, and hard on a ternary matrix. Two
measures of it, both of one token over its D channels, as means over tokens:

- crest: largest magnitude over root mean square; 1 if all channels are as large, sqrt(D) if only one is not 0.
- kurtosis: excess kurtosis, E[(x - m)^4] / s^4 - 3; 0 of Gaussian channels.

And one of channels: the largest root mean square of a channel over the median one; 1 if all are as large.

Axes: N tokens, K experts selected, D d_model.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import stats

from bvit_jax import calibration, expert_maps, rotated
from bvit_jax.opened import Opened
from bvit_jax.seen_routing import SeenRouting


def outlier_table(opened: Opened, seen: SeenRouting) -> pd.DataFrame:
    """Measures the inputs of each layer; two rows a layer, none of a model without rotations.

    Columns: layer; where: `before` or `after` the rotation; crest, kurtosis, channels. After it a token counts once for
    each of its K experts, as each turns it otherwise.
    """
    rows = []
    for index, layer in enumerate(opened.mixtures if opened.model.family == "butterfly" else ()):
        x_NxD = seen.x_MxBxTxD[index].reshape(-1, opened.model.d_model)
        experts_NxK = seen.experts_MxBxTxK[index].reshape(len(x_NxD), -1)
        turned_NxKxD = turned(opened, layer, x_NxD, experts_NxK)
        rows.append({"layer": layer.index, "where": "before", **measures(x_NxD)})
        rows.append({"layer": layer.index, "where": "after", **measures(turned_NxKxD.reshape(-1, x_NxD.shape[-1]))})
    return pd.DataFrame(rows, columns=["layer", "where", "crest", "kurtosis", "channels"])


def turned(opened: Opened, layer: calibration.Layer, x_NxD: np.ndarray, experts_NxK: np.ndarray) -> np.ndarray:
    """Turns tokens as their experts do before the first product, float32 (N, K, D)."""
    ffn = opened.ffn(layer)
    side = rotated.products(opened.model, ffn)[0].before

    def of_row(x_D: jax.Array, experts_K: jax.Array) -> jax.Array:
        return jax.vmap(lambda expert: expert_maps.turn(ffn, side, expert, x_D))(experts_K)

    return np.asarray(jax.jit(jax.vmap(of_row))(jnp.asarray(x_NxD), jnp.asarray(experts_NxK)))


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
