import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import expert_use, files, memory, sweep
from bvit_jax.config import resolve
from bvit_jax.model_config import ConfigError
from configs import digits
from tests.conftest import make_config

HEADER = (
    "family,num_experts,seed,form,test_accuracy,val_accuracy,params,bytes_paper,bytes_full,compression_paper,"
    "compression_full,images_per_second,steps,wall_seconds,status"
)


def base() -> dict[str, Any]:
    raw = digits.get_config("butterfly,4").to_dict()
    raw["total_steps"] = 200
    raw["optimizer"]["warmup_steps"] = 2
    return raw


def make_trial(directory: Path, argument: str = "butterfly,4", settings: str = "", **changes: object) -> sweep.Trial:
    return sweep.Trial(make_config(argument, **changes), directory, settings)


def finish(trial: sweep.Trial, accuracy: float, **changes: object) -> sweep.Trial:
    """Leaves the result that `bvit_jax.train` would."""
    result = {
        "test_accuracy": accuracy,
        "validation_accuracy": accuracy - 0.125,
        "test_nll": 1 - accuracy,
        "timing": {"images_per_second": 1000 * accuracy, "wall_seconds": 12.5},
    }
    if trial.config.model.family != "dense":
        use = expert_use.ExpertUse(accuracy, (2.0, 3.0), (accuracy, 1.0), accuracy - 0.25, accuracy - 0.03125)
        result["experts"] = use.to_dict()
    trial.directory.mkdir(parents=True)
    files.write_json(trial.directory / "result.json", result | changes)
    return trial


def shorthand(trials: list[sweep.Trial]) -> list[tuple[Any, ...]]:
    models = [trial.config.model for trial in trials]
    return [(t.config.seed, m.family, m.num_experts, m.form) for t, m in zip(trials, models, strict=True)]


def test_a_grid_is_the_product_of_its_leaves_seed_by_seed(tmp_path):
    grid = {"model": {"family": ("standard", "butterfly"), "num_experts": (4, 8)}, "seed": [1, 0]}
    kinds = [("standard", 4), ("standard", 8), ("butterfly", 4), ("butterfly", 8)]
    found = sweep.expand(base(), grid, tmp_path)
    assert shorthand(found) == [(seed, *kind, "separate") for seed in (0, 1) for kind in kinds]


def test_trials_are_the_base_but_for_the_grid(tmp_path):
    [trial] = sweep.expand(base(), {"optimizer": {"learning_rate": (0.5,)}}, tmp_path)
    raw = base()
    raw["optimizer"]["learning_rate"] = 0.5
    assert trial.config == resolve(raw)
    assert trial.directory == tmp_path / "trials" / trial.config.digest()


def test_an_empty_grid_is_the_base_itself(tmp_path):
    [trial] = sweep.expand(base(), {}, tmp_path)
    assert trial.config == resolve(base())
    assert trial.settings == ""


def test_combinations_that_mean_the_same_model_are_one_trial(tmp_path):
    grid = {
        "model": {"family": ("dense", "standard", "butterfly"), "num_experts": (4, 8), "form": ("separate", "tied")}
    }
    assert shorthand(sweep.expand(base(), grid, tmp_path)) == [
        (0, "dense", 1, "separate"),
        (0, "standard", 4, "separate"),
        (0, "standard", 8, "separate"),
        *[(0, "butterfly", experts, form) for experts in (4, 8) for form in ("separate", "tied")],
    ]


def test_a_single_expert_is_selected_alone_unless_the_grid_says_otherwise(tmp_path):
    trials = sweep.expand(base(), {"model": {"num_experts": (1, 4)}}, tmp_path)
    assert [(t.config.model.num_experts, t.config.model.top_k) for t in trials] == [(1, 1), (4, 2)]
    trials = sweep.expand(base(), {"model": {"num_experts": (4,), "top_k": (1, 3)}}, tmp_path)
    assert [trial.config.model.top_k for trial in trials] == [1, 3]


def test_expanding_leaves_base_and_disk_alone(tmp_path):
    raw = base()
    trials = sweep.expand(raw, {"model": {"num_experts": (8, 16)}}, tmp_path / "new")
    assert raw == base()
    assert len({trial.directory for trial in trials}) == 2
    assert not (tmp_path / "new").exists()


def test_settings_say_what_the_grid_set_beyond_the_usual(tmp_path):
    grid = {
        "seed": (0,),
        "model": {"family": ("butterfly", "dense"), "num_stages": (3,)},
        "loss": {"router_z": (0, 0.5)},
    }
    assert [trial.settings for trial in sweep.expand(base(), grid, tmp_path)] == [
        "model.num_stages=3 loss.router_z=0.0",
        "model.num_stages=3 loss.router_z=0.5",
        "model.num_stages=1 loss.router_z=0.0",  # dense models have no stages: the neutral value
        "model.num_stages=1 loss.router_z=0.5",
    ]


def test_settings_name_variants(tmp_path):
    [trial] = sweep.expand(base(), {"model": {"variant": ("tiny",)}}, tmp_path)
    assert trial.settings == "model.variant=tiny"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"seed": 3}, "grid.seed = 3: it must be a non-empty sequence of values"),
        ({"seed": ()}, "grid.seed = (): it must be a non-empty sequence of values"),
        ({"seed": None}, "grid.seed = None: it must be a non-empty sequence of values"),
        ({"model": {"family": "dense"}}, "grid.model.family = 'dense': it must be a non-empty sequence of values"),
        ({"modle": {"family": ("dense",)}}, "grid.modle.family = 'dense': it must be of a section that the base has"),
        ({"seed": {"model": (1,)}}, "grid.seed.model = 1: it must be of a section that the base has"),
        ({"model": {"expert": (4,)}}, "grid.model.expert = 4: it must be of a field that the base has"),
        ({"seeds": (0, 1)}, "grid.seeds = 0: it must be of a field that the base has"),
        ({"model": {"num_experts": (1,), "top_k": (2,)}}, "model.top_k = 2: it must be at most num_experts = 1"),
        ({"model": {"num_experts": (4, 0)}}, "model.num_experts = 0: it must be at least 1"),
        ({"seed": (0, "1")}, "seed = '1': it must be an integer"),
    ],
)
def test_a_bad_grid_is_reported_before_anything_is_written(tmp_path, grid, message):
    with pytest.raises(ConfigError) as caught:
        sweep.expand(base(), grid, tmp_path / "new")
    assert str(caught.value) == message
    assert not (tmp_path / "new").exists()


def test_the_row_of_a_finished_trial(tmp_path):
    trial = finish(make_trial(tmp_path / "t", "butterfly,4,tied", "a=1", seed=3), 0.75)
    row = sweep.result_row(trial)
    own, standard = memory.ledger(trial.config), memory.ledger(make_config("standard,4"))
    assert row == sweep.ResultRow(
        family="butterfly",
        num_experts=4,
        seed=3,
        form="tied",
        test_accuracy=0.75,
        val_accuracy=0.625,
        params=own.params,
        bytes_paper=own.bytes_paper,
        bytes_full=own.bytes_full,
        compression_paper=standard.bytes_paper / own.bytes_paper,
        compression_full=standard.bytes_full / own.bytes_full,
        images_per_second=750.0,
        steps=6,
        wall_seconds=12.5,
        status="ok",
        test_nll=0.25,
        bytes_full_ffn=own.bytes_full_ffn,
        compression_full_ffn=standard.bytes_full_ffn / own.bytes_full_ffn,
        output_cosine=0.875,
        experts_used=2.5,
        lost_shuffled=0.25,
        lost_one=0.03125,
        settings="a=1",
        trial=trial.config.digest(),
        error="",
    )


def test_the_form_of_other_families_is_a_dash(tmp_path):
    assert [sweep.result_row(make_trial(tmp_path, f"{family},4")).form for family in ("dense", "standard")] == [
        "-",
        "-",
    ]


def test_the_row_of_a_failed_trial(tmp_path):
    trial = make_trial(tmp_path / "t")
    row = sweep.result_row(trial, "Traceback\n  somewhere\nValueError: loss is nan\n\n")
    assert (row.status, row.error) == ("failed", "ValueError: loss is nan")
    assert (row.test_accuracy, row.val_accuracy, row.test_nll) == (None, None, None)
    assert (row.images_per_second, row.wall_seconds) == (None, None)
    assert row.params == memory.ledger(trial.config).params
    assert (row.output_cosine, row.experts_used, row.lost_shuffled, row.lost_one) == (None, None, None, None)


def test_of_one_expert_a_row_says_what_is_known(tmp_path):
    one = expert_use.ExpertUse(0.5, (1.0, 1.0)).to_dict()
    trial = finish(make_trial(tmp_path / "t", "butterfly,1", model__top_k=1), 0.5, experts=one)
    row = sweep.result_row(trial)
    assert (row.output_cosine, row.experts_used, row.lost_shuffled, row.lost_one) == (None, 1.0, None, None)
    assert "| - | 1.00 | - | - |" in sweep.to_markdown(sweep.summarise([trial], [row]), [row])


def test_a_failure_without_words_is_still_a_failure(tmp_path):
    row = sweep.result_row(make_trial(tmp_path / "t"), "")
    assert (row.status, row.error) == ("failed", "")


def test_the_row_of_an_unfinished_trial(tmp_path):
    trial = make_trial(tmp_path / "absent")
    assert (sweep.result_row(trial).status, sweep.result_row(trial).error) == ("unfinished", "")
    trial.directory.mkdir()
    (trial.directory / "metrics.jsonl").write_text('{"step": 2}\n')
    assert (trial.status(None), sweep.result_row(trial).test_accuracy) == ("unfinished", None)


def test_a_result_outweighs_an_old_failure(tmp_path):
    trial = finish(make_trial(tmp_path / "t"), 0.5)
    row = sweep.result_row(trial, "an earlier attempt")
    assert (trial.status("an earlier attempt"), row.status, row.error) == ("ok", "ok", "")


@pytest.mark.parametrize("content", [b"", b'{"test_accuracy": 0.', b"[1]", b"\xff"])
def test_a_damaged_result_is_none(tmp_path, content):
    trial = make_trial(tmp_path)
    (tmp_path / "result.json").write_bytes(content)
    assert trial.result is None
    assert (trial.status(None), trial.status("broken")) == ("unfinished", "failed")
    assert sweep.result_row(trial).test_accuracy is None


def test_a_directory_that_cannot_be_read_has_no_result_and_no_steps(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "result.json").mkdir()
    for directory in (tmp_path / "file", tmp_path):
        trial = make_trial(directory)
        assert (trial.result, trial.steps_done, trial.status(None)) == (None, 0, "unfinished")
    trial = make_trial(tmp_path / "binary")
    trial.directory.mkdir()
    (trial.directory / "metrics.jsonl").write_bytes(b"\xff\n")
    assert trial.steps_done == 0


def test_steps_done_are_those_of_the_newest_row(tmp_path):
    trial = make_trial(tmp_path)
    assert trial.steps_done == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"ste')
    assert trial.steps_done == 4


@pytest.mark.parametrize(
    ("argument", "settings", "label"),
    [
        ("dense,4", "", "dense seed 2"),
        ("standard,8", "", "standard 8 experts seed 2"),
        ("butterfly,8,tied", "a=1", "butterfly tied 8 experts a=1 seed 2"),
    ],
)
def test_labels(tmp_path, argument, settings, label):
    assert make_trial(tmp_path, argument, settings, seed=2).label == label


def test_groups_are_equal_but_for_the_seed(tmp_path):
    first = make_trial(tmp_path)
    assert make_trial(tmp_path, seed=5).group == first.group
    assert make_trial(tmp_path, batch_size=8).group != first.group
    assert make_trial(tmp_path, "butterfly,4,tied").group != first.group


def test_the_table_starts_with_the_agreed_columns(tmp_path):
    rows = [
        sweep.result_row(finish(make_trial(tmp_path / "a", settings='x=1, "two"'), 0.5)),
        sweep.result_row(make_trial(tmp_path / "b", "dense,4", seed=1)),
    ]
    text = files.to_csv([dataclasses.asdict(row) for row in rows])
    assert text.splitlines()[0].startswith(HEADER + ",")
    first, second = csv.DictReader(io.StringIO(text))
    assert (first["family"], first["test_accuracy"], first["wall_seconds"]) == ("butterfly", "0.5", "12.5")
    assert first["settings"] == 'x=1, "two"'
    assert int(first["bytes_full"]) == rows[0].bytes_full
    assert float(first["bytes_paper"]) == rows[0].bytes_paper
    assert (second["seed"], second["form"], second["status"]) == ("1", "-", "unfinished")
    assert second["test_accuracy"] == second["val_accuracy"] == second["images_per_second"] == second["error"] == ""


def test_means_and_deviations_over_seeds_by_hand(tmp_path):
    # Accuracies 0.5, 0.6 and 0.9: mean 2/3, squared deviations 1/36, 1/225 and 49/900, sum 78/900, over 3 - 1.
    butterfly = [finish(make_trial(tmp_path / f"b{seed}", seed=seed), a) for seed, a in enumerate((0.5, 0.6, 0.9))]
    dense = [finish(make_trial(tmp_path / "d", "dense,4"), 0.25)]
    failed = make_trial(tmp_path / "f", seed=3)
    trials = [butterfly[0], dense[0], failed, butterfly[1], make_trial(tmp_path / "u", seed=4), butterfly[2]]
    rows = [sweep.result_row(trial, "broken" if trial is failed else None) for trial in trials]
    first, second = sweep.summarise(trials, rows)
    assert first.sample == rows[0]
    assert first.seeds == 3
    assert first.accuracy_mean == pytest.approx(2 / 3)
    assert first.accuracy_std == pytest.approx(math.sqrt(78 / 900 / 2))
    assert first.val_accuracy_mean == pytest.approx(2 / 3 - 0.125)
    assert first.nll_mean == pytest.approx(1 / 3)
    assert first.images_per_second == pytest.approx(600)  # the median
    assert (second.sample, second.seeds, second.accuracy_mean) == (rows[1], 1, 0.25)
    assert math.isnan(second.accuracy_std)


def test_settings_of_their_own_are_groups_of_their_own(tmp_path):
    trials = [finish(make_trial(tmp_path / str(size), batch_size=size), 0.5) for size in (8, 16)]
    found = sweep.summarise(trials, [sweep.result_row(trial) for trial in trials])
    assert [summary.seeds for summary in found] == [1, 1]


def test_nothing_finished_gives_no_summary(tmp_path):
    trial = make_trial(tmp_path / "t")
    row = sweep.result_row(trial)
    assert sweep.summarise([trial], [row]) == []
    assert f"unfinished: {row.trial} (butterfly, 4 experts, seed 0)" in sweep.to_markdown([], [row])


def test_a_result_without_its_speed_can_be_summarised(tmp_path):
    trial = finish(make_trial(tmp_path / "t"), 0.5, timing={})
    rows = [sweep.result_row(trial)]
    [summary] = sweep.summarise([trial], rows)
    assert math.isnan(summary.images_per_second)
    assert "50.00" in sweep.to_markdown([summary], rows)


def test_the_summary_is_a_table_and_names_what_failed(tmp_path):
    trials = [finish(make_trial(tmp_path / str(seed), seed=seed), a) for seed, a in ((0, 0.5), (1, 0.6))]
    trials.append(finish(make_trial(tmp_path / "d", "dense,4", "a=1"), 0.25))
    rows = [sweep.result_row(trial) for trial in trials]
    trials.append(make_trial(tmp_path / "f", seed=2))
    rows.append(sweep.result_row(trials[-1], "Traceback\nValueError: broken"))
    text = sweep.to_markdown(sweep.summarise(trials, rows), rows)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    header, rule, butterfly, dense = table
    assert len(header) == len(rule) == len(butterfly) == len(dense)
    row = rows[0]
    # Deviation of 0.5 and 0.6: sqrt(2 x 0.05^2 / 1) = 0.0707.
    assert butterfly[:7] == ["butterfly", "separate", "4", "-", "2", "55.00 ± 7.07", "0.450"]
    # Cosines (0.5 + 1) / 2 and (0.6 + 1) / 2, and their mean.
    assert butterfly[7:11] == ["0.775", "2.50", "25.00", "3.12"]
    assert header[7:11] == ["output cosine", "experts used", "lost shuffled", "lost one"]
    assert butterfly[11:] == [
        f"{row.params:,}",
        f"{row.bytes_paper / 1e6:.4f}",
        f"{row.bytes_full / 1e6:.4f}",
        f"{row.compression_paper:.1f}",
        f"{row.compression_full:.2f}",
        f"{row.compression_full_ffn:.2f}",
        "550",
    ]
    assert dense[:6] == ["dense", "-", "1", "a=1", "1", "25.00"]
    assert dense[7:11] == ["-"] * 4
    assert f"failed: {rows[3].trial} (butterfly, 4 experts, seed 2) ValueError: broken" in text
    assert "unfinished" not in text
