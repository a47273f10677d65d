"""What the TPU compiler says of dense layers, stored experts and rotated experts, for one chip that is not there.

A layer takes about 16,384 rows, whatever its kind: a token counts once for each expert that it uses. It is laid out in
images of 1,025 tokens, which hardly need padding on a TPU. Nothing runs, and no time is estimated.
"""

import dataclasses
import functools
import importlib.metadata
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bvit_jax import bench, bench_cases, sharding, topology
from bvit_jax.bench_cases import Case, Job, OfCase
from bvit_jax.config import Config
from bvit_jax.model_config import Form

TOPOLOGY = "v5e:2x2"
TOP_K = 2
GRID = 32
"""Rows and columns of patches of an image that a layer takes."""
LAYER_IMAGES = 16
TRAIN_SIZE = "paper"
TRAIN_IMAGES = 128
_KERNEL_BYTES = re.compile(r'custom_call_target="tpu_custom_call".*"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class CompiledRow(OfCase):
    """A case and what its program costs one chip, by the compiler; None where there is no program.

    Attributes:
        rows: tokens times experts a token.
        status: `ok`, `out of memory` or `failed`.
        hbm_bytes: read from and written to HBM, read from the program (`bvit_jax.hlo`).
        accessed_bytes: the compiler's own figure, which counts the body of a loop once.
        kernel_bytes: what kernels move by the estimates that they bring: the project's, and XLA's grouped products.
        matmul_flops: of matrix products, two a multiply-add.
        temp_bytes: held beside inputs and outputs.
        peak_bytes: all at once.
        compile_seconds: on the machine that did it.
        error: why there is no program.
    """

    rows: int
    status: str
    hbm_bytes: int | None = None
    accessed_bytes: float | None = None
    kernel_bytes: int | None = None
    matmul_flops: int | None = None
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    error: str = ""


def compiler() -> dict[str, Any]:
    """Says for what and by what programs are compiled here."""
    return {"topology": TOPOLOGY, "devices": 1, "libtpu": importlib.metadata.version("libtpu")}


def cases(
    jobs: Sequence[Job],
    sizes: Sequence[str],
    experts: Sequence[int],
    stages: int,
    forms: Sequence[Form] = bench_cases.FORMS,
) -> list[Case]:
    """Lists what to compile; a training step is that of `TRAIN_SIZE`.

    Left out are `auto`, which is one of the others, mixtures of fewer experts than a token uses, training steps but
    with the most experts up to 64, and the form `tied` but with as many.
    """
    mixtures = [number for number in experts if number >= TOP_K]
    few = [number for number in mixtures if number <= bench_cases.MANY_EXPERTS][-1:]
    found = []
    for job in jobs:
        train = job == "train step"
        numbers = few if train else mixtures
        for size in sizes:
            if not numbers or (train and size != TRAIN_SIZE):
                continue
            found.append(Case(job, size, 1, "dense", copies=TOP_K if train else 1))
            for number in numbers:
                case = functools.partial(Case, job, size, TOP_K)
                here = [form for form in forms if form == "separate" or number in few]
                kinds = [(form, dispatch) for form in here for dispatch in bench_cases.DISPATCHES if dispatch != "auto"]
                found += [case("standard", number), *(case("butterfly", number, *kind, stages) for kind in kinds)]
    return found


def config_of(base: Config, case: Case) -> Config:
    """Returns the run that a case is of, in bfloat16."""
    config = bench.config_of(base, case)
    model = dataclasses.replace(config.model, compute_dtype="bfloat16")
    if case.job == "train step":
        return dataclasses.replace(config, model=model, batch_size=TRAIN_IMAGES * case.copies)
    pixels = GRID * model.patch_size
    model = dataclasses.replace(model, image_size=pixels)
    data = dataclasses.replace(config.data, image_size=pixels, stored_size=pixels)
    return dataclasses.replace(config, model=model, data=data, batch_size=LAYER_IMAGES // case.top_k)


def compile_case(base: Config, case: Case) -> CompiledRow:
    """Compiles a case; a program that is refused is no error but a row that says so."""
    config = config_of(base, case)
    rows = config.batch_size * bench.num_tokens(config.model) * case.top_k
    start = time.perf_counter()
    try:
        program = _build(config, case.job)
    except Exception as error:  # kernels that cannot be compiled raise errors of many kinds
        status, text = bench.outcome(error)
        return CompiledRow(case, rows, status, compile_seconds=time.perf_counter() - start, error=text)
    return CompiledRow(case, rows, "ok", **_read(program), compile_seconds=time.perf_counter() - start)


def _build(config: Config, job: Job) -> jax.stages.Compiled:
    device = topology.devices_of(TOPOLOGY)[0]
    model = config.model
    if job == "train step":
        return topology.build(config, sharding.place(model, config.batch_size, devices=[device]), "train")
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = (
        jax.eval_shape(lambda: bench.init_layer(model, jax.random.key(0))),
        jax.ShapeDtypeStruct(
            (config.batch_size, bench.num_tokens(model), model.d_model), jnp.dtype(model.compute_dtype)
        ),
    )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    # The kernels divide their work by the memory of the device that is traced for.
    with jax.sharding.use_abstract_mesh(jax.sharding.Mesh([device], ("chip",)).abstract_mesh):
        return topology.compile_uncached(jax.jit(bench.layer_function(model, job)).lower(*shapes))


def _read(program: jax.stages.Compiled) -> dict[str, Any]:
    found = topology.read(program)
    return {
        "hbm_bytes": found["traffic_bytes"],
        "accessed_bytes": found["accessed_unlooped"],
        "kernel_bytes": kernel_bytes(str(program.as_text())),
        **{name: found[name] for name in ("matmul_flops", "temp_bytes", "peak_bytes")},
    }


def kernel_bytes(text: str) -> int:
    """Sums what the kernels in a program's text say that they move, each counted once."""
    return sum(int(found[1]) for found in map(_KERNEL_BYTES.search, text.splitlines()) if found)
