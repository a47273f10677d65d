import functools
import importlib.util
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import ray_cluster, ray_probe
from bvit_jax.executor import Platform
from bvit_jax.model_config import ConfigError
from bvit_jax.ray_cluster import Need
from tests.commands import start_here
from tests.conftest import ROOT


def test_needs_are_read_from_flags():
    assert ray_cluster.need("", "") == Need({"CPU": 1.0})
    assert ray_cluster.need('{"CPU": 2, "special": 0.5}', "") == Need({"CPU": 2.0, "special": 0.5})
    assert ray_cluster.need("", "v6e:4x4") == Need({}, "v6e:4x4")
    assert ray_cluster.need('{"TPU": 4}', "v5e:4x4") == Need({"TPU": 4.0}, "v5e:4x4")


@pytest.mark.parametrize("amount", ["0", "-1", '"2"', "true", "NaN", "Infinity", None])
def test_resources_that_are_none_are_refused(amount):
    for text in ("CPU", "[1]", "{}") if amount is None else (f'{{"CPU": {amount}}}',):
        with pytest.raises(ConfigError, match="^resources_per_trial = .*: it must be a JSON object of positive"):
            ray_cluster.need(text, "")


@pytest.mark.parametrize("given", ["4x4", "v6e", "v6e:4", "v99:4x4", "v6e:0x4"])
def test_slices_that_are_none_are_refused(given):
    with pytest.raises(ConfigError, match=f"^topology = '{given}': it must be one of v4, v5e, v5p, v6e, tpu7x, then"):
        ray_cluster.need("", given)


def test_what_needs_say():
    assert str(Need({"CPU": 2.0, "memory": 1e9})) == "2 CPU, 1e+09 memory"
    assert str(Need({"TPU": 4.0}, "v5e:4x4")) == "v5e:4x4 with 4 TPU"
    assert (Need({}, "v5e:4x4").accelerator, Need({}, "v5e:4x4").shape) == ("TPU-V5LITEPOD", "4x4")
    assert Need({}, "tpu7x:2x2x1").accelerator == "TPU-V7X"
    assert [need.threads for need in (Need({"CPU": 3.0}), Need({"CPU": 0.5}), Need({"other": 1.0}))] == [3, 1, 1]
    assert [need.threads for need in (Need({"TPU": 4.0}), Need({"CPU": 1.0, "GPU": 1.0}), Need({}, "v6e:4x4"))] == (
        [None] * 3
    )


def host(name: str, number: int, chips: float = 4.0, shape: str = "4x4", kind: str = "V6E") -> dict[str, Any]:
    """A host of TPUs as Ray lists it."""
    pod = f"{kind.lower()}-{math.prod(map(int, shape.split('x')))}"
    labels = {"ray.io/tpu-slice-name": name, "ray.io/tpu-topology": shape, "ray.io/tpu-worker-id": str(number)}
    labels["ray.io/tpu-pod-type"] = pod
    resources = {"CPU": 8.0, "TPU": chips, f"accelerator_type:TPU-{kind}": 1.0}
    if number == 0:
        resources[f"TPU-{pod}-head"] = 1.0
    return {"NodeID": f"{name}-{number}", "Alive": True, "Labels": labels, "Resources": resources}


def three_of(name: str) -> list[dict[str, Any]]:
    """Three of four hosts."""
    return [host(name, number) for number in range(3)]


def test_slices_count_when_all_their_hosts_are_there():
    need = Need({}, "v6e:4x4")  # 16 chips, four hosts with four
    whole = [host("a", number) for number in range(4)]
    assert ray_cluster.count_slices(need, whole) == 1
    assert ray_cluster.count_slices(need, whole[:3]) == 0
    assert ray_cluster.count_slices(need, whole + [host("b", number) for number in range(4)]) == 2
    assert ray_cluster.count_slices(need, [*whole[:3], host("b", 3)]) == 0
    assert ray_cluster.count_slices(need, [*whole[:3], host("a", 3, chips=2.0)]) == 0
    assert ray_cluster.count_slices(need, [host("a", number, kind="V5LITEPOD") for number in range(4)]) == 0
    assert ray_cluster.count_slices(need, [host("a", number, shape="4x8") for number in range(8)]) == 0
    assert ray_cluster.count_slices(need, [host("a", number) for number in (1, 2, 3, 4)]) == 0  # without its head
    assert ray_cluster.count_slices(Need({"CPU": 9.0}, "v6e:4x4"), whole) == 0
    assert ray_cluster.count_slices(Need({}, "v6e:2x4"), [host("a", 0, chips=8.0, shape="2x4")]) == 1  # one host
    assert ray_cluster.fitting(need, [*whole, *three_of("b")]) == whole
    cpus = {"NodeID": "c", "Alive": True, "Labels": {}, "Resources": {"CPU": 4.0}}
    assert ray_cluster.count_slices(need, [cpus, *whole]) == 1


def sweep_on_ray(*flags: str) -> str:
    """Returns how a sweep that cannot begin ends."""
    found = start_here("experiments.sweep", "--executor=ray", *flags)
    assert found.returncode == 2, found.stderr
    assert found.stdout.count("\n") <= 1  # the name of the workdir
    return found.stderr.splitlines()[-1]


def test_resources_that_do_not_divide_a_slice_are_refused():
    with pytest.raises(ConfigError, match="^resources_per_trial = 'v6e:4x4 with 3 TPU': they do not divide the slice"):
        ray_cluster.hosts_of(Need({"TPU": 3.0}, "v6e:4x4"))
    assert ray_cluster.hosts_of(Need({}, "v6e:4x4")) == (4, {"CPU": 1, "TPU": 4})
    assert ray_cluster.hosts_of(Need({"CPU": 7.0}, "v5p:2x2x4")) == (4, {"CPU": 7.0, "TPU": 4})


def refusal(monkeypatch: pytest.MonkeyPatch, need: Need, nodes: list[dict[str, Any]]) -> str:
    monkeypatch.setattr(ray_cluster, "alive", lambda: nodes)
    with pytest.raises(ConfigError) as error:
        ray_cluster.check_there(need)
    return str(error.value)


def test_what_is_not_there_is_told_with_what_is(monkeypatch):
    whole = [host("a", number) for number in range(4)]
    cpus = {"NodeID": "c", "Alive": True, "Labels": {}, "Resources": {"CPU": 4.0, "node:1.2.3.4": 1.0}}
    monkeypatch.setattr(ray_cluster, "alive", lambda: [cpus, *whole])
    for need in (Need({"CPU": 8.0}), Need({"TPU": 4.0}), Need({"CPU": 8.0}, "v6e:4x4"), Need({}, "v6e:4x4")):
        ray_cluster.check_there(need)
    assert refusal(monkeypatch, Need({"CPU": 9.0}), [cpus]) == (
        "resources_per_trial = '9 CPU': it must be what a node has; the nodes have 4 CPU"
    )
    assert refusal(monkeypatch, Need({}, "v6e:4x8"), [cpus, *whole]) == (
        "topology = 'v6e:4x8': it must be that of a slice of the cluster, which has v6e-16 of shape 4x4"
    )
    assert refusal(monkeypatch, Need({}, "v6e:4x4"), [cpus]) == (
        "topology = 'v6e:4x4': it must be that of a slice of the cluster, which has no TPUs"
    )
    assert refusal(monkeypatch, Need({"CPU": 9.0}, "v6e:4x4"), whole).startswith(
        "resources_per_trial = 'v6e:4x4 with 9 CPU': it must be what a node has; the nodes have 8 CPU, 4 TPU"
    )
    assert refusal(monkeypatch, Need({"TPU": 3.0}), whole).startswith("resources_per_trial = '3 TPU': ")


@pytest.mark.parametrize(
    ("backend", "resources", "missing"),
    [
        ("cpu", {"CPU": 1.0}, None),
        ("tpu", {"CPU": 1.0}, "TPU"),
        ("tpu", {"TPU": 4.0}, None),
        ("gpu", {"CPU": 1.0, "TPU": 1.0}, "GPU"),
        ("gpu", {"GPU": 1.0}, None),
    ],
)
def test_accelerators_that_trials_would_take_from_each_other_must_be_asked_for(backend, resources, missing):
    look = functools.partial(ray_probe._check_own, Need(resources), Platform(backend, 4))
    if missing is None:
        look()
    else:
        with pytest.raises(ConfigError, match=f'the nodes have {missing}s, .* such as {{"{missing}": 4}}, or'):
            look()


def test_paths_mean_the_same_on_all_machines(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    assert ray_cluster._passed_on() == {}
    monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    assert ray_cluster._passed_on() == {
        "TFDS_DATA_DIR": str(Path.home() / "sets"),
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache",
    }
    monkeypatch.setenv("TFDS_DATA_DIR", "sets")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "cache")
    assert list(ray_cluster._passed_on().values()) == [str(tmp_path / "sets"), str(tmp_path / "cache")]


def test_without_ray_the_error_says_what_to_install(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest))
    wanted = "error: executor = 'ray': Ray is not installed: pip install -r requirements-ray.txt"
    assert sweep_on_ray(f"--workdir={tmp_path / 'sweep'}") == wanted
    assert not (tmp_path / "sweep").exists()


def test_a_local_sweep_does_not_import_ray():
    program = "import sys; sys.modules['ray'] = None; import experiments.sweep"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_no_cluster_is_one_error_at_once(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error = sweep_on_ray(f"--workdir={tmp_path / 'sweep'}", f"--ray_address={address}")
    assert error.startswith(f"error: ray_address = {address!r}: no Ray cluster there (")
    assert error.endswith("); start one with: ray start --head")
    for bad in ("somewhere", "host:0", "host:port", "ray://host:10001", "host:70000"):
        error = sweep_on_ray(f"--workdir={tmp_path / 'sweep'}", f"--ray_address={bad}")
        assert error == f"error: ray_address = {bad!r}: it must be auto or HOST:PORT"
    assert not (tmp_path / "sweep").exists()


@pytest.fixture(autouse=True)
def environment_as_before(monkeypatch) -> None:
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS_SKIP_REGEX"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)


def test_the_cluster_of_this_machine_is_found_or_missed_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "_LAST_STARTED", tmp_path / "none")
    with pytest.raises(ConfigError, match="^ray_address = 'auto': no Ray cluster on this machine; start one with: ray"):
        ray_cluster.connect("auto")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "started").write_text(gone + "\n")
        monkeypatch.setattr(ray_cluster, "_LAST_STARTED", tmp_path / "started")
        with pytest.raises(ConfigError, match=f"^ray_address = '{gone}': no Ray cluster there"):
            ray_cluster.connect("auto")
        monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
        with pytest.raises(ConfigError, match="^ray_address = 'elsewhere': it must be auto or HOST:PORT"):
            ray_cluster.connect("auto")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"  # which holds before Ray is imported


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--max_retries=-1"], "max_retries = -1: it must be 0 or more"),
        (["--jobs=-1"], "jobs = -1: it must be 0 or more"),
        (["--workdir=gs://bucket/sweep"], "workdir = 'gs://bucket/sweep': it must be a directory; have the storage"),
        (["--config.base.start_from=runs/dense"], "start_from = 'runs/dense': it must be an absolute path, for nodes"),
    ],
)
def test_what_a_cluster_could_not_run_is_refused_before_it_is_asked(tmp_path, flags, error):
    assert sweep_on_ray(f"--workdir={tmp_path / 'sweep'}", *flags).startswith(f"error: {error}")


def test_flags_of_ray_are_for_ray(tmp_path):
    for name, value in {"ray_address": "auto", "resources_per_trial": '{"CPU": 1}', "topology": "v6e:4x4"}.items():
        found = start_here("experiments.sweep", f"--workdir={tmp_path / 'sweep'}", f"--{name}={value}")
        assert found.returncode == 2
        wanted = f"error: {name} = {value!r}: it must be left out, or given with --executor=ray"
        assert found.stderr.splitlines()[-1] == wanted
    assert not Path(tmp_path / "sweep").exists()
