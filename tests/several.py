"""Runs of several processes on this machine, for tests: starting, waiting, ending."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import ROOT, environment

Running = list[subprocess.Popen[str]]
Ended = subprocess.CompletedProcess[str]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def started(count: int, command: Callable[[int, int], list[str]]) -> Iterator[Running]:
    """Runs command(port, process) as processes of two devices each; kills what is left of them when it is closed."""
    port = free_port()
    settings: Any = {"cwd": ROOT, "env": environment(2), "text": True, "stdout": subprocess.PIPE}
    running = [subprocess.Popen(command(port, i), **settings, stderr=subprocess.PIPE) for i in range(count)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def endings(running: Running, within: float = 240) -> list[Ended]:
    """Returns how each process ended, by itself, within so many seconds."""
    deadline = time.monotonic() + within
    outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 0.01)) for process in running]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(running, outputs, strict=True)
    ]


def wait_for(running: Running, *paths: Path) -> None:
    """Waits until all paths are there, while all processes run."""
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths}"
        for process in running:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)
