import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import call, make_config, on_devices
from several import Ended, endings, started, wait_for

from bvit_jax import data, evaluate, metrics, peers, preemption, processes, sharding, train
from bvit_jax.batches import Batch
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError
from bvit_jax.sharding import Layout
from bvit_jax.stepping import Stepper
from bvit_jax.trained import best_params

# Starting


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:80", None, None), "num_processes, process_id = None: {together}"),
        ((None, 2, None), "coordinator, process_id = None: {together}"),
        ((None, None, 0), "coordinator, num_processes = None: {together}"),
        (("localhost:80", 2, None), "process_id = None: {together}"),
        (("localhost:80", None, 0), "num_processes = None: {together}"),
        ((None, 2, 0), "coordinator = None: {together}"),
        *[
            ((address, 2, 0), f"coordinator = {address!r}: it must be HOST:PORT")
            for address in ("", "localhost", "localhost:", ":80", "localhost:port", "localhost:0", "localhost:65536")
        ],
        (("localhost:-1", 2, 0), "coordinator = 'localhost:-1': it must be HOST:PORT"),
        (("localhost:80", 0, 0), "num_processes = 0: it must be at least 1"),
        (("localhost:80", 2, 2), "process_id = 2: it must be 0 to 1, one under num_processes"),
        (("localhost:80", 2, -1), "process_id = -1: it must be 0 to 1, one under num_processes"),
    ],
)
def test_what_cannot_start_is_named(monkeypatch, arguments, message):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it was started"))
    together = "it must be given together with the others of coordinator, num_processes and process_id"
    with pytest.raises(ConfigError) as found:
        processes.start(*arguments)
    assert str(found.value) == message.format(together=together)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of every start of JAX's own."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments))
    return calls


def test_what_is_given_is_passed_on(starts):
    processes.start("10.0.0.1:8476", 4, 3)
    processes.start("[::1]:8476", 1, 0)
    assert starts == [("10.0.0.1:8476", 4, 3), ("[::1]:8476", 1, 0)]


@pytest.mark.parametrize(
    ("tpu", "platforms", "times"),
    [
        (True, "tpu,cpu", 1),
        (True, "tpu", 1),
        (True, "cpu", 0),
        (True, "cpu,tpu", 0),
        (True, None, 0),
        (False, "tpu", 0),
    ],
)
def test_hosts_of_tpus_find_each_other_and_others_are_alone(starts, monkeypatch, tpu, platforms, times):
    monkeypatch.setattr(processes, "has_tpu", lambda: tpu)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", platforms)
        processes.start()
    finally:
        jax.config.update("jax_platforms", before)
    assert starts == [()] * times


def test_hosts_of_tpus_that_do_not_find_each_other_are_one_clear_error(monkeypatch):
    def fails(**_: object) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes, "has_tpu", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", fails)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "tpu,cpu")
        with pytest.raises(ConfigError) as found:
            processes.start()
    finally:
        jax.config.update("jax_platforms", before)
    assert str(found.value) == (
        "the hosts of the slice did not find each other; give coordinator, num_processes and process_id "
        "(coordinator_address should be defined.)"
    )


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError])
def test_processes_that_do_not_come_together_are_one_clear_error(monkeypatch, kind):
    def fails(*_: object, **__: object) -> None:
        raise kind("DEADLINE_EXCEEDED: barrier timed out\nmany more lines")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(ConfigError) as found:
        processes.start("localhost:80", 2, 0)
    assert str(found.value) == (
        "coordinator = 'localhost:80': the 2 processes did not come together (DEADLINE_EXCEEDED: barrier timed out)"
    )


def wait_in_vain(port: int, number: int) -> None:
    """Starts as one of two processes, the other of which never comes."""
    processes.START_SECONDS = 2.0
    processes.start(f"localhost:{port}", 2, number)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_process_that_waits_for_others_in_vain_ends_with_one_line(number):
    with started(1, lambda port, _: call(wait_in_vain, port, number)) as running:
        [process] = endings(running, within=60)
    assert process.returncode == peers.EXIT_STATUS
    assert process.stderr.startswith("error: coordinator = 'localhost:")
    assert process.stderr.endswith(
        "': the 2 processes did not come together within 2 s; start the same command on all hosts\n"
    )


@pytest.mark.parametrize(
    ("plugged_in", "expected"),
    [
        ([], False),
        ([("0x8086", "0x1237")], False),
        ([("0x1ae0", "0x0042")], False),  # a network card
        ([("0x8086", "0x0063")], False),
        ([("0x1ae0", "0x0042"), ("0x8086", "0x1237"), ("0x1ae0", "0x0063")], True),
        *[([("0x1ae0", device)], True) for device in ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")],
    ],
)
def test_tpus_are_told_from_other_cards(tmp_path, plugged_in, expected):
    for number, (vendor, device) in enumerate(plugged_in):
        card = tmp_path / f"0000:00:{number:02x}.0"
        card.mkdir()
        (card / "vendor").write_text(vendor + "\n")
        (card / "device").write_text(device + "\n")
    assert processes.has_tpu(tmp_path) == expected


def test_a_machine_without_a_list_of_cards_has_no_tpu(tmp_path):
    assert not processes.has_tpu(tmp_path / "absent")


# One process


def test_one_process_does_its_work_itself():
    content = object()
    assert processes.is_first()
    assert processes.on_first(lambda: content) is content
    with pytest.raises(ZeroDivisionError):
        processes.on_first(lambda: 1 // 0)
    processes.check_same("seed", "3")
    assert [processes.all_agree(holds) for holds in (True, False)] == [True, False]
    assert processes.in_all(lambda: content) is content
    with pytest.raises(ConfigError, match="^no such images$"):
        processes.in_all(lambda: fail(ConfigError("no such images")))


def fail(error: Exception) -> Any:
    raise error


# Two processes


SMALL = {"num_layers": 1, "d_model": 16, "d_ff": 32, "patch_size": 4, "router_noise": 0.5}
FLAGS = [
    *("--config.total_steps=6", "--config.batch_size=16", "--config.log_every=2", "--config.eval_every=3"),
    *("--config.optimizer.warmup_steps=2", *[f"--config.model.{name}={value}" for name, value in SMALL.items()]),
]


def short(argument: str = "standard,4", **changes: object) -> Config:
    """The configuration of `FLAGS`."""
    return make_config(argument, **{f"model__{name}": value for name, value in SMALL.items()} | changes)


ROTATED = short("butterfly,4")


def in_pair(command: Callable[[int, int], list[str]]) -> list[Ended]:
    """Runs command(port, process) as two processes of two devices each, to the end of both."""
    with started(2, command) as running:
        return endings(running)


def train_in_pair(workdir: Path, *flags: str, second: tuple[str, ...] = ()) -> list[Ended]:
    def command(port: int, number: int) -> list[str]:
        return [sys.executable, "-m", *train_command(port, number, workdir), *flags, *(second if number else ())]

    return in_pair(command)


def train_command(port: int, number: int, workdir: Path) -> list[str]:
    where = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}"]
    return ["experiments.train", "--config=configs/digits.py:standard,4", f"--workdir={workdir}", *FLAGS, *where]


def train_and_die(port: int, number: int, workdir: str, step: int) -> None:
    """The entry point, killed before it takes a step."""
    batch_of = Stepper.batch

    def dies(self: Stepper, at: int) -> Batch:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch_of(self, at)

    Stepper.batch = dies
    sys.argv = train_command(port, number, Path(workdir))
    runpy.run_module("experiments.train", run_name="__main__")


def printed(process: Ended) -> list[str]:
    """Lines on standard output, without those of the library that connects CPUs, which run into each other."""
    return [line for line in process.stdout.splitlines() if line and "peer ranks" not in line]


def raised(work: Callable[[], Any]) -> tuple[str, str] | None:
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        return type(error).__name__, str(error)
    return None


def run(workdir: Path, stop_before: int | None = None) -> tuple[dict[str, Any], list[int]]:
    """Trains, perhaps until interrupted before a step; returns the result and the steps that were taken."""
    batch_of = Stepper.batch
    steps: list[int] = []

    def stops(self: Stepper, step: int) -> Batch:
        if step == stop_before:
            raise KeyboardInterrupt
        steps.append(step)
        return batch_of(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "batch", stops)
        return train.run(ROTATED, workdir, show_progress=False, layout=Layout(fsdp=True)), steps


def talk(port: int, number: int, folder: str) -> None:
    """What each of two processes does: everything that needs both, but entry points."""
    processes.start(f"localhost:{port}", 2, number)
    done: list[int] = []

    def work() -> Any:
        done.append(number)
        return {"number": number, "nested": [1, 0.5, None, {"é": "ü" * 5000}]}

    found: dict[str, Any] = {
        "is_first": processes.is_first(),
        "returned": processes.on_first(work),
        "done": done,
        "nothing": processes.on_first(lambda: None),
        "config error": raised(lambda: processes.on_first(lambda: fail(ConfigError("é = 3: it must be 4")))),
        "other error": raised(lambda: processes.on_first(lambda: fail(OSError("disk full")))),
        "same": raised(lambda: processes.check_same("seed", "12")),
        "other": raised(lambda: processes.check_same("seed", f"1{number}")),
        "longer": raised(lambda: processes.check_same("seed", "ä" * (3 + 2 * number))),
        "agreed": [processes.all_agree(holds) for holds in (True, number == 0, number == 1, False)],
        "each": processes.in_all(lambda: number),
        "not in one": raised(lambda: processes.in_all(lambda: number or fail(ConfigError("no such images")))),
        "after all": processes.on_first(lambda: number),
    }

    placement = sharding.place(ROTATED.model, 16)
    rows = placement.host_rows(16)
    batch = placement.put_batch(np.arange(16)[rows] ** 2, rows, 16)
    found["rows"] = rows.tolist()
    found["sum"] = int(jax.jit(lambda batch: (batch * np.arange(16)).sum(), out_shardings=placement.replicated)(batch))

    sharding.LARGE_BYTES = 256  # so that these small arrays are split over both processes as large ones are
    path = Path(folder)
    found["layouts"] = raised(lambda: train.run(ROTATED, path / "layouts", layout=Layout(expert=1 + number)))
    found["workdirs"] = raised(lambda: train.run(ROTATED, path / f"of {number}"))
    found["stopped"] = raised(lambda: run(path / "stopped", stop_before=4))
    # Begun with one device, see `pair`.
    found["result"], found["steps"] = run(path / "begun")
    found["again"] = run(path / "begun")
    (Path(folder) / f"{number}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of rotated experts by one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    train.run(ROTATED, workdir, show_progress=False)
    return workdir


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two processes worked in, and what each found."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "begun", stop_before=4)
    ended = in_pair(lambda port, number: call(talk, port, number, str(folder)))
    for process in ended:
        assert process.returncode == 0, process.stderr
    return folder, [json.loads((folder / f"{i}.json").read_text()) for i in (0, 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """A run that two processes with two devices each did from start to end, by the entry point."""
    workdir = tmp_path_factory.mktemp("trained")
    return workdir, train_in_pair(workdir)


def assert_close(found: Any, expected: Any) -> None:
    """Nested plain data: numbers equal up to rounding, the rest exactly."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if isinstance(b, float):
            assert a == pytest.approx(b, rel=1e-5)
        else:
            assert a == b


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    return metrics.read_rows(workdir / "metrics.jsonl")


def result_of(workdir: Path) -> dict[str, Any]:
    """What does not depend on the devices, up to rounding."""
    result = json.loads((workdir / "result.json").read_text())
    return {name: value for name, value in result.items() if name not in ("timing", "memory", "params_digest")}


def test_the_first_works_and_all_are_told(pair):
    first, second = pair[1]
    assert (first["is_first"], second["is_first"]) == (True, False)
    assert first["returned"] == second["returned"]
    assert first["returned"] == {"number": 0, "nested": [1, 0.5, None, {"é": "ü" * 5000}]}
    assert (first["done"], second["done"]) == ([0], [])
    assert first["nothing"] is second["nothing"] is None
    assert first["after all"] == second["after all"] == 0


def test_an_error_of_the_first_is_one_of_all(pair):
    first, second = pair[1]
    assert first["config error"] == second["config error"] == ["ConfigError", "é = 3: it must be 4"]
    assert first["other error"] == ["OSError", "disk full"]
    assert second["other error"] == ["RuntimeError", "disk full"]


def test_all_agree_only_if_each_does(pair):
    for found in pair[1]:
        assert found["agreed"] == [True, False, False, False]


def test_what_one_process_lacks_stops_all(pair):
    first, second = pair[1]
    assert (first["each"], second["each"]) == (0, 1)
    assert first["not in one"] == ["ConfigError", "no such images"]
    assert second["not in one"][1].startswith("another process of the run cannot go on")


def test_the_process_that_differs_is_named_in_all(pair):
    for number, found in enumerate(pair[1]):
        assert found["same"] is None
        differs = "it must be that of the first process; not so in processes [1]"
        assert found["other"] == ["ConfigError", f"seed = '1{number}': {differs}"]
        assert found["longer"] == ["ConfigError", f"seed = '{'ä' * (3 + 2 * number)}': {differs}"]


def test_processes_of_different_layouts_are_refused(pair):
    for number, found in enumerate(pair[1]):
        kind, message = found["layouts"]
        assert kind == "ConfigError"
        assert message.startswith(f"layout = 'Layout(expert={1 + number}, ")
        assert message.endswith("it must be that of the first process; not so in processes [1]")
    assert not (pair[0] / "layouts").exists()


def test_a_workdir_that_only_one_sees_is_refused(pair):
    for number, found in enumerate(pair[1]):
        wanted = "it must be a directory that all hosts share; not so in processes [1]"
        assert found["workdirs"] == ["ConfigError", f"workdir = {str(pair[0] / f'of {number}')!r}: {wanted}"]
    assert {path.name for path in (pair[0] / "of 0").iterdir()} == {"config.json", ".lock"}
    assert not (pair[0] / "of 1").exists()


def test_each_process_holds_its_part_of_the_batch(pair):
    assert [found["rows"] for found in pair[1]] == [list(range(8)), list(range(8, 16))]
    assert [found["sum"] for found in pair[1]] == [sum(i**3 for i in range(16))] * 2


def test_a_run_stopped_under_two_processes_is_taken_up_by_one(pair, alone, tmp_path):
    assert [found["stopped"] for found in pair[1]] == [["KeyboardInterrupt", ""]] * 2
    workdir = tmp_path / "stopped"
    shutil.copytree(pair[0] / "stopped", workdir)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3"}
    assert not (workdir / "result.json").exists()
    assert run(workdir)[1] == [3, 4, 5]
    assert_close(rows_of(workdir), rows_of(alone))
    assert_close(result_of(workdir), result_of(alone))


def test_a_run_stopped_under_one_process_is_taken_up_by_two(pair, alone):
    workdir, found = pair[0] / "begun", pair[1]
    assert_close(rows_of(workdir), rows_of(alone))
    assert_close(result_of(workdir), result_of(alone))
    # A finished run's result is told to all.
    result = json.loads((workdir / "result.json").read_text())
    for each in found:
        assert (each["result"], each["steps"]) == (result, [3, 4, 5])
        assert each["again"] == [result, []]
    # Every device keeps a part of the large arrays.
    whole = json.loads((alone / "result.json").read_text())["memory"]
    assert result["memory"]["params_bytes"] < 0.6 * whole["params_bytes"]
    assert result["memory"]["optimizer_bytes"] < 0.6 * whole["optimizer_bytes"]


def test_two_processes_train_and_the_first_alone_reports(trained):
    workdir, ended = trained
    for process in ended:
        assert process.returncode == 0, process.stderr
    assert f"run {short().digest()} in {workdir}, 4 devices, 2 processes" in ended[0].stdout
    assert "step      3  validation accuracy" in ended[0].stdout
    assert printed(ended[0])[-1] == f"result: {workdir / 'result.json'}"
    assert printed(ended[1]) == []
    assert json.loads((workdir / "config.json").read_text()) == short().to_dict()
    assert [(row["step"], row["split"]) for row in rows_of(workdir)] == [
        *[(2, "train"), (3, "validation"), (4, "train"), (6, "train"), (6, "validation"), (6, "test")],
    ]
    timing = metrics.read_rows(workdir / "timing.jsonl")
    assert [row["step"] for row in timing] == [2, 4, 6, 6]
    assert len(list((workdir / "tensorboard").iterdir())) == 1


def assert_goes_on_and_ends_like(undisturbed: Path, workdir: Path) -> None:
    """Trains to the end as two processes; the run must equal the undisturbed one to the bit."""
    for process in train_in_pair(workdir):
        assert process.returncode == 0, process.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    results = [json.loads((each / "result.json").read_text()) for each in (workdir, undisturbed)]
    assert results[0] | {"timing": None} == results[1] | {"timing": None}


@pytest.mark.long
@pytest.mark.parametrize("losses", [((1, 4),), ((0, 4), (1, 5))], ids=["one", "one after the other"])
def test_a_run_that_lost_processes_ends_like_one_that_did_not(trained, tmp_path, losses):
    for victim, step in losses:

        def command(port: int, number: int, victim: int = victim, step: int = step) -> list[str]:
            if number == victim:
                return call(train_and_die, port, number, str(tmp_path), step)
            return [sys.executable, "-m", *train_command(port, number, tmp_path)]

        both = in_pair(command)
        assert both[victim].returncode == -signal.SIGKILL, both[victim].stderr
        survivor = both[1 - victim]
        assert survivor.returncode == peers.EXIT_STATUS, survivor.stderr
        assert f"error: process {victim} of 2 is gone (" in survivor.stderr
        assert not (tmp_path / "result.json").exists()
    assert_goes_on_and_ends_like(trained[0], tmp_path)


@pytest.mark.long
def test_two_processes_of_which_one_is_told_to_stop_stop_together_and_go_on(trained, tmp_path):
    with started(2, lambda port, number: [sys.executable, "-m", *train_command(port, number, tmp_path)]) as running:
        wait_for(running, tmp_path / "config.json")
        running[1].send_signal(signal.SIGTERM)
        both = endings(running)
    for process in both:
        assert process.returncode == preemption.EXIT_STATUS, process.stderr
        assert "told to stop" in process.stderr
    assert not (tmp_path / "result.json").exists()
    assert_goes_on_and_ends_like(trained[0], tmp_path)


def on_four_devices() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as workdir:
        train.run(short(), Path(workdir), show_progress=False)
        return rows_of(Path(workdir)), result_of(Path(workdir))


def test_two_processes_compute_what_one_does(trained, tmp_path):
    workdir, _ = trained
    train.run(short(), tmp_path, show_progress=False)
    assert_close(rows_of(workdir), rows_of(tmp_path))
    assert_close(result_of(workdir), result_of(tmp_path))


@pytest.mark.long
def test_two_processes_compute_what_one_with_as_many_devices_does(trained):
    workdir, _ = trained
    rows, result = on_devices(4, on_four_devices)
    assert_close(rows_of(workdir), rows)
    assert_close(result_of(workdir), result)


def test_checkpoints_of_two_processes_are_read_by_one(trained):
    workdir, _ = trained
    config, step, params = best_params(workdir)
    result = result_of(workdir)
    assert (config, step) == (short(), result["best_step"])
    placement = sharding.place(config.model, 40, devices=jax.devices()[:1])
    found = evaluate.evaluate(params, config.model, data.load(config.data).test, 40, placement)
    assert found.accuracy == result["test_accuracy"]
    assert found.nll == pytest.approx(result["test_nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "second", "message"),
    [
        (["--config.seed=3"], (), "workdir = '{workdir}': it is of another configuration; choose another workdir"),
        pytest.param(
            *(["--expert_axis=3"], (), "expert_axis = 3: it must be a divisor of 4 devices"), marks=pytest.mark.long
        ),
        (
            [],
            ("--config.seed=1",),
            "configuration = '{digest}': it must be that of the first process; not so in processes [1]",
        ),
    ],
)
def test_what_cannot_run_is_one_clear_error_of_both(trained, flags, second, message):
    workdir, _ = trained
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    for number, process in enumerate(train_in_pair(workdir, *flags, second=second)):
        assert process.returncode == 2, process.stderr
        digest = short(seed=number).digest()
        [line] = [line for line in process.stderr.splitlines() if line.startswith("error:")]
        assert line.startswith(f"error: {message.format(workdir=workdir, digest=digest)}")
        assert "Traceback" not in process.stderr
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before
