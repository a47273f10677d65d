"""Compensation of a compressed map: a residual P Q fitted to the inputs that the compressed maps before it give.

A map y = x W has become x M, and its inputs X^ are no longer the original X. The residual of rank R minimises

    1/2 ||X^ (M + P Q) - X W||^2 + 1/2 lambda ||P Q||^2,        lambda = ridge mean(diag X^^T X^)

by its gradient. All that is needed of the inputs are their second moments, so that rows can be summed batch by batch.

With L L^T = X^^T X^ + lambda and T = L^-1 (X^^T X W - X^^T X^ M) the objective is 1/2 ||L^T P Q - T||^2 and a constant:
however badly the inputs are conditioned, the best P for a given Q is L^-T T Q^T (Q Q^T)^-1. So only Q is searched, with
P at its best, where the gradient is that of Q alone.

Axes: I inputs, O outputs, R ranks of the residual, N rows. All arrays are NumPy float64.

References:
    Activation-aware mixed-rank compression, arXiv 2402.06004; its details are reconstructed here from its abstract.
    Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
    separate", SIAM Journal on Numerical Analysis 10 (1973).
"""

import dataclasses
import math

import numpy as np
from scipy import linalg, optimize

from bvit_jax.factors import RIDGE

STEPS = 100
"""Steps of L-BFGS at most; a few tens mostly do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of paired rows: inputs X of the original map and X^ of the compressed one, both (N, I).

    Moments of further rows are added with +.

    Attributes:
        own_IxI: X^^T X^.
        cross_IxI: X^^T X.
        original_IxI: X^T X.
        rows: N.

    Raises:
        ValueError: for matrices that are not square, alike in shape and finite, or for no rows.
    """

    own_IxI: np.ndarray
    cross_IxI: np.ndarray
    original_IxI: np.ndarray
    rows: int

    def __post_init__(self) -> None:
        inputs = len(self.own_IxI)
        for name in ("own_IxI", "cross_IxI", "original_IxI"):
            values = getattr(self, name)
            if values.shape != (inputs, inputs):
                raise ValueError(f"{name} has the shape {values.shape}; {(inputs, inputs)} is right")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} holds values that are not finite; finite ones are right")
        if self.rows < 1:
            raise ValueError(f"moments are of {self.rows} rows; 1 or more is right")

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.own_IxI + other.own_IxI,
            self.cross_IxI + other.cross_IxI,
            self.original_IxI + other.original_IxI,
            self.rows + other.rows,
        )

    def loss(self, w_IxO: np.ndarray, approx_IxO: np.ndarray) -> float:
        """Returns 1/2 ||X^ M - X W||^2, M what stands for W.

        It is 1/2 tr (X^ M - X W)^T (X^ M - X W) = 1/2 tr(M^T X^^T X^ M) - tr(M^T X^^T X W) + 1/2 tr(W^T X^T X W), so
        only rounding, of some 1e-16 of these terms, could make it negative; it is then 0.
        """
        own = np.vdot(approx_IxO, self.own_IxI @ approx_IxO)
        cross = np.vdot(approx_IxO, self.cross_IxI @ w_IxO)
        return max(float(own / 2 - cross + self._energy(w_IxO) / 2), 0.0)

    def gradient(self, w_IxO: np.ndarray, approx_IxO: np.ndarray) -> np.ndarray:
        """Returns the gradient of `loss` by M, (I, O): X^^T (X^ M - X W)."""
        difference: np.ndarray = self.own_IxI @ approx_IxO - self.cross_IxI @ w_IxO
        return difference

    def relative_error(self, w_IxO: np.ndarray, approx_IxO: np.ndarray) -> float:
        """Returns ||X^ M - X W|| / ||X W||: 0 for equal outputs, infinity where only those of W are zero."""
        loss, energy = self.loss(w_IxO, approx_IxO), self._energy(w_IxO)
        if energy <= 0:
            return 0.0 if loss == 0 else math.inf
        return math.sqrt(2 * loss / energy)

    def _energy(self, w_IxO: np.ndarray) -> float:
        return float(np.vdot(w_IxO, self.original_IxI @ w_IxO))


def paired_moments(x_NxI: np.ndarray, given_NxI: np.ndarray) -> Moments:
    """Returns the moments of rows X and X^, summed in float64.

    Args:
        x_NxI: X, inputs of the original map.
        given_NxI: X^, the same rows as the compressed maps before it give them.

    Raises:
        ValueError: for rows that are not paired, or not finite.
    """
    x_NxI, given_NxI = np.asarray(x_NxI, np.float64), np.asarray(given_NxI, np.float64)
    if x_NxI.ndim != 2 or given_NxI.shape != x_NxI.shape:
        raise ValueError(f"rows have the shapes {x_NxI.shape} and {given_NxI.shape}; twice (rows, inputs) is right")
    return Moments(given_NxI.T @ given_NxI, given_NxI.T @ x_NxI, x_NxI.T @ x_NxI, len(x_NxI))


def residual(
    moments: Moments, w_IxO: np.ndarray, base_IxO: np.ndarray, q_RxO: np.ndarray, ridge: float = RIDGE
) -> tuple[np.ndarray, np.ndarray]:
    """Fits P Q so that X^ (M + P Q) comes near X W (see the module).

    Args:
        moments: of X and X^.
        w_IxO: the original map W.
        base_IxO: what stands for it, M.
        q_RxO: where Q starts: independent rows. With the right singular vectors that M dropped first, the first P
            already does as well as these ranks would, but for the ridge.
        ridge: above 0; it holds back a P that is large where X^ hardly reaches.

    Returns:
        P (I, R) and Q (R, O), rows of Q orthonormal. The objective is at most that of the starting Q with its best P,
        and that of P = 0.

    Raises:
        ValueError: for wrong shapes, values that are not finite, rows of Q that depend on each other, or a ridge that
            is not above 0.
    """
    shape = (len(moments.own_IxI), np.shape(w_IxO)[-1])
    for name, values, right in (
        ("W", w_IxO, shape),
        ("what stands for W", base_IxO, shape),
        ("Q", q_RxO, (len(q_RxO), shape[1])),
    ):
        if np.shape(values) != right:
            raise ValueError(f"{name} has the shape {np.shape(values)}; {right} is right")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds values that are not finite; finite ones are right")
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; above 0 is right")
    if len(q_RxO) == 0:
        return np.zeros((shape[0], 0)), np.zeros((0, shape[1]))
    rank = int(np.linalg.matrix_rank(q_RxO))
    if rank < len(q_RxO):
        raise ValueError(f"Q has {rank} independent rows of {len(q_RxO)}; all of them is right")
    q_OxR = linalg.qr(np.transpose(q_RxO), mode="economic")[0]
    lower_IxI, t_IxO = _whitened(moments, w_IxO, base_IxO, ridge)
    length = linalg.norm(t_IxO)
    if length == 0:
        return np.zeros((shape[0], rank)), q_OxR.T
    found = optimize.minimize(
        _objective,
        q_OxR.T.ravel(),
        args=(t_IxO / length,),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": STEPS, "ftol": 1e-10, "gtol": 1e-7},
    )
    q_OxR = linalg.qr(found.x.reshape(rank, shape[1]).T, mode="economic")[0]
    return linalg.solve_triangular(lower_IxI, t_IxO @ q_OxR, trans="T", lower=True), q_OxR.T


def _whitened(moments: Moments, w_IxO: np.ndarray, base_IxO: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns L (I, I), lower triangular, and T (I, O), as in the module; zeros if X^ is."""
    inputs = len(moments.own_IxI)
    strength = ridge * np.trace(moments.own_IxI) / inputs
    target_IxO = -moments.gradient(w_IxO, base_IxO)
    if strength == 0:
        return np.zeros((inputs, inputs)), np.zeros_like(target_IxO)
    lower_IxI = linalg.cholesky(moments.own_IxI + strength * np.eye(inputs), lower=True)
    return lower_IxI, linalg.solve_triangular(lower_IxI, target_IxO, lower=True)


def _objective(q_RO: np.ndarray, t_IxO: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the least of 1/2 ||P Q - T||^2 over P, and its gradient by Q, both flat (R O,).

    With Q = U^T V^T, the columns of V orthonormal and U triangular, the best P is T V U^-T, which leaves
    1/2 (||T||^2 - ||T V||^2). There the gradient by P is 0, so that by Q is P^T (P Q - T) = U^-1 (T V)^T (T V V^T - T).
    """
    outputs = t_IxO.shape[1]
    v_OxR, upper_RxR = linalg.qr(q_RO.reshape(-1, outputs).T, mode="economic")
    tv_IxR = t_IxO @ v_OxR
    p_RxI = linalg.solve_triangular(upper_RxR, tv_IxR.T)
    gradient_RxO = (p_RxI @ tv_IxR) @ v_OxR.T - p_RxI @ t_IxO
    return float(np.vdot(t_IxO, t_IxO) - np.vdot(tv_IxR, tv_IxR)) / 2, gradient_RxO.ravel()
