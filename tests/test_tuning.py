import dataclasses
import math
from pathlib import Path

import pytest

from bvit_jax import sweep, tuning
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config

LABELS = ("family", "setting")


def make(family: str, rate: float, seed: int, bed: str = "few") -> sweep.Trial:
    labels = {"bed": bed, "family": family, "setting": f"{rate}"}
    return sweep.Trial(make_config(f"{family},4", seed=seed), Path("absent"), "", labels)


def scored(trial: sweep.Trial, accuracy: float | None, cause: str | None = None) -> sweep.ResultRow:
    row = sweep.result_row(trial, cause)
    return row if accuracy is None else dataclasses.replace(row, status="ok", val_accuracy=accuracy, test_accuracy=0.1)


def test_the_best_mean_over_beds_and_seeds_is_chosen_by_hand() -> None:
    table = {
        ("dense", 0.1): (0.5, 0.9),  # mean 0.7: one seed is the best of all
        ("dense", 0.2): (0.75, 0.75),
        ("butterfly", 0.1): (0.5, 0.5),
        ("butterfly", 0.2): (0.5, 0.5),  # as good, but later
        ("standard", 0.1): (0.6, None),
        ("standard", 0.2): (0.9, 0.9),
    }
    trials = [make(*case, seed, bed) for case in table for seed, bed in ((0, "few"), (0, "pairs"))]
    accuracies = [accuracy for line in table.values() for accuracy in line]
    rows = [scored(trial, accuracy) for trial, accuracy in zip(trials, accuracies, strict=True)]
    tuning.check("family", "setting", trials)
    found = tuning.choose(trials, rows, "family", "setting")
    assert [(score.kind, score.setting) for score in found] == [(kind, str(rate)) for kind, rate in table]
    assert [score.val_accuracy for score in found] == pytest.approx([0.7, 0.75, 0.5, 0.5, 0.6, 0.9])
    # Of the unfinished kind nothing is chosen.
    assert [score.chosen for score in found] == [False, True, True, False, False, False]
    assert [(score.finished, score.trials) for score in found[4:]] == [(1, 2), (2, 2)]
    text = tuning.to_markdown(found)
    assert "| dense | 0.2 | 2 of 2 | 75.00 | best |" in text
    assert text.count("best") == 2


def test_nothing_finished_is_a_table_without_a_choice() -> None:
    trials = [make("dense", 0.1, 0)]
    [score] = tuning.choose(trials, [scored(trials[0], None)], "family", "setting")
    assert math.isnan(score.val_accuracy)
    assert not score.chosen
    assert "| dense | 0.1 | 0 of 1 | - |  |" in tuning.to_markdown([score])


def test_a_setting_with_a_failed_trial_is_not_chosen_and_holds_up_nobody() -> None:
    trials = [make("dense", rate, seed) for rate in (0.1, 0.2) for seed in (0, 1)]
    rows = [scored(trials[0], 0.9), scored(trials[1], None, "loss is nan"), scored(trials[2], 0.5)]
    assert not any(score.chosen for score in tuning.choose(trials[:3], [*rows[:2], scored(trials[2], None)], *LABELS))
    found = tuning.choose(trials, [*rows, scored(trials[3], 0.5)], *LABELS)
    assert [(score.finished, score.failed, score.chosen) for score in found] == [(1, 1, False), (2, 0, True)]
    assert "| dense | 0.1 | 1 of 2, 1 failed | 90.00 |  |" in tuning.to_markdown(found)
    [only] = tuning.choose(trials[:2], rows[:2], *LABELS)
    assert not only.chosen


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("kind", "setting", "choose.kind = 'kind': it must be bed or family or setting"),
        ("family", "rate", "choose.setting = 'rate': it must be bed or family or setting"),
    ],
)
def test_labels_that_are_not_there_are_refused(kind: str, setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tuning.check(kind, setting, [make("dense", 0.1, 0)])
    assert str(caught.value) == message
