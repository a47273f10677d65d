import dataclasses
from pathlib import Path

import pytest

from bvit_jax import comparison, sweep
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config

CASES = {"dense": "dense,4", "mixture": "butterfly,4"}


def make(bed: str, kind: str, seed: int, **chosen: object) -> sweep.Trial:
    config = make_config(CASES[kind], seed=seed, batch_size=len(bed))  # runs of one bed are no other's
    return sweep.Trial(config, Path("absent"), f"{bed} {kind}", {"bed": bed, "kind": kind}, {"seed": seed} | chosen)


def scored(trial: sweep.Trial, accuracy: float | None) -> sweep.ResultRow:
    row = sweep.result_row(trial)
    if accuracy is None:
        return row
    others = {"test_nll": 1 - accuracy, "val_accuracy": accuracy / 2}
    return dataclasses.replace(row, status="ok", test_accuracy=accuracy, **others)


def test_differences_are_paired_by_seed_and_by_hand() -> None:
    scores = {
        ("pairs", "dense"): (0.5, 0.6, None, 0.9),
        ("pairs", "mixture"): (0.6, 0.8, 0.1, None),
        ("few", "dense"): (0.5, None, None, None),
        ("few", "mixture"): (0.25, None, None, None),
    }
    trials = [make(*case, seed) for case, accuracies in scores.items() for seed in range(len(accuracies))]
    accuracies = [accuracy for line in scores.values() for accuracy in line]
    rows = [scored(trial, accuracy) for trial, accuracy in zip(trials, accuracies, strict=True)]
    pairs, few, _ = comparison.compare(trials, rows, "kind", ["dense"])
    # Seeds 0 and 1 are done in both: differences 0.1 and 0.2, deviation sqrt(2 x 0.05^2) over sqrt(2) = 0.05.
    assert (pairs.where, pairs.case, pairs.baseline, pairs.seeds) == ("pairs", "mixture", "dense", 2)
    assert pairs.num_experts == 4
    assert pairs.accuracy == pytest.approx(0.15)
    assert pairs.accuracy_interval == pytest.approx(12.7062 * 0.05, rel=1e-5)
    assert pairs.nll == pytest.approx(-0.15)
    assert pairs.nll_interval == pytest.approx(12.7062 * 0.05, rel=1e-5)
    assert (pairs.val_accuracy, few.val_accuracy) == pytest.approx((0.075, -0.125))
    assert pairs.val_accuracy_interval == pytest.approx(12.7062 * 0.025, rel=1e-5)
    assert pairs.baseline_accuracy == pytest.approx(0.55)
    assert (few.where, few.accuracy, few.accuracy_interval, few.nll_interval) == ("few", -0.25, None, None)


def test_means_over_all_places_seed_by_seed_by_hand() -> None:
    # Differences of seeds 0 and 1: 0.25 and 0.5 in pairs, 0 and 0.25 in few; seed 2 is not finished in few.
    scores = {"pairs": (0.75, 1.0, 0.9), "few": (0.5, 0.75, None)}
    trials = [make(bed, kind, seed) for bed in scores for kind in CASES for seed in (0, 1, 2)]
    rows = [
        scored(trial, 0.5 if trial.labels["kind"] == "dense" else scores[trial.labels["bed"]][trial.config.seed])
        for trial in trials
    ]
    *_, found = comparison.compare(trials, rows, "kind", ["dense"])
    # Means of a seed: 0.125 and 0.375. Not four samples: what a seed does to both beds would be counted twice.
    assert (found.where, found.seeds, found.accuracy) == (comparison.EVERYWHERE, 2, 0.25)
    assert found.accuracy_interval == pytest.approx(12.7062 * 0.125, rel=1e-5)
    assert found.baseline_accuracy == 0.5


def test_a_case_that_is_not_everywhere_has_no_mean_over_all_places() -> None:
    places = [(bed, kind) for bed in ("few", "pairs") for kind in CASES if (bed, kind) != ("few", "mixture")]
    trials = [make(*case, 0) for case in places]
    rows = [scored(trial, 0.5) for trial in trials]
    assert [row.where for row in comparison.compare(trials, rows, "kind", ["dense"])] == ["pairs"]


@pytest.mark.parametrize("unfinished", ["dense", "mixture"])
def test_a_mean_over_all_places_is_of_all_that_there_are_to_be(unfinished: str) -> None:
    trials = [make(bed, kind, 0) for bed in ("few", "pairs", "patches") for kind in CASES]
    rows = [scored(t, None if t.labels == {"bed": "patches", "kind": unfinished} else 0.5) for t in trials]
    found = comparison.compare(trials, rows, "kind", ["dense"])
    assert [row.where for row in found] == ["few", "pairs"]


def test_trials_are_paired_by_both_seeds() -> None:
    def of_split(kind: str, seed: int, split: int) -> sweep.Trial:
        trial = make("few", kind, seed, **{"data.seed": split})
        data = dataclasses.replace(trial.config.data, seed=split)
        return dataclasses.replace(trial, config=dataclasses.replace(trial.config, data=data))

    trials = [of_split("dense", 0, 0), of_split("dense", 0, 1), of_split("mixture", 0, 1), of_split("mixture", 1, 1)]
    rows = [scored(trial, accuracy) for trial, accuracy in zip(trials, (0.1, 0.5, 0.75, 0.9), strict=True)]
    [found] = comparison.compare(trials, rows, "kind", ["dense"])
    assert (found.where, found.seeds, found.accuracy) == ("few", 1, 0.25)
    # A mean is over both seeds too.
    assert [summary.seeds for summary in sweep.summarise(trials, rows)] == [2, 2]


def test_only_what_is_equal_but_for_the_label_is_compared() -> None:
    trials = [
        make("pairs", "dense", 0, **{"loss.router_z": 0.0}),
        make("pairs", "mixture", 0, **{"loss.router_z": 0.5}),
        make("few", "mixture", 0, **{"loss.router_z": 0.0}),
    ]
    rows = [scored(trial, 0.5) for trial in trials]
    assert comparison.compare(trials, rows, "kind", ["dense", "mixture"]) == []
    trials[1] = make("pairs", "mixture", 0, **{"loss.router_z": 0.0})
    there, back = comparison.compare(trials, rows, "kind", ["dense", "mixture"])
    assert (there.where, there.case, back.case) == ("pairs loss.router_z=0.0", "mixture", "dense")


def test_a_run_of_several_places_is_compared_at_each() -> None:
    sizes = [{"model.num_experts": number} for number in (4, 8)]
    dense = dataclasses.replace(make("few", "dense", 0, **sizes[0]), also=(sizes[1] | {"seed": 0},))
    trials = [dense, *(make("few", "mixture", 0, **size) for size in sizes)]
    rows = [scored(trial, accuracy) for trial, accuracy in zip(trials, (0.5, 0.25, 0.75), strict=True)]
    found = comparison.compare(trials, rows, "kind", ["dense"])
    assert [(row.where, row.case, row.accuracy) for row in found] == [
        ("few model.num_experts=4", "mixture", -0.25),
        ("few model.num_experts=8", "mixture", 0.25),
        (comparison.EVERYWHERE, "mixture", 0.0),
    ]


def test_crossed_seeds_are_no_independent_samples() -> None:
    trials = [make("few", kind, seed) for kind in CASES for seed in (0, 1)]
    comparison.check("kind", ["dense"], trials)
    data = dataclasses.replace(trials[0].config.data, seed=5)
    other = dataclasses.replace(trials[0], config=dataclasses.replace(trials[0].config, data=data))
    with pytest.raises(ConfigError, match=r"data\.seed = \[0, 5\]: it must be one for seed 0, or -1, the seed of"):
        comparison.check("kind", ["dense"], [*trials, other])


@pytest.mark.parametrize(
    ("label", "baselines", "message"),
    [
        ("kin", ["dense"], "compare.label = 'kin': it must be bed or kind"),
        ("kind", ["standard"], "compare.baselines = 'standard': it must be dense or mixture"),
        ("kind", "dense", "compare.baselines = 'dense': it must be a non-empty sequence of dense or mixture"),
        ("kind", [], "compare.baselines = []: it must be a non-empty sequence of dense or mixture"),
    ],
)
def test_a_comparison_with_what_is_not_there_is_refused(label: str, baselines: list[str], message: str) -> None:
    trials = [make("few", kind, 0) for kind in CASES]
    comparison.check("kind", ["dense"], trials)
    with pytest.raises(ConfigError) as caught:
        comparison.check(label, baselines, trials)
    assert str(caught.value) == message
    with pytest.raises(ConfigError, match="compare.label = 'kind': it must be absent, as there are no cases"):
        comparison.check("kind", [], [sweep.Trial(make_config(), Path("absent"))])
