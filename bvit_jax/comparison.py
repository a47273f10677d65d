"""Differences between the cases of a sweep, seed by seed, with confidence intervals (`bvit_jax.intervals`).

Trials of equal seeds, of the run and of its images, share images, their order and what is drawn for them, so that their
difference varies less than either.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bvit_jax import intervals
from bvit_jax.model_config import require
from bvit_jax.sweep import ResultRow, Trial

EVERYWHERE = "all places"
"""Where a comparison stands that takes the pairs of all places together, as independent of each other."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A case against another that differs in one label, by the seeds that both have finished.

    Attributes:
        where: the other labels and settings, the same for both; or `EVERYWHERE`.
        case, baseline: the label's values.
        num_experts: of the case.
        seeds: pairs of trials, of one place or of all.
        accuracy, nll, val_accuracy: mean difference in test accuracy and NLL and in validation accuracy, case minus
            baseline; accuracies as shares.
        accuracy_interval, nll_interval, val_accuracy_interval: half the width of their confidence intervals; None for a
            single pair.
        baseline_accuracy: mean test accuracy of the baseline over these seeds.
    """

    where: str
    case: str
    baseline: str
    num_experts: int
    seeds: int
    accuracy: float
    accuracy_interval: float | None
    nll: float
    nll_interval: float | None
    val_accuracy: float
    val_accuracy_interval: float | None
    baseline_accuracy: float


def check(label: str, baselines: Sequence[str], trials: Sequence[Trial]) -> None:
    """Checks what is to be compared before anything runs.

    Raises:
        ConfigError: if the trials lack the label, a baseline is not one of its values, or trials of one case share
            their seed with other images: they are no independent samples, and an interval would be too narrow.
    """
    named = sorted({name for trial in trials for name in trial.labels})
    require(label in named, "compare.label", label, " or ".join(named) or "absent, as there are no cases")
    values = list(dict.fromkeys(trial.labels[label] for trial in trials))
    names = isinstance(baselines, Sequence) and not isinstance(baselines, str) and len(baselines) > 0
    require(names, "compare.baselines", baselines, f"a non-empty sequence of {' or '.join(values)}")
    for baseline in baselines:
        require(baseline in values, "compare.baselines", baseline, " or ".join(values))
    (_, times), *_ = Counter((trial.group, trial.config.seed) for trial in trials).most_common(1)
    require(times == 1, "grid.data.seed", f"{times} values", "one, or -1, the seed of the run, to compare cases")


def compare(
    trials: Sequence[Trial], rows: Sequence[ResultRow], label: str, baselines: Sequence[str]
) -> list[Comparison]:
    """Compares every case with each baseline, seed by seed.

    Args:
        trials: of a sweep.
        rows: their results.
        label: in which a case and its baseline may differ; in all other labels and settings they are equal.
        baselines: values of the label.

    Returns:
        A row for each case and place with a seed in common, in the order of the trials, baseline by baseline. Behind
        those of a baseline, one of all pairs of a case that stands at several places, if no trial is in two pairs.
    """
    finished: dict[tuple[str, str], dict[tuple[int, int], ResultRow]] = {}
    for trial, row in zip(trials, rows, strict=True):
        if row.status == "ok":
            for place in places(trial, label):
                seeds_of = finished.setdefault((place, trial.labels[label]), {})
                seeds_of[trial.config.seed, trial.config.data.seed] = row
    found = []
    for baseline in baselines:
        pairs_of: dict[str, list[list[tuple[ResultRow, ResultRow]]]] = {}
        for (place, case), results in finished.items():
            others = finished.get((place, baseline), {})
            pairs = [(results[seed], others[seed]) for seed in sorted(results.keys() & others.keys())]
            if case != baseline and pairs:
                found.append(_compared(place, case, baseline, pairs))
                pairs_of.setdefault(case, []).append(pairs)
        for case, by_place in pairs_of.items():
            everywhere = list(itertools.chain(*by_place))
            if len(by_place) > 1 and _each_once(everywhere):
                found.append(_compared(EVERYWHERE, case, baseline, everywhere))
    return found


def _each_once(pairs: Sequence[tuple[ResultRow, ResultRow]]) -> bool:
    """Says whether no trial is in two pairs, which would then not be independent."""
    trials = [row.trial for pair in pairs for row in pair]
    return len(set(trials)) == len(trials)


def places(trial: Trial, label: str) -> list[str]:
    """Names all that a trial was given by its case and the grid, but for its value of `label` and its seeds.

    A run that several values of the grid mean (a dense model, of any number of experts) stands at the place of each.
    """
    others = [value for name, value in trial.labels.items() if name != label]
    seeds = ("seed", "data.seed")
    grids = [[f"{name}={value}" for name, value in each.items() if name not in seeds] for each in _choices(trial)]
    return list(dict.fromkeys(" ".join(others + grid) for grid in grids))


def _choices(trial: Trial) -> tuple[Mapping[str, Any], ...]:
    return (trial.chosen, *trial.also)


def _compared(place: str, case: str, baseline: str, pairs: Sequence[tuple[ResultRow, ResultRow]]) -> Comparison:
    def differences(name: str) -> np.ndarray:
        return np.array([getattr(own, name) - getattr(other, name) for own, other in pairs], np.float64)

    def interval(values: np.ndarray) -> float | None:
        return intervals.half_interval(values) if len(values) > 1 else None

    accuracy, nll, validation = (differences(name) for name in ("test_accuracy", "test_nll", "val_accuracy"))
    return Comparison(
        where=place,
        case=case,
        baseline=baseline,
        num_experts=pairs[0][0].num_experts,
        seeds=len(pairs),
        accuracy=float(accuracy.mean()),
        accuracy_interval=interval(accuracy),
        nll=float(nll.mean()),
        nll_interval=interval(nll),
        val_accuracy=float(validation.mean()),
        val_accuracy_interval=interval(validation),
        baseline_accuracy=float(np.mean([other.test_accuracy for _, other in pairs])),
    )
