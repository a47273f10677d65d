"""Settings of the whole test suite, made before JAX starts."""

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests run side by side, and threads of linear algebra that wait for a core crawl.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compiling costs more here than running.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax
import pytest

from bvit_jax import platforms, topology
from bvit_jax.config import Config, resolve
from bvit_jax.model_config import ModelConfig
from configs import digits

ROOT = Path(__file__).parent.parent

# Compiled programs are shared between test processes and runs.
_CACHE = Path(tempfile.gettempdir()) / f"bvit_jax_tests_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE)))
jax.config.update("jax_numpy_rank_promotion", "raise")

_STRICT = (
    *("test_ternary", "test_butterfly", "test_packing", "test_precision"),
    *("test_losses", "test_routing", "test_dispatch", "test_low_rank", "test_mixture", "test_moe", "test_vit"),
)

_EVERY_PLATFORM = ("test_topology", "test_bench", "test_bench_compiled", "test_compile_report")
"""Modules whose programs are traced for all platforms, as they are outside of tests."""


# Every family, and every form of the butterfly one.
KINDS = [
    ("dense", "separate"),
    ("standard", "separate"),
    ("ternary", "separate"),
    ("butterfly", "separate"),
    ("butterfly", "tied"),
    ("butterfly", "reference"),
    ("low_rank", "separate"),
]


def make_config(argument: str = "butterfly,4", **changes: object) -> Config:
    """Returns the digits configuration, with few steps and one layer; `changes` are dotted fields, __ the dot."""
    raw = digits.get_config(argument)
    raw.update({"total_steps": 6, "batch_size": 16, "log_every": 2, "eval_every": 3})
    raw.optimizer.warmup_steps = 2
    raw.model.num_layers = 1
    raw = raw.to_dict()
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = raw
        for section in sections:
            place = place[section]
        place[field] = value
    return resolve(raw)


def make_model(**changes: object) -> ModelConfig:
    """Returns the model of configs/digits.py with four experts and fields changed."""
    fields = {"num_layers": 2} | changes
    return make_config("butterfly,4", **{f"model__{name}": value for name, value in fields.items()}).model


def long_but(short: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Returns the cases as parameters of a test, marked long but for those in `short`; a tuple is of several names."""
    short, cases = list(short), list(cases)
    assert all(case in cases for case in short), short
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*of, marks=() if case in short else pytest.mark.long)
        for case, of in zip(cases, values, strict=True)
    ]


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process that has that many CPU devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "NPROC": "16",  # devices that wait for each other need a thread each, however few cores there are
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }


def call(function: Callable[..., Any], *arguments: object) -> list[str]:
    """Returns the command that calls a function of a test module, with plain data, in a process of its own."""
    code = f"import {function.__module__} as module; module.{function.__name__}(*{arguments!r})"
    return [sys.executable, "-c", code]


def on_devices(count: int, function: Callable[..., Any], *arguments: object) -> Any:
    """Returns what a function of a test module returns for plain data, in a process that has `count` CPU devices."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "returned")
        command = call(_keep, function.__module__, function.__name__, path, *arguments)
        run = subprocess.run(command, env=environment(count), capture_output=True, text=True, timeout=500)
        assert run.returncode == 0, run.stderr
        return pickle.loads(Path(path).read_bytes())


def _keep(module: str, name: str, path: str, *arguments: object) -> None:
    with contextlib.nullcontext() if module in _EVERY_PLATFORM else platforms.lowered_for("cpu"):
        returned = getattr(__import__(module, fromlist=[name]), name)(*arguments)
    Path(path).write_bytes(pickle.dumps(returned))


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """Lets the compiled programs of a module go: thousands of them exhaust a process's memory maps, and XLA crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def uncached() -> Iterator[None]:
    """Keeps programs for TPUs out of the cache: without a TPU they could not be read back."""
    with topology.uncached():
        yield


@pytest.fixture(autouse=True)
def cpus_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Traces what is for CPUs alone, which takes a fraction of the time."""
    module = request.module.__name__.rsplit(".", 1)[-1]
    every = module in _EVERY_PLATFORM or request.node.get_closest_marker("every_platform") is not None
    with contextlib.nullcontext() if every else platforms.lowered_for("cpu"):
        yield


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forbids silent changes of dtype in the maths of this project; optax does not keep to it."""
    strict = request.module.__name__.rsplit(".", 1)[-1] in _STRICT
    with jax.numpy_dtype_promotion("strict") if strict else contextlib.nullcontext():
        yield
