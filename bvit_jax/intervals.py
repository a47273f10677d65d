"""How sure a mean is: confidence intervals of 95 % by Student's t.

For n values of mean m and sample standard deviation s the interval is m ± t(0.975, n - 1) s / sqrt(n). Over the seeds
of a sweep it tells how sure the mean is on these test images, not how far other images would move it. Where every seed
deals one pool of images anew, it tells of both, but the deals overlap, so that it is too narrow (Nadeau & Bengio).

References:
    Student, "The Probable Error of a Mean", Biometrika 6 (1908); quantiles from `scipy.special.stdtrit`.
    Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 52 (2003).
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

CONFIDENCE = 0.95


def half_interval(values: Sequence[float] | np.ndarray) -> float:
    """Returns half the width of the confidence interval of the mean of `values`; nan for fewer than two."""
    if len(values) < 2:
        return math.nan
    return quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def quantile(degrees: int) -> float:
    """Returns Student's t of so many degrees of freedom for both ends of an interval."""
    return float(special.stdtrit(degrees, (1 + CONFIDENCE) / 2))
