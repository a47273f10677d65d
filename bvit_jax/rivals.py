"""Compressions beside what was trained: accuracy against the bytes of the file, and which are beaten by none.

A rival is a case of a sweep as it was trained, or a case compressed in one way. Its bytes are those of its file.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bvit_jax import comparison, compress_request, compressed, intervals, memory
from bvit_jax.compress_request import STEPS, Request
from bvit_jax.model_config import require
from bvit_jax.sweep import ResultRow, Trial

AS_TRAINED = "as trained"
Of = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
"""Values of a label, each with the fields of the compressions (`compress_request.Request`) of its trials."""


@dataclasses.dataclass(frozen=True)
class RivalRow:
    """One rival with one seed; None where it has not got that far.

    Attributes:
        where: the other labels and settings (`comparison.places`).
        case: value of the label.
        compression: `Request.name`, or `AS_TRAINED`.
        method, keep, bits: of the request; those of training read `-`, 1 and 32.
        seed, data_seed: of the run and of its images.
        numbers: of the model that are stored.
        bytes_full, bytes_full_ffn: of the file, and of its FFNs or mixture layers.
        test_accuracy, val_accuracy: of what is in the file.
        accuracy_before: test accuracy of the run as trained.
        output_error, seconds: as in `compressed.Result`.
        trial: as in `ResultRow`.
    """

    where: str
    case: str
    compression: str
    method: str
    keep: float
    bits: int
    seed: int
    data_seed: int
    numbers: int | None
    bytes_full: int | None
    bytes_full_ffn: int | None
    test_accuracy: float | None
    val_accuracy: float | None
    accuracy_before: float | None
    output_error: float | None
    seconds: float | None
    trial: str


@dataclasses.dataclass(frozen=True)
class Rival:
    """What the finished seeds of one rival say together, at one place.

    Attributes:
        where, case, compression, method, bits: as in `RivalRow`.
        seeds: how many.
        bytes_full, bytes_full_ffn: means; headers differ by some bytes from seed to seed.
        accuracy_mean, accuracy_interval: of the test accuracy; half its 95 % confidence interval, nan for one seed.
        lost_mean, lost_interval: likewise, of what compressing takes from it, seed by seed; 0 as trained.
        best: no other at this place has as few bytes and as high a mean and one of them better.
    """

    where: str
    case: str
    compression: str
    method: str
    bits: int
    seeds: int
    bytes_full: float
    bytes_full_ffn: float
    accuracy_mean: float
    accuracy_interval: float
    lost_mean: float
    lost_interval: float
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the mixed-rank method against the one before, at equal numbers, by the seeds that both have finished.

    Attributes:
        where, case: as in `RivalRow`.
        keep, bits: of both.
        method, before: the two steps.
        seeds: how many.
        gained, interval: mean difference in test accuracy, and half its 95 % confidence interval, None for one seed.
    """

    where: str
    case: str
    keep: float
    bits: int
    method: str
    before: str
    seeds: int
    gained: float
    interval: float | None


def requested(trials: Sequence[Trial], label: str, of: Of) -> list[Trial]:
    """Returns trials with the compressions that are asked for.

    Args:
        trials: of a sweep.
        label: of its cases.
        of: for some of its values, what is to be done with their trials.

    Raises:
        ConfigError: if the trials lack the label or a value, or cannot be compressed as asked.
    """
    named = sorted({name for trial in trials for name in trial.labels})
    require(label in named, "compress.label", label, " or ".join(named) or "absent, as there are no cases")
    wanted = _wanted(of, label, sorted({trial.labels[label] for trial in trials}))
    found = [dataclasses.replace(trial, compressions=wanted.get(trial.labels[label], ())) for trial in trials]
    models = ((trial.config.model, trial.config.data.num_train, trial.compressions) for trial in found)
    for model, num_train, requests in dict.fromkeys(models):  # once for all seeds
        for request in requests:
            compress_request.check(model, request, num_train)
    return found


def _wanted(of: Of, label: str, values: Sequence[str]) -> dict[str, tuple[Request, ...]]:
    """Returns the requests by value of the label."""
    wanted: dict[str, tuple[Request, ...]] = {}
    for pair in of:
        paired = not isinstance(pair, str) and len(pair) == 2 and not isinstance(pair[1], str | Mapping)
        require(paired, "compress.of", pair, f"a value of {label} and a sequence of requests")
        case, fields = pair
        require(case in values, "compress.of", case, " or ".join(values))
        require(case not in wanted, "compress.of", case, "there once, with all its requests")
        requests = tuple(compress_request.from_dict(each) for each in fields)
        names = [request.name for request in requests]
        require(len(set(names)) == len(names), "compress.of", names, "of requests that differ in method, keep or bits")
        wanted[case] = requests
    return wanted


def rows(trials: Sequence[Trial], results: Sequence[ResultRow], label: str) -> list[RivalRow]:
    """Lists all rivals, seed by seed, in the order of the trials; a trial at several places has a row at each.

    Args:
        trials: of a sweep.
        results: theirs.
        label: which tells the cases of a place apart.
    """
    found = []
    for trial, result in zip(trials, results, strict=True):
        for where in comparison.places(trial, label):
            found.append(_as_trained(trial, result, where, trial.labels[label]))
            for request in trial.compressions:
                made = trial.compressed(request)
                found.append(_row(trial, where, trial.labels[label], request, made))
    return found


def _as_trained(trial: Trial, result: ResultRow, where: str, case: str) -> RivalRow:
    ledger = memory.ledger(trial.config)
    return RivalRow(
        where=where,
        case=case,
        compression=AS_TRAINED,
        method="-",
        keep=1.0,
        bits=32,
        seed=trial.config.seed,
        data_seed=trial.config.data.seed,
        numbers=ledger.params,
        bytes_full=ledger.bytes_full,
        bytes_full_ffn=ledger.bytes_full_ffn,
        test_accuracy=result.test_accuracy,
        val_accuracy=result.val_accuracy,
        accuracy_before=result.test_accuracy,
        output_error=None,
        seconds=None,
        trial=result.trial,
    )


def _row(trial: Trial, where: str, case: str, request: Request, made: compressed.Result | None) -> RivalRow:
    names = ("numbers", "bytes_full", "bytes_full_ffn", "test_accuracy", "val_accuracy", "accuracy_before")
    known: dict[str, Any] = {name: getattr(made, name, None) for name in (*names, "output_error", "seconds")}
    return RivalRow(
        where=where,
        case=case,
        compression=request.name,
        method=request.method,
        keep=request.keep,
        bits=request.bits,
        seed=trial.config.seed,
        data_seed=trial.config.data.seed,
        trial=trial.config.digest(),
        **known,
    )


def summarise(found: Sequence[RivalRow]) -> list[Rival]:
    """Groups finished rivals by everything but the seeds, in order, and marks at each place those beaten by none."""
    groups: dict[tuple[str, str, str], list[RivalRow]] = {}
    for row in found:
        if row.test_accuracy is not None:
            groups.setdefault((row.where, row.case, row.compression), []).append(row)
    rivals = [_summary(group) for group in groups.values()]
    return [dataclasses.replace(rival, best=not any(_beats(other, rival) for other in rivals)) for rival in rivals]


def _summary(group: Sequence[RivalRow]) -> Rival:
    def values(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in group], np.float64)

    accuracy, lost = values("test_accuracy"), values("accuracy_before") - values("test_accuracy")
    return Rival(
        where=group[0].where,
        case=group[0].case,
        compression=group[0].compression,
        method=group[0].method,
        bits=group[0].bits,
        seeds=len(group),
        bytes_full=float(values("bytes_full").mean()),
        bytes_full_ffn=float(values("bytes_full_ffn").mean()),
        accuracy_mean=float(accuracy.mean()),
        accuracy_interval=intervals.half_interval(accuracy),
        lost_mean=float(lost.mean()),
        lost_interval=intervals.half_interval(lost),
    )


def _beats(other: Rival, rival: Rival) -> bool:
    if other.where != rival.where:
        return False
    no_worse = other.bytes_full <= rival.bytes_full and other.accuracy_mean >= rival.accuracy_mean
    return no_worse and (other.bytes_full, other.accuracy_mean) != (rival.bytes_full, rival.accuracy_mean)


def steps(found: Sequence[RivalRow]) -> list[Step]:
    """Compares the steps of the mixed-rank method, each with the one before, at equal place, case and budget."""
    scores: dict[tuple[str, str, float, int], dict[str, dict[tuple[int, int], float]]] = {}
    for row in found:
        if row.test_accuracy is not None and row.method in STEPS:
            of_place = scores.setdefault((row.where, row.case, row.keep, row.bits), {})
            of_place.setdefault(row.method, {})[row.seed, row.data_seed] = row.test_accuracy
    compared = []
    for place, by_method in scores.items():
        for before, method in itertools.pairwise(STEPS):
            own, earlier = by_method.get(method, {}), by_method.get(before, {})
            seeds = sorted(own.keys() & earlier.keys())
            if seeds:
                gained = np.array([own[seed] - earlier[seed] for seed in seeds])
                half = intervals.half_interval(gained) if len(seeds) > 1 else None
                compared.append(Step(*place, method, before, len(seeds), float(gained.mean()), half))
    return compared
