import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import call, environment
from jax.experimental import multihost_utils
from several import endings, started, wait_for

from bvit_jax import peers, preemption, processes

# One process


def test_a_signal_is_noted_and_the_next_one_ends_the_process(request):
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("it was not watched"))
    ours = signal.getsignal(signal.SIGTERM)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    with preemption.watch() as notice:
        assert [notice.reached() for _ in range(3)] == [False] * 3
        os.kill(os.getpid(), signal.SIGTERM)
        assert [notice.reached() for _ in range(3)] == [True] * 3
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is ours
    with preemption.watch() as notice:
        assert not notice.reached()


def test_other_threads_hear_nothing():
    before = signal.getsignal(signal.SIGTERM)
    heard: list[bool] = []

    def work() -> None:
        with preemption.watch() as notice:
            heard.append(notice.reached())
            heard.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [False, True]


def test_no_backend_is_started():
    code = (
        "from bvit_jax import preemption; from jax._src import xla_bridge\n"
        "with preemption.watch() as notice: assert not notice.reached()\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(1), check=True)


def test_points_of_joined_processes_count_over_runs(monkeypatch):
    asked: list[int] = []

    def reached(point: int) -> bool:
        asked.append(point)
        return len(asked) == 3

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as notice:
        assert signal.getsignal(signal.SIGTERM) is before  # JAX takes it
        assert not notice.reached()
    with preemption.watch() as notice:
        assert [notice.reached() for _ in range(4)] == [False, True, True, True]
    assert asked == [asked[0], asked[0] + 1, asked[0] + 2]


# Two processes


def work(port: int, number: int, folder: str, early: bool) -> None:
    """Steps until told to stop, or waits to be told first; ends with the status of a process that was."""
    path = Path(folder)
    processes.start(f"localhost:{port}", 2, number)
    try:
        with preemption.watch() as notice, peers.together():
            (path / f"ready {number}").touch()
            while early and not (path / "told").exists():
                time.sleep(0.05)
            for step in range(2000):
                steps = multihost_utils.process_allgather(np.array(step)).reshape(-1)
                assert steps.tolist() == [step] * 2
                (path / f"begun {number}").touch()
                time.sleep(0.005 * (1 + number))
                if notice.reached():
                    (path / f"stopped {number}").write_text(str(step))
                    os.kill(os.getpid(), signal.SIGTERM)  # has no effect any more
                    raise preemption.Preempted
    except preemption.Preempted:
        (path / f"saved {number}").touch()
        sys.exit(preemption.EXIT_STATUS)


@pytest.mark.parametrize(("early", "told"), [(False, 1), pytest.param(True, 0, marks=pytest.mark.long)])
def test_a_signal_to_one_stops_both_at_the_same_point(tmp_path, early, told):
    with started(2, lambda port, number: call(work, port, number, str(tmp_path), early)) as running:
        moment = "ready" if early else "begun"
        wait_for(running, *(tmp_path / f"{moment} {number}" for number in (0, 1)))
        running[told].send_signal(signal.SIGTERM)
        if early:
            time.sleep(3.0)  # the signal is looked for once a second
            (tmp_path / "told").touch()
        both = endings(running)
    for number, process in enumerate(both):
        assert process.returncode == preemption.EXIT_STATUS == 75, process.stderr
        assert (tmp_path / f"saved {number}").exists()
    stopped = [int((tmp_path / f"stopped {number}").read_text()) for number in (0, 1)]
    assert stopped[0] == stopped[1]
    assert (stopped[0] == 0) == early
