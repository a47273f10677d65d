"""What becomes of a run of several processes that loses one: the others end at once and say why, instead of waiting.

Every process keeps a connection to the first one. Only farewells are sent over it, so a process need do nothing to
count as alive, however long it compiles: a connection that ends without a farewell is a process that died, and a host
that is lost no longer answers the probes of the other's operating system.
"""

import contextlib
import itertools
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from jax._src.distributed import global_state  # jax.distributed does not tell addresses, nor give its store of keys

from bvit_jax.preemption import Preempted

EXIT_STATUS = 76
"""Of a process whose peers are lost: EX_PROTOCOL of sysexits.h."""
MEETING_SECONDS = 60.0
"""For all to connect. They have just met in `processes.start`; on a busy host an import may come between."""
PROBE_AFTER_SECONDS, PROBE_EVERY_SECONDS, PROBES = 10, 5, 4
"""A host that answers nothing for 30 s is lost: longer than a virtual machine stands still while it is moved, and
well before the 100 s after which JAX itself would abort the process."""
GRACE_SECONDS = 30.0
"""After one process failed, for the others to fail in the same way: their checkpoints may be under way."""
QUITTING_SECONDS = 1.0
"""For the others to end before the first process does, whose end makes JAX abort them."""

_UNWATCHED = "not all processes can reach the first; the loss of one will be noticed by JAX alone, after 100 s"
_HERE, _LEFT, _FAILED, _GONE = "here", "left", "failed", "gone"
_meetings = itertools.count()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process with status 76 and one line on standard error if another one is lost while this is open.

    All processes of a run open it, after `processes.start`, and close it at the same place; it closes when all have
    come there. A process that leaves it with an exception waits until the others have left too. If some do not within
    `GRACE_SECONDS`, it failed alone: it ends with its traceback and status 1, and they end with status 76. The loss of
    a process is seen at once, that of a host within 30 s. Nothing is done in a run of one process. Where the others
    cannot reach the first (they need a port of the system's choice), a warning is printed and JAX's own watch is left,
    which aborts the process after 100 s.
    """
    if global_state.num_processes == 1:
        yield
        return
    number, count = global_state.process_id, global_state.num_processes
    connections = _meet(number, count)
    if connections is None:
        if number == 0:
            sys.stderr.write(f"warning: {_UNWATCHED}\n")
        yield
        return
    watch = _Watch(number, count, connections)
    try:
        yield
    except Preempted:
        watch.leave(_LEFT)
        raise
    except BaseException as error:
        watch.cause = f"; here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if not watch.leave(_FAILED, GRACE_SECONDS):
            sys.excepthook(*sys.exc_info())
            _exit(1)  # JAX would wait for the others
        raise
    watch.leave(_LEFT)


class _Watch:
    """What is known of each process. The first passes on what it hears."""

    def __init__(self, number: int, count: int, connections: dict[int, socket.socket]) -> None:
        self.cause = ""
        self._number = number
        self._states = [_HERE] * count
        self._changed = threading.Condition()
        self._closed = self._quitting = False
        self._connections = connections
        for peer, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()

    def leave(self, state: str, patience: float | None = None) -> bool:
        """Says farewell, and waits for the others, at most `patience` seconds; says whether all have left."""
        with self._changed:
            self._states[self._number] = state
            self._tell(state, self._number)
            all_left = self._changed.wait_for(lambda: self._quitting or _HERE not in self._states, patience)
            self._closed = not self._quitting
        if self._quitting:
            threading.Event().wait()  # the thread that heard of a loss ends the process
        if not all_left:
            self._tell(_GONE, self._number)
            self._let_others_end_first()
            return False
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        return True

    def _tell(self, state: str, about: int) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{state} {about}\n".encode())

    def _listen(self, peer: int, connection: socket.socket) -> None:
        how = "its connection was closed"
        try:
            with connection.makefile() as lines:
                for line in lines:
                    state, about = line.split()
                    self._note(state, int(about), "seen by the first process")
        except (OSError, ValueError) as error:  # a ValueError if it broke within a line
            how = f"its connection broke: {error}"
        self._note(_GONE, peer, how)

    def _note(self, state: str, about: int, how: str) -> None:
        with self._changed:
            expected = state == _GONE and _HERE not in self._states
            if self._closed or self._quitting or about == self._number or expected:
                return
            before, self._states[about] = self._states[about], state
            self._quitting = state == _GONE
            if self._number == 0:
                self._tell(state, about)
            self._changed.notify_all()
        if self._quitting:
            self._quit(about, "failed; see its own output" if before == _FAILED else f"is gone ({how})")

    def _quit(self, about: int, what: str) -> NoReturn:
        lost = f"process {about} of {len(self._states)} {what}{self.cause}"
        os.write(2, f"error: {lost}; the same command on all hosts goes on from the newest checkpoint\n".encode())
        self._let_others_end_first()
        _exit(EXIT_STATUS)

    def _let_others_end_first(self) -> None:
        if self._number == 0:
            time.sleep(QUITTING_SECONDS)


def _meet(number: int, count: int) -> dict[int, socket.socket] | None:
    """Returns this process's connections by the number at their other end; None, in all, if some are missing."""
    key = f"bvit_jax/peers/{next(_meetings)}"
    connections = _accept(key, count) if number == 0 else _connect(key, number)
    _store().key_value_set(f"{key}/met/{number}", "no" if connections is None else "yes")
    met = [_told(f"{key}/met/{peer}", f"process {peer} of {count} did not come") for peer in range(count)]
    if connections is None or "no" in met:
        for connection in (connections or {}).values():
            connection.close()
        return None
    return connections


def _told(key: str, missing: str) -> str:
    """Returns what a process stored; ends this one if it does not, for an exception would wait for the others."""
    patience = 2 * MEETING_SECONDS
    try:
        return str(_store().blocking_key_value_get(key, int(patience * 1000)))
    except RuntimeError:
        os.write(2, f"error: {missing} within {patience:.0f} s\n".encode())
        _exit(EXIT_STATUS)


def _accept(key: str, count: int) -> dict[int, socket.socket] | None:
    """Connections from all other processes, by their numbers; None if some do not come."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + MEETING_SECONDS
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=count) as server:
        token = secrets.token_hex(16)
        _store().key_value_set(key, f"{server.getsockname()[1]} {token}")
        while len(connections) < count - 1:
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                connection, _ = server.accept()
            except TimeoutError:
                for connection in connections.values():
                    connection.close()
                return None
            number = _greeting(connection, token)
            if number is None:
                connection.close()
            else:
                connections[number] = _probed(connection)
    return connections


def _greeting(connection: socket.socket, token: str) -> int | None:
    """The number of the process that connected; None if it is none of this run."""
    connection.settimeout(5.0)
    try:
        with connection.makefile("rb", buffering=0) as lines:  # it reads no further than the line
            given, number = lines.readline(80).split()
        return int(number) if secrets.compare_digest(given, token.encode()) else None
    except (OSError, ValueError):
        return None


def _connect(key: str, number: int) -> dict[int, socket.socket] | None:
    """A connection to the first process; None if it cannot be reached."""
    host = str(global_state.coordinator_address).rpartition(":")[0].strip("[]")
    try:
        port, token = _store().blocking_key_value_get(key, int(MEETING_SECONDS * 1000)).split()
        connection = socket.create_connection((host, int(port)), MEETING_SECONDS)
        connection.sendall(f"{token} {number}\n".encode())
    except (RuntimeError, OSError):
        return None
    return {0: _probed(connection)}


def _probed(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    lost_after = PROBE_AFTER_SECONDS + PROBES * PROBE_EVERY_SECONDS
    for option, value in {
        socket.TCP_KEEPIDLE: PROBE_AFTER_SECONDS,
        socket.TCP_KEEPINTVL: PROBE_EVERY_SECONDS,
        socket.TCP_KEEPCNT: PROBES,
        socket.TCP_USER_TIMEOUT: lost_after * 1000,
        socket.TCP_NODELAY: 1,
    }.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _store() -> Any:
    """JAX's store of keys and values, which the first process keeps."""
    return global_state.client


def _exit(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
