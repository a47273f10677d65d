"""Low-rank factors of linear maps, and how many ranks each map keeps of a budget of numbers.

A map y = x W is cut to rank r as W ~ A B with A = W V_r (I, r) and B = V_r^T (r, O), V_r the first r right singular
vectors of S W, where S^T S = C, the second moments X^T X of calibration inputs. Then X A B is the best approximation of
X W of rank r, and its relative output error is sqrt(sum_{i>r} s_i^2 / sum s_i^2), s the singular values of S W. With
C = 1 this is the plain truncated SVD of W.

A map keeps rank r = 0 .. `break_even` as factors, r (I + O) numbers, fewer than its own I O. Any higher rank, up to
min(I, O) = `whole`, means that it is kept whole: W itself, without error.

Axes: I inputs, O outputs, R ranks, M = min(I, O), N rows. All arrays are NumPy float64.

References:
    Activation-aware mixed-rank compression, arXiv 2402.06004; its details are reconstructed here from its abstract.
    Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).
"""

import bisect
import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence

import numpy as np
from scipy import linalg

RIDGE = 1e-6
"""Added to second moments, in mean diagonals: where calibration inputs say nothing, W itself then does."""


def break_even(inputs: int, outputs: int) -> int:
    """Returns the highest rank whose factors are fewer numbers than the map: the largest r with r (I + O) < I O."""
    return (inputs * outputs - 1) // (inputs + outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """A linear map with the directions of its outputs, most energy first.

    Every method that takes a rank raises ValueError for one outside 0 .. `whole`.

    Attributes:
        w_IxO: the map.
        values: (M,), singular values of S W, falling.
        right_OxM: right singular vectors of S W, orthonormal columns.
    """

    w_IxO: np.ndarray
    values: np.ndarray
    right_OxM: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        inputs, outputs = self.w_IxO.shape
        return inputs, outputs

    @property
    def break_even(self) -> int:
        """The highest rank that is kept as factors; 0 where not even rank 1 saves numbers."""
        return break_even(*self.shape)

    @property
    def whole(self) -> int:
        """The rank that stands for a map kept whole."""
        return min(self.shape)

    @functools.cached_property
    def _lost(self) -> np.ndarray:
        """Share of the energy lost at ranks 0 .. M, (M + 1,); 0 everywhere for a map without energy."""
        largest = self.values.max()
        energies = (self.values / largest) ** 2 if largest > 0 else np.zeros_like(self.values)
        tails = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
        return tails / tails[0] if largest > 0 else tails

    def _require(self, rank: int) -> None:
        if not 0 <= rank <= self.whole:
            inputs, outputs = self.shape
            raise ValueError(f"rank {rank} of a map ({inputs}, {outputs}); from 0 to {self.whole} is right")

    def cost(self, rank: int) -> int:
        """Returns how many numbers are stored: r (I + O), or I O for a map kept whole."""
        self._require(rank)
        inputs, outputs = self.shape
        return min(rank * (inputs + outputs), inputs * outputs)

    def energy_lost(self, rank: int) -> float:
        """Returns sum_{i>r} s_i^2 / sum s_i^2; 0 for a map kept whole and for one without energy."""
        self._require(rank)
        return float(self._lost[rank]) if rank <= self.break_even else 0.0

    def energy_kept(self, rank: int) -> float:
        """Returns 1 - `energy_lost`."""
        return 1 - self.energy_lost(rank)

    def output_error(self, rank: int) -> float:
        """Returns the relative error of the outputs, ||S W - S A B|| / ||S W||, by the formula."""
        return math.sqrt(self.energy_lost(rank))

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns A (I, R) = W V_r and B (R, O) = V_r^T.

        Raises:
            ValueError: also for a rank above `break_even`.
        """
        self._require(rank)
        if rank > self.break_even:
            raise ValueError(f"rank {rank} keeps the map whole, without factors; {self.break_even} at most is right")
        v_OxR = self.right_OxM[:, :rank]
        return self.w_IxO @ v_OxR, v_OxR.T

    def matrix(self, rank: int) -> np.ndarray:
        """Returns the map (I, O) that stands for W at a rank: A B, or W itself if it is kept whole."""
        self._require(rank)
        if rank > self.break_even:
            return self.w_IxO
        a_IxR, b_RxO = self.factors(rank)
        return a_IxR @ b_RxO


def plain(w_IxO: np.ndarray) -> Spectrum:
    """Returns the spectrum of W by its own SVD, which knows nothing of the inputs.

    Raises:
        ValueError: for a map that is not a finite matrix with a row and a column at least.
    """
    w_IxO = _checked_map(w_IxO)
    _, values, right_MxO = linalg.svd(w_IxO, full_matrices=False)
    return Spectrum(w_IxO, values, right_MxO.T)


def activation_aware(w_IxO: np.ndarray, c_IxI: np.ndarray, ridge: float = RIDGE) -> Spectrum:
    """Returns the spectrum of S W, S^T S = C + ridge mean(diag C): that of the outputs to calibration inputs.

    It is the eigendecomposition W^T C W = V diag(s^2) V^T, but found by an SVD of S W, which does not square the values
    and so keeps the small ones. Errors by the formula are those under C + ridge mean(diag C), with ridge 0 exactly
    those on the inputs.

    Args:
        w_IxO: the map.
        c_IxI: X^T X of calibration inputs X (N, I), or their mean; its scale makes no difference.
        ridge: 0 or more.

    Raises:
        ValueError: for wrong shapes, values that are not finite, or a negative ridge.
    """
    w_IxO = _checked_map(w_IxO)
    c_IxI = _checked_moments(c_IxI, len(w_IxO))
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; 0 or more is right")
    eigenvalues, vectors_IxI = linalg.eigh(c_IxI)
    # What rounding leaves of eigenvalues that are zero would be taken for inputs.
    noise = len(w_IxO) * np.finfo(np.float64).eps * max(eigenvalues[-1], 0.0)
    lengths = np.sqrt(np.where(eigenvalues > noise, eigenvalues, 0.0) + ridge * np.trace(c_IxI) / len(w_IxO))
    _, values, right_MxO = linalg.svd(lengths[:, None] * (vectors_IxI.T @ w_IxO), full_matrices=False)
    return Spectrum(w_IxO, values, right_MxO.T)


def output_error(w_IxO: np.ndarray, approx_IxO: np.ndarray, c_IxI: np.ndarray) -> float:
    """Returns ||X (W - W')|| / ||X W|| as measured under C = X^T X: sqrt(tr(D^T C D) / tr(W^T C W)), D = W - W'.

    Args:
        w_IxO: the map W.
        approx_IxO: what stands for it, W'.
        c_IxI: second moments of the inputs.

    Returns:
        0 for equal outputs; infinity where only those of W are zero.

    Raises:
        ValueError: for wrong shapes or values that are not finite.
    """
    w_IxO, approx_IxO = _checked_map(w_IxO), _checked_map(approx_IxO)
    if approx_IxO.shape != w_IxO.shape:
        raise ValueError(f"the approximation is {approx_IxO.shape}; {w_IxO.shape} is right, as the map")
    c_IxI = _checked_moments(c_IxI, len(w_IxO))
    difference_IxO = w_IxO - approx_IxO
    wrong = max(float(np.vdot(difference_IxO, c_IxI @ difference_IxO)), 0.0)
    energy = max(float(np.vdot(w_IxO, c_IxI @ w_IxO)), 0.0)
    if energy == 0:
        return 0.0 if wrong == 0 else math.inf
    return math.sqrt(wrong / energy)


def numbers(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> int:
    """Returns how many numbers maps store at ranks, in all."""
    return sum(spectrum.cost(rank) for spectrum, rank in zip(spectra, ranks, strict=True))


def least(spectra: Sequence[Spectrum]) -> int:
    """Returns the smallest budget: every map at rank 1, or whole where that is no more."""
    return sum(spectrum.cost(1) for spectrum in spectra)


def equal_ranks(spectra: Sequence[Spectrum], budget: int) -> tuple[int, ...]:
    """Gives every map the same share of its numbers, whatever their values.

    The ranks are share x I O / (I + O), rounded down but 1 at least, for the largest share whose numbers the budget
    holds. What is left then goes to single ranks, map by map in their order, round and round, while they fit.

    Returns:
        A rank for each map, 1 .. `break_even`, or `whole`; their numbers, in all, are `budget` at most.

    Raises:
        ValueError: for a budget below `least`.
    """
    _require_budget(spectra, budget)
    # The shares at which the ranks of a map rise. Quotients of integers are rounded once: equal ones are equal.
    rises = [np.arange(1, each.break_even + 1) * sum(each.shape) / math.prod(each.shape) for each in spectra]

    def at(share: float) -> list[int]:
        counts = (int(np.searchsorted(of_map, share, side="right")) for of_map in rises)
        return [max(1, count) if each.break_even else each.whole for each, count in zip(spectra, counts, strict=True)]

    shares = [0.0, *np.unique(np.concatenate([np.zeros(0), *rises])).tolist()]
    first_too_large = bisect.bisect_right(shares, budget, key=lambda share: numbers(spectra, at(share)))
    ranks = at(shares[first_too_large - 1])
    spare = budget - numbers(spectra, ranks)
    given = True
    while given:
        given = False
        for index, each in enumerate(spectra):
            higher = _next(each, ranks[index])
            more = each.cost(higher) - each.cost(ranks[index])
            if 0 < more <= spare:
                ranks[index], spare, given = higher, spare - more, True
    return tuple(ranks)


def mixed_ranks(spectra: Sequence[Spectrum], budget: int) -> tuple[int, ...]:
    """Gives ranks to the maps where they keep most energy, each map's counted as a share of its own.

    From break-even, ranks are taken one by one from the map that loses least energy per number saved, until the budget
    holds. Single values only fall, so these are the ranks of most energy in all (whole maps aside) that the numbers
    then stored can buy. What is left goes, while anything fits, to the single rank, or to the map made whole from where
    it stands, that gains most energy per number. Equals go by the order of the maps.

    Returns:
        A rank for each map, 1 .. `break_even`, or `whole`; their numbers, in all, are `budget` at most.

    Raises:
        ValueError: for a budget below `least`.
    """
    _require_budget(spectra, budget)
    ranks = [each.break_even or each.whole for each in spectra]
    spare = budget - numbers(spectra, ranks)

    def cheapest(index: int) -> list[tuple[float, int]]:
        each, rank = spectra[index], ranks[index]
        lost = each.energy_lost(rank - 1) - each.energy_lost(rank)
        return [(lost / sum(each.shape), index)] if 1 < rank <= each.break_even else []

    heap = [entry for index in range(len(spectra)) for entry in cheapest(index)]
    heapq.heapify(heap)
    while spare < 0:
        _, index = heapq.heappop(heap)
        ranks[index] -= 1
        spare += sum(spectra[index].shape)
        for entry in cheapest(index):
            heapq.heappush(heap, entry)
    _use_up(spectra, ranks, spare)
    return tuple(ranks)


def _use_up(spectra: Sequence[Spectrum], ranks: list[int], spare: int) -> None:
    """Raises ranks, in place, by the step that gains most energy per number, while one fits into `spare` numbers."""

    def dearest(index: int) -> list[tuple[float, int, int, int]]:
        each, rank = spectra[index], ranks[index]
        steps = [(higher, each.cost(higher) - each.cost(rank)) for higher in (_next(each, rank), each.whole)]
        fitting = [(higher, more) for higher, more in steps if 0 < more <= spare]
        lost = each.energy_lost(rank)
        return sorted(((each.energy_lost(higher) - lost) / more, index, higher, more) for higher, more in fitting)[:1]

    heap = [entry for index in range(len(spectra)) for entry in dearest(index)]
    heapq.heapify(heap)
    while heap:
        _, index, higher, more = heapq.heappop(heap)
        if more <= spare:
            ranks[index], spare = higher, spare - more
        for entry in dearest(index):
            heapq.heappush(heap, entry)


def _next(spectrum: Spectrum, rank: int) -> int:
    return rank + 1 if rank < spectrum.break_even else spectrum.whole


def _require_budget(spectra: Sequence[Spectrum], budget: int) -> None:
    if budget < least(spectra):
        raise ValueError(f"a budget of {budget} numbers is too small; {least(spectra)} or more is right, for rank 1")


def _checked_map(w_IxO: np.ndarray) -> np.ndarray:
    w_IxO = np.asarray(w_IxO, np.float64)
    if w_IxO.ndim != 2 or 0 in w_IxO.shape:
        raise ValueError(f"a map has the shape {w_IxO.shape}; (inputs, outputs) is right, 1 of each at least")
    if not np.isfinite(w_IxO).all():
        raise ValueError("a map holds values that are not finite; finite ones are right")
    return w_IxO


def _checked_moments(c_IxI: np.ndarray, inputs: int) -> np.ndarray:
    c_IxI = np.asarray(c_IxI, np.float64)
    if c_IxI.shape != (inputs, inputs):
        raise ValueError(f"second moments have the shape {c_IxI.shape}; {(inputs, inputs)} is right, for the map")
    if not np.isfinite(c_IxI).all():
        raise ValueError("second moments hold values that are not finite; finite ones are right")
    return c_IxI
