import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bvit_jax import compress, compressed, data, memory, packed, packed_file, train, trained, vit
from bvit_jax.compress_request import Request
from bvit_jax.compressed import MAPS_FILE, MODEL_FILE, RESULT_FILE
from bvit_jax.data import Split
from bvit_jax.model_config import ConfigError
from tests.commands import start, start_here
from tests.conftest import long_but, make_config

SMALL: dict[str, Any] = {
    "model__d_model": 16,
    "model__d_ff": 32,
    "model__patch_size": 4,
    "total_steps": 60,
    "optimizer__learning_rate": 0.01,
}
IMAGES = 40


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a dense model."""
    directory = tmp_path_factory.mktemp("dense")
    train.run(make_config("dense", **SMALL), directory, show_progress=False)
    return directory


def drawn(family: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in name only: what is read of it are the parameters that it would start from."""
    config = make_config(f"{family},4", **SMALL)
    params = vit.init_params(config.model, jax.random.key(0))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    monkeypatch.setattr(trained, "best_params", lambda workdir: (config, 7, params))
    return Path("nowhere")


REQUESTS = {
    "dense": [
        Request("mixed_rank", 0.6, 32, IMAGES),
        Request("prune", 0.5, 32, IMAGES),
        Request("svd", 0.5, 8, IMAGES),
    ],
    "standard": [
        Request("merge", 0.7, 32, IMAGES),
        Request("merge", 0.7, 4, IMAGES),
        Request("mixed", 0.5, 32, IMAGES),
    ],
    "butterfly": [Request("quantise", 1.0, 4, IMAGES), Request("rounding", 1.0, 8, IMAGES)],
}


@pytest.mark.parametrize("family", long_but(["dense", "standard"], REQUESTS))
def test_what_is_written_is_what_is_reported(
    family: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compressed.Run(dense if family == "dense" else drawn(family, monkeypatch))
    split = data.load_split(run.config.data, "test")
    assert isinstance(split, Split)
    for wanted in REQUESTS[family]:
        out = tmp_path / wanted.name
        out.mkdir()
        result, maps = run.write(wanted, out)
        assert {path.name for path in out.iterdir()} == {MODEL_FILE, RESULT_FILE, MAPS_FILE, "maps.json"}
        model = packed.load(out / MODEL_FILE)
        assert (out / MODEL_FILE).stat().st_size == result.bytes_full == model.ledger.bytes_full < result.bytes_before
        assert result.bytes_before == memory.ledger(run.config).bytes_full
        assert (result.bytes_full_ffn, result.numbers) == (model.ledger.bytes_full_ffn, model.ledger.params)
        accuracy = (model(split.images).argmax(axis=1) == split.labels).mean()
        assert result.test_accuracy == pytest.approx(accuracy, abs=1.01 / len(split))  # one image may lie on the edge
        assert (result.request, result.step) == (wanted, run.step)
        assert result.numbers <= wanted.keep * result.numbers_before
        assert result.seconds > 0
        assert json.loads((out / RESULT_FILE).read_text()) == dataclasses.asdict(result)
        with (out / MAPS_FILE).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["path"], row["numbers"]) for row in rows] == [(row.path, str(row.numbers)) for row in maps]
        if wanted.method == "merge":
            assert (maps, result.output_error, result.experts) == ((), None, 2)
        else:
            expected = np.sqrt(np.mean([row.output_error**2 for row in maps]))
            assert result.output_error == pytest.approx(expected)


def test_before_is_the_run_as_it_was_scored(dense: Path, tmp_path: Path) -> None:
    result, _ = compressed.Run(dense).write(Request("rounding", 1.0, 8, IMAGES), tmp_path)
    of_run = json.loads((dense / "result.json").read_text())
    assert result.step == of_run["best_step"]
    assert result.accuracy_before == pytest.approx(of_run["test_accuracy"])
    assert result.nll_before == pytest.approx(of_run["test_nll"], rel=1e-5)
    assert result.val_accuracy_before == pytest.approx(of_run["validation_accuracy"])


def test_only_the_training_split_shapes_the_model(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, digests = Request("mixed_rank", 0.5, 32, IMAGES), []
    load = data.load_split

    def blank(config: Any, name: Any, found: Any = None) -> Any:
        split = load(config, name, found)
        assert isinstance(split, Split)
        return split if name == "train" else Split(np.zeros_like(split.images), split.labels)

    for loader in (load, blank):
        monkeypatch.setattr(data, "load_split", loader)
        result, _ = compressed.Run(dense).write(wanted, tmp_path)
        digests.append((packed_file.read(tmp_path / MODEL_FILE).digest, result.test_accuracy))
    assert digests[0][0] == digests[1][0]
    assert digests[0][1] != digests[1][1]


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        ("butterfly", Request("mixed_rank", 0.4), "model.family = 'butterfly': it must be dense or standard"),
        ("dense", Request("merge", 0.4), "model.family = 'dense': it must be standard for merge"),
        ("dense", Request("svd", 0.05), "keep = 0.05: it must be at least 0."),
        ("dense", Request("quantise", bits=8, calibration_images=2), "calibration_images = 2: it must be at least 7"),
        ("dense", Request("svd", 0.5, 32, 1201), "calibration_images = 1201: it must be at most 1200, the images of"),
    ],
)
def test_what_cannot_be_done_writes_nothing(
    family: str, wanted: Request, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compressed.Run(drawn(family, monkeypatch))
    for work in (lambda: run.check(wanted), lambda: run.write(wanted, tmp_path)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            work()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it must be the directory of a run; it has no config.json"):
        compressed.Run(tmp_path)


def test_a_directory_that_cannot_be_written_to(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=re.escape(f"out = {str(out)!r}: it cannot be written to")):
        compressed.Run(dense).write(Request("rounding", 1.0, 8, IMAGES), out)


def test_a_run_is_compressed_in_several_ways_once(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [Request("rounding", 1.0, 8, IMAGES), Request("prune", 0.5, 32, IMAGES)]
    assert [compressed.read_result(dense, each) for each in wanted] == [None, None]
    compressed.run_all(dense, wanted)
    found = [compressed.read_result(dense, each) for each in wanted]
    assert [None if one is None else one.request for one in found] == wanted
    assert re.fullmatch(r"(\S+: test accuracy 0\.\d{4} -> 0\.\d{4}\n){2}", capsys.readouterr().out)
    place = compressed.directory_of(dense, wanted[1])
    assert place == dense / "compressed" / "prune_0.5"

    # The same folder, but another request: what is there is not its result.
    assert compressed.read_result(dense, dataclasses.replace(wanted[1], calibration_images=IMAGES + 1)) is None
    for damaged in ("{", "[]", '{"method": "prune"}', json.dumps(dataclasses.asdict(found[1]) | {"keep": 7})):  # type: ignore[call-overload]
        (place / RESULT_FILE).write_text(damaged)
        assert compressed.read_result(dense, wanted[1]) is None
    compressed.run_all(dense, wanted)
    assert compressed.read_result(dense, wanted[1]) is not None
    assert capsys.readouterr().out.count("->") == 1

    def refuse(workdir: Path) -> Any:
        raise AssertionError

    monkeypatch.setattr(compressed, "Run", refuse)
    compressed.run_all(dense, wanted)


def test_one_that_fails_does_not_keep_the_others(dense: Path) -> None:
    wanted = [Request("svd", 0.01, 32, IMAGES), Request("rounding", 1.0, 4, IMAGES)]
    with pytest.raises(ConfigError, match="keep = 0.01"):
        compressed.run_all(dense, wanted)
    assert compressed.read_result(dense, wanted[0]) is None
    assert compressed.read_result(dense, wanted[1]) is not None


def test_the_commands_of_the_readme(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    flags = [f"--workdir={dense}", "--method=mixed_rank", "--keep=0.5", f"--calibration_images={IMAGES}"]
    found = start("experiments.compress", *flags, f"--out={out}")
    assert found.returncode == 0, found.stderr
    result = json.loads((out / RESULT_FILE).read_text())
    assert f"{result['bytes_before']:,} {result['bytes_full']:,}" in re.sub(" +", " ", found.stdout)
    change = 100 * (result["test_accuracy"] - result["accuracy_before"])
    assert f"{100 * result['accuracy_before']:.2f} {100 * result['test_accuracy']:.2f} {change:+.2f} points" in re.sub(
        " +", " ", found.stdout
    )
    assert f"mixed_rank of step {result['step']} in " in found.stdout
    assert "segment_0/block_0/ffn/up/kernel" in found.stdout
    scored = start_here("experiments.evaluate", f"--model={out / MODEL_FILE}", "--json")
    assert scored.returncode == 0, scored.stderr
    (row,) = json.loads(scored.stdout)
    assert (row["bytes_full"], row["numbers"]) == (result["bytes_full"], "experts float32, maps as factors")
    assert row["accuracy"] == pytest.approx(result["test_accuracy"], abs=0.003)
    (out / "notes.txt").write_text("mine")
    again = start_here("experiments.compress", *flags, f"--out={out}")
    assert (again.returncode, again.stderr) == (
        2,
        f"error: out = {str(out)!r}: it must be a directory of its own; this one holds notes.txt\n",
    )


def test_help_lists_the_methods() -> None:
    shown = start_here("experiments.compress", "--help").stdout
    for method in ("rounding", "quantise", "prune", "svd", "activation_aware", "mixed", "mixed_rank", "merge"):
        assert re.search(rf"^ +{method} +\w", shown, re.MULTILINE)


def test_a_failure_of_any_kind_waits_for_the_others(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, work = [Request("svd", 0.5, 32, IMAGES), Request("rounding", 1.0, 2, IMAGES)], compress.compress

    def fails(source: Any, request: Request) -> Any:
        if request.method == "svd":
            raise np.linalg.LinAlgError("SVD did not converge")
        return work(source, request)

    monkeypatch.setattr(compress, "compress", fails)
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        compressed.run_all(dense, wanted)
    assert [compressed.read_result(dense, each) is None for each in wanted] == [True, False]
    place = compressed.directory_of(dense, wanted[1]) / MODEL_FILE
    place.unlink()  # a result without its model is none
    assert compressed.read_result(dense, wanted[1]) is None
