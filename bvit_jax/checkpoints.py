"""Checkpoints that prove themselves: written in the background, committed whole, and read with their digests checked.

Each is a directory named by its step, written by orbax: the state in few arrays (`bvit_jax.bundles`), and a record of
the configuration, of the rows of `metrics.jsonl` so far, and of a digest for every stored array (`bvit_jax.digests`).
So a run goes on from a checkpoint alone. A seal over all files (`bvit_jax.seals`) goes in before the directory gets its
name; it names damage to the files, the digests whatever else happened to the values on the way.
Kept are the newest two, the best on validation as each of these knew it, and every n-th.
"""

import contextlib
import dataclasses
import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from bvit_jax import bundles, digests, metrics, processes, seals
from bvit_jax import workdir as workdirs
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from bvit_jax.train_step import TrainState

NEWEST = 2
"""Checkpoints kept for being new: should the last be damaged, one interval is lost and no more."""
DIRECTORY = "checkpoints"
UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a checkpoint that is being written."""
_DELETED = ".deleted"


class DamagedError(Exception):
    """A checkpoint is not what was written; the message says which and how."""


class SaveError(Exception):
    """A checkpoint could not be written; the message says why.

    Attributes:
        step: of the checkpoint.
    """

    def __init__(self, step: int, cause: str) -> None:
        super().__init__(f"the checkpoint of step {step} could not be written: {cause}")
        self.step = step


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says beside the state.

    Attributes:
        config: as `Config.to_dict`.
        metrics: content of `metrics.jsonl` up to this step.
        layout: as `bundles.layout` of the state.
        digests: as `digests.of_tree` of what is stored of the state (`bvit_jax.bundles`).
    """

    config: dict[str, Any]
    metrics: str
    layout: list[list[Any]]
    digests: dict[str, str]


def steps_in(directory: Path) -> list[int]:
    """Lists the steps of the finished checkpoints in a directory, oldest first; none if it is absent."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def read_record(directory: Path, step: int) -> Record:
    """Reads the record of a checkpoint, having checked the seal of all its files.

    Raises:
        DamagedError: if a file is not as it was written.
        ConfigError: if a file cannot be read, or the record is of another version of this library.
    """
    folder = directory / str(step)
    try:
        seals.check(folder)
        return Record(**ocp.JsonCheckpointHandler().restore(folder / "record"))
    except (seals.BrokenSealError, FileNotFoundError, ValueError) as error:
        raise DamagedError(f"the checkpoint of step {step} is damaged: {_gist(error)}") from None
    except TypeError:
        raise ConfigError(f"{folder}: it must be a checkpoint of this version, not of another") from None
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{folder}: it cannot be read now, and is left as it is ({_gist(error)})")


def _gist(error: Exception) -> str:
    """Returns the first line of a message, which tensorstore follows by pages."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def restore(directory: Path, step: int, config: Config, abstract: TrainState) -> tuple[TrainState, Record]:
    """Reads a checkpoint and checks it: its files against the seal, and every array against its digest.

    Args:
        directory: of the checkpoints.
        step: of the checkpoint.
        config: of the run.
        abstract: shapes, dtypes and shardings, as `abstract_state`. In a run of several processes all call this.

    Raises:
        DamagedError: if it is not what was written.
        ConfigError: if it is of another configuration or version, or cannot be read although its files are as they
            were written; that may pass. All processes raise the same.
    """
    folder = directory / str(step)
    told = processes.on_first(lambda: _told(directory, step))
    if "damaged" in told:
        raise DamagedError(told["damaged"])
    record = Record(**told)
    differing = workdirs.differences(record.config, config.to_dict())
    if differing:
        name = f"workdir = {str(directory.parent)!r}"
        raise ConfigError(f"{name}: the checkpoint of step {step} is of another configuration: {'; '.join(differing)}")
    for stored, wanted in itertools.zip_longest(record.layout, bundles.layout(abstract)):
        if stored != wanted:
            raise ConfigError(f"{folder}: written by another version: it holds {stored}, this one has {wanted}")
    error, bundle = _read_state(folder, bundles.abstract(abstract))
    if not processes.all_agree(error is None):
        raise _unreadable(folder, error or OSError("another process could not"))
    found = digests.of_tree(bundle)
    changed = [path for path in found if found[path] != record.digests.get(path)]
    if changed:
        gist = f"{len(changed)} of {len(found)} arrays differ from their digests, such as {changed[0]}"
        raise DamagedError(f"the checkpoint of step {step} is damaged: {gist}")
    return bundles.unbundle(bundle, abstract), record


def _told(directory: Path, step: int) -> dict[str, Any]:
    try:
        return dataclasses.asdict(read_record(directory, step))
    except DamagedError as error:
        return {"damaged": str(error)}


def _read_state(folder: Path, abstract: bundles.Stored) -> tuple[Exception | None, Any]:
    """Returns what went wrong or what is stored; it waits for no other process, which may have failed."""
    try:
        # Not by orbax's checkpointer, which meets the others at a barrier at its end.
        arguments = ocp.args.StandardRestore(abstract)
        return None, ocp.StandardCheckpointHandler().restore((folder / "state").absolute(), args=arguments)
    except Exception as error:  # orbax raises what it likes, bare Exception included
        return error, None


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

    def __init__(
        self,
        directory: Path,
        keep_every: int = 0,
        log: str = "",
        on_failure: Callable[[SaveError], None] = lambda error: None,
    ) -> None:
        """Makes the directory and clears away what an interrupted save left.

        Args:
            directory: of the checkpoints.
            keep_every: checkpoints of steps that this divides are kept for good; 0: none.
            log: content of `metrics.jsonl` that the run goes on from; its best checkpoint is kept until a newer is.
            on_failure: called where a save failed and the next one is tried.
        """
        self._directory = directory.absolute()
        self._keep_every = keep_every
        self._on_failure = on_failure
        self._bests = _best_steps(log)
        self._saving: tuple[int, list[int]] | None = None
        """Step that is being written, and its best."""
        self._failed = False
        self._deleting: list[threading.Thread] = []
        processes.on_first(self._clear)
        self._writer = self._new_writer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            for thread in self._deleting:
                thread.join()
            self._writer.close()

    def save(self, state: TrainState, config: Config, log: str) -> None:
        """Begins to write a checkpoint, once the one before is on disk; the state may be given away at once.

        Args:
            state: what to store, under `state.step`.
            config: of the run.
            log: content of `metrics.jsonl` so far; it says which checkpoint is the best.

        Raises:
            SaveError: if the two saves before failed. After one, this one is tried: there may be space by now.
        """
        self._settle()
        step, stored = int(state.step), bundles.bundle(state)
        record = Record(config.to_dict(), log, bundles.layout(state), digests.of_tree(stored))
        arguments = {"state": ocp.args.StandardSave(stored), "record": ocp.args.JsonSave(dataclasses.asdict(record))}
        self._saving = (step, _best_steps(log))
        with _failing_as_save_error(step):
            self._writer.save(self._directory / str(step), args=ocp.args.Composite(**arguments))

    def _new_writer(self) -> ocp.AsyncCheckpointer:
        options = ocp.AsyncOptions(post_finalization_callback=self._seal)
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)

    def _settle(self) -> None:
        """Waits for the save before; a failure is told of, a second in succession raised, in all processes alike."""
        step = self._saving[0] if self._saving else 0
        error: SaveError | None = None
        try:
            self.wait()
        except SaveError as raised:
            error = raised
        if processes.all_agree(error is None):
            self._failed = False
            return
        error = error or SaveError(step, "another process could not write its part")
        if self._failed:
            raise error
        self._failed = True
        self._on_failure(error)
        processes.on_first(self._clear)
        self._writer = self._new_writer()  # the old one would tell of its failure again

    def wait(self) -> None:
        """Waits until what was saved is on disk, then drops what need not be kept.

        Raises:
            SaveError: if it could not be written; what was there before is untouched.
        """
        if self._saving is None:
            return
        (step, best), self._saving = self._saving, None
        with _failing_as_save_error(step):
            self._writer.wait_until_finished()
        self._bests = [*self._bests, *best][-NEWEST:]
        if processes.is_first():
            self._tidy()

    def _seal(self) -> None:
        """Seals what is complete and has not got its name yet; called in the background, one save at a time."""
        if processes.is_first():
            for path in self._directory.glob(f"*{UNFINISHED}*"):
                seals.seal(path)

    def _tidy(self) -> None:
        steps = steps_in(self._directory)
        kept = {*steps[-NEWEST:], *self._bests}
        for step in steps:
            if step not in kept and not (self._keep_every and step % self._keep_every == 0):
                # Under another name, a deletion cut short leaves no half checkpoint.
                gone = self._directory / f"{step}{_DELETED}"
                (self._directory / str(step)).rename(gone)
                # It takes longer than all that a save does in the foreground; what it leaves, the next start clears.
                thread = threading.Thread(target=shutil.rmtree, args=(gone,), kwargs={"ignore_errors": True})
                thread.start()
                self._deleting = [*(old for old in self._deleting if old.is_alive()), thread]

    def _clear(self) -> None:
        """Removes what an interrupted save or deletion left, as far as it can be removed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if path.name.endswith(_DELETED) or UNFINISHED in path.name:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _failing_as_save_error(step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a full disk is a ValueError of tensorstore's
        raise SaveError(step, _gist(error)) from error


def _best_steps(log: str) -> list[int]:
    best = metrics.best_row(log)
    return [best["step"]] if best else []
