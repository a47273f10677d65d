"""The results of sweeps as data frames, with whatever of them is there: sweeps that go on, that failed, with holes."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bvit_jax import intervals, sweep, trained, workdir
from bvit_jax.model_config import ConfigError, require
from bvit_jax.sweep import ResultRow, Trial

_COLUMNS = [field.name for field in dataclasses.fields(ResultRow)]
_KNOWN_LATER = [field.name for field in dataclasses.fields(ResultRow) if field.type == float | None]
_NEEDED = {"family", "form", "settings", "trial", "status"}


def is_sweep(path: Path) -> bool:
    """Says whether a directory is a sweep's."""
    return (path / "sweep.json").is_file()


def read(*workdirs: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads the results of one sweep, or of several to be compared; a row each run.

    Columns: sweep, the directory's name; those of `sweep.ResultRow`, nan where a run has not got that far; `status`:
    `ok`, `failed`, `unfinished`, or `going on` of one that a process is working on; and series: family, form and
    settings in words, what a curve over the number of experts is of, after the sweep's name if there are several.

    Raises:
        ConfigError: if a directory is no sweep's, its results are damaged, or two have the same name.
    """
    paths = [Path(path) for path in workdirs]
    names = [path.resolve().name for path in paths]
    require(len(set(names)) == len(names) > 0, "sweeps", names, "one or more, each of another name")
    frames = []
    for path, name in zip(paths, names, strict=True):
        frame = pd.DataFrame(_rows(path), columns=_COLUMNS)
        frame.insert(0, "sweep", name)
        frame["status"] = [_status(path, row) for row in frame.itertuples()]
        prefix = f"{name}: " if len(paths) > 1 else ""
        frame["series"] = [prefix + sweep.series(row.family, row.form, row.settings) for row in frame.itertuples()]
        frames.append(frame)
    filled = [frame for frame in frames if len(frame)] or frames[:1]
    return pd.concat(filled, ignore_index=True).astype(dict.fromkeys(_KNOWN_LATER, np.float64))


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    if not is_sweep(path):
        raise ConfigError(f"{str(path)!r} is not the directory of a sweep: it has no sweep.json")
    results = path / "results.json"
    try:
        rows = json.loads(results.read_text())
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _NEEDED for row in rows):
            raise ValueError("not rows of results")
    except FileNotFoundError:
        return _begun(path)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{results} is damaged ({error}); the sweep's own command writes it anew") from None
    return rows


def _begun(path: Path) -> list[dict[str, Any]]:
    """Lists the trials that have begun, of a sweep of which none has ended yet; of what case they are is not known."""
    found = []
    for directory in sorted(path.glob("trials/*")):
        try:
            config = trained.config_of(directory, str(directory))
        except ConfigError:
            continue  # it has made its directory, and nothing else yet
        row = dataclasses.asdict(sweep.result_row(Trial(config, directory)))
        found.append(row | {"test_accuracy": None, "test_nll": None, "status": "unfinished"})
    return found


def _status(path: Path, row: Any) -> str:
    if row.status != "ok" and workdir.holder(path / "trials" / row.trial) is not None:
        return "going on"
    return str(row.status)


def means(results: pd.DataFrame) -> pd.DataFrame:
    """Takes the means over the seeds of runs with a result; a row for each series and number of experts.

    Columns: sweep, series, family, num_experts; seeds: how many; accuracy, nll: on the test split; accuracy_interval,
    nll_interval: half their 95 % confidence intervals, nan of one seed; bytes_full, bytes_full_ffn, bytes_paper;
    output_cosine, experts_used, and half the intervals of these.
    """
    finished = results[results["test_accuracy"].notna()]
    grouped = finished.groupby(["sweep", "series", "family", "num_experts"], sort=False, as_index=False)
    return grouped.agg(
        seeds=("seed", "size"),
        accuracy=("test_accuracy", "mean"),
        accuracy_interval=("test_accuracy", _interval),
        nll=("test_nll", "mean"),
        nll_interval=("test_nll", _interval),
        bytes_full=("bytes_full", "first"),
        bytes_full_ffn=("bytes_full_ffn", "first"),
        bytes_paper=("bytes_paper", "first"),
        output_cosine=("output_cosine", "mean"),
        output_cosine_interval=("output_cosine", _interval),
        experts_used=("experts_used", "mean"),
        experts_used_interval=("experts_used", _interval),
    )


def _interval(values: pd.Series) -> float:
    return intervals.half_interval(values.dropna().to_numpy())
