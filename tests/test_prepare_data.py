"""The entry point that prepares data sets, started as a user starts it, and the flag that says where they lie."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from bvit_jax import data_dirs, prepared
from experiments import data_flags
from tests.conftest import ROOT
from tests.made_archive import make, prepare_jpegs, prepare_unlabelled


def start(*arguments, cwd=ROOT):
    command = [sys.executable, "-W", "error", "-m", "experiments.prepare_data", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "TFDS_DATA_DIR"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def cells(line):
    return re.split(r"  +", line.strip())


def test_cifar_is_prepared_read_and_described(tmp_path):
    sha256 = make("cifar10", tmp_path, 45, 20)
    flags = ["--dataset=cifar10", "--data_dir=data", f"--archive_dir={tmp_path}", f"--sha256={sha256}"]
    first = start(*flags, cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    found = prepared.open_set("cifar10", tmp_path / "data")
    lines = first.stdout.splitlines()
    assert lines[0] == f"cifar10:3.0.2 in {found.directory}, digest {found.digest}"
    assert lines[1] == "10 classes, 3 channels; every image was read."
    (train,) = [cells(line) for line in lines if line.strip().startswith("train")]
    (test,) = [cells(line) for line in lines if line.strip().startswith("test")]
    assert train[:4] == ["train", "45", "4 to 5", "32 x 32"]
    assert test[:4] == ["test", "20", "2", "32 x 32"]
    assert float(train[4].replace(",", "")) > 0
    assert lines[-1] == f"To train on it: --data_dir={tmp_path}/data and data.name = 'cifar10' in the configuration."
    # Given again, it reads again and prepares nothing.
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    again = start(*flags, cwd=tmp_path)
    told = ["already prepared; the archive was not read", *lines[:2]]
    assert (again.returncode, again.stdout.splitlines()[:3]) == (0, told)


def test_another_set_is_read_and_described(tmp_path):
    place = prepare_jpegs(tmp_path, train=40, validation=20)
    run = start("--dataset=tiny_jpegs", f"--data_dir={place}")
    assert (run.returncode, run.stderr) == (0, "")
    (train,) = [cells(line) for line in run.stdout.splitlines() if line.strip().startswith("train")]
    sizes, _ = prepared.open_set("tiny_jpegs", place).source("train").measure(np.arange(40))
    heights, widths = (f"{sizes[:, axis].min()} to {sizes[:, axis].max()}" for axis in (0, 1))
    assert train[:4] == ["train", "40", "10", f"{heights} x {widths}"]


def test_splits_without_labels_are_read_and_shown_as_such(tmp_path):
    place = prepare_unlabelled(tmp_path, {"train": [0, 1, 1], "validation": [1, -1, -1], "test": [-1, -1]})
    run = start("--dataset=unlabelled", f"--data_dir={place}")
    assert (run.returncode, run.stderr) == (0, "")
    rows = [cells(line) for line in run.stdout.splitlines()]
    found = {row[0]: row[1:4] for row in rows if row[0] in ("train", "validation", "test")}
    assert found == {
        "train": ["3", "0 to 2", "4 x 4"],
        "validation": ["3", "0 to 1; 2 without label", "4 x 4"],
        "test": ["2", "without labels", "4 x 4"],
    }


def test_a_damaged_image_is_found(tmp_path):
    version = prepare_jpegs(tmp_path, train=40, validation=20) / "tiny_jpegs" / "1.0.0"
    path = version / "tiny_jpegs-validation.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 300] ^= 1
    path.write_bytes(content)
    run = start("--dataset=tiny_jpegs", f"--data_dir={tmp_path}")
    assert run.returncode == 2
    assert run.stderr.startswith("error: tiny_jpegs:1.0.0, split validation: a record file is missing or damaged;")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dataset=mnist"],
            "data.name = 'mnist': not prepared in {data} (there: none); where TensorFlow ",
        ),
        (
            ["--dataset=mnist", "--archive_dir=x"],
            "archive_dir = 'x': it must be left out, as mnist is not prepared",
        ),
        pytest.param(
            ["--dataset=mnist", "--sha256=0"],
            "sha256 = '0': it must be left out, as mnist is not prepared here",
            marks=pytest.mark.long,
        ),
        (["--dataset=cifar10", "--archive_dir={data}"], "archive_dir: {data}/cifar-10-binary.tar.gz cannot be read ("),
        pytest.param(
            ["--dataset=cifar10", "--sha256=0"],
            "sha256 = '0': it must be given with archive_dir alone",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, flags, message):
    run = start(*[flag.format(data=tmp_path) for flag in flags], f"--data_dir={tmp_path}")
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: {message.format(data=tmp_path)}")


@pytest.fixture
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def test_the_flag_holds_for_this_process_and_its_children(parsed, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", "/elsewhere")
    with flagsaver.flagsaver(data_dir=None):
        assert data_flags.apply() == Path("/elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    for given, meant in (("sets", tmp_path / "sets"), ("~/sets", Path("/home/ada/sets")), ("/sets", Path("/sets"))):
        with flagsaver.flagsaver(data_dir=given):
            assert data_flags.apply() == data_dirs.current() == meant
        assert os.environ["TFDS_DATA_DIR"] == str(meant)
