"""Faults done to real training runs, and whether the runs come through: killed processes and damaged checkpoints.

A trial starts a run as a process of its own, kills it one to three times at moments drawn at random, damages what it
left where the trial says so, starts it again each time, and compares what it ends with with an undisturbed run.
"""

import dataclasses
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from bvit_jax import checkpoints, damage, journal, metrics, preemption

Moment = Literal["anywhere", "in a save"]
Target = Literal["newest", "best", "all", "metrics", "none"]
Command = Callable[[Path], list[str]]
"""A run's directory -> the command that trains there, started again to go on."""

OUTPUT = "output.txt"
"""What the processes of a run print, in the run's directory."""
POLL_SECONDS = 0.002
PATIENCE_SECONDS = 600.0
"""For one start of a run; more means that it hangs."""
SAVE_SECONDS = 0.03
"""About what a save takes here: a kill comes up to so long after its moment."""
START_SHARE = 0.2
"""Of the kills anywhere, those during the start of the process, before its first row."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a trial does.

    Attributes:
        name: in tables.
        signal: that kills.
        moment: when.
        target: what is damaged after the first kill.
        damage: how, a key of `damage.KINDS`; for `metrics` and `none` it says nothing.
    """

    name: str
    signal: signal.Signals
    moment: Moment = "anywhere"
    target: Target = "none"
    damage: str = ""


_KINDS: tuple[Kind, ...] = (
    Kind("SIGKILL", signal.SIGKILL),
    Kind("SIGKILL in a save", signal.SIGKILL, "in a save"),
    Kind("SIGTERM", signal.SIGTERM),
    Kind("SIGTERM in a save", signal.SIGTERM, "in a save"),
    *(Kind(f"newest: {name}", signal.SIGKILL, "anywhere", "newest", name) for name in damage.KINDS),
    Kind("best: flipped byte", signal.SIGKILL, "anywhere", "best", "flipped byte"),
    Kind("all: truncated file", signal.SIGKILL, "anywhere", "all", "truncated file"),
    Kind("metrics.jsonl cut", signal.SIGKILL, "anywhere", "metrics"),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a trial is measured by.

    Attributes:
        workdir: of the run that nothing happened to.
        seconds_to_start: until its first row of metrics.
        steps: that it took.
        best_step: its best on validation.
    """

    workdir: Path
    seconds_to_start: float
    steps: int
    best_step: int


@dataclasses.dataclass(frozen=True)
class TrialRow:
    """What came of one trial.

    Attributes:
        trial: its number, from 1.
        kind: of the fault.
        kills: signals sent that hit the process before it had ended.
        kills_in_a_save: of these, those that came while a checkpoint was being written.
        damages: files or checkpoints damaged.
        damages_found: of these, those that the run named.
        steps_repeated: steps that had been logged and were taken again.
        survived: whether the run came to its end by nothing but the same command.
        exact: whether metrics.jsonl, result.json (but for timing) and all arrays of the last checkpoint equal those of
            the undisturbed run to the bit.
        good_lost: restarts that went on from less than the newest good checkpoint, or good checkpoints that were moved
            away.
        wrong_exits: runs that were told to stop and did not say so by their exit status.
        exits: exit status of every start.
        story: what was done, in words.
    """

    trial: int
    kind: str
    kills: int
    kills_in_a_save: int
    damages: int
    damages_found: int
    steps_repeated: int
    survived: bool
    exact: bool
    good_lost: int
    wrong_exits: int
    exits: str
    story: str

    @property
    def passed(self) -> bool:
        """Whether something was done to the run, nothing was lost, and all damage was found."""
        whole = self.survived and self.exact and not self.good_lost and not self.wrong_exits
        done = self.kills > 0 and (self.damages > 0 or KINDS[self.kind].target == "none")
        return whole and done and self.damages == self.damages_found


def plan(trials: int, kinds: Sequence[str]) -> list[Kind]:
    """Lists the kinds of so many trials: those named (keys of `KINDS`) in turn."""
    return [KINDS[kinds[number % len(kinds)]] for number in range(trials)]


def run_undisturbed(command: Command, workdir: Path) -> Undisturbed:
    """Trains once with nothing happening.

    Raises:
        RuntimeError: if that fails; the message holds the end of its output.
    """
    started = time.monotonic()
    process = _start(command, workdir)
    first = 0.0
    while process.poll() is None:
        if not first and _rows(workdir):
            first = time.monotonic() - started
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(f"the undisturbed run failed: {(workdir / OUTPUT).read_text()[-500:]}")
    result = json.loads((workdir / "result.json").read_text())
    return Undisturbed(workdir, first, result["steps"], result["best_step"])


def run_trial(number: int, kind: Kind, seed: int, command: Command, workdir: Path, expected: Undisturbed) -> TrialRow:
    """Runs one trial in a new directory; the same arguments draw the same faults, at moments as the machine has it."""
    return _Trial(kind, random.Random(f"{seed} {number}"), command, workdir, expected).run(number)


class _Trial:
    def __init__(self, kind: Kind, rng: random.Random, command: Command, workdir: Path, expected: Undisturbed) -> None:
        self.kind = kind
        self.rng = rng
        self.command = command
        self.workdir = workdir
        self.directory = workdir / checkpoints.DIRECTORY
        self.expected = expected
        self.story: list[str] = []
        self.exits: list[int] = []
        self.in_save = self.killed = self.repeated = self.lost = self.wrong_exits = 0
        self.had = 0
        """Last step that was logged when the process before ended."""
        self.harmed: dict[int, str] = {}
        """Steps of the checkpoints that were damaged, and how; -1 for metrics.jsonl."""

    def run(self, number: int) -> TrialRow:
        for _ in range(self.rng.randint(1, 3) if self.kind.target == "none" else 1):
            self._start_and_kill()
        self._harm()
        self._start_and(lambda process: None)
        survived = self.exits[-1] == 0 and (self.workdir / "result.json").exists()
        return TrialRow(
            trial=number,
            kind=self.kind.name,
            kills=self.killed,
            kills_in_a_save=self.in_save,
            damages=len(self.harmed),
            damages_found=len(self.harmed.keys() & self._named()),
            steps_repeated=self.repeated,
            survived=survived,
            exact=survived and not differences(self.workdir, self.expected.workdir),
            good_lost=self.lost + self._good_moved(),
            wrong_exits=self.wrong_exits,
            exits=" ".join(map(str, self.exits)),
            story="; ".join(self.story),
        )

    def _start_and_kill(self) -> None:
        steps = self.expected.steps
        # Damage needs checkpoints to be done to, and steps to go.
        low, high = (0.0, 0.85) if self.kind.target == "none" else (0.5, 0.9)
        if self.kind.target == "best":
            low = max(low, (self.expected.best_step + steps) / 2 / steps)
            high = max(low, high)
        at_step = self.rng.uniform(low, high) * steps
        early = (self.kind.target, self.kind.moment) == ("none", "anywhere") and self.rng.random() < START_SHARE
        delay = self.rng.uniform(0, self.expected.seconds_to_start if early else SAVE_SECONDS)

        def strike(process: subprocess.Popen[bytes]) -> None:
            if self.kind.moment == "in a save":
                _wait_until(process, lambda: _step(self.workdir) >= at_step and self._saving())
            elif not early:
                _wait_until(process, lambda: _step(self.workdir) >= at_step)
            time.sleep(delay)
            if process.poll() is None:
                self.in_save += self._saving()
                process.send_signal(self.kind.signal)
                self.killed += 1
                self.story.append(f"{self.kind.signal.name} at step {_step(self.workdir)}")

        self._start_and(strike)

    def _saving(self) -> bool:
        return any(self.directory.glob(f"*{checkpoints.UNFINISHED}*"))

    def _start_and(self, strike: Callable[[subprocess.Popen[bytes]], None]) -> None:
        """Starts the run, lets something happen to it, waits for its end, and sees where it went on from."""
        finished = (self.workdir / "result.json").exists()
        good = [step for step in checkpoints.steps_in(self.directory) if step not in self.harmed]
        known = len(self._resumptions())
        process = _start(self.command, self.workdir)
        try:
            strike(process)
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self.story.append(f"hung for {PATIENCE_SECONDS:.0f} s")
        self.exits.append(process.returncode)
        since = self._resumptions()[known:]
        if since:
            self.lost += since[0] < max(good, default=0)
            self.repeated += max(0, self.had - since[0])
        elif process.returncode == 0 and not finished:
            self.lost += bool(good)
            self.repeated += self.had
        unfinished = not (self.workdir / "result.json").exists()
        self._check_exit(process.returncode, unfinished and (bool(since) or _step(self.workdir) > self.had))
        self.had = _step(self.workdir)

    def _check_exit(self, status: int, was_running: bool) -> None:
        """A run that had begun and was told to stop must say so in its exit status."""
        allowed = {0, preemption.EXIT_STATUS} if was_running else {0, preemption.EXIT_STATUS, -signal.SIGTERM}
        if self.kind.signal == signal.SIGTERM and status not in allowed:
            self.wrong_exits += 1
            self.story.append(f"exit status {status}")

    def _resumptions(self) -> list[int]:
        return [row["step"] for row in self._incidents() if row["kind"] == "resumed"]

    def _incidents(self) -> list[dict[str, Any]]:
        return journal.read(self.workdir)

    def _harm(self) -> None:
        steps = checkpoints.steps_in(self.directory)
        if (self.workdir / "result.json").exists():
            return  # too late: nothing will be read again
        if self.kind.target == "metrics":
            self.harmed[-1] = damage.cut_metrics(self.workdir, self.rng)
        elif self.kind.target != "none":
            best = self.expected.best_step
            chosen = {"newest": steps[-1:], "best": [best] if best in steps else [], "all": steps}[self.kind.target]
            for step in chosen:
                self.harmed[step] = damage.KINDS[self.kind.damage](self.directory / str(step), self.rng)
        self.story += [f"step {step}: {what}" if step >= 0 else what for step, what in self.harmed.items()]

    def _named(self) -> set[int]:
        rows = [row for row in self._incidents() if row["kind"] == "damaged"]
        log = {-1} if any("metrics.jsonl is damaged" in row["text"] for row in rows) else set()
        return log | {row["step"] for row in rows if f"the checkpoint of step {row['step']} is damaged" in row["text"]}

    def _good_moved(self) -> int:
        """Counts checkpoints that were set aside although nothing had been done to them."""
        aside = self.workdir / "damaged"
        moved = {int(path.name.split("-")[0]) for path in aside.iterdir()} if aside.is_dir() else set()
        return len(moved - self.harmed.keys())


def differences(workdir: Path, other: Path) -> list[str]:
    """Lists what two finished runs differ in that should be equal to the bit.

    Compared are metrics.jsonl, result.json but for timing, and the digests of all arrays of the last checkpoint, which
    must be whole.
    """
    found = []
    if (workdir / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    results = [json.loads((path / "result.json").read_text()) for path in (workdir, other)]
    names = results[0].keys() | results[1].keys()
    found += [f"result.json: {name}" for name in sorted(names - {"timing"}) if _unequal(results, name)]
    try:
        digests = [_last_digests(path) for path in (workdir, other)]
        found += ["arrays of the last checkpoint"] if digests[0] != digests[1] else []
    except checkpoints.DamagedError as error:
        found.append(str(error))
    return found


def _unequal(results: Sequence[dict[str, Any]], name: str) -> bool:
    return bool(results[0].get(name) != results[1].get(name))


def _last_digests(workdir: Path) -> dict[str, str]:
    steps = checkpoints.steps_in(workdir / checkpoints.DIRECTORY)
    return checkpoints.read_record(workdir / checkpoints.DIRECTORY, steps[-1]).digests


def _start(command: Command, workdir: Path) -> subprocess.Popen[bytes]:
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / OUTPUT).open("ab") as output:
        return subprocess.Popen(command(workdir), stdout=output, stderr=subprocess.STDOUT)


def _wait_until(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and not holds() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _rows(workdir: Path) -> list[dict[str, Any]]:
    return metrics.read_rows(workdir / "metrics.jsonl")


def _step(workdir: Path) -> int:
    """Returns the last step that is logged."""
    rows = _rows(workdir)
    return rows[-1]["step"] if rows else 0
