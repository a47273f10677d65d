"""From a trained run to a packed file and its predictions, by the commands that a user gives."""

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bvit_jax import data, memory, packed
from bvit_jax.config import Config, from_dict
from tests.commands import start, start_here, train
from tests.conftest import make_config


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of six steps with 6-bit angles and an int8 router."""
    workdir = tmp_path_factory.mktemp("run")
    formats = ["--config.model.angle_bits=6", "--config.model.router_precision=int8", "--config.model.angle_init=2.0"]
    found = train(workdir, *formats, config="configs/digits.py:butterfly,4")
    assert found.returncode == 0, found.stderr
    return workdir


@pytest.fixture(scope="module")
def other_run(tmp_path_factory) -> Path:
    """Another seed, whose accuracy differs."""
    workdir = tmp_path_factory.mktemp("other")
    flags = ["--config.seed=1", "--config.model.angle_bits=6", "--config.model.router_precision=int8"]
    assert train(workdir, *flags, "--config.optimizer.learning_rate=0.01").returncode == 0
    return workdir


@pytest.fixture(scope="module")
def standard_run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("standard")
    assert train(workdir, config="configs/digits.py:standard,2").returncode == 0
    return workdir


@pytest.fixture(scope="module")
def model(run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "deep" / "model.safetensors"
    found = start("experiments.export", f"--workdir={run}", f"--out={path}", "--angle_bits=8")
    assert found.returncode == 0, found.stderr
    size = path.stat().st_size
    assert f"written: {path}, {size:,} bytes, SHA-256 " in found.stdout
    assert f"{size:,}" in found.stdout.split("all", 1)[1].splitlines()[0]  # the ledger's sum
    assert "; 8-bit angles, router int8\n" in found.stdout
    own = packed.load(path).ledger
    standard = memory.standard_ledger(packed.load(path).config)
    for name, accounting in (("paper", "paper"), ("mixture layers", "full_ffn"), ("whole file", "full")):
        times = getattr(standard, f"bytes_{accounting}") / getattr(own, f"bytes_{accounting}")
        assert f"{name} {times:.1f}x" in found.stdout
    assert found.stderr == ""
    return path


def make_run_config(workdir: Path) -> Config:
    return from_dict(json.loads((workdir / "config.json").read_text()))


def test_the_same_run_gives_the_same_bytes_and_other_formats_other_ones(run, model, tmp_path):
    again, small = tmp_path / "again.safetensors", tmp_path / "small.safetensors"
    assert start_here("experiments.export", f"--workdir={run}", f"--out={again}", "--angle_bits=8").returncode == 0
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert hashlib.sha256(again.read_bytes()).hexdigest() == digest
    formats = ["--router=int4", "--backbone=int8", "--ends=bfloat16", "--trits=2bit"]
    assert start_here("experiments.export", f"--workdir={run}", f"--out={small}", *formats).returncode == 0
    assert small.stat().st_size < again.stat().st_size / 1.5
    storage = packed.load(small).storage
    assert (storage.angle_bits, storage.router, storage.backbone, storage.trits) == (6, "int4", "int8", "2bit")
    assert storage.ends == "bfloat16"


def test_the_file_scores_as_the_run_did(run, model, tmp_path):
    # 8 bits hold the 6-bit angles that the run was trained with, exactly.
    result = json.loads((run / "result.json").read_text())
    of_file = json.loads(start_here("experiments.evaluate", f"--model={model}", "--json").stdout)
    of_run = json.loads(start_here("experiments.evaluate", f"--workdir={run}", "--json").stdout)
    assert [row["accuracy"] for row in of_file + of_run] == [result["test_accuracy"]] * 2
    assert [row["nll"] for row in of_file + of_run] == pytest.approx([result["test_nll"]] * 2, abs=1e-6)
    assert of_file[0]["bytes_full"] == model.stat().st_size
    as_trained = memory.ledger(make_run_config(run))
    assert (of_run[0]["bytes_full"], of_run[0]["bytes_full_ffn"]) == (as_trained.bytes_full, as_trained.bytes_full_ffn)
    repacked = json.loads(start_here("experiments.evaluate", f"--workdir={run}", "--json", "--router=bfloat16").stdout)
    assert [row["numbers"] for row in repacked] == ["6-bit angles, router bfloat16"]
    validation = json.loads(
        start_here("experiments.evaluate", f"--model={model}", "--json", "--split=validation").stdout
    )
    assert validation[0]["accuracy"] == result["validation_accuracy"]
    assert (validation[0]["count"], of_file[0]["count"]) == (197, 400)


@pytest.mark.long
def test_a_table_of_formats_over_several_runs(run, other_run, tmp_path):
    flags = ["--angle_bits=32,4", "--without_rotations", f"--out={tmp_path / 'new'}"]
    found = start("experiments.evaluate", f"--workdir={run},{other_run},{run}", *flags)
    assert found.returncode == 0, found.stderr
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "evaluation.csv").read_text())))
    names = ["as trained, every angle 0", "32-bit angles, router int8", "4-bit angles, router int8"]
    assert [row["numbers"] for row in rows] == names * 2
    assert int(rows[1]["bytes_full_ffn"]) > int(rows[2]["bytes_full_ffn"])
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text())[3]["accuracy"] == float(rows[3]["accuracy"])
    assert "mean of 2 runs" in found.stdout
    by_run = [[row for row in rows if row["source"] == str(name)] for name in (run, other_run)]
    accuracies = [100 * float(part[1]["accuracy"]) for part in by_run]
    assert accuracies[0] != accuracies[1]
    assert f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}" in found.stdout
    # Every angle 0 is another model than the rotated one.
    assert abs(float(by_run[0][0]["nll"]) - float(by_run[0][1]["nll"])) > 1e-4


def test_a_run_says_whether_its_experts_differ_and_are_used(run, tmp_path):
    known = json.loads((run / "result.json").read_text())["experts"]
    found = start_here("experiments.evaluate", f"--workdir={run}", "--experts", f"--out={tmp_path / 'new'}")
    assert found.returncode == 0, found.stderr
    [row] = csv.DictReader(io.StringIO((tmp_path / "new" / "evaluation.csv").read_text()))
    for name in ("output_cosine", "experts_used", "lost_shuffled", "lost_one"):
        assert float(row[name]) == pytest.approx(np.mean(known[name]), abs=1e-5)
    lost = [f"{100 * known[name]:.2f}" for name in ("lost_shuffled", "lost_one")]
    means = [f"{np.mean(known['output_cosine']):.3f}", f"{np.mean(known['experts_used']):.2f}"]
    _, table = found.stdout.split("lost one")
    figures = next(line for line in table.splitlines() if "as trained" in line)
    assert figures.split()[-4:] == means + lost


def test_only_butterflies_have_angles(standard_run, run, tmp_path):
    for flag in ("--angle_bits=8", "--without_rotations"):
        found = start_here("experiments.evaluate", f"--workdir={standard_run}", flag)
        assert found.returncode == 2
        assert "it must be the run of a butterfly" in found.stderr
    out = tmp_path / "m.safetensors"
    shown = start_here(
        "experiments.export", f"--workdir={standard_run}", f"--out={out}", "--experts_format=int4"
    ).stdout
    assert "; experts int4, router float32\n" in shown


def test_predictions_on_files(model, tmp_path):
    picture, *others = data.load(make_config().data).test.images[:4]
    Image.fromarray(picture[..., 0]).save(tmp_path / "a.png")
    floating = np.stack(others) / np.float32(255)
    np.save(tmp_path / "b.npy", floating)
    np.save(tmp_path / "c.npy", picture)
    files = [tmp_path / "a.png", tmp_path / "b.npy", tmp_path / "c.npy"]
    rows = json.loads(start("experiments.predict", f"--model={model}", "--json", "--batch_size=2", *files).stdout)
    names = [str(files[0]), *[f"{files[1]}[{index}]" for index in range(3)], str(files[2])]
    assert [row["image"] for row in rows] == names
    wanted = packed.load(model).probabilities(np.stack([picture, *others, picture]))
    np.testing.assert_allclose([row["probabilities"] for row in rows], wanted, atol=1e-6)
    assert [row["class"] for row in rows] == wanted.argmax(axis=1).tolist()
    assert [row["probability"] for row in rows] == pytest.approx(wanted.max(axis=1), abs=1e-6)
    shown = start_here("experiments.predict", f"--model={model}", "--top=2", *files)
    assert "class 2" in shown.stdout
    assert "class 3" not in shown.stdout
    assert f"{100 * wanted[0].max():.1f}" in shown.stdout
    assert "peak memory" in shown.stderr


def test_the_memory_report(tmp_path):
    formats = ["--experts=1,16,128", "--router=int8", "--backbone=int8"]
    found = start("experiments.memory", "--config=configs/paper.py", *formats, f"--out={tmp_path / 'memory'}")
    assert found.returncode == 0, found.stderr
    assert "16 experts, router int8, dense matrices float32, backbone int8, 5 trits a byte." in found.stdout
    assert found.stdout.count("butterfly tied 8-bit") == 3  # bytes, devices, energy: one number of experts
    totals = list(csv.DictReader(io.StringIO((tmp_path / "memory" / "memory_totals.csv").read_text())))
    (row,) = (r for r in totals if (r["form"], r["numbers"], r["num_experts"]) == ("tied", "8-bit", "16"))
    assert f"{int(row['bytes_full']) / 1e6:.3f}" in found.stdout
    assert f"{float(row['compression_full_ffn']):.1f}" in found.stdout
    devices = json.loads((tmp_path / "memory" / "devices.json").read_text())
    most = {(r["device"], r["variant"]): r["num_experts"] for r in devices}
    assert most["ESP32-S3-WROOM-1-N16R8", "butterfly separate 8-bit"] == 705
    assert most["ESP32-S3-WROOM-1-N16R8", "butterfly tied 8-bit"] == 1327
    assert "1,327" in found.stdout
    energies = json.loads((tmp_path / "memory" / "energy.json").read_text())
    assert {r["num_experts"] for r in energies} == {16}
    assert {r["images"] for r in energies} == {1, 128}
    written = {path.name for path in (tmp_path / "memory").iterdir()}
    assert {"memory.csv", "memory_totals.csv", "memory.json", "plots", "devices.csv", "energy.csv"} <= written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--workdir=/nowhere", "--out=model.safetensors"], "workdir = '/nowhere': it must be the directory"),
        (["export", "--workdir=/nowhere", "--out=/"], "out = '/': it must be a file"),
        (["evaluate"], "model, workdir = (None, []): it must be given, exactly one of them"),
        (["evaluate", "--workdir=/nowhere", "--angle_bits=7"], "angle_bits = '7': it must be 32 or 16 or 8 or 6 or 4"),
        (["evaluate", "--model=/nowhere"], "/nowhere: No such file or directory"),
        (["evaluate", "--model=/nowhere", "--router=int8"], "model = '/nowhere': it must be without formats"),
        (["evaluate", "--model=/nowhere", "--experts"], "experts = True: it must be of runs as they were trained"),
        (["evaluate", "--model=/nowhere", "--without_rotations"], "model = '/nowhere': it must be without formats"),
        (["memory", "--config=configs/nope.py", "--out=/tmp"], "config: the file cannot be read"),
        (["predict", "--model=", "a.png"], "model = '': it must be a packed file"),
        (["predict", "--model=/nowhere"], "IMAGE = '': it must be one file or more"),
        (["predict", "--model=README.md", "a.png"], "README.md: not a packed model"),
        (["memory", "--config=configs/paper.py", "--out=/proc/nowhere"], "out = '/proc/nowhere': it must be a dir"),
        (["memory", "--config=configs/paper.py", "--out=/tmp", "--experts=1,0"], "experts = '1,0': it must be numbers"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    name, *flags = arguments
    found = start_here(f"experiments.{name}", *flags)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in found.stderr


def test_an_unfinished_run_has_no_model(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    found = start_here("experiments.export", f"--workdir={tmp_path}", f"--out={tmp_path / 'm'}")
    assert found.returncode == 2
    assert "it holds no checkpoint yet" in found.stderr
    assert not (tmp_path / "m").exists()
    (tmp_path / "config.json").write_text("{}")
    assert "it is damaged, or of another version" in start_here("experiments.evaluate", f"--workdir={tmp_path}").stderr
