"""What a mixture's experts are made of: rotation angles and ternary weights, as tables.

Axes: E experts, A angles of one rotation, I inputs, O outputs.
"""

from typing import Any

import numpy as np
import pandas as pd

from bvit_jax import butterfly, calibration, rotated
from bvit_jax.opened import Opened

QUANTILES = (0.05, 0.5, 0.95)


def angles(opened: Opened) -> dict[tuple[int, str, int], np.ndarray]:
    """Returns the angles of every rotation, by layer, name (`up_theta`, ...) and stage, (E, A) each.

    They are in radians, from -pi to under pi; a model without rotations has none.
    """
    found: dict[tuple[int, str, int], np.ndarray] = {}
    if opened.model.family != "butterfly":
        return found
    for layer in opened.mixtures:
        ffn = opened.ffn(layer)
        for name, side in rotated.params_of(opened.model).items():
            if name.endswith("_angles"):
                parts = butterfly.by_stage(rotated.stages_of(opened.model, side), ffn[name])
                for stage, part_ExA in enumerate(parts):
                    wrapped = np.remainder(np.asarray(part_ExA, np.float64) + np.pi, 2 * np.pi) - np.pi
                    found[layer.index, name.removesuffix("_angles"), stage] = wrapped
    return found


def angle_table(opened: Opened) -> pd.DataFrame:
    """Sums up the angles; a row for each layer, rotation and stage.

    Columns: layer, rotation, stage; angles: how many, of all experts; mean, std, q5, median, q95: radians; spread: mean
    over angles of the standard deviation between experts, 0 if all experts turn alike. All are of plain numbers: angles
    on either side of pi count as far apart.
    """
    rows = []
    for (layer, rotation, stage), values_ExA in angles(opened).items():
        low, median, high = np.quantile(values_ExA, QUANTILES)
        row = {
            "layer": layer,
            "rotation": rotation,
            "stage": stage,
            "angles": values_ExA.size,
            "mean": values_ExA.mean(),
            "std": values_ExA.std(),
            "q5": low,
            "median": median,
            "q95": high,
            "spread": values_ExA.std(axis=0).mean(),
        }
        rows.append(row)
    columns = ["layer", "rotation", "stage", "angles", "mean", "std", "q5", "median", "q95", "spread"]
    return pd.DataFrame(rows, columns=columns)


def trit_table(opened: Opened) -> pd.DataFrame:
    """Counts the ternary weights; a row for each layer and matrix, of stored experts all experts together.

    Columns: layer, matrix; weights: how many; minus, zero, plus: shares of -1, 0 and 1; scale, scale_min, scale_max: of
    the outputs that are not all 0; dead: share of outputs that are. A model that was not trained with ternary matrices
    has no rows.
    """
    rows = []
    for layer in opened.mixtures if _is_ternary(opened) else ():
        for name, leaf in _ternary(opened, layer).items():
            scale_O = np.abs(leaf).max(axis=-2)
            alive = scale_O > 0
            row = {
                "layer": layer.index,
                "matrix": name,
                "weights": leaf.size,
                "minus": (leaf < 0).mean(),
                "zero": (leaf == 0).mean(),
                "plus": (leaf > 0).mean(),
                "scale": scale_O[alive].mean() if alive.any() else np.nan,
                "scale_min": scale_O[alive].min() if alive.any() else np.nan,
                "scale_max": scale_O[alive].max() if alive.any() else np.nan,
                "dead": 1 - alive.mean(),
            }
            rows.append(row)
    columns = ["layer", "matrix", "weights", "minus", "zero", "plus", "scale", "scale_min", "scale_max", "dead"]
    return pd.DataFrame(rows, columns=columns)


def _ternary(opened: Opened, layer: calibration.Layer) -> dict[str, np.ndarray]:
    """Returns the ternary matrices of a layer, (..., I, O), by name."""
    ffn: dict[str, Any] = opened.ffn(layer)
    ending = "prototype" if opened.model.family == "butterfly" else "kernel"
    names = sorted((name for name in ffn if name.endswith(ending)), reverse=True)  # up before down
    return {name: np.asarray(ffn[name]) for name in names}


def _is_ternary(opened: Opened) -> bool:
    trained = opened.config.model
    return trained.has_ternary_experts and trained.ternary_scale != "none"
