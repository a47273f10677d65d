"""From an archive to a tested model, by the commands that a user gives; and no TensorFlow anywhere."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests import made_archive
from tests.commands import command, start_here
from tests.conftest import ROOT, environment

SIZES = ["--config.data.num_train=200", "--config.data.num_validation=40", "--config.data.num_test=30"]
SMALL = [
    *(
        "--config.model.num_layers=1",
        "--config.model.d_model=16",
        "--config.model.d_ff=32",
        "--config.model.num_heads=2",
    ),
    *("--config.model.patch_size=8", "--config.batch_size=16", "--config.eval_every=3", "--config.log_every=2"),
]
CONFIG = "--config=configs/cifar100.py:butterfly,4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds archive/ and, prepared from it by the command, data/."""
    folder = tmp_path_factory.mktemp("cifar")
    sha256 = made_archive.make("cifar100", folder / "archive", 240, 30)
    where = (f"--data_dir={folder / 'data'}", f"--archive_dir={folder / 'archive'}", f"--sha256={sha256}")
    run = start_here("experiments.prepare_data", "--dataset=cifar100", *where)
    assert run.returncode == 0, run.stderr
    return folder


def train(folder: Path, workdir: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return start_here(*training(folder, workdir), *flags)


def training(folder: Path, workdir: str) -> tuple[str, ...]:
    where = (f"--workdir={folder / workdir}", f"--data_dir={folder / 'data'}")
    return ("experiments.train", CONFIG, *where, "--config.total_steps=6", *SIZES, *SMALL)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    program, *flags = command(*training(folder, "run"))
    strict = [program, "-W", "error::UserWarning", *flags]
    run = subprocess.run(strict, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return folder / "run"


def test_there_is_no_tensorflow():
    assert importlib.util.find_spec("tensorflow") is None


def test_a_prepared_archive_is_trained_on_and_evaluated(folder, trained):
    result = json.loads((trained / "result.json").read_text())
    assert (result["steps"], result["test"]["count"]) == (6, 30)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [3, 6]
    assert [row["step"] for row in rows if row["split"] == "test"] == [6]  # once
    images = json.loads((trained / "images.json").read_text())
    assert len(images["cifar100"]["classes"]) == 100
    model = folder / "model.safetensors"
    run = start_here("experiments.export", f"--workdir={trained}", f"--out={model}", "--angle_bits=8")
    assert run.returncode == 0, run.stderr
    where = (f"--data_dir={folder / 'data'}", "--json")
    run = start_here("experiments.evaluate", f"--model={model}", *where)
    assert run.returncode == 0, run.stderr
    [row] = json.loads(run.stdout)
    assert row["count"] == 30
    assert row["nll"] == pytest.approx(result["test_nll"], abs=0.05)


def test_streamed_images_train_the_same_model(folder, trained):
    run = train(folder, "streamed", "--config.data.reading=stream")
    assert run.returncode == 0, run.stderr
    assert (folder / "streamed" / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_a_run_is_not_gone_on_with_on_other_images(folder, trained, tmp_path):
    made_archive.prepare_drawn(tmp_path, train=260, test=40)
    (trained / "result.json").rename(tmp_path / "result.json")
    run = start_here(
        *("experiments.train", CONFIG, f"--workdir={trained}", f"--data_dir={tmp_path / 'data'}"),
        *("--config.total_steps=6", *SIZES, *SMALL),
    )
    (tmp_path / "result.json").rename(trained / "result.json")
    assert run.returncode == 2
    told = f"error: workdir = '{trained}': it is of other images of cifar100, digest "
    assert run.stderr.strip().splitlines()[-1].startswith(told)
    run = start_here("experiments.evaluate", f"--workdir={trained}", f"--data_dir={tmp_path / 'data'}")
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(told)


@pytest.mark.long
def test_images_stored_larger_than_the_model_sees_are_cut_streamed_trained_on_and_scored(tmp_path):
    made_archive.prepare_jpegs(tmp_path / "data", train=40, validation=11)
    where = f"--data_dir={tmp_path / 'data'}"
    sizes = {"name": "tiny_jpegs", "num_classes": 4, "num_train": 32, "num_validation": 8, "num_test": 11}
    sizes |= {"stored_size": 24, "image_size": 16}
    flags = [f"--config.data.{name}={value}" for name, value in sizes.items()]
    flags += ["--config.model.image_size=16", "--config.total_steps=3", "--config.optimizer.ema_decay=0.9", *SMALL]
    config = "--config=configs/imagenet_s16.py:butterfly,4,tied"
    run = start_here("experiments.train", config, f"--workdir={tmp_path / 'run'}", where, *flags)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test"]["count"] == 11
    model = tmp_path / "model.safetensors"
    assert start_here("experiments.export", f"--workdir={tmp_path / 'run'}", f"--out={model}").returncode == 0
    for source in (f"--workdir={tmp_path / 'run'}", f"--model={model}"):
        run = start_here("experiments.evaluate", source, where, "--json", "--batch_size=4")
        assert run.returncode == 0, run.stderr
        [row] = json.loads(run.stdout)
        assert (row["count"], row["nll"]) == (11, pytest.approx(result["test_nll"], abs=0.01))


def test_images_that_are_not_there_are_one_clear_error(folder, tmp_path):
    for name in ("train", "sweep"):
        config = "configs/cifar100.py" if name == "train" else "configs/sweep_cifar100.py"
        where = (f"--workdir={tmp_path / name}", f"--data_dir={tmp_path}")
        run = start_here(f"experiments.{name}", f"--config={config}", *where)
        assert run.returncode == 2
        told = run.stderr.strip().splitlines()[-1]
        assert told.startswith("error: data.name = 'cifar100': not prepared in ")
        assert "python -m experiments.prepare_data --dataset=cifar100 --data_dir=" in told


def test_a_batch_is_drawn_as_the_model_sees_it(folder, tmp_path):
    path = tmp_path / "pictures" / "batch.png"
    where = (f"--data_dir={folder / 'data'}", f"--out={path}", "--images=8", "--step=2")
    run = start_here("experiments.show_batch", CONFIG, *where, *SIZES, *SMALL)
    assert run.returncode == 0, run.stderr
    assert f"8 of 16 images, 32 x 32 x 3: {path}" in run.stdout
    with Image.open(path) as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(10**6)) > 1000  # not blank


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([CONFIG, "--out=/"], "out = '/': it must be a file"),
        ([CONFIG, "--out=/proc/nowhere/batch.png"], "out = '/proc/nowhere': it must be a directory that can be"),
        (["--config=configs/paper.py", "--config.data.channels=2"], "data.channels = 2: it must be 1 or 3, to be"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_one_clear_error(folder, flags, message):
    run = start_here("experiments.show_batch", f"--data_dir={folder / 'data'}", *flags)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.long
def test_the_input_is_timed(folder, tmp_path):
    where = (f"--data_dir={folder / 'data'}", f"--out={tmp_path}", "--repeats=2")
    run = start_here("experiments.bench_data", CONFIG, *where, *SIZES, *SMALL)
    assert run.returncode == 0, run.stderr
    [row] = json.loads((tmp_path / "data_cost.json").read_text())
    assert (row["images"], row["reading"], row["batch_size"], row["repeats"]) == ("cifar100", "memory", 16, 2)
    assert all(row[f"{name}_images_s"] > 0 for name in ("host", "device", "augment", "step"))
    assert row["host_images_s"] > row["step_images_s"]
    assert (tmp_path / "data_cost.csv").exists()
