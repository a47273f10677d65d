import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from jax.experimental import multihost_utils
from several import Ended, endings, started, wait_for

from bvit_jax import peers, processes
from bvit_jax.model_config import ConfigError
from bvit_jax.preemption import Preempted

ONWARDS = "; the same command on all hosts goes on from the newest checkpoint"
PROMPT = 60
"""Seconds. JAX's own patience is 100 s; a lost process is seen at once."""


def errors(process: Ended) -> list[str]:
    return [line for line in process.stderr.splitlines() if line.startswith("error: ")]


# What each process does


def wait(port: int, number: int, count: int, folder: str) -> None:
    """Waits for its end, as for a peer in a computation."""
    processes.start(f"localhost:{port}", count, number)
    with peers.together():
        (Path(folder) / f"{number}").touch()
        time.sleep(500)


def compute(port: int, number: int, folder: str) -> None:
    """Computes with the others without end."""
    processes.start(f"localhost:{port}", 2, number)
    with peers.together():
        for step in range(10**6):
            multihost_utils.process_allgather(np.array(step))
            (Path(folder) / f"{number}").touch()


def leave(port: int, number: int, folder: str, error: str, graces: tuple[float, float], delays: list[float]) -> None:
    """Leaves after its delay, by an error or at the end; writes down how, when, and when it was let go."""
    errors = {"OSError": OSError("disk full"), "ConfigError": ConfigError("a = 1: no"), "Preempted": Preempted()}
    peers.GRACE_SECONDS, peers.QUITTING_SECONDS = graces
    processes.start(f"localhost:{port}", 2, number)
    raised, left = "nothing", 0.0
    try:
        with peers.together():
            (Path(folder) / f"{number}").touch()
            time.sleep(delays[number])
            left = time.time()
            if error in errors:
                raise errors[error]
    except (OSError, ConfigError, Preempted) as caught:
        raised = type(caught).__name__
    (Path(folder) / f"left {number}").write_text(f"{raised} {left} {time.time()}")


def stay_away(port: int, number: int, absent: int, folder: str) -> None:
    """Meets the others, unless it is the absent one."""
    peers.MEETING_SECONDS = 2.0
    processes.start(f"localhost:{port}", 2, number)
    if number == absent:
        (Path(folder) / "absent").touch()
        time.sleep(500)
    with peers.together():
        pass


# One process


def test_one_process_has_no_peers_to_lose():
    done = []
    with peers.together():
        done.append(1)
    with pytest.raises(ZeroDivisionError), peers.together():
        done.append(1 // 0)
    assert done == [1]


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (b"secret 3\n", 3),
        *((said, None) for said in (b"wrong 3\n", b"secret\n", b"secret x\n", b"\xff\xfe 3\n", b"")),
        *((said, None) for said in (b"GET / HTTP/1.1\r\n", "sécret 3\n".encode(), b"secret" + b" " * 100 + b"3\n")),
    ],
)
def test_strangers_are_told_from_processes_of_the_run(said, number):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        assert peers._greeting(ours, "secret") == number


def test_a_farewell_may_follow_the_greeting_at_once():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"secret 3\nleft 3\n")
        assert peers._greeting(ours, "secret") == 3
        assert ours.recv(100) == b"left 3\n"


def test_lost_hosts_are_noticed_before_jax_gives_up():
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        assert peers._probed(connection) is connection

        def option(name: int) -> int:
            return connection.getsockopt(socket.IPPROTO_TCP, name)

        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        seconds = option(socket.TCP_KEEPIDLE) + option(socket.TCP_KEEPINTVL) * option(socket.TCP_KEEPCNT)
        assert 10 <= seconds <= 60
        assert option(socket.TCP_USER_TIMEOUT) == 1000 * seconds
        assert connection.gettimeout() is None


# Several processes


def test_all_others_end_when_one_is_killed(tmp_path):
    with started(3, lambda port, number: call(wait, port, number, 3, str(tmp_path))) as running:
        wait_for(running, *(tmp_path / str(number) for number in range(3)))
        running[2].kill()
        first, second, killed = endings(running, PROMPT)
    assert killed.returncode == -signal.SIGKILL
    assert (first.returncode, second.returncode) == (peers.EXIT_STATUS, peers.EXIT_STATUS) == (76, 76)
    assert first.stderr == f"error: process 2 of 3 is gone (its connection was closed){ONWARDS}\n"
    assert second.stderr == f"error: process 2 of 3 is gone (seen by the first process){ONWARDS}\n"


def test_all_others_end_when_the_first_is_killed(tmp_path):
    with started(2, lambda port, number: call(wait, port, number, 2, str(tmp_path))) as running:
        wait_for(running, tmp_path / "0", tmp_path / "1")
        running[0].kill()
        _, second = endings(running, PROMPT)
    assert second.returncode == peers.EXIT_STATUS, second.stderr
    # JAX notices too, and may have begun to say so.
    assert errors(second) == [f"error: process 0 of 2 is gone (its connection was closed){ONWARDS}"]


def test_a_computation_that_breaks_ends_in_the_same_way(tmp_path):
    with started(2, lambda port, number: call(compute, port, number, str(tmp_path))) as running:
        wait_for(running, tmp_path / "0", tmp_path / "1")
        running[1].kill()
        first, _ = endings(running, PROMPT)
    assert first.returncode == peers.EXIT_STATUS, first.stderr
    [line] = errors(first)
    assert line.startswith("error: process 1 of 2 is gone (its connection ")
    assert line.endswith(ONWARDS)
    assert "Traceback" not in first.stderr


@pytest.mark.parametrize(
    ("error", "delays", "grace"),
    [
        ("none", [0.0, 3.0], 1.0),
        ("Preempted", [3.0, 0.0], 1.0),
        pytest.param("ConfigError", [2.0, 0.0], 60.0, marks=pytest.mark.long),
    ],
)
def test_processes_that_leave_at_different_times_are_not_lost(tmp_path, error, delays, grace):
    def command(port: int, number: int) -> list[str]:
        return call(leave, port, number, str(tmp_path), error, (grace, 1.0), delays)

    with started(2, command) as running:
        wait_for(running, tmp_path / "0", tmp_path / "1")
        for doing in (signal.SIGSTOP, signal.SIGCONT):  # one that stands still is not lost either
            running[1].send_signal(doing)
            time.sleep(1.0)
        both = endings(running)
    found: Any = [(tmp_path / f"left {number}").read_text().split() for number in (0, 1)]
    for process, (raised, _, let_go) in zip(both, found, strict=True):
        assert (process.returncode, process.stderr) == (0, "")
        assert raised == ("nothing" if error == "none" else error)
        assert float(let_go) >= max(float(left) for _, left, _ in found)


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_process_that_fails_alone_ends_all(tmp_path, failing):
    def command(port: int, number: int) -> list[str]:
        delays = [300.0 * (other != failing) for other in (0, 1)]
        return call(leave, port, number, str(tmp_path), "OSError", (1.0, 1.0), delays)

    with started(2, command) as running:
        both = endings(running, PROMPT)
    assert both[failing].returncode == 1
    assert both[failing].stderr.endswith("\nOSError: disk full\n")
    assert errors(both[failing]) == []
    assert both[1 - failing].returncode == peers.EXIT_STATUS
    assert both[1 - failing].stderr == f"error: process {failing} of 2 failed; see its own output{ONWARDS}\n"


@pytest.mark.parametrize("absent", [0, pytest.param(1, marks=pytest.mark.long)])
def test_processes_that_do_not_meet_end(tmp_path, absent):
    with started(2, lambda port, number: call(stay_away, port, number, absent, str(tmp_path))) as running:
        [present] = endings([running[1 - absent]], PROMPT)
    assert present.returncode == peers.EXIT_STATUS
    assert present.stderr == f"error: process {absent} of 2 did not come within 4 s\n"


def unreachable(port: int, number: int, folder: str) -> None:
    """Runs although the second process cannot reach the first."""
    peers.MEETING_SECONDS = 2.0
    peers._connect = lambda key, number: None
    processes.start(f"localhost:{port}", 2, number)
    with peers.together():
        (Path(folder) / f"{number}").write_text(str(multihost_utils.process_allgather(np.array(number)).sum()))


def test_processes_that_cannot_connect_run_unwatched_and_say_so(tmp_path):
    with started(2, lambda port, number: call(unreachable, port, number, str(tmp_path))) as running:
        first, second = endings(running, PROMPT)
    assert (first.returncode, second.returncode) == (0, 0)
    assert f"warning: {peers._UNWATCHED}\n" in first.stderr
    assert "warning" not in second.stderr
    assert [(tmp_path / name).read_text() for name in ("0", "1")] == ["1", "1"]
