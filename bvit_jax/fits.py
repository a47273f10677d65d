"""Laws of scaling with the number of experts E, fitted by least squares over single runs, with 95 % intervals.

    accuracy = a + b log2 E       b: gained by each doubling; accuracies are shares
    NLL = a E^b                   a line in log NLL on log E
    bytes = a E^b                 likewise, a point for each number of experts: bytes are counted, whatever the seed,
                                  and the interval is of the misfit alone

An interval is that of the slope by Student's t with n - 2 degrees of freedom, which takes the runs for independent:
runs of one seed share images and start, and then it is a rough one.

References:
    `scipy.stats.linregress`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from bvit_jax import intervals

Law = Literal["linear in log2 E", "power of E"]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to one curve.

    Attributes:
        law: which.
        constant: a.
        slope: b.
        interval: half the 95 % confidence interval of b; nan for two runs.
        runs: that it is fitted to.
        spread: residual standard deviation, of the values or of their logarithms; nan for two runs.
        centre, square_sum: mean of log2 E, and sum of squared distances from it, for `band`.
    """

    law: Law
    constant: float
    slope: float
    interval: float
    runs: int
    spread: float
    centre: float
    square_sum: float

    def at(self, experts: np.ndarray) -> np.ndarray:
        """Returns the values that the law gives."""
        x = np.log2(experts)
        found: np.ndarray = self.constant + self.slope * x
        return found if self.law == "linear in log2 E" else self.constant * 2.0 ** (self.slope * x)

    def band(self, experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bounds of the 95 % confidence band of the mean, the geometric one of powers; nan for two runs."""
        x = np.log2(experts)
        half = _quantile(self.runs) * self.spread * np.sqrt(1 / self.runs + (x - self.centre) ** 2 / self.square_sum)
        middle = self.at(experts)
        if self.law == "linear in log2 E":
            return middle - half, middle + half
        return middle * np.exp(-half), middle * np.exp(half)


def fit(experts: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, law: Law) -> Fit:
    """Fits a law to runs, one value each.

    Raises:
        ValueError: if there are fewer than two numbers of experts, values that are not finite, or values for a power
            law that are not positive.
    """
    e, y = np.asarray(experts, np.float64), np.asarray(values, np.float64)
    if len(np.unique(e)) < 2:
        raise ValueError(f"the runs have {len(np.unique(e))} number of experts; a law needs two at least")
    if not np.isfinite(y).all():
        raise ValueError(f"values of a law must be finite; there is {y[~np.isfinite(y)][0]}")
    power = law == "power of E"
    if power and not (y > 0).all():
        raise ValueError(f"a power law needs positive values; the least is {y.min()}")
    x, targets = np.log2(e), np.log(y) if power else y
    found = stats.linregress(x, targets)
    runs = len(x)
    residual = targets - (found.intercept + found.slope * x)
    spread = math.sqrt(float((residual**2).sum()) / (runs - 2)) if runs > 2 else math.nan
    square_sum = float(((x - x.mean()) ** 2).sum())
    return Fit(
        law=law,
        constant=float(np.exp(found.intercept)) if power else float(found.intercept),
        slope=float(found.slope / np.log(2)) if power else float(found.slope),
        interval=_quantile(runs) * spread / math.sqrt(square_sum) / (math.log(2) if power else 1),
        runs=runs,
        spread=spread,
        centre=float(x.mean()),
        square_sum=square_sum,
    )


def _quantile(runs: int) -> float:
    return intervals.quantile(runs - 2) if runs > 2 else math.nan


LAWS: dict[str, Law] = {
    "test_accuracy": "linear in log2 E",
    "test_nll": "power of E",
    "bytes_full": "power of E",
    "bytes_full_ffn": "power of E",
}
"""Columns of a sweep's results, and the law that is fitted to each."""


def series_fits(results: pd.DataFrame) -> dict[tuple[str, str], Fit]:
    """Fits all laws to every curve of sweeps that has two numbers of experts; by curve and column.

    Args:
        results: as `sweep_results.read` returns them; runs without a result are left out.
    """
    found = {}
    trained = results[results["test_accuracy"].notna() & (results["family"] != "dense")]
    for series, runs in trained.groupby("series", sort=False):
        if runs["num_experts"].nunique() > 1:
            for column, law in LAWS.items():
                points = runs[["num_experts", column]].astype(np.float64)
                if column.startswith("bytes"):
                    points = points.drop_duplicates()
                values = points[column].to_numpy()
                if np.isfinite(values).all() and (law == "linear in log2 E" or (values > 0).all()):
                    found[str(series), column] = fit(points["num_experts"].to_numpy(), values, law)
    return found


def fit_table(found: dict[tuple[str, str], Fit]) -> pd.DataFrame:
    """Lists fits; a row each. Columns: series, of, law, constant, slope, interval, runs."""
    names = ["law", "constant", "slope", "interval", "runs"]
    rows = [(*key, *(getattr(one, name) for name in names)) for key, one in found.items()]
    return pd.DataFrame(rows, columns=["series", "of", *names])
