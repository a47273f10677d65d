"""A run's compressed models: made, written, read back and scored beside the run itself.

A compressed model's directory:

    model.safetensors   the packed file         compression.json   what it cost and what it is worth
    maps.csv, .json     its linear maps
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bvit_jax import (
    calibration,
    compress,
    compress_request,
    data,
    encoding,
    evaluate,
    files,
    memory,
    packed_file,
    run_images,
    sharding,
    trained,
)
from bvit_jax.compress_request import Request
from bvit_jax.compress_source import MapRow, Source
from bvit_jax.evaluate import Evaluation
from bvit_jax.model_config import ConfigError
from bvit_jax.storage import as_trained

MODEL_FILE, RESULT_FILE, MAPS_FILE = "model.safetensors", "compression.json", "maps.csv"
FOLDER = "compressed"
"""Of a trial's directory, where its compressions are."""
BATCH = 64
"""Images at a time in evaluation."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a compression cost and what it is worth; "before" is the run as trained, packed in the formats of training.

    Attributes:
        method, keep, bits, calibration_images: as in `compress_request.Request`.
        config_digest, step: of the run and of its checkpoint.
        family: of the model.
        numbers_before, numbers: of the model, all and those that are stored.
        bytes_before, bytes_full: of the files.
        bytes_full_ffn: of the FFNs or mixture layers in the new one.
        accuracy_before, test_accuracy, nll_before, test_nll: on the test split.
        val_accuracy_before, val_accuracy: on the validation split.
        output_error: root mean square of those of the linear maps; None where experts were merged.
        experts: stored ones of each mixture, where experts were merged.
        seconds: as `compress.compress` returns them.
    """

    method: str
    keep: float
    bits: int
    calibration_images: int
    config_digest: str
    step: int
    family: str
    numbers_before: int
    numbers: int
    bytes_before: int
    bytes_full: int
    bytes_full_ffn: int
    accuracy_before: float
    test_accuracy: float
    nll_before: float
    test_nll: float
    val_accuracy_before: float
    val_accuracy: float
    output_error: float | None
    experts: int | None
    seconds: float

    @property
    def request(self) -> Request:
        """What was asked for."""
        fields = (field.name for field in dataclasses.fields(Request))
        return Request(**{name: getattr(self, name) for name in fields})


class Run:
    """A trained run, read once, to be compressed in several ways.

    Attributes:
        config, step: of the run and of its best checkpoint.
    """

    def __init__(self, workdir: Path) -> None:
        """Reads a run.

        Raises:
            ConfigError: as `trained.best_params`, or if its images are not there or others.
        """
        self.config, self.step, self._params = trained.best_params(workdir)
        found = data.opened(self.config.data)
        run_images.check(workdir, self.config.data.name, found)
        self._images = found
        self._splits: dict[str, data.AnySplit] = {}
        self._sources: dict[int, Source] = {}
        self._before: dict[str, Evaluation] = {}

    def check(self, request: Request) -> None:
        """Raises ConfigError if the method does not suit the run, or there are not the calibration images asked for."""
        compress_request.check(self.config.model, request, self.config.data.num_train)

    def write(self, request: Request, out: Path) -> tuple[Result, tuple[MapRow, ...]]:
        """Compresses, writes the files of one directory, and scores what is in them.

        Args:
            request: what to do.
            out: a directory that is there; the file of the result comes last.

        Returns:
            The result, and what became of every linear map.

        Raises:
            ConfigError: as `compress.compress`, or if the file cannot be written.
        """
        self.check(request)
        made, seconds = compress.compress(self._source(request.calibration_images), request)
        path, result = out / MODEL_FILE, out / RESULT_FILE
        try:
            result.unlink(missing_ok=True)  # an old one is not to stand beside the new model
            packed_file.write(path, made.params, self.config, made.storage, made.scales)
            files.write_rows(out / MAPS_FILE, [dataclasses.asdict(row) for row in made.maps])
            found = self._result(request, path, made.maps, seconds)
            files.write_json(result, dataclasses.asdict(found))
        except OSError as error:
            raise ConfigError(f"out = {str(out)!r}: it cannot be written to ({error})") from None
        except ValueError as error:
            raise ConfigError(f"{request.name}: the result cannot be stored ({error})") from None
        return found, made.maps

    def _result(self, request: Request, path: Path, maps: Sequence[MapRow], seconds: float) -> Result:
        stored = packed_file.read(path)
        before = memory.ledger(self.config)
        errors = np.array([row.output_error for row in maps])
        params = encoding.decode_all(stored.arrays, self.config.model, stored.storage)
        test, validation = (self._score(params, name) for name in ("test", "validation"))
        return Result(
            method=request.method,
            keep=request.keep,
            bits=request.bits,
            calibration_images=request.calibration_images,
            config_digest=self.config.digest(),
            step=self.step,
            family=self.config.model.family,
            numbers_before=before.params,
            numbers=stored.ledger.params,
            bytes_before=before.bytes_full,
            bytes_full=path.stat().st_size,
            bytes_full_ffn=stored.ledger.bytes_full_ffn,
            accuracy_before=self._trained("test").accuracy,
            test_accuracy=test.accuracy,
            nll_before=self._trained("test").nll,
            test_nll=test.nll,
            val_accuracy_before=self._trained("validation").accuracy,
            val_accuracy=validation.accuracy,
            output_error=float(np.sqrt(np.mean(errors**2))) if maps else None,
            experts=compress_request.experts(self.config.model, request.keep) if request.method == "merge" else None,
            seconds=seconds,
        )

    def _split(self, name: data.SplitName) -> data.AnySplit:
        if name not in self._splits:
            self._splits[name] = data.load_split(self.config.data, name, self._images)
        return self._splits[name]

    def _calibration(self, count: int) -> np.ndarray:
        return calibration.calibration_images(self._split("train"), self.config.model, self.config.seed, count)

    def _source(self, count: int) -> Source:
        if count not in self._sources:
            self._sources[count] = Source(self.config.model, self._params, self._calibration(count))
        return self._sources[count]

    def _trained(self, name: data.SplitName) -> Evaluation:
        if name not in self._before:
            model = self.config.model
            self._before[name] = self._score(encoding.as_stored(self._params, model, as_trained(model)), name)
        return self._before[name]

    def _score(self, params: Any, name: Any) -> Evaluation:
        model = self.config.model.deployed()
        placement = sharding.place(model, BATCH, devices=jax.devices()[:1])
        return evaluate.evaluate(params, model, self._split(name), BATCH, placement)


def run_all(workdir: Path, requests: Sequence[Request]) -> None:
    """Compresses a run in several ways, each in a directory of its own below it; those that are done stay as they are.

    Raises:
        Exception: whatever `Run` raises, and what `Run.write` does, its first error when all others are done.
    """
    waiting = [request for request in requests if read_result(workdir, request) is None]
    if not waiting:
        return
    run, failures = Run(workdir), list[Exception]()
    for request in waiting:
        directory = directory_of(workdir, request)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            result, _ = run.write(request, directory)
        except Exception as error:  # whatever it is, it is raised in the end
            failures.append(error)
        else:
            print(f"{request.name}: test accuracy {result.accuracy_before:.4f} -> {result.test_accuracy:.4f}")
    if failures:
        raise failures[0]


def directory_of(workdir: Path, request: Request) -> Path:
    """Returns where `run_all` keeps one compression of a run."""
    return workdir / FOLDER / request.name


def read_result(workdir: Path, request: Request) -> Result | None:
    """Reads the result of a compression by `run_all`; None if there is none of this request, or not whole."""
    directory = directory_of(workdir, request)
    try:
        found = Result(**json.loads((directory / RESULT_FILE).read_text()))
        whole = (directory / MODEL_FILE).stat().st_size == found.bytes_full
        return found if found.request == request and whole else None
    except (OSError, ValueError, TypeError):
        return None
