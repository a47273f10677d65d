import dataclasses
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bvit_jax import failures, sweep
from bvit_jax.compress_request import Request
from bvit_jax.failures import Failures
from tests.conftest import make_config
from tests.test_rivals import compress


def make_trial(directory: Path, seed: int = 0) -> sweep.Trial:
    return sweep.Trial(make_config("dense", seed=seed), directory)


def test_causes_are_kept_for_a_later_call_until_they_are_forgotten(tmp_path):
    trial, other = make_trial(tmp_path / "t"), make_trial(tmp_path / "o", seed=1)
    found = Failures(tmp_path / "errors")
    assert (found.cause(trial), found.status(trial)) == (None, "unfinished")
    found.record(trial, "Traceback\nValueError: \udcff\n\n")
    assert (tmp_path / "errors" / f"{trial.config.digest()}.txt").read_text() == "Traceback\nValueError: ?\n"
    later = Failures(tmp_path / "errors")
    assert (later.cause(trial), later.status(trial)) == ("Traceback\nValueError: ?\n", "failed")
    assert (later.cause(other), later.status(other)) == (None, "unfinished")
    assert later.is_recorded(trial)
    assert not trial.directory.exists()
    later.forget(trial)
    later.forget(other)
    assert (later.cause(trial), Failures(tmp_path / "errors").cause(trial)) == (None, None)


def test_what_waits_is_what_is_not_trained_and_compressed_as_wanted(tmp_path):
    request = Request("svd", 0.5)
    found = Failures(tmp_path / "errors")
    trials = [dataclasses.replace(make_trial(tmp_path / f"{seed}", seed), compressions=(request,)) for seed in range(4)]
    done, trained, failed, new = trials
    for trial in (done, trained, failed):
        trial.directory.mkdir()
        (trial.directory / "result.json").write_text('{"test_accuracy": 0.5}')
    compress(done, request)
    found.record(failed, "broken")
    assert [found.status(trial) for trial in trials] == ["ok", "unfinished", "failed", "unfinished"]
    assert found.waiting(trials, retry_failed=False) == [trained, new]
    assert found.waiting(trials, retry_failed=True) == [trained, failed, new]
    without = [dataclasses.replace(trial, compressions=()) for trial in trials]
    assert found.waiting(without, retry_failed=True) == without[3:]


def unwritable(kind: str, trial: sweep.Trial, directory: Path) -> None:
    """Makes a folder of errors that even root cannot write to."""
    if kind == "a file":
        directory.write_text("")
    elif kind == "read-only":
        directory.symlink_to("/sys/kernel")
    else:
        directory.mkdir()
        (directory / f"{trial.config.digest()}.txt.partial").symlink_to("/dev/full")


@pytest.mark.parametrize("kind", ["a file", "read-only", "full"])
def test_what_cannot_be_written_is_kept_in_memory(tmp_path, kind):
    trial = make_trial(tmp_path / "t")
    unwritable(kind, trial, tmp_path / "errors")
    found = Failures(tmp_path / "errors")
    found.forget(trial)
    assert found.cause(trial) is None
    found.record(trial, "broken")
    assert (found.cause(trial), found.status(trial), found.is_recorded(trial)) == ("broken", "failed", False)
    assert Failures(tmp_path / "errors").cause(trial) is None
    found.forget(trial)
    assert found.cause(trial) is None


def test_a_cause_that_cannot_be_read_or_taken_away_is_no_obstacle(tmp_path):
    trial = make_trial(tmp_path / "t")
    (tmp_path / "errors" / f"{trial.config.digest()}.txt").mkdir(parents=True)
    found = Failures(tmp_path / "errors")
    assert found.status(trial) == "failed"
    assert found.cause(trial).startswith("failed; the cause cannot be read: [Errno 21] Is a directory")
    found.forget(trial)
    assert (found.status(trial), found.is_recorded(trial)) == ("unfinished", True)


def describe(function) -> list[str]:
    try:
        function()
    except Exception as error:
        return failures.describe(error).splitlines()
    raise AssertionError("nothing was raised")


def raise_(error: Exception) -> None:
    raise error


def test_the_last_line_is_the_type_and_the_first_line_of_the_message():
    lines = describe(lambda: raise_(ValueError("loss is nan")))
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: loss is nan"
    assert lines.count("ValueError: loss is nan") == 1
    assert describe(lambda: raise_(MemoryError()))[-1] == "MemoryError"
    assert describe(lambda: raise_(ValueError("broken:\nhere\n\nand there\n")))[-1] == "ValueError: broken:"


def test_the_last_line_of_jax_being_out_of_memory_says_so():
    lines = describe(lambda: jax.jit(lambda: jnp.zeros((10**6, 10**9)))())
    assert lines[-1].endswith("RESOURCE_EXHAUSTED: Out of memory allocating 4000000000000000 bytes.")


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (1, "exit status 1"),
        (None, "exit status None"),
        (-signal.SIGKILL, "killed by signal 9 (kill -9, or the kernel when memory ran out)"),
        (-signal.SIGSEGV, "killed by signal 11 (SIGSEGV)"),
        (-63, "killed by signal 63"),
    ],
)
def test_a_process_that_left_no_word_is_described_by_how_it_ended(code, how):
    found = failures.describe_end(code, Path("trials/x/output.txt"))
    assert found == f"the trial's process ended early: {how}; its output is in trials/x/output.txt"
