import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bvit_jax import compress_request, compressed, files, intervals, memory, rivals, sweep
from bvit_jax.compress_request import Request
from bvit_jax.model_config import ConfigError
from bvit_jax.rivals import AS_TRAINED, RivalRow
from tests.conftest import make_config
from tests.test_comparison import scored

CASES = {"dense": "dense,4", "stored": "standard,4", "rotated": "butterfly,4"}
SVD = {"method": "svd", "keep": 0.5}
Q8 = {"method": "quantise"}


def make(kind: str, seed: int = 0, bed: str = "few", directory: Path = Path("absent"), **chosen: object) -> sweep.Trial:
    config = make_config(CASES[kind], seed=seed, batch_size=len(bed))  # runs of one bed are no other's
    labels = {"bed": bed, "kind": kind}
    return sweep.Trial(config, directory / config.digest(), f"{bed} {kind}", labels, {"seed": seed} | chosen)


def compress(trial: sweep.Trial, request: Request, **changes: object) -> compressed.Result:
    """Leaves the result that `compressed.run_all` would."""
    sizes = {"numbers_before": 100, "numbers": 50, "bytes_before": 4000, "bytes_full": 2000, "bytes_full_ffn": 1500}
    scores = {"accuracy_before": 0.75, "test_accuracy": 0.5, "nll_before": 1.0, "test_nll": 1.5}
    others = {"val_accuracy_before": 0.8, "val_accuracy": 0.625, "output_error": 0.125, "experts": None, "seconds": 2.5}
    about = {"config_digest": trial.config.digest(), "step": 6, "family": trial.config.model.family}
    fields: dict[str, Any] = dataclasses.asdict(request) | about | sizes | scores | others | changes
    found = compressed.Result(**fields)
    directory = compressed.directory_of(trial.directory, request)
    directory.mkdir(parents=True)
    files.write_json(directory / compressed.RESULT_FILE, dataclasses.asdict(found))
    with (directory / compressed.MODEL_FILE).open("wb") as model:
        model.truncate(found.bytes_full)
    return found


def test_every_value_of_the_label_gets_its_requests_in_order() -> None:
    trials = [make(kind, seed) for seed in (0, 1) for kind in CASES]
    found = rivals.requested(trials, "kind", (("stored", [Q8, SVD]), ("rotated", (Q8,))))
    wanted = {"dense": (), "stored": (Request("quantise", bits=8), Request("svd", 0.5))}
    wanted["rotated"] = (Request("quantise", bits=8),)
    assert [trial.compressions for trial in found] == 2 * list(wanted.values())
    assert [dataclasses.replace(trial, compressions=()) for trial in found] == trials


def of_dense(*requests: object) -> Any:
    return (("dense", requests),)


@pytest.mark.parametrize(
    ("label", "of", "message"),
    [
        ("kin", of_dense(SVD), "compress.label = 'kin': it must be bed or kind"),
        ("kind", (("sparse", [SVD]),), "compress.of = 'sparse': it must be dense or rotated or stored"),
        ("kind", ("dense",), "compress.of = 'dense': it must be a value of kind and a sequence of requests"),
        ("kind", ("ab",), "compress.of = 'ab': it must be a value of kind and a sequence of requests"),
        ("kind", (("dense", SVD),), f"compress.of = {('dense', SVD)}: it must be a value of kind and a sequence"),
        ("kind", (("dense", "svd"),), "compress.of = ('dense', 'svd'): it must be a value of kind and a sequence"),
        ("kind", 2 * of_dense(SVD), "compress.of = 'dense': it must be there once, with all its requests"),
        (
            "kind",
            of_dense(SVD | {"rank": 3}),
            "compress = 'rank': it must be method or keep or bits or calibration_images",
        ),
        ("kind", of_dense({"keep": 0.5}), "compress = {'keep': 0.5}: it must be with a method"),
        ("kind", of_dense({"method": "magic"}), "method = 'magic': it must be rounding or quantise or prune or svd"),
        (
            "kind",
            of_dense(SVD, SVD | {"calibration_images": 300}),
            "compress.of = ['svd_0.5', 'svd_0.5']: it must be of requests that differ in method, keep or bits",
        ),
        (
            "kind",
            (("rotated", [SVD]),),
            "model.family = 'butterfly': it must be dense or standard for svd, which works on float matrices of its",
        ),
        ("kind", of_dense({"method": "merge", "keep": 0.5}), "model.family = 'dense': it must be standard for merge"),
        (
            "kind",
            of_dense(Q8 | {"calibration_images": 1201}),
            "calibration_images = 1201: it must be at most 1200, the images of the training split",
        ),
        (
            # 17 tokens an image, and the second map of the FFN has 128 inputs: 7 x 17 = 119 are too few.
            "kind",
            of_dense(Q8 | {"calibration_images": 7}),
            "calibration_images = 7: it must be at least 8: an image has 17 tokens, and the widest map 128 inputs",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(label: str, of: Any, message: str) -> None:
    trials = [make(kind) for kind in CASES]
    with pytest.raises(ConfigError) as caught:
        rivals.requested(trials, label, of)
    assert str(caught.value).startswith(message)


def test_a_budget_that_cannot_be_met_is_refused_with_what_can() -> None:
    trials = [dataclasses.replace(make("dense"), config=make_config("dense", model__num_layers=2))]
    every = compress_request.numbers(trials[0].config.model)
    # Of two layers: query, key, value and out of 64 x 64, up of 64 x 128 and down of 128 x 64; rank 1 takes the sum of
    # their sides, and what else there is cannot be compressed.
    in_maps = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    least = every - in_maps + 2 * (4 * (64 + 64) + 2 * (64 + 128))
    share = math.ceil(1000 * least / every) / 1000
    message = f"keep = 0.01: it must be at least {share:g}: {least:,} of {every:,} numbers cannot be saved"
    with pytest.raises(ConfigError) as caught:
        rivals.requested(trials, "kind", of_dense(SVD | {"keep": 0.01}))
    assert str(caught.value) == message
    assert rivals.requested(trials, "kind", of_dense(SVD | {"keep": share}))


def test_one_of_several_models_that_cannot_is_enough() -> None:
    small = make("dense")
    large = dataclasses.replace(small, config=make_config("dense", model__d_ff=1024))
    of = of_dense(Q8 | {"calibration_images": 10})
    rivals.requested([small], "kind", of)
    with pytest.raises(ConfigError, match=r"calibration_images = 10: it must be at least 61: an image has 17 tokens"):
        rivals.requested([small, large], "kind", of)


def test_trials_without_cases_have_no_label() -> None:
    with pytest.raises(ConfigError, match=r"compress\.label = 'kind': it must be absent, as there are no cases"):
        rivals.requested([sweep.Trial(make_config(), Path("absent"))], "kind", of_dense(SVD))


def test_the_rows_of_a_trial_are_as_trained_and_its_compressions(tmp_path: Path) -> None:
    [trial] = rivals.requested([make("dense", 3, directory=tmp_path)], "kind", of_dense(SVD, Q8))
    made = compress(trial, trial.compressions[0], accuracy_before=0.7)
    trained, svd, q8 = rivals.rows([trial], [scored(trial, 0.75)], "kind")
    ledger = memory.ledger(trial.config)
    assert trained == RivalRow(
        where="few",
        case="dense",
        compression=AS_TRAINED,
        method="-",
        keep=1.0,
        bits=32,
        seed=3,
        data_seed=0,
        numbers=ledger.params,
        bytes_full=ledger.bytes_full,
        bytes_full_ffn=ledger.bytes_full_ffn,
        test_accuracy=0.75,
        val_accuracy=0.375,
        accuracy_before=0.75,
        output_error=None,
        seconds=None,
        trial=trial.config.digest(),
    )
    assert svd == RivalRow(
        where="few",
        case="dense",
        compression="svd_0.5",
        method="svd",
        keep=0.5,
        bits=32,
        seed=3,
        data_seed=0,
        numbers=made.numbers,
        bytes_full=made.bytes_full,
        bytes_full_ffn=made.bytes_full_ffn,
        test_accuracy=0.5,
        val_accuracy=0.625,
        accuracy_before=0.7,
        output_error=0.125,
        seconds=2.5,
        trial=trial.config.digest(),
    )
    # Not there yet.
    assert (q8.compression, q8.bits, q8.numbers, q8.bytes_full, q8.test_accuracy) == ("quantise_8bit", 8, *[None] * 3)
    assert (q8.accuracy_before, q8.output_error, q8.seconds) == (None, None, None)


def test_what_is_not_trained_has_its_size_alone() -> None:
    [trial] = rivals.requested([make("stored")], "kind", (("stored", [SVD]),))
    trained, svd = rivals.rows([trial], [sweep.result_row(trial)], "kind")
    assert (trained.test_accuracy, trained.accuracy_before) == (None, None)
    assert trained.bytes_full == memory.ledger(trial.config).bytes_full
    assert (svd.bytes_full, svd.test_accuracy) == (None, None)
    assert rivals.summarise([trained, svd]) == []


def test_a_trial_at_two_places_has_its_rows_at_both(tmp_path: Path) -> None:
    sizes = [{"model.num_experts": number} for number in (4, 8)]
    trial = dataclasses.replace(make("dense", directory=tmp_path, **sizes[0]), also=(sizes[1],))
    [trial] = rivals.requested([trial], "kind", of_dense(SVD))
    compress(trial, trial.compressions[0])
    found = rivals.rows([trial], [scored(trial, 0.75)], "kind")
    few = [f"few model.num_experts={number}" for number in (4, 8)]
    assert [(row.where, row.compression, row.test_accuracy) for row in found] == [
        *((few[0], AS_TRAINED, 0.75), (few[0], "svd_0.5", 0.5)),
        *((few[1], AS_TRAINED, 0.75), (few[1], "svd_0.5", 0.5)),
    ]


def test_a_result_of_another_request_or_none_is_not_there(tmp_path: Path) -> None:
    [trial] = rivals.requested([make("dense", directory=tmp_path)], "kind", of_dense(SVD))
    [request] = trial.compressions
    compress(trial, dataclasses.replace(request, calibration_images=100))  # its directory is of the same name
    assert trial.compressed(request) is None
    path = compressed.directory_of(trial.directory, request) / compressed.RESULT_FILE
    for content in (b"", b"{}", b"[1]", b"\xff"):
        path.write_bytes(content)
        assert trial.compressed(request) is None


def row(case: str, seed: int, accuracy: float | None, kilobytes: float = 1.0, **changes: Any) -> RivalRow:
    fields: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(RivalRow))
    fields |= {"where": "few", "case": case, "compression": AS_TRAINED, "method": "-", "keep": 1.0, "bits": 32}
    fields |= {"seed": seed, "data_seed": 0, "test_accuracy": accuracy, "accuracy_before": accuracy}
    fields |= {"bytes_full": round(1000 * kilobytes), "bytes_full_ffn": round(500 * kilobytes), "trial": f"{seed}"}
    return RivalRow(**fields | changes)


def of(method: str, keep: float = 0.5, bits: int = 32) -> dict[str, Any]:
    return {"method": method, "keep": keep, "bits": bits, "compression": f"{method} {keep} {bits}"}


def test_means_and_intervals_over_finished_seeds_by_hand() -> None:
    lines = [
        row("dense", 0, 0.5, 2.0, accuracy_before=0.75, **of("svd")),
        row("dense", 0, 0.9),
        row("dense", 1, 0.75, 2.008, accuracy_before=0.875, **of("svd")),
        row("dense", 2, None, **of("svd")),
    ]
    svd, trained = rivals.summarise(lines)
    assert (svd.where, svd.case, svd.compression, svd.method, svd.bits) == ("few", "dense", "svd 0.5 32", "svd", 32)
    assert (svd.seeds, svd.accuracy_mean) == (2, 0.625)
    assert (svd.bytes_full, svd.bytes_full_ffn) == (2004, 1002)
    # Accuracies 0.5 and 0.75: each lies 0.125 from the mean, which is the standard error of two; t of one degree of
    # freedom is 12.7062. Lost are 0.25 and 0.125: mean 0.1875, 0.0625 from it.
    assert svd.accuracy_interval == pytest.approx(12.7062 * 0.125, rel=1e-5)
    assert svd.accuracy_interval == intervals.half_interval([0.5, 0.75])
    assert (svd.lost_mean, svd.lost_interval) == (0.1875, pytest.approx(12.7062 * 0.0625, rel=1e-5))
    assert (trained.seeds, trained.accuracy_mean, trained.lost_mean) == (1, 0.9, 0.0)
    assert math.isnan(trained.accuracy_interval)
    assert math.isnan(trained.lost_interval)


def test_places_cases_and_compressions_are_rivals_of_their_own() -> None:
    lines = [row("dense", 0, 0.5), row("stored", 0, 0.5), row("dense", 0, 0.5, where="pairs")]
    lines += [row("dense", 0, 0.5, **of("svd", keep)) for keep in (0.5, 0.25)]
    assert [rival.seeds for rival in rivals.summarise(lines)] == [1] * 5
    assert rivals.summarise([]) == []


def best_of(lines: list[tuple[str, float, float]], where: str = "few") -> set[str]:
    """Names those that are marked, of cases with their kilobytes and accuracies."""
    found = rivals.summarise([row(case, 0, accuracy, kilobytes, where=where) for case, kilobytes, accuracy in lines])
    return {rival.case for rival in found if rival.best}


@pytest.mark.parametrize(
    ("lines", "best"),
    [
        ([("a", 1, 0.5)], "a"),
        ([("a", 1, 0.5), ("b", 2, 0.75)], "ab"),  # neither has both
        ([("a", 1, 0.75), ("b", 2, 0.5)], "a"),
        ([("a", 1, 0.5), ("b", 2, 0.5)], "a"),  # as good, with more bytes
        ([("a", 1, 0.5), ("b", 1, 0.75)], "b"),  # of as many bytes the better
        ([("a", 1, 0.5), ("b", 1, 0.5), ("c", 1, 0.25)], "ab"),  # equals do not beat each other
        ([("a", 3, 0.9), ("b", 1, 0.5), ("c", 2, 0.25), ("d", 2, 0.75)], "abd"),
    ],
)
def test_those_beaten_by_none_are_marked(lines: list[tuple[str, float, float]], best: str) -> None:
    assert best_of(lines) == set(best)
    assert best_of(lines[::-1]) == set(best)


def test_the_marks_are_those_of_an_obvious_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lines = [(f"{i}", float(rng.integers(1, 6)), float(rng.integers(0, 6)) / 8) for i in range(12)]
        wanted = set()
        for name, size, accuracy in lines:
            better = [s <= size and a >= accuracy and (s < size or a > accuracy) for _, s, a in lines]
            wanted |= set() if any(better) else {name}
        assert best_of(lines) == wanted


def test_rivals_of_other_places_do_not_beat() -> None:
    lines = [row("a", 0, 0.9, 1.0), row("b", 0, 0.5, 2.0, where="pairs")]
    assert [rival.best for rival in rivals.summarise(lines)] == [True, True]
    assert [rival.best for rival in rivals.summarise([lines[0], dataclasses.replace(lines[1], where="few")])] == [
        True,
        False,
    ]


def test_steps_are_paired_by_seed_by_hand() -> None:
    lines = [
        *(row("dense", seed, accuracy, **of("svd")) for seed, accuracy in enumerate((0.25, 0.5, 0.75))),
        *(row("dense", seed, accuracy, **of("activation_aware")) for seed, accuracy in enumerate((0.5, 0.625, None))),
        *(row("dense", seed, accuracy, **of("mixed_rank")) for seed, accuracy in enumerate((0.5, 0.75, 0.9))),
        row("dense", 1, 0.5, **of("mixed")),
        *(row("dense", seed, 0.9, **of("prune")) for seed in (0, 1)),
        row("dense", 0, 0.9),
    ]
    aware, mixed, rank = rivals.steps(lines)
    assert (aware.where, aware.case, aware.keep, aware.bits) == ("few", "dense", 0.5, 32)
    assert (aware.method, aware.before, aware.seeds) == ("activation_aware", "svd", 2)
    # Seeds 0 and 1: 0.25 and 0.125 gained, each 0.0625 from the mean.
    assert (aware.gained, aware.interval) == (0.1875, pytest.approx(12.7062 * 0.0625, rel=1e-5))
    # Seed 1 alone.
    assert (mixed.method, mixed.before, mixed.seeds, mixed.gained) == ("mixed", "activation_aware", 1, -0.125)
    assert (rank.method, rank.before, rank.seeds, rank.gained) == ("mixed_rank", "mixed", 1, 0.25)
    assert (mixed.interval, rank.interval) == (None, None)


def test_steps_are_paired_by_the_seed_of_the_images_too() -> None:
    lines = [row("dense", 0, 0.25, **of("svd"), data_seed=1), row("dense", 0, 0.5, **of("activation_aware"))]
    assert rivals.steps(lines) == []
    [step] = rivals.steps([dataclasses.replace(lines[0], data_seed=0), lines[1]])
    assert step.gained == 0.25


@pytest.mark.parametrize("change", [{"where": "pairs"}, {"case": "stored"}, {"keep": 0.25}, {"bits": 8}])
def test_only_equal_budgets_of_one_case_are_steps(change: dict[str, Any]) -> None:
    svd, aware = row("dense", 0, 0.25, **of("svd")), row("dense", 0, 0.5, **of("activation_aware"))
    assert len(rivals.steps([svd, aware])) == 1
    assert rivals.steps([svd, dataclasses.replace(aware, **change)]) == []
    together = [dataclasses.replace(one, **change) for one in (svd, aware)]
    [there] = rivals.steps(together)
    assert all(getattr(there, name) == value for name, value in change.items())


def test_a_step_that_was_left_out_is_not_stepped_over() -> None:
    lines = [row("dense", 0, 0.25, **of("svd")), row("dense", 0, 0.5, **of("mixed"))]
    assert rivals.steps(lines) == []
