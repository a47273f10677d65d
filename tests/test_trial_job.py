import multiprocessing
import signal
import threading
import time
from pathlib import Path

import pytest

from bvit_jax import preemption, trial_job, trial_process
from bvit_jax.sweep import Trial
from bvit_jax.trial_process import Order, Seat
from tests.conftest import make_config


def make_order(directory: Path, seat: Seat | None = None) -> Order:
    return Order({}, directory, (), directory / "cache", (0,), seat=seat)


class Ended:
    """A process that has ended."""

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode


def test_a_cause_longer_than_a_pipe_holds_arrives_whole(tmp_path):
    here, there = multiprocessing.Pipe()
    sender = threading.Thread(target=there.send_bytes, args=(b"x" * 10**7,), daemon=True)
    sender.start()
    job = trial_job.Job(make_order(tmp_path), multiprocessing.Process(), here)
    while sender.is_alive():
        job.listen()
    there.close()
    job.listen()  # the other end is gone: no more to come, no error
    assert job.cause == "x" * 10**7
    here.close()


def test_a_trial_ends_with_its_result_and_takes_what_it_was_ordered(tmp_path):
    config = make_config("dense")
    order = trial_process.order(Trial(config, tmp_path / "trial"), tmp_path / "cache", (0,))
    assert (order.output, order.compressions, order.threads) == (tmp_path / "trial" / "output.txt", (), None)
    job = trial_job.start(order)
    assert not job.ended()
    deadline = time.monotonic() + 300
    while not job.ended(1.0):
        assert time.monotonic() < deadline
    assert job.ended()  # however often it is asked
    assert (job.process.exitcode, job.cause, job.was_stopped) == (0, None, False)
    assert (tmp_path / "trial" / "result.json").exists()


@pytest.mark.parametrize(
    ("exitcode", "cause", "was_stopped"),
    [
        (preemption.EXIT_STATUS, None, True),
        (-signal.SIGTERM, None, True),
        (-signal.SIGKILL, None, False),
        (1, "ValueError: no", False),
        (preemption.EXIT_STATUS, "ValueError: no", False),
        (0, None, False),
    ],
)
def test_who_was_stopped_is_told_from_who_failed(tmp_path, exitcode, cause, was_stopped):
    here, _ = multiprocessing.Pipe()
    job = trial_job.Job(make_order(tmp_path), Ended(exitcode), here, cause)
    assert job.was_stopped == was_stopped
    if cause:
        assert job.described == cause
    elif exitcode == -signal.SIGKILL:
        assert job.described == (
            "the trial's process ended early: killed by signal 9 (kill -9, or the kernel when memory ran out); its "
            f"output is in {tmp_path / 'output.txt'}"
        )


def test_each_process_of_a_trial_has_its_own_output(tmp_path):
    names = [make_order(tmp_path, Seat("host:1", 3, number)).output.name for number in range(3)]
    assert names == ["output.txt", "output_1.txt", "output_2.txt"]
