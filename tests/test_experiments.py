"""The entry points, started as a user starts them."""

import csv
import importlib
import io
import json

import pytest

from bvit_jax import files, grid
from bvit_jax import workdir as workdirs
from tests.commands import SHORT, start, start_here, train

SHORT_SWEEP = [flag.replace("config.", "config.base.") for flag in SHORT]
SMALL_GRID = [
    *('--config.grid.model.family=("dense","butterfly")', "--config.grid.model.num_experts=(2,4)"),
    *('--config.grid.model.form=("separate",)', "--config.grid.seed=(0,)"),
]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.variant=huge"], "model.variant = 'huge': it must be tiny or small or paper"),
        (["--config.model.form=round"], "model.form = 'round': it must be separate or tied or reference"),
        (["--config.model.patch_size=3"], "model.patch_size = 3: it must be a divisor of image_size = 8"),
        (["--config.model.top_k=9"], "model.top_k = 9: it must be at most num_experts = 8"),
        (["--config.loss.smoothness=-0.5"], "loss.smoothness = -0.5: it must be 0 or more"),
        (["--config.total_steps=0"], "total_steps = 0: it must be at least 1"),
        (["--expert_axis=x"], "expert_axis = 'x': it must be auto or a number"),
        (["--model_axis=2"], "model_axis = 2: it must be a divisor of 1 devices"),
        (["--coordinator=here:80"], "num_processes, process_id = None: it must be given together with the others"),
        (["--workdir=/proc/nowhere"], "workdir = '/proc/nowhere': it must be a directory that can be written to"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_nothing_behind(tmp_path, flags, message):
    workdir = tmp_path / "run"
    run = train(workdir, *flags)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in run.stderr
    assert not workdir.exists()


def test_train_writes_its_result_and_refuses_the_workdir_to_another_configuration(tmp_path):
    run = start("experiments.train", "--config=configs/digits.py:dense", f"--workdir={tmp_path}", *SHORT)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"test_accuracy", "steps", "seed", "config_digest"} <= result.keys()
    assert (tmp_path / "metrics.jsonl").exists()
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    other = train(tmp_path, "--config.seed=3", config="configs/digits.py:dense")
    assert other.returncode == 2
    assert "another configuration" in other.stderr
    assert "seed: 0 != 3" in other.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files


def test_a_config_without_a_sweep_is_refused(tmp_path):
    run = start_here("experiments.sweep", "--config=configs/digits.py", f"--workdir={tmp_path / 'sweep'}")
    assert run.returncode == 2
    assert "a sweep has a base and a grid" in run.stderr
    assert not (tmp_path / "sweep").exists()


def test_help_says_how_to_start():
    names = ("train", "sweep", "export", "evaluate", "predict", "memory", "compile_tpu", "bench")
    for name in (*names, "prepare_data", "show_batch", "bench_data"):
        shown = start_here(f"experiments.{name}", "--help").stdout
        assert f"python -m experiments.{name}" in shown
        assert "--workdir" in shown or "--model" in shown or "--out" in shown or "--data_dir" in shown


def test_arguments_that_are_no_flags_are_refused(tmp_path):
    found = train(tmp_path / "run", "stray")
    assert found.returncode != 0
    assert "unexpected arguments: stray" in found.stdout + found.stderr
    assert not (tmp_path / "run").exists()


def test_the_mesh_and_the_processes_are_in_the_help_of_training():
    shown = start_here("experiments.train", "--help").stdout
    flags = ("expert_axis", "model_axis", "[no]fsdp", "coordinator", "num_processes", "process_id")
    assert all(f"--{flag}" in shown for flag in flags)


def test_formats_are_in_the_help_of_all_that_take_them():
    for name in ("export", "evaluate", "memory"):
        shown = start_here(f"experiments.{name}", "--help").stdout
        assert all(f"--{flag}" in shown for flag in ("router", "backbone", "ends", "experts_format", "trits"))


CASES = """
import ml_collections
from configs import studies

KINDS = {"dense": {"model": {"family": "dense"}}, "mixture": {"model": {"num_experts": 4}}}


def get_config():
    config = ml_collections.ConfigDict()
    config.base = studies.base()
    config.grid = ml_collections.ConfigDict({"seed": (0, 1)})
    config.cases = studies.cases(bed=studies.of("few_digits"), kind=KINDS)
    config.compare = ml_collections.ConfigDict({"label": "kind", "baselines": ("dense",)})
    config.choose = ml_collections.ConfigDict({"kind": "bed", "setting": "kind"})
    return config
"""


def test_a_sweep_of_cases_compares_and_chooses(tmp_path, monkeypatch):
    (tmp_path / "cases.py").write_text(CASES)
    monkeypatch.syspath_prepend(str(tmp_path))
    raw = importlib.import_module("cases").get_config().to_dict()
    workdir = tmp_path / "sweep"
    workdirs.claim(workdir, "sweep.json", {"base": raw["base"]}, ())
    # Finished trials, so that none is trained: 0.5 and 0.625 of dense models, 0.75 and 0.875 of mixtures.
    for number, trial in enumerate(grid.expand(raw["base"], raw["grid"], workdir, raw["cases"])):
        seed, is_mixture = divmod(number, 2)
        accuracy = 0.5 + 0.25 * is_mixture + 0.125 * seed
        result = {"test_accuracy": accuracy, "test_nll": 1 - accuracy, "validation_accuracy": accuracy}
        trial.directory.mkdir(parents=True)
        files.write_json(trial.directory / "result.json", result)
    run = start_here("experiments.sweep", f"--config={tmp_path / 'cases.py'}", f"--workdir={workdir}")
    assert run.returncode == 0, run.stderr
    [compared] = json.loads((workdir / "comparisons.json").read_text())
    assert (compared["where"], compared["case"], compared["seeds"]) == ("few_digits", "mixture", 2)
    assert (compared["accuracy"], compared["accuracy_interval"], compared["val_accuracy"]) == (0.25, 0.0, 0.25)
    scores = json.loads((workdir / "tuning.json").read_text())
    assert [(score["setting"], score["chosen"]) for score in scores] == [("dense", False), ("mixture", True)]
    summary = (workdir / "summary.md").read_text()
    assert "| mixture | +25.00 ± 0.00 |" in summary
    assert "| few_digits | mixture | 2 of 2 | 81.25 | best |" in summary
    assert sorted(path.name for path in (workdir / "plots").iterdir()) == ["cases.png", "cases_vs_bytes.png"]
    assert not (workdir / "memory_totals.csv").exists()  # no memory_base


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.compare.label=family", "compare.label = 'family': it must be bed or kind"),
        ("--config.compare.baselines=('moe',)", "compare.baselines = 'moe': it must be dense or mixture"),
        ("--config.choose.kind=family", "choose.kind = 'family': it must be bed or kind"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_at_once(tmp_path, flag, message):
    (tmp_path / "cases.py").write_text(CASES)
    run = start_here("experiments.sweep", f"--config={tmp_path / 'cases.py'}", f"--workdir={tmp_path / 'sweep'}", flag)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_writes_tables_and_plots_and_ends_at_once_when_it_is_done(tmp_path):
    sweep = ["experiments.sweep", f"--workdir={tmp_path}", "--jobs=2", *SHORT_SWEEP, *SMALL_GRID]
    first = start(*sweep)
    assert first.returncode == 0, first.stderr
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [(row["family"], row["num_experts"], row["form"]) for row in rows] == [
        *[("dense", "1", "-"), ("butterfly", "2", "separate"), ("butterfly", "4", "separate")],
    ]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["wall_seconds"] and row["test_accuracy"] for row in rows)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [str(row["test_accuracy"]) for row in stored] == [row["test_accuracy"] for row in rows]
    for name in ("accuracy_vs_experts", "bytes_vs_experts", "accuracy_vs_bytes", "memory_vs_experts"):
        assert (tmp_path / "plots" / f"{name}.png").exists()
    assert "| butterfly | separate | 4 |" in (tmp_path / "summary.md").read_text()
    # The paper's figures, counted from shapes.
    for figure in ("939.52", "2.656", "353.7"):
        assert figure in first.stdout

    results = (tmp_path / "results.csv").read_bytes()
    second = start_here(*sweep)
    assert second.returncode == 0, second.stderr
    assert "3 trials, 3 finished" in second.stdout
    assert (tmp_path / "results.csv").read_bytes() == results


@pytest.mark.long
def test_compile_tpu_writes_its_report_and_goes_on(tmp_path):
    flags = ["--config=configs/digits.py", "--topology=v5e:2x2", "--families=butterfly,dense", f"--out={tmp_path}"]
    run = start("experiments.compile_tpu", *flags, "--experts=4", "--config.model.num_layers=1")
    assert run.returncode == 0, run.stderr
    assert "v5e:2x2, train, butterfly: fits with 4 experts" in run.stdout
    rows = list(csv.DictReader(io.StringIO((tmp_path / "compiled.csv").read_text())))
    assert [(row["family"], row["step"], row["status"]) for row in rows] == [
        *[("butterfly", "train", "fits"), ("dense", "train", "fits")],
        *[("butterfly", "eval", "fits"), ("dense", "eval", "fits")],
    ]
    assert all(int(row["peak_bytes"]) > 0 and int(row["all_to_all_bytes"]) == 0 for row in rows)
    again = start_here("experiments.compile_tpu", *flags, "--experts=4", "--config.model.num_layers=1")
    assert again.returncode == 0
    assert list(csv.DictReader(io.StringIO((tmp_path / "compiled.csv").read_text()))) == rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v7:2x2"], "topology = 'v7:2x2': it must be one of v4, v5e"),
        (["--topology=v5e:8x8"], "butterfly, 1 experts on v5e:8x8: batch_size = 32: it must be a multiple of the 64"),
        (["--expert_axis=2", "--experts=3"], "standard, 3 experts on v5e:4x4: expert_axis = 2: it must be a divisor"),
        (["--experts=4,x"], "experts = '4,x': it must be numbers from 1"),
        (["--families=round"], "families = 'round': it must be dense or standard or ternary or butterfly or low_rank"),
        (["--expert_axis=two"], "expert_axis = 'two': it must be auto or a number"),
    ],
)
def test_compile_tpu_refuses_what_cannot_be_compiled(tmp_path, flags, message):
    run = start_here("experiments.compile_tpu", "--config=configs/digits.py", f"--out={tmp_path / 'out'}", *flags)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_bench_times_compiles_writes_its_report_and_goes_on(tmp_path):
    flags = ["--quick", "--experts=4", "--jobs=layer forward", "--tpu_sizes=tiny", f"--out={tmp_path}"]
    run = start("experiments.bench", *flags)
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
    timed = [row for row in rows if row["dispatch"] != "fused"]
    assert {row["status"] for row in timed} == {"ok"}
    assert {row["status"] for row in rows if row["dispatch"] == "fused"} == {"not on CPU"}
    assert {row["name"] for row in timed} >= {"dense", "dense x 2", "standard", "butterfly rows separate"}
    assert all(float(row["lower_ms"]) <= float(row["median_ms"]) <= float(row["upper_ms"]) for row in timed)
    compiled = list(csv.DictReader(io.StringIO((tmp_path / "compiled.csv").read_text())))
    assert int(compiled[0]["hbm_bytes"]) > 0
    assert "layer forward, tiny, top-2: d_model 64, d_ff 128, 2,040 tokens" in run.stdout
    assert "butterfly over standard" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "plots" / "bench.png").exists()
    again = start_here("experiments.bench", *flags)
    assert again.returncode == 0
    assert list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text()))) == rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes=tiny,huge"], "sizes = 'huge': it must be tiny or small or paper"),
        (["--tpu_sizes=huge"], "tpu_sizes = 'huge': it must be tiny or small or paper"),
        (["--jobs=train"], "jobs = 'train': it must be layer forward or layer forward+backward or train step"),
        (["--experts=0"], "experts = '0': it must be numbers from 1"),
        (["--top_k=x"], "top_k = 'x': it must be numbers from 1"),
        (["--top_k=65", "--experts=64"], "top_k = '65': it must be at most the experts, 64"),
        (["--repetitions=0"], "repetitions = 0: it must be at least 1"),
        (["--out=/proc/nowhere"], "out = '/proc/nowhere': it must be a directory that can be written to"),
    ],
)
def test_bench_refuses_what_cannot_be_timed(tmp_path, flags, message):
    run = start_here("experiments.bench", "--quick", "--notpu", f"--out={tmp_path / 'out'}", *flags)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_ends_with_a_status_of_its_own_and_a_report(tmp_path):
    small = ["--config.total_steps=20", "--config.log_every=2", "--config.optimizer.warmup_steps=0"]
    run = train(tmp_path, *small, "--config.optimizer.learning_rate=1e15", config="configs/digits.py:dense")
    assert run.returncode == 65, run.stderr
    [line] = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith("max_skipped_steps = 0 may be left out; try a lower learning rate, or allow more")
    assert "Traceback" not in run.stderr
    [report] = (tmp_path / "nonfinite").glob("*.json")
    assert json.loads(report.read_text())["groups"]
