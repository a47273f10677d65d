"""Parameters of which a file holds fewer numbers than the model has: factors, kept weights, merged experts.

What a reduction needs to know of each matrix, its rank, how many of its weights are kept, whose copy it is, stands in
the header of the file and is counted there.

Axes: L layers stacked by the scan, E experts, I inputs, O outputs, M stored experts; `...` any leading axes.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bvit_jax import pruning
from bvit_jax.model_config import require


@dataclasses.dataclass(frozen=True)
class Reductions:
    """Reductions of a model's parameters by path; a parameter has one at most.

    Attributes:
        ranks: (path, rank of each of its matrices in order) of parameters stored as factors (I, r) and (r, O); the rank
            min(I, O) stands for a matrix that is kept as it is.
        kept: (path, weights that are kept) of pruned parameters, stored as one bit a weight and those that are kept.
        groups: (path of a mixture, for each layer the stored expert of each expert) of merged ones; numbers from 0 in
            order of first appearance, as many stored experts in every layer of a path.
    """

    ranks: tuple[tuple[str, tuple[int, ...]], ...] = ()
    kept: tuple[tuple[str, int], ...] = ()
    groups: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            pairs = getattr(self, field.name)
            for path, numbers in pairs:
                _require_naturals(numbers, path)
            # In one order, so that what is read equals what was written.
            object.__setattr__(self, field.name, tuple(sorted(pairs)))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, each reduction by path."""
        return {field.name: dict(getattr(self, field.name)) for field in dataclasses.fields(self)}


NONE = Reductions()
LARGEST_REST = 1e-5
"""Share of its norm that a float32 product of factors may be off them; its rounding takes a hundredth of it."""


def from_dict(stored: Mapping[str, Any]) -> Reductions:
    """Rebuilds reductions from `Reductions.to_dict`; whether they fit a model is found when it is laid out.

    Raises:
        ConfigError, TypeError, AttributeError, KeyError: if this is no such thing.
    """
    ranks = {path: tuple(found) for path, found in stored["ranks"].items()}
    groups = {path: tuple(tuple(layer) for layer in found) for path, found in stored["groups"].items()}
    require(len(stored) == 3, "storage.reductions", sorted(stored), "of ranks, kept and groups")
    return Reductions(tuple(ranks.items()), tuple(stored["kept"].items()), tuple(groups.items()))


def _require_naturals(numbers: Any, path: str) -> None:
    if isinstance(numbers, tuple):
        for number in numbers:
            _require_naturals(number, path)
        return
    natural = type(numbers) is int and numbers >= 0
    require(natural, f"storage.reductions of {path}", numbers, "an integer, 0 or more")


@dataclasses.dataclass(frozen=True)
class Factors:
    """Ranks of the matrices of one parameter, as in `Reductions.ranks`."""

    ranks: tuple[int, ...]

    def shapes(self, matrix: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Lists the matrices that are stored, in order: of each, (I, r) and (r, O), or (I, O) as it is."""
        inputs, outputs = matrix
        whole = min(matrix)
        pairs = ([matrix] if rank == whole else [(inputs, rank), (rank, outputs)] for rank in self.ranks)
        return tuple(shape for pair in pairs for shape in pair)

    def split(self, matrices: np.ndarray) -> list[np.ndarray]:
        """Returns what is stored of matrices (n, I, O) of these ranks at most: balanced factors by their SVD.

        Raises:
            ValueError: if a matrix has a larger rank: a singular value beyond `LARGEST_REST` of the first.
        """
        parts: list[np.ndarray] = []
        for index, (w_IxO, rank) in enumerate(zip(matrices.astype(np.float64), self.ranks, strict=True)):
            if rank == min(w_IxO.shape):
                parts.append(w_IxO)
                continue
            left_IxM, values_M, right_MxO = np.linalg.svd(w_IxO, full_matrices=False)
            if values_M[rank:].max(initial=0.0) > LARGEST_REST * values_M[0]:
                raise ValueError(f"matrix {index} is of a rank above {rank}")
            root_r = np.sqrt(values_M[:rank])
            parts += [left_IxM[:, :rank] * root_r, root_r[:, None] * right_MxO[:rank]]
        return parts

    def joined(self, parts: Sequence[Any], matrix: tuple[int, int]) -> Iterator[Any]:
        """Undoes `split`, matrix by matrix."""
        remaining = iter(parts)
        for rank in self.ranks:
            first = next(remaining)
            yield first if rank == min(matrix) else first @ next(remaining)


@dataclasses.dataclass(frozen=True)
class Pruned:
    """One parameter of which `kept` weights are stored, and a bit for each weight that says whether it is."""

    kept: int

    def mask_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the bits."""
        return pruning.mask_bytes(math.prod(shape))


@dataclasses.dataclass(frozen=True)
class Merged:
    """One parameter of experts, axes (L, E, ...), of which M experts are stored; `groups` as in `Reductions`."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def stored(self) -> int:
        """M."""
        return max(map(max, self.groups)) + 1

    def gathered(self, leaf: np.ndarray) -> np.ndarray:
        """Returns (L, M, ...) of (L, E, ...).

        Raises:
            ValueError: if experts of one group differ.
        """
        firsts = [[layer.index(group) for group in range(self.stored)] for layer in self.groups]
        kept = np.stack([of_layer[first] for of_layer, first in zip(leaf, firsts, strict=True)])
        if not np.array_equal(self.spread(kept), leaf):
            raise ValueError("experts of one group differ")
        return kept

    def spread(self, kept: Any) -> Any:
        """Returns (L, E, ...) of (L, M, ...)."""
        return np.stack(
            [np.asarray(of_layer)[list(groups)] for of_layer, groups in zip(kept, self.groups, strict=True)]
        )


Reduction = Factors | Pruned | Merged
OF_EXPERTS = ("up_kernel", "up_bias", "down_kernel", "down_bias")
"""Parameters of a mixture that its experts have each for themselves."""


def of_param(path: str, reductions: Reductions) -> Reduction | None:
    """Returns what is said of a parameter; None if nothing is."""
    for name, ranks in reductions.ranks:
        if name == path:
            return Factors(ranks)
    for name, kept in reductions.kept:
        if name == path:
            return Pruned(kept)
    mixture, _, name = path.rpartition("/")
    for ffn, groups in reductions.groups:
        if ffn == mixture and name in OF_EXPERTS:
            return Merged(groups)
    return None


def check(path: str, reduction: Factors | Pruned, number: int, matrix: tuple[int, int], packed: bool) -> None:
    """Checks that a reduction fits its parameter.

    Args:
        path: of the parameter.
        reduction: of it.
        number, matrix: how many matrices it has, and their (I, O).
        packed: whether its numbers are packed integers.

    Raises:
        ConfigError: if it does not.
    """
    if isinstance(reduction, Factors):
        require(len(reduction.ranks) == number, f"ranks of {path}", len(reduction.ranks), f"{number}, one a matrix")
        for rank in reduction.ranks:
            saves = rank * sum(matrix) < math.prod(matrix)
            wanted = f"such that factors are fewer numbers than {matrix}, or {min(matrix)}"
            require(saves or rank == min(matrix), f"rank of {path}", rank, wanted)
        return
    weights = number * math.prod(matrix)
    require(reduction.kept <= weights, f"kept weights of {path}", reduction.kept, f"at most {weights}")
    require(not packed, f"format of {path}", "packed", "floats, as it is pruned")


def check_merged(path: str, reduction: Merged, layers: int, experts: int) -> None:
    """Checks that merged experts are those of a mixture; raises ConfigError if they are not."""
    fits = len(reduction.groups) == layers and all(len(groups) == experts for groups in reduction.groups)
    require(fits, f"groups of {path}", reduction.groups, f"{experts} for each of {layers} layers")
    every = list(range(min(reduction.stored, experts)))
    named = all(list(dict.fromkeys(groups)) == every for groups in reduction.groups)
    require(named, f"groups of {path}", reduction.groups, "numbered by first appearance, as many in all layers")
