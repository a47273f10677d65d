"""Differences between the cases of a sweep, seed by seed, with confidence intervals (`bvit_jax.intervals`).

Trials of equal seeds, of the run and of its images, share images, their order and what is drawn for them, so that their
difference varies less than either.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from bvit_jax import intervals
from bvit_jax.model_config import require
from bvit_jax.sweep import ResultRow, Trial

EVERYWHERE = "all places"
"""Where a comparison stands of the means over all places, seed by seed."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A case against another that differs in one label, by the seeds that both have finished.

    Attributes:
        where: the other labels and settings, the same for both; or `EVERYWHERE`.
        case, baseline: the label's values.
        num_experts: of the case.
        seeds: how many both have finished, at all places if all are meant.
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
        ConfigError: if the trials lack the label, baselines are not a non-empty sequence of its values, or trials of
            one case share their seed with other images: they are no independent samples, and an interval would be too
            narrow.
    """
    named = sorted({name for trial in trials for name in trial.labels})
    require(label in named, "compare.label", label, " or ".join(named) or "absent, as there are no cases")
    values = list(dict.fromkeys(trial.labels[label] for trial in trials))
    names = isinstance(baselines, Sequence) and not isinstance(baselines, str) and len(baselines) > 0
    require(names, "compare.baselines", baselines, f"a non-empty sequence of {' or '.join(values)}")
    for baseline in baselines:
        require(baseline in values, "compare.baselines", baseline, " or ".join(values))
    ((kind, seed), times), *_ = Counter((trial.kind, trial.config.seed) for trial in trials).most_common(1)
    images = [trial.config.data.seed for trial in trials if (trial.kind, trial.config.seed) == (kind, seed)]
    require(times == 1, "data.seed", images, f"one for seed {seed}, or -1, the seed of the run, to compare cases")


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
        those of a baseline, for each case that stands at all of its places, if there are several, one of the means over
        places: a sample for every seed that both have finished at all of them, since trials of one seed may share
        images from place to place.
    """
    finished: dict[str, dict[str, dict[tuple[int, int], ResultRow]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        if row.test_accuracy is not None:
            for place in places(trial, label):
                of_case = finished.setdefault(trial.labels[label], {}).setdefault(place, {})
                of_case[trial.config.seed, trial.config.data.seed] = row
    found: list[Comparison] = []
    for baseline in baselines:
        others = finished.get(baseline, {})
        wanted = {place for trial in trials if trial.labels[label] == baseline for place in places(trial, label)}
        pairs_of = {case: _paired(own, others) for case, own in finished.items() if case != baseline}
        for place in dict.fromkeys(itertools.chain(*finished.values())):
            for case, by_place in pairs_of.items():
                if by_place.get(place):
                    found.append(_compared(place, case, baseline, [[pair] for pair in by_place[place].values()]))
        for case, by_place in pairs_of.items():
            if len(by_place) > 1 and by_place.keys() == wanted:
                seeds = sorted(set.intersection(*(set(of_place) for of_place in by_place.values())))
                together = [[of_place[seed] for of_place in by_place.values()] for seed in seeds]
                found += [_compared(EVERYWHERE, case, baseline, together)] if together else []
    return found


_Pair = tuple[ResultRow, ResultRow]


def _paired(
    own: Mapping[str, Mapping[tuple[int, int], ResultRow]], others: Mapping[str, Mapping[tuple[int, int], ResultRow]]
) -> dict[str, dict[tuple[int, int], _Pair]]:
    """Returns for each place the results of both by seed."""
    return {
        place: {seed: (results[seed], others[place][seed]) for seed in sorted(results.keys() & others[place].keys())}
        for place, results in own.items()
        if place in others
    }


def places(trial: Trial, label: str) -> list[str]:
    """Names all that a trial was given by its case and the grid, but for its value of `label` and its seeds.

    A run that several values of the grid mean (a dense model, of any number of experts) stands at the place of each.
    """
    others = [value for name, value in trial.labels.items() if name != label]
    seeds = ("seed", "data.seed")
    choices = (trial.chosen, *trial.also)
    grids = [[f"{name}={value}" for name, value in each.items() if name not in seeds] for each in choices]
    return list(dict.fromkeys(" ".join(others + grid) for grid in grids))


def _compared(place: str, case: str, baseline: str, samples: Sequence[Sequence[_Pair]]) -> Comparison:
    """Compares by independent samples, one a seed: each the mean difference of its pairs."""

    def differences(name: str) -> np.ndarray:
        means = [np.mean([getattr(own, name) - getattr(other, name) for own, other in pairs]) for pairs in samples]
        return np.array(means, np.float64)

    def interval(values: np.ndarray) -> float | None:
        return intervals.half_interval(values) if len(values) > 1 else None

    accuracy, nll, validation = (differences(name) for name in ("test_accuracy", "test_nll", "val_accuracy"))
    return Comparison(
        where=place,
        case=case,
        baseline=baseline,
        num_experts=samples[0][0][0].num_experts,
        seeds=len(samples),
        accuracy=float(accuracy.mean()),
        accuracy_interval=interval(accuracy),
        nll=float(nll.mean()),
        nll_interval=interval(nll),
        val_accuracy=float(validation.mean()),
        val_accuracy_interval=interval(validation),
        baseline_accuracy=float(np.mean([other.test_accuracy for pairs in samples for _, other in pairs])),
    )
