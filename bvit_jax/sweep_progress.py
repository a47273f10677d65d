"""How far a sweep is, while it runs: a table on a terminal, a line a minute elsewhere."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from bvit_jax.failures import Failures
from bvit_jax.sweep import Trial

REFRESH_SECONDS = 2.0
LINE_SECONDS = 60.0
"""Between two lines where there is no terminal."""
COST_SHARE = 0.05
"""Of the time, at most, goes into reading what the trials wrote: hundreds of them may lie on a slow file system."""
ROWS_OF_TERMINAL = 0.5
"""Share of a terminal's rows that the table may take."""


@dataclasses.dataclass(frozen=True)
class Running:
    """A trial that runs.

    Attributes:
        trial: of the sweep.
        steps_at_start: that it had done when it was started.
        where: its process or its machine.
    """

    trial: Trial
    steps_at_start: int
    where: str


@dataclasses.dataclass(frozen=True)
class State:
    """The newest figures of a running trial; None where it has none yet."""

    step: int
    loss: float | None
    accuracy: float | None
    validation_accuracy: float | None
    images_per_second: float | None


def state_of(trial: Trial) -> State:
    """Reads what a running trial wrote last."""
    rows = trial.rows("metrics.jsonl")
    newest = {row.get("split"): row for row in rows}
    train, validation = newest.get("train", {}), newest.get("validation", {})
    timing = (trial.rows("timing.jsonl") or [{}])[-1]
    return State(
        max((int(row.get("step", 0)) for row in newest.values()), default=0),
        train.get("loss"),
        train.get("accuracy"),
        validation.get("accuracy"),
        timing.get("images_per_second"),
    )


class _Console(Console):
    """One that a closed pipe does not end."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress:
    """Counts trials and steps; open it as a context.

    Args:
        trials: all of the sweep.
        waiting: those that this call is to run.
        failed: the failures so far.
        console: to show them on; standard output if None.
    """

    def __init__(
        self, trials: Sequence[Trial], waiting: Sequence[Trial], failed: Failures, console: Console | None = None
    ) -> None:
        self._failed = failed
        self._statuses = {trial.directory: failed.status(trial) for trial in trials}
        self._statuses |= {trial.directory: "unfinished" for trial in waiting}
        self._steps = sum(trial.config.total_steps - trial.steps_done for trial in waiting)
        self._ended_steps = 0
        self._waiting = len(waiting)
        self._console = console or _Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._start = self._line_at = time.monotonic()
        self._next = 0.0

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            with contextlib.suppress(OSError):
                self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()

    def ended(self, trial: Trial, steps_at_start: int) -> None:
        """Takes note of a trial that has ended, however it did."""
        self._statuses[trial.directory] = self._failed.status(trial)
        self._ended_steps += trial.config.total_steps - steps_at_start
        self._waiting -= 1

    def set_back(self, trial: Trial, steps_at_start: int) -> None:
        """Takes note of a trial that waits again; what it keeps of its steps counts."""
        self._ended_steps += max(trial.steps_done - steps_at_start, 0)

    def show(self, running: Sequence[Running]) -> None:
        """Shows how things stand, unless that was done a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        states = [state_of(one.trial) for one in running]
        self._next = now + max(REFRESH_SECONDS, (time.monotonic() - now) / COST_SHARE)
        headline = self._headline(running, states, now - self._start)
        with contextlib.suppress(OSError):  # output may go to a disk that is full, or to a pipe that is closed
            if self._console.is_terminal:
                self._live.update(self._table(headline, running, states), refresh=True)
            elif now - self._line_at >= LINE_SECONDS:
                self._line_at = now
                self._console.print(headline, soft_wrap=True)

    def _headline(self, running: Sequence[Running], states: Sequence[State], seconds: float) -> str:
        found = list(self._statuses.values())
        steps = self._ended_steps + sum(
            max(state.step - one.steps_at_start, 0) for one, state in zip(running, states, strict=True)
        )
        parts = [
            f"{found.count('ok')} of {len(found)} trials done",
            f"{found.count('failed')} failed",
            f"{len(running)} running",
            f"{self._waiting - len(running)} waiting",
        ]
        if self._steps:
            parts.append(f"{100 * steps / self._steps:.0f} % of the steps")
        if 0 < steps < self._steps:
            parts.append(f"about {_duration(seconds * (self._steps - steps) / steps)} left")
        return ", ".join(parts)

    def _table(self, headline: str, running: Sequence[Running], states: Sequence[State]) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "where"):
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        for name in ("step", "of", "loss", "accuracy", "validation", "images/s"):
            table.add_column(name, justify="right", no_wrap=True)
        room = max(int(ROWS_OF_TERMINAL * self._console.height), 1)
        for one, state in list(zip(running, states, strict=True))[:room]:
            figures = (state.loss, state.accuracy, state.validation_accuracy)
            table.add_row(
                *(one.trial.label, one.where, f"{state.step:,}", f"{one.trial.config.total_steps:,}"),
                *("" if figure is None else f"{figure:.3f}" for figure in figures),
                "" if state.images_per_second is None else f"{state.images_per_second:,.0f}",
            )
        more = [f"and {len(running) - room} more"] if len(running) > room else []
        return Group(headline, table, *more) if running else headline


def _duration(seconds: float) -> str:
    """Formats a time to come in words, to two figures or so."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 24 else f"{hours / 24:.1f} days"
