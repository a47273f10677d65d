"""Is routing smooth in space? Agreement of neighbouring patches, beside that of patches taken anywhere in the image.

Two patches agree by the share of their K experts that they have in common: 1 if all, 0 if none. Under the null
hypothesis the patches of each image are shuffled; the mean over all shuffles is that over all pairs of its patches, so
it is worked out, not drawn:

    expected agreement of an image = sum_e n_e (n_e - 1) / (P (P - 1) K),   n_e patches that selected expert e.

What the smoothness loss is made of, ||p_a - p_b||^2, is measured in the same way. Class tokens are left out.

Axes: M mixture layers, B images, P patches, h and w patches down and across, E experts, K experts selected.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pandas as pd

from bvit_jax import intervals
from bvit_jax.seen_routing import SeenRouting

Direction = Literal["across", "down", "both"]


def agreement_table(seen: SeenRouting) -> pd.DataFrame:
    """Compares neighbours with shuffled patches; a row for each layer and direction.

    Columns: layer; direction: `across` (left and right), `down` (above and below) or `both`; pairs: of an image;
    agreement, shuffled: means over images; excess: the difference, paired by image; excess_interval: half its 95 %
    confidence interval over images, nan for one; kappa: excess over what is left to 1 - shuffled, 0 by chance and 1 if
    all neighbours agree, nan where shuffled patches agree too; distance, distance_shuffled: mean ||p_a - p_b||^2.

    A direction in which patches have no neighbours has no row.
    """
    rows = []
    for index, layer in enumerate(seen.layers):
        experts_BxPxK = seen.experts_MxBxTxK[index, :, 1:]
        probs_BxPxE = seen.probs_MxBxTxE[index, :, 1:]
        if experts_BxPxK.shape[1] < 2:
            continue
        shuffled_B = expected_agreement(experts_BxPxK, seen.num_experts)
        apart_B = expected_distance(probs_BxPxE)
        for direction, first, second in _neighbours(seen.grid):
            agreement_B = _agreement(experts_BxPxK[:, first], experts_BxPxK[:, second]).mean(axis=1)
            distance_B = _distance(probs_BxPxE, first, second)
            excess_B, chance = agreement_B - shuffled_B, float(shuffled_B.mean())
            row = {
                "layer": layer,
                "direction": direction,
                "pairs": len(first),
                "agreement": float(agreement_B.mean()),
                "shuffled": chance,
                "excess": float(excess_B.mean()),
                "excess_interval": intervals.half_interval(excess_B),
                "kappa": float(excess_B.mean() / (1 - chance)) if chance < 1 else np.nan,
                "distance": float(distance_B.mean()),
                "distance_shuffled": float(apart_B.mean()),
            }
            rows.append(row)
    columns = ["layer", "direction", "pairs", "agreement", "shuffled", "excess", "excess_interval", "kappa"]
    return pd.DataFrame(rows, columns=[*columns, "distance", "distance_shuffled"])


def expected_agreement(experts_BxPxK: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns the mean agreement over all pairs of different patches of each image, float64 (B,)."""
    images, patches, top_k = experts_BxPxK.shape
    counts_BxE = np.zeros((images, num_experts))
    np.add.at(counts_BxE, (np.arange(images)[:, None], experts_BxPxK.reshape(images, -1)), 1)
    found: np.ndarray = (counts_BxE * (counts_BxE - 1)).sum(axis=1) / (patches * (patches - 1) * top_k)
    return found


def expected_distance(probs_BxPxE: np.ndarray) -> np.ndarray:
    """Returns the mean of ||p_a - p_b||^2 over all pairs of different patches of each image, float64 (B,)."""
    patches = probs_BxPxE.shape[1]
    variance_B = np.array([probs_PxE.var(axis=0, dtype=np.float64).sum() for probs_PxE in probs_BxPxE])
    found: np.ndarray = 2 * variance_B * patches / (patches - 1)
    return found


def _agreement(experts_BxpxK: np.ndarray, others_BxpxK: np.ndarray) -> np.ndarray:
    """Share of experts in common, float64 (B, pairs)."""
    common = (experts_BxpxK[..., :, None] == others_BxpxK[..., None, :]).sum(axis=(-2, -1))
    found: np.ndarray = common / experts_BxpxK.shape[-1]
    return found


def _distance(probs_BxPxE: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean of ||p_a - p_b||^2 over pairs of patches, image by image for the sake of memory, float64 (B,)."""
    wide = (probs_PxE.astype(np.float64) for probs_PxE in probs_BxPxE)
    return np.array([((p[first] - p[second]) ** 2).sum(axis=-1).mean() for p in wide])


def _neighbours(grid: tuple[int, int]) -> Iterator[tuple[Direction, np.ndarray, np.ndarray]]:
    """Yields for each direction the indices of the first and the second patches of all pairs."""
    place_hxw = np.arange(grid[0] * grid[1]).reshape(grid)
    across = place_hxw[:, :-1].reshape(-1), place_hxw[:, 1:].reshape(-1)
    down = place_hxw[:-1].reshape(-1), place_hxw[1:].reshape(-1)
    both = np.concatenate([across[0], down[0]]), np.concatenate([across[1], down[1]])
    named: list[tuple[Direction, tuple[np.ndarray, np.ndarray]]] = [("across", across), ("down", down), ("both", both)]
    for direction, (first, second) in named:
        if len(first):
            yield direction, first, second
