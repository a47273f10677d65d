"""From a trained run to a packed file and its predictions, with the entry points as a user starts them."""

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bvit_jax import data, packed
from tests.conftest import make_config
from tests.test_experiments import start, train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of six steps with 6-bit angles and an int8 router."""
    workdir = tmp_path_factory.mktemp("run")
    formats = ["--config.model.angle_bits=6", "--config.model.router_precision=int8"]
    found = train(workdir, *formats, config="configs/digits.py:butterfly,4")
    assert found.returncode == 0, found.stderr
    return workdir


@pytest.fixture(scope="module")
def model(run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "deep" / "model.safetensors"
    found = start("experiments.export", f"--workdir={run}", f"--out={path}", "--angle_bits=8")
    assert found.returncode == 0, found.stderr
    size = path.stat().st_size
    assert f"written: {path}, {size:,} bytes, SHA-256 " in found.stdout
    assert f"{size:,}" in found.stdout.split("all", 1)[1].splitlines()[0]  # the ledger's sum
    assert "8-bit angles, router int8, backbone float32, 5 trits a byte" in found.stdout
    assert found.stderr == ""
    return path


def test_the_same_run_gives_the_same_bytes_and_other_formats_other_ones(run, model, tmp_path):
    again, small = tmp_path / "again.safetensors", tmp_path / "small.safetensors"
    assert start("experiments.export", f"--workdir={run}", f"--out={again}", "--angle_bits=8").returncode == 0
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert hashlib.sha256(again.read_bytes()).hexdigest() == digest
    formats = ["--router=int4", "--backbone=int8", "--trits=2bit"]
    assert start("experiments.export", f"--workdir={run}", f"--out={small}", *formats).returncode == 0
    assert small.stat().st_size < again.stat().st_size / 1.5
    storage = packed.load(small).storage
    assert (storage.angle_bits, storage.router, storage.backbone, storage.trits) == (6, "int4", "int8", "2bit")


def test_the_file_scores_as_the_run_did(run, model, tmp_path):
    # 8 bits hold the 6-bit angles that the run was trained with, exactly.
    result = json.loads((run / "result.json").read_text())
    of_file = json.loads(start("experiments.evaluate", f"--model={model}", "--json").stdout)
    of_run = json.loads(start("experiments.evaluate", f"--workdir={run}", "--json").stdout)
    assert [row["accuracy"] for row in of_file + of_run] == [result["test_accuracy"]] * 2
    assert [row["nll"] for row in of_file + of_run] == pytest.approx([result["test_nll"]] * 2, abs=1e-6)
    assert of_file[0]["bytes_full"] == model.stat().st_size
    validation = json.loads(start("experiments.evaluate", f"--model={model}", "--json", "--split=validation").stdout)
    assert validation[0]["accuracy"] == result["validation_accuracy"]
    assert (validation[0]["count"], of_file[0]["count"]) == (197, 400)


def test_a_table_of_formats_over_several_runs(run, tmp_path):
    flags = ["--angle_bits=32,4", "--without_rotations", f"--out={tmp_path / 'new'}"]
    found = start("experiments.evaluate", f"--workdir={run},{run}", *flags)
    assert found.returncode == 0, found.stderr
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "evaluation.csv").read_text())))
    names = ["every angle 0", "32-bit angles, router int8", "4-bit angles, router int8"]
    assert [row["numbers"] for row in rows] == names * 2
    assert int(rows[1]["bytes_full_ffn"]) > int(rows[2]["bytes_full_ffn"])
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text())[3]["accuracy"] == float(rows[3]["accuracy"])
    assert "mean of 2 runs" in found.stdout
    assert "± 0.00" in found.stdout


def test_predictions_on_files(model, tmp_path):
    test = data.load(make_config().data).test
    picture = (test.images[0, ..., 0] * 255).round().astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", test.images[1:4])
    files = [tmp_path / "a.png", tmp_path / "b.npy"]
    rows = json.loads(start("experiments.predict", f"--model={model}", "--json", "--batch_size=3", *files).stdout)
    assert [row["image"] for row in rows] == [str(files[0]), *[f"{files[1]}[{index}]" for index in range(3)]]
    pixels = np.concatenate([(picture / np.float32(255))[None, ..., None], test.images[1:4]])
    wanted = packed.load(model).probabilities(pixels)
    np.testing.assert_allclose([row["probabilities"] for row in rows], wanted, atol=1e-6)
    assert [row["class"] for row in rows] == wanted.argmax(axis=1).tolist()
    assert [row["probability"] for row in rows] == pytest.approx(wanted.max(axis=1), abs=1e-6)
    shown = start("experiments.predict", f"--model={model}", "--top=2", *files)
    assert "class 2" in shown.stdout
    assert "class 3" not in shown.stdout
    assert f"{100 * wanted[0].max():.1f}" in shown.stdout
    assert "peak memory" in shown.stderr


def test_the_memory_report(tmp_path):
    formats = ["--experts=1,64", "--router=int8", "--backbone=int8"]
    found = start("experiments.memory", "--config=configs/paper.py", *formats, f"--out={tmp_path / 'memory'}")
    assert found.returncode == 0, found.stderr
    for figure in ("939.52", "2.656", "353.7", "1.121"):  # the last: tied, 8-bit angles, every byte
        assert figure in found.stdout
    written = {path.name for path in (tmp_path / "memory").iterdir()}
    assert {"memory.csv", "memory_totals.csv", "memory.json", "plots"} <= written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--workdir=/nowhere", "--out=model.safetensors"], "workdir = '/nowhere': it must be the directory"),
        (["export", "--workdir=/nowhere", "--out=/"], "out = '/': it must be a file"),
        (["evaluate"], "model, workdir = (None, []): it must be given, exactly one of them"),
        (["evaluate", "--workdir=/nowhere", "--angle_bits=7"], "angle_bits = '7': it must be 32 or 16 or 8 or 6 or 4"),
        (["evaluate", "--model=/nowhere"], "/nowhere: No such file or directory"),
        (["evaluate", "--model=/nowhere", "--router=int8"], "model = '/nowhere': it must be without formats"),
        (["predict", "--model=/nowhere"], "IMAGE = '': it must be one file or more"),
        (["predict", "--model=README.md", "a.png"], "README.md: not a packed model"),
        (["memory", "--config=configs/paper.py", "--out=/proc/nowhere"], "out = '/proc/nowhere': it must be a dir"),
        (["memory", "--config=configs/paper.py", "--out=/tmp", "--experts=1,0"], "experts = '1,0': it must be numbers"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    name, *flags = arguments
    found = start(f"experiments.{name}", *flags)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in found.stderr


def test_an_unfinished_run_has_no_model(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    found = start("experiments.export", f"--workdir={tmp_path}", f"--out={tmp_path / 'm'}")
    assert found.returncode == 2
    assert "it holds no checkpoint yet" in found.stderr
    assert not (tmp_path / "m").exists()
    (tmp_path / "config.json").write_text("{}")
    assert "it is damaged, or of another version" in start("experiments.evaluate", f"--workdir={tmp_path}").stderr
