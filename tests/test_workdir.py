import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import call, environment

from bvit_jax import workdir
from bvit_jax.model_config import ConfigError

IDENTITY = {"seed": 0, "grid": (1, 2)}
OUTPUTS = ("results.csv", "trials")


def claim(directory: Path, identity: dict[str, object] = IDENTITY) -> None:
    workdir.claim(directory, "identity.json", identity, OUTPUTS)


def visible(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file() and path.name[0] != "."}


def test_a_new_directory_is_made_and_can_be_claimed_again_by_the_same(tmp_path):
    claim(tmp_path / "a" / "b")
    assert json.loads((tmp_path / "a" / "b" / "identity.json").read_text()) == {"seed": 0, "grid": [1, 2]}
    claim(tmp_path / "a" / "b")


def test_another_identity_is_refused_and_changes_nothing(tmp_path):
    claim(tmp_path)
    before = visible(tmp_path)
    with pytest.raises(ConfigError, match=r"another configuration.*seed: 0 != 5"):
        claim(tmp_path, IDENTITY | {"seed": 5})
    assert visible(tmp_path) == before


@pytest.mark.parametrize("output", OUTPUTS)
def test_somebody_elses_output_is_left_alone(tmp_path, output):
    (tmp_path / output).write_text("precious")
    with pytest.raises(ConfigError, match=rf"it holds {output} but no identity\.json"):
        claim(tmp_path)
    assert visible(tmp_path) == {output: "precious"}


def test_other_files_do_not_stand_in_the_way(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path)
    assert visible(tmp_path)["notes.txt"] == "mine"


@pytest.mark.parametrize("content", [b"", b'{"seed": {', b"[]", b"null", b"3", b"\xff\xfe"])
def test_a_damaged_identity_is_named_and_kept(tmp_path, content):
    (tmp_path / "identity.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"identity\.json is damaged .*restore it or choose another workdir"):
        claim(tmp_path)
    assert (tmp_path / "identity.json").read_bytes() == content


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can be written to"):
        claim(tmp_path / "file" / "run")


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "identity.json.partial").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"it must be a directory that can be written to .*No space left"):
        claim(tmp_path)


HOLDER = """
import sys
from pathlib import Path
from bvit_jax import workdir
with workdir.locked(Path(sys.argv[1]), 0):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the directory."""
    command = [sys.executable, "-c", HOLDER, str(directory)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def lock_file(directory: Path) -> Path:
    return directory / workdir.LOCK_FILE


def leave_lock(directory: Path, age_seconds: float, **changes: object) -> Path:
    """Leaves the lock of a process on another machine, last written so long ago."""
    claim(directory)
    path = lock_file(directory)
    path.write_text(json.dumps({"host": "elsewhere", "boot": "b", "process": 17} | changes))
    written = time.time() - age_seconds
    os.utime(path, (written, written))
    return path


def this_machine() -> dict[str, str]:
    return {"host": socket.gethostname(), "boot": workdir._boot()}


def assert_refused(directory: Path, by: str, patience_seconds: float = 0) -> None:
    before = lock_file(directory).read_bytes()
    with pytest.raises(ConfigError) as caught:
        with workdir.locked(directory, patience_seconds):
            pytest.fail("two processes in one directory")
    assert str(caught.value) == f"workdir = {str(directory)!r}: in use by another process ({by})"
    assert lock_file(directory).read_bytes() == before


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path):
    claim(tmp_path)
    with holder(tmp_path) as process:
        name = f"host {socket.gethostname()}, process {process.pid}"
        assert_refused(tmp_path, name, 0.3)
        process.kill()
        process.wait()
        with workdir.locked(tmp_path, 0) as dead:
            assert dead == name
    with workdir.locked(tmp_path, 0) as dead:  # let go properly this time
        assert dead is None
        assert json.loads(lock_file(tmp_path).read_text())["process"] == os.getpid()


def test_a_running_process_is_respected_even_if_its_lock_is_damaged_or_old(tmp_path):
    claim(tmp_path)
    with holder(tmp_path):
        leave_lock(tmp_path, 70)
        assert_refused(tmp_path, "host elsewhere, process 17")
        lock_file(tmp_path).write_text("{")
        assert_refused(tmp_path, "unknown")


@pytest.mark.parametrize("error", [None, ValueError("of the work")])
def test_no_content_is_left_after_the_end(tmp_path, error):
    claim(tmp_path)
    with pytest.raises(ValueError, match="of the work") if error else contextlib.nullcontext():
        with workdir.locked(tmp_path, 0):
            assert lock_file(tmp_path).read_bytes()
            if error:
                raise error
    assert lock_file(tmp_path).read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "identity.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"host": "h"}', b'{"host": "h", "boot": "b", "process": "x"}']
)
def test_a_damaged_lock_is_no_obstacle(tmp_path, content):
    claim(tmp_path)
    lock_file(tmp_path).write_bytes(content)
    with workdir.locked(tmp_path, 0) as dead:
        assert dead is None


@pytest.mark.parametrize("changes", [{}, {"host": "same"}, {"boot": "same"}])
def test_another_machine_that_wrote_its_lock_lately_is_respected(tmp_path, changes):
    changes = {name: this_machine()[name] for name in changes}
    leave_lock(tmp_path, 20, **changes)
    assert_refused(tmp_path, f"host {changes.get('host', 'elsewhere')}, process 17")


def test_the_lock_of_a_machine_that_went_away_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "SETTLE_SECONDS", 0.01)
    leave_lock(tmp_path, 70)
    with workdir.locked(tmp_path, 0) as dead:
        assert dead == "host elsewhere, process 17"
    with workdir.locked(tmp_path, 0) as dead:
        assert dead is None


@pytest.mark.parametrize("skew_seconds", [-3600, 3600])
def test_the_clock_of_this_machine_does_not_matter(tmp_path, monkeypatch, skew_seconds):
    monkeypatch.setattr(workdir, "SETTLE_SECONDS", 0.01)
    path = leave_lock(tmp_path, 20)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + skew_seconds)
    assert_refused(tmp_path, "host elsewhere, process 17")
    os.utime(path, (clock() - 70, clock() - 70))
    with workdir.locked(tmp_path, 0) as dead:
        assert dead == "host elsewhere, process 17"


@pytest.mark.parametrize("age_seconds", [0, -3600])
def test_with_patience_a_silent_machine_is_waited_for_until_it_counts_as_dead(tmp_path, monkeypatch, age_seconds):
    monkeypatch.setattr(workdir, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(workdir, "STALE_SECONDS", 1.0)
    leave_lock(tmp_path, age_seconds)
    start = time.monotonic()
    with workdir.locked(tmp_path, 0.1) as dead:
        assert dead == "host elsewhere, process 17"
    assert time.monotonic() - start > 0.7


def test_a_machine_that_shows_a_sign_of_life_is_not_waited_for(tmp_path):
    path = leave_lock(tmp_path, 20)
    timer = threading.Timer(0.5, lambda: os.utime(path))
    timer.start()
    assert_refused(tmp_path, "host elsewhere, process 17", 0.1)
    timer.join()


def test_of_two_machines_that_take_over_the_last_to_write_has_it(tmp_path, monkeypatch):
    path = leave_lock(tmp_path, 70)
    content = json.dumps({"host": "third", "boot": "b", "process": 3})
    monkeypatch.setattr(time, "sleep", lambda _: path.write_text(content))  # while this one waits
    with pytest.raises(ConfigError, match="host third, process 3"):
        with workdir.locked(tmp_path, 0.05):
            pytest.fail("two processes in one directory")
    assert path.read_text() == content


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_a_held_lock_is_written_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "REFRESH_SECONDS", 0.05)
    claim(tmp_path)
    with workdir.locked(tmp_path, 0):
        path = lock_file(tmp_path)
        for _ in range(2):
            os.utime(path, (0, 0))
            wait_until(lambda: path.stat().st_mtime > 1e9)
        assert json.loads(path.read_text()) == this_machine() | {"process": os.getpid()}
    os.utime(path, (0, 0))
    time.sleep(0.2)
    assert path.stat().st_mtime == 0


def is_taken_over_from(folder: str, handler: int) -> None:
    """Holds a lock that another machine writes, and would go on for ten seconds."""
    signal.signal(signal.SIGINT, signal.default_int_handler if handler == FOREGROUND else signal.SIG_IGN)
    workdir.REFRESH_SECONDS = 0.5
    claim(Path(folder))
    with workdir.locked(Path(folder), 0):
        # Between two refreshes: one that is under way would write over what is left here.
        os.utime(lock_file(Path(folder)), (0, 0))
        wait_until(lambda: lock_file(Path(folder)).stat().st_mtime > 1e9)
        time.sleep(0.1)
        leave_lock(Path(folder), 20)
        for _ in range(1000):
            time.sleep(0.01)


FOREGROUND, BACKGROUND = 0, 1


@pytest.mark.parametrize(("handler", "status"), [(FOREGROUND, -signal.SIGINT), (BACKGROUND, 130)])
def test_a_process_that_was_taken_over_from_leaves_the_lock_alone_and_stops(tmp_path, handler, status):
    # Shells have what they start in the background ignore SIGINT.
    command = call(is_taken_over_from, str(tmp_path), handler)
    ended = subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=60)
    assert ended.returncode == status
    assert "took it over, as this process was silent too long" in ended.stderr
    assert (
        json.loads(lock_file(tmp_path).read_text())["host"] == json.loads(leave_lock(tmp_path, 20).read_text())["host"]
    )


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdir.fcntl, "flock", refuse)
    monkeypatch.setattr(workdir, "SETTLE_SECONDS", 0.01)


@pytest.mark.usefixtures("without_flock")
def test_without_locks_of_the_file_system_a_running_process_is_respected(tmp_path):
    leave_lock(tmp_path, 20, **this_machine(), process=os.getppid())
    assert_refused(tmp_path, f"host {socket.gethostname()}, process {os.getppid()}")


@pytest.mark.usefixtures("without_flock")
def test_without_locks_of_the_file_system_a_dead_process_is_taken_over_from(tmp_path):
    with subprocess.Popen(["true"]) as ended:
        pass
    leave_lock(tmp_path, 20, **this_machine(), process=ended.pid)
    with workdir.locked(tmp_path, 0) as dead:
        assert dead == f"host {socket.gethostname()}, process {ended.pid}"


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    lock_file(tmp_path).symlink_to("/dev/full")  # which is read as zeros without end
    with pytest.raises(ConfigError, match="it must be a directory that can be written to .*No space left"):
        with workdir.locked(tmp_path, 0):
            pytest.fail("not locked")


def test_differences_lists_every_field_that_differs():
    stored = {"a": 1, "b": {"c": 2, "d": 3}, "gone": 0}
    asked = {"a": 1, "b": {"c": 2, "d": 4}, "new": 0}
    assert workdir.differences(stored, asked) == ["b.d: 3 != 4", "gone: 0 != None", "new: None != 0"]
