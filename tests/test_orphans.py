import multiprocessing
import subprocess
import time
from pathlib import Path

from conftest import call, environment

from bvit_jax import orphans


def child() -> None:
    orphans.end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(600)


def parent() -> None:
    started = multiprocessing.get_context("spawn").Process(target=child)
    started.start()
    started.join()


def test_a_process_ends_with_its_parent_however_that_ends():
    with subprocess.Popen(call(parent), env=environment(1), stdout=subprocess.PIPE, text=True) as killed:
        path = Path("/proc") / killed.stdout.readline().strip()
        assert path.exists()
        killed.kill()
    deadline = time.monotonic() + 30
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_nobody_started_goes_on():
    orphans._wait_for_parent()
    assert multiprocessing.parent_process() is None
