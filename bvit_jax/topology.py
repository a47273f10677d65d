"""Compiles the very training and evaluation steps for TPU slices that are not there, by the real TPU compiler.

`libtpu` holds the compiler and runs it on any Linux machine. The compiled program is what the slice would execute, so
what it says of memory and of traffic between chips is measured; how long it would run it does not say.
"""

import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from bvit_jax import blocks, exchange, hlo, sharding, train_step
from bvit_jax.compiled import STEPS, Compiled, Step
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError, require, require_choice
from bvit_jax.sharding import Layout, Placement

HBM_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
"""What the compiler (libtpu 0.0.42.1) lets one program have of a device's memory. A device is a chip; of tpu7x it is
one of a chip's two cores."""
_NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


_WANTED = f"one of {', '.join(HBM_GIB)}, then :2x2 or larger (v4, v5p: :2x2x1), such as v5e:4x4"


def num_devices(name: str) -> int:
    """Returns the number of devices of a topology such as `v5e:4x4`; raises ConfigError if that is no such name."""
    kind, _, shape = name.partition(":")
    known = kind in HBM_GIB and re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape)
    require(bool(known), "topology", name, _WANTED)
    return math.prod(map(int, shape.split("x"))) * (2 if kind == "tpu7x" else 1)


def devices_of(name: str) -> list[Any]:
    """Returns the devices of a topology such as `v5e:4x4`, to compile for.

    Environment variables that make libtpu quiet are set, where they are not.

    Raises:
        ConfigError: if there is no such topology, or libtpu is not installed.
    """
    kind = name.partition(":")[0]
    num_devices(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("libtpu is not installed, and it holds the TPU compiler: pip install -r requirements-tpu.txt")
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    cores_as_one = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **cores_as_one).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology = {name!r}: it must be {_WANTED} ({_gist(error)})") from None


_QUIET = {
    # No questions to a metadata server that is not there, no log files, and no lock: nothing runs on a TPU here.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compile_step(config: Config, topology: str, step: Step, layout: Layout = sharding.DEFAULT) -> Compiled:
    """Compiles one step of a run for a topology.

    Args:
        config: the run.
        topology: as for `devices_of`.
        step: `train`, as `train_step.make_train_step` gives it, or `eval`, as `make_eval_step`.
        layout: of the mesh.

    Raises:
        ConfigError: if there is no such topology or step, or the model does not divide over it. What the compiler
            refuses is no error but the result.
    """
    require_choice("step", step, STEPS)
    placement = sharding.place(config.model, config.batch_size, layout, devices_of(topology))
    axes = {f"{axis}_axis": size for axis, size in placement.mesh.shape.items()}
    hbm_bytes = int(HBM_GIB[topology.partition(":")[0]] * 2**30)
    start = time.perf_counter()
    try:
        program = build(config, placement, step)
    except jax.errors.JaxRuntimeError as error:
        needed = _NEEDED.search(str(error))
        seconds = time.perf_counter() - start
        if needed is None:
            return Compiled("failed", **axes, hbm_bytes=hbm_bytes, compile_seconds=seconds, error=_gist(error))
        peak = int(float(needed[1]) * _UNITS[needed[2]])
        return Compiled("does not fit", **axes, hbm_bytes=hbm_bytes, peak_bytes=peak, compile_seconds=seconds)
    return Compiled("fits", **axes, hbm_bytes=hbm_bytes, compile_seconds=time.perf_counter() - start, **read(program))


def build(config: Config, placement: Placement, step: Step) -> jax.stages.Compiled:
    """Compiles a step for a placement."""
    return compile_uncached(lower(config, placement, step))


def compile_uncached(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program for a TPU, `uncached`."""
    with uncached():
        return lowered.compile()


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Keeps programs for TPUs out of JAX's cache: without a TPU they could not be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def lower(config: Config, placement: Placement, step: Step) -> jax.stages.Lowered:
    """Lowers a step for a placement; no array is made."""
    images, labels, weights = _batch_shapes(config, placement)
    shapes = train_step.state_shapes(config)
    state = train_step.abstract_state(shapes, train_step.state_shardings(config, placement))
    if step == "eval":
        return train_step.make_eval_step(config.model, placement).lower(state.params, images, labels, weights)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placement.replicated)
    return train_step.make_train_step(config, placement).lower(state, key, images, labels)


def _batch_shapes(config: Config, placement: Placement) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Describes a batch on its devices: images, labels, weights."""
    batch, size = config.batch_size, config.data.stored_size
    pixels = (batch, size, size, config.data.channels)
    kinds = ((pixels, jnp.uint8), ((batch,), jnp.int32), ((batch,), jnp.float32))
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=placement.batch) for shape, dtype in kinds)


def read(program: jax.stages.Compiled) -> dict[str, Any]:
    """Returns what a program takes of a device, by the names of `Compiled`."""
    memory: Any = program.memory_analysis()
    cost: Any = program.cost_analysis()
    found = hlo.read(str(program.as_text()), exchange.OVERFLOW_SCOPE, blocks.AT_MOST_SCOPE)
    by_kind = found.bytes_by_kind()
    return {
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "matmul_flops": found.matmul_flops,
        "traffic_bytes": found.hbm_bytes,
        "open_loops": found.open_loops,
        "collective_bytes": sum(by_kind.values()),
        "by_kind": by_kind,
        "flops_unlooped": float(cost["flops"]),
        "accessed_unlooped": float(cost["bytes accessed"]),
    }


def _gist(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
