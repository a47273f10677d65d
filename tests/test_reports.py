"""Reports on runs, packed files and sweeps, in whatever state these are."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from bvit_jax import figures, files, grid, opened, page, run_report, sweep, sweep_report, train, vit
from bvit_jax import workdir as workdirs
from bvit_jax.figures import Picture
from bvit_jax.model_config import ConfigError
from bvit_jax.opened import Opened
from bvit_jax.run_report import Report
from configs import digits
from tests import chromium
from tests.commands import start, start_here
from tests.conftest import make_config
from tests.test_sweep import finish

EVERYTHING = [
    *("training", "routing_maps", "load", "labels", "favourites", "agreement", "diversity", "diversity_pairs"),
    *("outliers", "angles", "trits"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of rotated experts; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("runs") / "rotated"
    train.run(make_config("butterfly,4", model__num_layers=2), workdir, show_progress=False)
    return workdir


def pictures(report: Report) -> list[str]:
    return [part.name for section in report.sections for part in section.parts if isinstance(part, Picture)]


def text(report: Report) -> str:
    parts = [part for section in report.sections for part in section.parts]
    frames = [part.frame.to_string() for part in parts if isinstance(part, page.Table)]
    return "\n".join([report.lead, *(part for part in parts if isinstance(part, str)), *frames])


def of_run(workdir: Path) -> Report:
    return run_report.of_run(workdir, "test", 5)


def test_a_finished_run_is_shown_from_all_sides(run: Path) -> None:
    report = of_run(run)
    assert pictures(report) == EVERYTHING
    model = "butterfly separate, 4 experts, 2 a token; 2 layers of 64 channels"
    assert report.lead == f"{model}, on digits, seed 0; finished, 6 steps."
    assert "Looked at with 5 images" in text(report)


def unfinished(run: Path, tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(run, tmp_path / "unfinished"))
    (copied / "result.json").unlink()
    rows = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= 4))
    return copied


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(run: Path, tmp_path: Path) -> None:
    copied = unfinished(run, tmp_path)
    with workdirs.locked(copied, 0.0):
        report = of_run(copied)
    assert "going on at step 4 of 6: host " in report.lead
    assert pictures(report) == EVERYTHING


def test_a_run_that_was_stopped_says_why(run: Path, tmp_path: Path) -> None:
    copied = unfinished(run, tmp_path)
    incident = {"utc": "2026-01-01T00:00:00+00:00", "kind": "preempted", "step": 4, "text": "told to stop"}
    (copied / "incidents.jsonl").write_text(json.dumps(incident) + "\n")
    report = of_run(copied)
    assert "stopped at step 4 of 6: told to stop" in report.lead
    assert "preempted" in text(report)


def test_a_run_without_a_checkpoint_is_its_training_alone(run: Path, tmp_path: Path) -> None:
    copied = unfinished(run, tmp_path)
    shutil.rmtree(copied / "checkpoints")
    report = of_run(copied)
    assert pictures(report) == ["training"]
    assert "it holds no checkpoint yet" in text(report)


def test_a_run_that_has_not_begun_is_no_crash(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.json", tmp_path)
    report = of_run(tmp_path)
    assert pictures(report) == []
    assert "not begun at step 0 of 6" in report.lead
    assert "No step has been recorded." in text(report)


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it must be the directory of a run"):
        of_run(tmp_path)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("dense", []),
        ("standard,1", EVERYTHING[1:6]),
        ("ternary,4", [*EVERYTHING[1:8], "trits"]),
        ("low_rank,4", EVERYTHING[1:8]),
    ],
)
def test_other_families_are_shown_without_what_they_lack(argument: str, expected: list[str]) -> None:
    config = make_config(argument)
    params = vit.init_params(config.model, jax.random.key(0))
    model = Opened(Path("run"), config, 0, config.model.deployed(), opened.as_used(params, config.model))
    assert pictures(Report("", "", run_report.of_model(model, "test", 5))) == expected


# Sweeps


def sweep_of(directory: Path, finished: int = 6, failed: int = 0) -> list[sweep.Trial]:
    """Makes a sweep of six trials, of which the first `failed` have failed, and `finished` others are done."""
    base = digits.get_config("standard,4").to_dict()
    trials = grid.expand(base, {"model": {"num_experts": (2, 4, 8)}, "seed": (0, 1)}, directory)
    for number, trial in enumerate(trials[failed : failed + finished]):
        finish(trial, 0.75 + number / 100)
    causes = ["Traceback\nMemoryError: 2 TB"] * failed + [None] * (len(trials) - failed)
    rows = [sweep.result_row(trial, cause) for trial, cause in zip(trials, causes, strict=True)]
    files.write_json(directory / "sweep.json", {"base": base})
    files.write_rows(directory / "results.csv", [dataclasses.asdict(row) for row in rows])
    return trials


CURVES = ["quality", "bytes", "accuracy_against_bytes", "experts"]


def test_a_finished_sweep_has_its_curves_and_laws(tmp_path: Path) -> None:
    sweep_of(tmp_path)
    report = sweep_report.of_sweeps([tmp_path])
    assert pictures(report) == CURVES
    assert report.lead == "6 trials: 6 ok."
    assert [section.heading for section in report.sections] == ["Trials", "Curves", "Laws", "Means over seeds"]
    assert "All are done." in text(report)


def test_a_sweep_with_holes_says_what_is_missing(tmp_path: Path) -> None:
    trials = sweep_of(tmp_path, finished=3, failed=1)
    with working(trials[5]):
        report = sweep_report.of_sweeps([tmp_path])
    assert report.lead == "6 trials: 3 ok, 1 failed, 1 unfinished, 1 going on."
    assert pictures(report) == CURVES
    shown = text(report)
    assert f"{trials[0].config.digest()} failed: MemoryError: 2 TB" in shown
    assert trials[4].config.digest() in shown


def working(trial: sweep.Trial) -> Any:
    trial.directory.mkdir(parents=True)
    (trial.directory / workdirs.LOCK_FILE).touch()
    return workdirs.locked(trial.directory, 0.0)


def test_a_sweep_that_has_just_begun_is_no_crash(tmp_path: Path) -> None:
    trials = sweep_of(tmp_path, finished=0)
    (tmp_path / "results.json").unlink()
    report = sweep_report.of_sweeps([tmp_path])
    assert (report.lead, pictures(report)) == ("0 trials: none has begun.", [])
    trials[0].directory.mkdir(parents=True)
    files.write_json(trials[0].directory / "config.json", trials[0].config.to_dict())
    report = sweep_report.of_sweeps([tmp_path])
    assert report.lead == "1 trials: 1 unfinished."
    assert "No trial has a result yet." in text(report)


def test_sweeps_side_by_side(tmp_path: Path) -> None:
    for name in ("one", "other"):
        sweep_of(tmp_path / name)
    report = sweep_report.of_sweeps([tmp_path / "one", tmp_path / "other"])
    assert report.title == "Sweep one and other"
    assert "one: standard" in text(report)
    assert "other: standard" in text(report)


# The command


def written(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "figures").iterdir())


@pytest.fixture(scope="module")
def report_of_run(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command wrote of a run."""
    out = tmp_path_factory.mktemp("reports") / "deep" / "out"
    done = start_here("experiments.report", f"--workdir={run}", f"--out={out}", "--images=5")
    assert done.returncode == 0, done.stderr
    assert f"{out / 'report.html'}; 11 figures, each as PNG and SVG" in done.stdout
    return out


def test_the_command_on_a_run(report_of_run: Path) -> None:
    assert written(report_of_run) == sorted(f"{name}.{ending}" for name in EVERYTHING for ending in ("png", "svg"))


@chromium.needs_chromium
def test_a_browser_shows_the_report_of_a_run(report_of_run: Path, tmp_path: Path) -> None:
    seen = chromium.look(report_of_run / "report.html", tmp_path)
    assert len(seen["pictures"]) == len(EVERYTHING)
    assert min(width for _, width in seen["pictures"]) > 500


@pytest.fixture(scope="module")
def report_of_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command wrote of a sweep that has a picture of its own."""
    folder = tmp_path_factory.mktemp("sweeps")
    sweep_of(folder / "sweep")
    (folder / "sweep" / "plots").mkdir()
    drawn = figures.draw("cases", "", "", (3.5, 2.0), lambda figure: figure.subplots().plot([1, 2]))
    drawn.save(folder / "sweep" / "plots")
    done = start("experiments.report", f"--workdir={folder / 'sweep'}", f"--out={folder / 'out'}")
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_the_command_on_a_sweep(report_of_sweep: Path) -> None:
    assert written(report_of_sweep) == sorted(f"{name}.{ending}" for name in CURVES for ending in ("png", "svg"))


@chromium.needs_chromium
def test_a_browser_shows_the_report_of_a_sweep_and_its_own_pictures_too(report_of_sweep: Path, tmp_path: Path) -> None:
    seen = chromium.look(report_of_sweep / "report.html", tmp_path)
    assert [name for name, _ in seen["pictures"]][-1] == "sweep: cases"
    assert len(seen["pictures"]) == len(CURVES) + 1
    assert min(width for _, width in seen["pictures"]) > 500


def test_a_report_is_written_over_an_earlier_one_and_over_nothing_else(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "out" / "figures"
    sweep_of(tmp_path / "sweep")
    flags = (f"--workdir={tmp_path / 'sweep'}", f"--out={out}")
    folder.mkdir(parents=True)
    (folder / "mine.png").write_text("a picture of a paper")
    refused = start_here("experiments.report", *flags)
    assert refused.returncode == 2
    told = f"error: out = {str(out)!r}: it must be a directory of its own; this one holds figures"
    assert refused.stderr.strip().splitlines()[-1] == told
    assert [path.name for path in folder.iterdir()] == ["mine.png"]
    (out / "report.html").write_text("an earlier report, with a picture that this one lacks")
    # A sweep whose results cannot be read leaves it as it was.
    results = (tmp_path / "sweep" / "results.json").read_bytes()
    (tmp_path / "sweep" / "results.json").write_text("{")
    assert start_here("experiments.report", *flags).returncode == 2
    assert [path.name for path in folder.iterdir()] == ["mine.png"]
    (tmp_path / "sweep" / "results.json").write_bytes(results)
    assert start_here("experiments.report", *flags).returncode == 0
    assert written(out) == sorted(f"{name}.{ending}" for name in CURVES for ending in ("png", "svg"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=README.md", "--out=OUT"], "README.md: "),
        (["--workdir=absent,away", "--out=OUT"], "workdir = ['absent', 'away']: it must be sweeps alone"),
    ],
)
def test_bad_input_is_one_clear_error(flags: list[str], message: str, tmp_path: Path) -> None:
    done = start_here("experiments.report", *(flag.replace("OUT", str(tmp_path / "out")) for flag in flags))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not list(tmp_path.glob("out/*"))
