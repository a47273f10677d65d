"""Checkpoints that prove themselves: written in the background, committed whole, and read with their digests checked.

Each is a directory named by its step, written by orbax: the state in few arrays (`bvit_jax.bundles`), and a record of
the configuration, of the rows of `metrics.jsonl` so far, and of a digest for every stored array (`bvit_jax.digests`).
So a run goes on from a checkpoint alone. A seal over all files (`bvit_jax.seals`) goes in before the directory gets its
name; it names damage to the files, the digests whatever else happened to the values on the way.
Kept are the newest two, the best on validation as each of these knew it, and every n-th.
"""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from bvit_jax import bundles, digests, metrics, processes, seals
from bvit_jax import workdir as workdirs
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from bvit_jax.train_step import TrainState

NEWEST = 2
"""Checkpoints kept for being new: should the last be damaged, one interval is lost and no more."""
DIRECTORY = "checkpoints"
_DELETED = ".deleted"
_UNFINISHED = ".orbax-checkpoint-tmp"


class DamagedError(Exception):
    """A checkpoint is not what was written; the message says which and how."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says beside the state.

    Attributes:
        config: as `Config.to_dict`.
        metrics: content of `metrics.jsonl` up to this step.
        digests: as `digests.of_tree` of what is stored of the state (`bvit_jax.bundles`).
    """

    config: dict[str, Any]
    metrics: str
    digests: dict[str, str]


def steps_in(directory: Path) -> list[int]:
    """Lists the steps of the finished checkpoints in a directory, oldest first; none if it is absent."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def read_record(directory: Path, step: int) -> Record:
    """Reads the record of a checkpoint; raises DamagedError if it is not as it was written."""
    folder = directory / str(step)
    try:
        seals.check(folder)
        return Record(**ocp.JsonCheckpointHandler().restore(folder / "record"))
    except (seals.BrokenSealError, OSError, ValueError, TypeError) as error:
        raise DamagedError(_cause(step, error)) from None


def restore(directory: Path, step: int, config: Config, abstract: TrainState) -> tuple[TrainState, Record]:
    """Reads a checkpoint and checks it: its files against the seal, and every array against its digest.

    Args:
        directory: of the checkpoints.
        step: of the checkpoint.
        config: of the run.
        abstract: shapes, dtypes and shardings, as `abstract_state`. In a run of several processes all call this.

    Raises:
        ConfigError: if the checkpoint is of another configuration.
        DamagedError: if it is not what was written. Both are raised in all processes.
    """
    told = processes.on_first(lambda: _told(directory, step))
    if "damaged" in told:
        raise DamagedError(told["damaged"])
    record = Record(**told)
    differing = workdirs.differences(record.config, json.loads(json.dumps(config.to_dict())))
    if differing:
        name = f"workdir = {str(directory.parent)!r}"
        raise ConfigError(f"{name}: the checkpoint of step {step} is of another configuration: {'; '.join(differing)}")
    error, stored = _read_state(directory, step, bundles.abstract(abstract))
    if not processes.all_agree(error is None):
        raise DamagedError(_cause(step, error or OSError("another process could not read it")))
    found = digests.of_tree(stored)
    differing = [path for path in found if found[path] != record.digests.get(path)]
    if differing:
        gist = f"{len(differing)} of {len(found)} arrays differ from their digests, such as {differing[0]}"
        raise DamagedError(_cause(step, ValueError(gist)))
    return bundles.unbundle(stored, abstract), record


def _told(directory: Path, step: int) -> dict[str, Any]:
    try:
        return dataclasses.asdict(read_record(directory, step))
    except DamagedError as error:
        return {"damaged": str(error)}


def _read_state(directory: Path, step: int, abstract: bundles.Stored) -> tuple[Exception | None, Any]:
    """Returns what went wrong or what is stored; it waits for no other process, which may have failed."""
    try:
        # Not by orbax's checkpointer, which meets the others at a barrier at its end.
        arguments = ocp.args.StandardRestore(abstract)
        path = (directory / str(step) / "state").absolute()
        return None, ocp.StandardCheckpointHandler().restore(path, args=arguments)
    except Exception as error:  # orbax raises what it likes, bare Exception included
        return error, None


def _cause(step: int, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"the checkpoint of step {step} is damaged: {lines[0][:200]}"


def restore_newest(
    directory: Path,
    config: Config,
    abstract: TrainState,
    on_damage: Callable[[int, str], None],
    before: int | None = None,
) -> tuple[TrainState, Record] | None:
    """Reads the newest checkpoint that is good; damaged ones are told of and moved to `damaged/` beside `directory`.

    Args:
        directory: of the checkpoints.
        config: of the run.
        abstract: as for `restore`.
        on_damage: called with the step of each damaged checkpoint, and what is wrong with it and where it is now.
        before: only those of earlier steps.

    Returns:
        State and record; None if there is no good checkpoint.

    Raises:
        ConfigError: as `restore`.
    """
    for step in reversed(processes.on_first(lambda: steps_in(directory))):
        if before is not None and step >= before:
            continue
        try:
            return restore(directory, step, config, abstract)
        except DamagedError as error:
            on_damage(step, f"{error}; {set_aside(directory, step)}")
    return None


def set_aside(directory: Path, step: int) -> str:
    """Moves a checkpoint, if it is there, to `damaged/` beside `directory`, under a free name; says where it is."""

    def move() -> str:
        source, folder = directory / str(step), directory.parent / "damaged"
        if not source.exists():
            return "nothing is left of it"
        folder.mkdir(exist_ok=True)
        names = (f"{step}-{number}" if number else str(step) for number in itertools.count())
        target = next(folder / name for name in names if not (folder / name).exists())
        source.rename(target)
        return f"moved to {target}"

    return str(processes.on_first(move))


class Checkpoints:
    """Writes checkpoints to one directory; use it as a context, which waits for what is still being written.

    All processes of a run call the same methods.
    """

    def __init__(self, directory: Path, keep_every: int = 0, log: str = "") -> None:
        """Makes the directory and clears away what an interrupted save left.

        Args:
            directory: of the checkpoints.
            keep_every: checkpoints of steps that this divides are kept for good; 0: none.
            log: content of `metrics.jsonl` that the run goes on from; its best checkpoint is kept until a newer is.
        """
        self._directory = directory.absolute()
        self._keep_every = keep_every
        self._bests = _best_steps(log)
        self._unsettled = False
        processes.on_first(self._clear)
        options = ocp.AsyncOptions(post_finalization_callback=self._finish)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
            if processes.is_first():
                self._clear()
        finally:
            self._writer.close()

    def save(self, state: TrainState, config: Config, log: str) -> None:
        """Begins to write a checkpoint, once the one before is on disk; the state may be given away at once.

        Args:
            state: what to store, under `state.step`.
            config: of the run.
            log: content of `metrics.jsonl` so far; it says which checkpoint is the best.
        """
        self.wait()
        stored = bundles.bundle(state)
        record = ocp.args.JsonSave(dataclasses.asdict(Record(config.to_dict(), log, digests.of_tree(stored))))
        self._writer.save(
            self._directory / str(int(state.step)),
            args=ocp.args.Composite(state=ocp.args.StandardSave(stored), record=record),
        )
        self._unsettled = True
        self._bests = [*self._bests, *_best_steps(log)][-NEWEST:]

    def wait(self) -> None:
        """Waits until what was saved is on disk, then drops what need not be kept.

        Raises:
            Exception: what orbax met while it wrote, OSError for a full disk.
        """
        self._writer.wait_until_finished()
        if self._unsettled and processes.is_first():
            self._tidy()
        self._unsettled = False

    def _finish(self) -> None:
        """Seals what is complete and has not got its name yet; called in the background, one save at a time."""
        if processes.is_first():
            for path in self._directory.iterdir():
                if _UNFINISHED in path.name:
                    seals.seal(path)
                elif path.name.endswith(_DELETED):
                    shutil.rmtree(path)  # here, as it takes longer than everything that a save does in the foreground

    def _tidy(self) -> None:
        steps = steps_in(self._directory)
        kept = {*steps[-NEWEST:], *self._bests}
        for step in steps:
            if step not in kept and not (self._keep_every and step % self._keep_every == 0):
                # Under another name, a deletion cut short leaves no half checkpoint.
                (self._directory / str(step)).rename(self._directory / f"{step}{_DELETED}")

    def _clear(self) -> None:
        """Removes what an interrupted save or deletion left."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if path.name.endswith(_DELETED) or _UNFINISHED in path.name:
                shutil.rmtree(path)


def _best_steps(log: str) -> list[int]:
    best = metrics.best_row(metrics.parse(log))
    return [best["step"]] if best else []


def abstract_state(state: TrainState, shardings: Any) -> TrainState:
    """Describes a state that is not there, every array where `shardings` says; a single one stands for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, state)
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, shardings)
