import csv
import dataclasses
import io
import math
from pathlib import Path

import pytest

from bvit_jax import expert_use, files, memory, sweep
from bvit_jax.compress_request import Request
from tests.conftest import make_config
from tests.test_rivals import compress

HEADER = (
    "family,num_experts,seed,form,test_accuracy,val_accuracy,params,bytes_paper,bytes_full,compression_paper,"
    "compression_full,images_per_second,steps,wall_seconds,status"
)


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
        data_seed=0,
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


def test_a_trial_is_done_when_all_its_compressions_are(tmp_path):
    requests = (Request("svd", 0.5), Request("quantise", bits=8))
    trial = dataclasses.replace(make_trial(tmp_path / "t", "dense"), compressions=requests)
    compress(trial, requests[0])
    assert (trial.is_done, trial.status(None), trial.status("broken")) == (False, "unfinished", "failed")
    (trial.directory / "result.json").write_text('{"test_accuracy": 0.5}')
    assert (trial.is_done, trial.status(None), trial.status("broken")) == (False, "unfinished", "failed")
    row = sweep.result_row(trial, "Traceback\nConfigError: out = 'x': it cannot be written to")
    assert (row.status, row.test_accuracy, row.error[:16]) == ("failed", 0.5, "ConfigError: out")
    # It is trained, whatever became of its compressions.
    assert [summary.accuracy_mean for summary in sweep.summarise([trial], [row])] == [0.5]
    made = compress(trial, requests[1])
    assert trial.compressed(requests[1]) == made
    assert (trial.is_done, trial.status(None), trial.status("broken")) == (True, "ok", "ok")
    assert dataclasses.replace(trial, compressions=(*requests, Request("svd", 0.25))).status(None) == "unfinished"


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
    assert first.accuracies == (0.5, 0.6, 0.9)
    assert first.accuracy_std == pytest.approx(math.sqrt(78 / 900 / 2))
    # Student's t with 2 degrees of freedom: 4.303 at 97.5 %.
    assert first.accuracy_interval == pytest.approx(4.30265 * math.sqrt(78 / 900 / 2) / math.sqrt(3), rel=1e-5)
    assert first.val_accuracy_mean == pytest.approx(2 / 3 - 0.125)
    assert first.nll_mean == pytest.approx(1 / 3)
    assert first.images_per_second == pytest.approx(600)  # the median
    assert (second.sample, second.seeds, second.accuracy_mean) == (rows[1], 1, 0.25)
    assert math.isnan(second.accuracy_std)
    assert math.isnan(second.accuracy_interval)


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
    # Student's t with 1 degree of freedom is 12.706 at 97.5 %: 12.706 x 0.0707 / sqrt(2) = 0.6353.
    assert butterfly[:7] == ["butterfly", "separate", "4", "-", "2", "55.00 ± 7.07", "± 63.53"]
    assert butterfly[7:9] == ["42.50", "0.450"]
    # Cosines (0.5 + 1) / 2 and (0.6 + 1) / 2, and their mean.
    assert butterfly[9:13] == ["0.775", "2.50", "25.00", "3.12"]
    assert header[9:13] == ["output cosine", "experts used", "lost shuffled", "lost one"]
    assert butterfly[13:] == [
        f"{row.params:,}",
        f"{row.bytes_paper / 1e6:.4f}",
        f"{row.bytes_full / 1e6:.4f}",
        f"{row.compression_paper:.1f}",
        f"{row.compression_full:.2f}",
        f"{row.compression_full_ffn:.2f}",
        "550",
    ]
    assert dense[:7] == ["dense", "-", "1", "a=1", "1", "25.00", "-"]
    assert dense[9:13] == ["-"] * 4
    assert f"failed: {rows[3].trial} (butterfly, 4 experts, seed 2) ValueError: broken" in text
    assert "unfinished" not in text


def test_cases_that_differ_in_their_images_alone_have_a_mean_each(tmp_path):
    trials = []
    for split, (name, accuracy) in enumerate((("a", 0.5), ("b", 0.75))):
        trial = make_trial(tmp_path / name, "butterfly,4")
        data = dataclasses.replace(trial.config.data, seed=split)
        config = dataclasses.replace(trial.config, data=data)
        trials.append(finish(dataclasses.replace(trial, config=config, labels={"split": name}), accuracy))
    found = sweep.summarise(trials, [sweep.result_row(trial) for trial in trials])
    assert [(summary.trial.labels["split"], summary.accuracy_mean) for summary in found] == [("a", 0.5), ("b", 0.75)]
