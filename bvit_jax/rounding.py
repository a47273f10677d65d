"""Weights of linear maps rounded to integers: to nearest, or so that the outputs for calibration inputs stay.

For y = x W with inputs X and C = X^T X, a rounding V of W moves the outputs by

    ||X V - X W||^2 = sum over outputs o of e_o^T C e_o        e = W - V

Formats and their scales are those of `bvit_jax.precision`: one scale an output channel.

OPTQ (also called GPTQ) rounds the weights of one input after another to nearest, and moves all those of later inputs so
that they make up for the errors made as well as they can. With H = C + ridge in the order of rounding and H = V D V^T,
V unit upper triangular and D diagonal, the error is sum_k D_k (e_k + sum_{j<k} V_jk e_j)^2: what input k has to make up
for is V_jk e_j of each earlier j, whatever comes later. It is what the Cholesky factor of H^-1 gives (Chee et al.,
theorem 6), without the inverse.

References:
    Frantar et al., "OPTQ: Accurate Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.
    Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", arXiv 2307.13304.

Axes: I inputs, O outputs, A inputs that are not always 0, in the order of rounding.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from scipy import linalg

from bvit_jax.precision import Precision, levels

RIDGE = 0.01
"""Added to the diagonal of C, as a share of its mean over the inputs that are not always 0."""
LEAST_RIDGE = 1e-6
LIMITS: dict[Precision, tuple[int, int]] = {"int8": (-127, 127), "int4": (-7, 7), "int2": (-2, 1)}
"""Formats that weights can be rounded to here: their lowest and highest integers."""
SHRINKS = np.linspace(0.3, 1, 29)
"""Scales tried, as shares of that of the largest weight: below 1 the largest weights are cut off."""

_BLOCK = 128
"""Inputs for which what earlier ones leave to be made up for is worked out in one product of matrices."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix of integers with one scale an output channel.

    Attributes:
        levels_IxO: int8, the integers q of `precision`.
        scale_1xO: float32.
        precision: one of `LIMITS`.
    """

    levels_IxO: np.ndarray
    scale_1xO: np.ndarray
    precision: Precision

    @property
    def matrix(self) -> np.ndarray:
        """The weights that the integers stand for, float32 (I, O), as `precision.from_levels` returns them."""
        offset = np.float32(0.5 if self.precision == "int2" else 0)
        return self.scale_1xO * (self.levels_IxO.astype(np.float32) + offset)


def nearest(w_IxO: np.ndarray, precision: Precision) -> Rounded:
    """Rounds weights to nearest, with the scales of `precision.levels`.

    Args:
        w_IxO: floating, used as float32.
        precision: one of `LIMITS`.

    Raises:
        ValueError: for weights that are no finite matrix, or another precision.
    """
    w_IxO = _checked(w_IxO, precision)
    levels_IxO, scale_1xO = levels(jnp.asarray(w_IxO), precision)
    return Rounded(np.asarray(levels_IxO).astype(np.int8), np.asarray(scale_1xO), precision)


def calibrated(w_IxO: np.ndarray, c_IxI: np.ndarray, precision: Precision, ridge: float = RIDGE) -> Rounded:
    """Rounds weights by calibration inputs.

    Each output channel is rounded in three ways, of which the one with the least error under C is taken: to nearest as
    in `nearest`; to nearest with the best scale of `SHRINKS`; by OPTQ with that scale. On the calibration inputs it is
    therefore never worse than `nearest`.

    Args:
        w_IxO: floating, used as float32.
        c_IxI: C = X^T X of calibration inputs X, float64.
        precision: one of `LIMITS`.
        ridge: for OPTQ, as `RIDGE`; `LEAST_RIDGE` at least, so that rounding leaves C + ridge positive definite.

    Raises:
        ValueError: for weights that are no finite matrix, C that cannot be their inputs', another precision or ridge.
    """
    w_IxO = _checked(w_IxO, precision)
    c_IxI = _checked_moments(c_IxI, w_IxO.shape[0], ridge)
    plain = nearest(w_IxO, precision)
    searched = _with_best_scales(plain, w_IxO, c_IxI)
    ways = (plain, searched, optq(w_IxO, searched.scale_1xO, c_IxI, precision, ridge))
    best_1xO = np.argmin([_channel_errors(w_IxO, way, c_IxI) for way in ways], axis=0)[None]
    levels_IxO, scale_1xO = plain.levels_IxO, plain.scale_1xO
    for number, way in enumerate(ways):
        levels_IxO = np.where(best_1xO == number, way.levels_IxO, levels_IxO)
        scale_1xO = np.where(best_1xO == number, way.scale_1xO, scale_1xO)
    return Rounded(levels_IxO, scale_1xO, precision)


def optq(
    w_IxO: np.ndarray, scale_1xO: np.ndarray, c_IxI: np.ndarray, precision: Precision, ridge: float = RIDGE
) -> Rounded:
    """Rounds weights by OPTQ, inputs in order of falling mean square.

    Inputs that are always 0 are rounded to nearest.

    Args:
        w_IxO: floating, used as float32.
        scale_1xO: float32, the scales of the result; positive.
        c_IxI: as in `calibrated`.
        precision: one of `LIMITS`.
        ridge: as in `calibrated`.

    Raises:
        ValueError: as in `calibrated`, and for scales that do not fit.
    """
    w_IxO = _checked(w_IxO, precision)
    c_IxI = _checked_moments(c_IxI, w_IxO.shape[0], ridge)
    if scale_1xO.shape != (1, w_IxO.shape[1]) or not (scale_1xO > 0).all():
        raise ValueError(f"scales are positive, (1, {w_IxO.shape[1]}); found {scale_1xO.shape}, {scale_1xO}")
    levels_IxO = _levels(w_IxO, scale_1xO, precision)
    energy_I = c_IxI.diagonal()
    falling_I = np.argsort(-energy_I, kind="stable")
    order_A = falling_I[energy_I[falling_I] > 0]
    feedback_AxA = _feedback(c_IxI[np.ix_(order_A, order_A)], ridge)
    error_AxO = np.zeros((order_A.size, w_IxO.shape[1]))
    for step, index in enumerate(order_A):
        first = step - step % _BLOCK
        if step == first:
            earlier_BxO = feedback_AxA[first : first + _BLOCK, :first] @ error_AxO[:first]
        w_1xO = w_IxO[index : index + 1].astype(np.float64)
        made_up_O = earlier_BxO[step - first] + feedback_AxA[step, first:step] @ error_AxO[first:step]
        row = Rounded(_levels(w_1xO + made_up_O[None], scale_1xO, precision), scale_1xO, precision)
        levels_IxO[index] = row.levels_IxO[0]
        error_AxO[step] = (w_1xO - row.matrix)[0]
    return Rounded(levels_IxO, scale_1xO, precision)


def _feedback(c_AxA: np.ndarray, ridge: float) -> np.ndarray:
    """Returns V^T of H = V D V^T, unit lower triangular."""
    if not c_AxA.size:
        return c_AxA
    h_AxA = c_AxA + ridge * c_AxA.diagonal().mean() * np.eye(len(c_AxA))
    # Cholesky's factor is lower triangular: of H back to front it is the upper one of H.
    lower_AxA = linalg.cholesky(h_AxA[::-1, ::-1], lower=True)[::-1, ::-1].T
    return lower_AxA / lower_AxA.diagonal()[:, None]


def _with_best_scales(plain: Rounded, w_IxO: np.ndarray, c_IxI: np.ndarray) -> Rounded:
    """Returns the rounding to nearest with the scale of `SHRINKS` that has the least error, channel by channel."""
    least_O, best_1xO = np.full(w_IxO.shape[1], np.inf), plain.scale_1xO
    for shrink in SHRINKS:
        scale_1xO = plain.scale_1xO * np.float32(shrink)
        tried = Rounded(_levels(w_IxO, scale_1xO, plain.precision), scale_1xO, plain.precision)
        error_O = _channel_errors(w_IxO, tried, c_IxI)
        best_1xO = np.where(error_O < least_O, scale_1xO, best_1xO)
        least_O = np.minimum(error_O, least_O)
    return Rounded(_levels(w_IxO, best_1xO, plain.precision), best_1xO, plain.precision)


def _channel_errors(w_IxO: np.ndarray, rounded: Rounded, c_IxI: np.ndarray) -> np.ndarray:
    """Returns e^T C e of each output channel, (O,)."""
    error_IxO = w_IxO.astype(np.float64) - rounded.matrix
    return np.einsum("io,io->o", error_IxO, c_IxI @ error_IxO)


def _levels(w_IxO: np.ndarray, scale_1xO: np.ndarray, precision: Precision) -> np.ndarray:
    """Returns the integers nearest to weights, int8 (I, O), for given scales."""
    ratio_IxO = w_IxO / scale_1xO
    whole_IxO = np.floor(ratio_IxO) if precision == "int2" else np.round(ratio_IxO)
    return np.clip(whole_IxO, *LIMITS[precision]).astype(np.int8)


def _checked(w_IxO: np.ndarray, precision: Precision) -> np.ndarray:
    if precision not in LIMITS:
        raise ValueError(f"weights are not rounded to {precision!r} here; choose one of {', '.join(LIMITS)}")
    if w_IxO.ndim != 2 or 0 in w_IxO.shape:
        raise ValueError(f"weights are a matrix (inputs, outputs) with one of each at least; found {w_IxO.shape}")
    if not np.isfinite(w_IxO).all():
        raise ValueError("weights to be rounded are finite; found nan or inf")
    return w_IxO.astype(np.float32)


def _checked_moments(c_IxI: np.ndarray, inputs: int, ridge: float) -> np.ndarray:
    if c_IxI.shape != (inputs, inputs):
        raise ValueError(f"second moments of {inputs} inputs are ({inputs}, {inputs}); found {c_IxI.shape}")
    if not np.isfinite(c_IxI).all():
        raise ValueError("second moments are finite; found nan or inf")
    largest = np.abs(c_IxI).max()
    if np.abs(c_IxI - c_IxI.T).max() > 1e-6 * largest or c_IxI.diagonal().min() < 0:
        raise ValueError("second moments X^T X are symmetric, with nothing negative on the diagonal")
    if not LEAST_RIDGE <= ridge < np.inf:
        raise ValueError(f"the ridge is a number from {LEAST_RIDGE} on; found {ridge}")
    return c_IxI.astype(np.float64)
