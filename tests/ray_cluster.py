"""Ray clusters of several nodes on this machine, of real processes."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import environment

START_SECONDS = 120
_STARTED = "Ray runtime started"
SLICE = "v4:2x2x2"
"""Two hosts with four chips each."""


class Cluster:
    """A head that runs nothing but sweeps, and nodes; each node ends with the process that started it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"127.0.0.1:{_free_port()}"
        port = self.address.rpartition(":")[2]
        head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={directory}")
        self._start(*head, "--num-cpus=0")

    def add(self, host_of_slice: int) -> subprocess.Popen[bytes]:
        """Starts a node with one CPU that says it were this host of a slice of TPUs, as on Kubernetes."""
        slice_of_two = {"TPU_ACCELERATOR_TYPE": "v4-16", "TPU_NAME": "drawn", "TPU_TOPOLOGY": "2x2x2"}
        resources = ("--num-cpus=1", '--resources={"TPU": 4}')
        variables = {**slice_of_two, "TPU_WORKER_ID": str(host_of_slice)}
        return self._start(f"--address={self.address}", *resources, **variables)

    def _start(self, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        # Any ports: nodes of one machine cannot all have the usual ones.
        ports = ("--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1")
        program = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=80000000"]
        log = self._directory / f"node_{len(self._nodes)}.log"
        with log.open("wb") as output:
            node = subprocess.Popen(
                [*program, *ports, *arguments],
                env=variables_of_all() | {"RAY_worker_niceness": "0", **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._nodes.append(node)
        deadline = time.monotonic() + START_SECONDS
        while _STARTED not in log.read_text() and node.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _STARTED in log.read_text(), log.read_text()
        return node

    def stop(self) -> None:
        """Kills what runs, the head last."""
        for node in reversed(self._nodes):
            kill(node)


def variables_of_all() -> dict[str, str]:
    """Of nodes and sweeps: computations have as many threads as a trial asks for CPUs, on which roundings depend."""
    without = {name: value for name, value in environment(1).items() if name != "NPROC"}
    return without | {"RAY_USAGE_STATS_ENABLED": "0"}


def ancestors(process: int) -> set[int]:
    """Returns a process and those that it descends from; raises OSError if it has ended."""
    found = set[int]()
    while process > 1:
        found.add(process)
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def kill(node: subprocess.Popen[bytes]) -> None:
    """Takes a node away with all that runs there, as when a machine loses its power."""
    of_node = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if node.pid in ancestors(int(path.name)):
                of_node.append(int(path.name))
    for process in of_node:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    node.wait()


@contextlib.contextmanager
def started(nodes: int) -> Iterator[tuple[Cluster, list[subprocess.Popen[bytes]]]]:
    """A cluster with that many nodes, the hosts of a slice, and the processes of these."""
    directory = Path(tempfile.mkdtemp(prefix="ray_"))  # a short path: sockets lie below it
    cluster = None
    try:
        cluster = Cluster(directory)
        yield cluster, [cluster.add(host) for host in range(nodes)]
    finally:
        if cluster is not None:
            cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
