import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import files, run_state, workdir
from bvit_jax.model_config import ConfigError
from tests.conftest import make_config


def begin(directory: Path, steps: int = 0, **changes: object) -> Path:
    """Leaves what a run leaves that has got so far and has been let go."""
    workdir.claim(directory, "config.json", make_config("standard,2", **changes).to_dict(), ())
    rows = [{"step": step, "split": "train", "loss": 1 / step} for step in range(1, steps + 1)]
    if steps:
        rows.append({"step": steps, "split": "validation", "accuracy": 0.5})
        (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return directory


def record(directory: Path, *incidents: tuple[str, int, str]) -> list[dict[str, Any]]:
    rows = [{"utc": "2025-01-01", "kind": kind, "step": step, "text": text} for kind, step, text in incidents]
    (directory / "incidents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return rows


def this_process() -> str:
    return f"host {socket.gethostname()}, process {os.getpid()}"


def test_a_finished_run(tmp_path):
    begin(tmp_path, 6)
    files.write_json(tmp_path / "result.json", {"test_accuracy": 0.5})
    incidents = record(tmp_path, ("resumed", 2, "goes on from step 2"))
    found = run_state.read(tmp_path)
    assert found.path == tmp_path
    assert found.config == make_config("standard,2")
    assert (found.status, found.steps, found.note) == ("finished", 6, "")
    assert found.result == {"test_accuracy": 0.5}
    assert found.incidents == incidents
    assert found.progress == "finished, 6 steps"


def test_a_run_that_a_process_holds_goes_on(tmp_path):
    begin(tmp_path, 4)
    record(tmp_path, ("resumed", 2, "goes on from step 2"))
    with workdir.locked(tmp_path, 0):
        found = run_state.read(str(tmp_path))
    assert (found.status, found.steps, found.note) == ("going on", 4, this_process())
    assert found.result is None
    assert found.progress == f"going on at step 4 of 6: {this_process()}"


def test_a_run_that_has_just_started_goes_on_too(tmp_path):
    begin(tmp_path)
    with workdir.locked(tmp_path, 0):
        found = run_state.read(tmp_path)
    assert (found.status, found.steps) == ("going on", 0)


def test_a_finished_run_is_finished_though_its_process_is_not_gone_yet(tmp_path):
    begin(tmp_path, 6)
    files.write_json(tmp_path / "result.json", {})
    with workdir.locked(tmp_path, 0):
        found = run_state.read(tmp_path)
    assert (found.status, found.note, found.result) == ("finished", "", {})


def test_a_stopped_run_says_what_happened_last(tmp_path):
    begin(tmp_path, 4, total_steps=6000)
    incidents = record(tmp_path, ("resumed", 2, "goes on"), ("preempted", 4, "told to stop; step 4 is saved"))
    found = run_state.read(tmp_path)
    assert (found.status, found.steps, found.note) == ("stopped", 4, "told to stop; step 4 is saved")
    assert found.incidents == incidents
    assert found.progress == "stopped at step 4 of 6,000: told to stop; step 4 is saved"


def test_a_stopped_run_without_incidents_has_no_note(tmp_path):
    found = run_state.read(begin(tmp_path, 3))
    assert (found.status, found.note, found.incidents) == ("stopped", "", [])
    assert found.progress == "stopped at step 3 of 6"


@pytest.mark.parametrize("kind", ["resumed", "damaged", "remade", "skipped", "unsaved", "experts"])
def test_what_a_run_survived_is_not_why_it_stopped(tmp_path, kind):
    begin(tmp_path, 4)
    record(tmp_path, (kind, 4, "survived"))
    assert run_state.read(tmp_path).note == ""


@pytest.mark.parametrize("kind", ["preempted", "stopped"])
def test_a_stop_that_it_went_on_from_is_not_why_it_stopped(tmp_path, kind):
    begin(tmp_path, 4)
    record(tmp_path, (kind, 3, "earlier"))
    assert run_state.read(tmp_path).note == ""
    record(tmp_path, (kind, 3, "earlier"), (kind, 4, "later"))
    assert run_state.read(tmp_path).note == "later"


def test_a_run_that_stopped_before_its_first_row_has_the_steps_of_its_incident(tmp_path):
    begin(tmp_path)
    record(tmp_path, ("preempted", 1, "told to stop"))
    assert run_state.read(tmp_path).progress == "stopped at step 1 of 6: told to stop"


def test_lines_that_are_no_incidents_are_left_out(tmp_path):
    begin(tmp_path, 4)
    (tmp_path / "incidents.jsonl").write_text('[1]\n{"kind": "stopped", "step": 4, "text": "nan"}\n"text"\n')
    found = run_state.read(tmp_path)
    assert (found.note, len(found.incidents)) == ("nan", 1)


@pytest.mark.parametrize("incidents", [(), (("damaged", 0, "step 0 was damaged"),)])
def test_a_run_without_a_step_has_not_begun(tmp_path, incidents):
    begin(tmp_path)
    record(tmp_path, *incidents)
    found = run_state.read(tmp_path)
    assert (found.status, found.steps, found.note) == ("not begun", 0, "")
    assert found.progress == "not begun at step 0 of 6"
    assert len(found.metrics) == 0


@pytest.mark.parametrize("content", [b"", b'{"test_accuracy": 0.', b"[1]", b"null", b"\xff"])
def test_a_damaged_result_is_none(tmp_path, content):
    (begin(tmp_path, 6) / "result.json").write_bytes(content)
    found = run_state.read(tmp_path)
    assert (found.status, found.steps, found.result) == ("stopped", 6, None)


def test_metrics_are_a_table_without_a_line_that_was_cut_short(tmp_path):
    begin(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "split"')
    found = run_state.read(tmp_path)
    assert found.steps == 3
    assert found.metrics["step"].tolist() == [1, 2, 3, 3]
    assert found.metrics["split"].tolist() == ["train"] * 3 + ["validation"]
    assert found.metrics["loss"].tolist()[:3] == [1, 1 / 2, 1 / 3]
    assert found.metrics["accuracy"].isna().tolist() == [True] * 3 + [False]


def test_the_furthest_step_counts_wherever_it_stands(tmp_path):
    begin(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "split": "train"}\n{"step": 3, "split": "validation"}\n')
    assert run_state.read(tmp_path).steps == 5


def test_looking_writes_nothing(tmp_path):
    begin(tmp_path, 3)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    run_state.read(tmp_path)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_what_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=f"^workdir = '{path}': it must be the directory of a run; it has no"):
            run_state.read(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: it is damaged, or of another version"):
        run_state.read(tmp_path)


def test_a_run_whose_process_died_has_stopped(tmp_path):
    begin(tmp_path, 4)
    leave_lock(tmp_path, process=dead_process())
    found = run_state.read(tmp_path)
    assert (found.status, found.note) == ("stopped", "")


def leave_lock(directory: Path, age_seconds: float = 0, **changes: object) -> None:
    """Leaves the lock of a process of this machine, last written so long ago."""
    path = directory / workdir.LOCK_FILE
    own = {"host": socket.gethostname(), "boot": workdir._boot(), "process": os.getpid()}
    path.write_text(json.dumps(own | changes))
    written = time.time() - age_seconds
    os.utime(path, (written, written))


def dead_process() -> int:
    with subprocess.Popen(["true"]) as ended:
        pass
    return ended.pid


def test_nobody_holds_a_directory_that_nobody_locked(tmp_path):
    assert workdir.holder(tmp_path) is None
    assert workdir.holder(tmp_path / "absent") is None
    begin(tmp_path)
    assert (tmp_path / workdir.LOCK_FILE).exists()
    assert workdir.holder(tmp_path) is None


def test_this_process_holds_what_it_has_locked_and_no_longer(tmp_path):
    begin(tmp_path)
    with workdir.locked(tmp_path, 0):
        assert workdir.holder(tmp_path) == this_process()
    assert workdir.holder(tmp_path) is None


@pytest.mark.parametrize("age_seconds", [0, 3600])
def test_a_running_process_of_this_machine_holds_however_old_its_lock(tmp_path, age_seconds):
    leave_lock(tmp_path, age_seconds, process=os.getppid())
    assert workdir.holder(tmp_path) == f"host {socket.gethostname()}, process {os.getppid()}"


def test_a_dead_process_of_this_machine_holds_nothing_however_new_its_lock(tmp_path):
    leave_lock(tmp_path, process=dead_process())
    assert workdir.holder(tmp_path) is None


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"boot": "an earlier one"}])
def test_another_machine_holds_while_it_writes_its_lock(tmp_path, changes):
    # A process of its number may run here or not: that says nothing.
    host = changes.get("host", socket.gethostname())
    for process in (os.getppid(), dead_process()):
        leave_lock(tmp_path, 20, process=process, **changes)
        assert workdir.holder(tmp_path) == f"host {host}, process {process}"
        leave_lock(tmp_path, 70, process=process, **changes)
        assert workdir.holder(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"host": "h"}'])
def test_a_damaged_lock_names_nobody(tmp_path, content):
    (tmp_path / workdir.LOCK_FILE).write_bytes(content)
    assert workdir.holder(tmp_path) is None
