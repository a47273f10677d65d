"""Times dense layers, stored experts and rotated experts side by side.

The programs of a group (`bvit_jax.bench_cases`) are compiled and run once, then timed in turn, round by round, so that
whatever else the machine does meets all of them alike. Every time is given relative to the dense program of the group.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import sharding, train_step, vit
from bvit_jax.bench_cases import Case, Job, Row
from bvit_jax.config import Config
from bvit_jax.model_config import VARIANTS, ModelConfig

LAYER_TOKENS = 2048
"""Tokens of a layer, as nearly as whole images make them up."""
TRAIN_IMAGES = 32
LEAST_SECONDS = 2.0
"""Of all timed runs of a group together."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; `run` runs it once and waits for all that it returns."""

    run: Callable[[], Any]
    temp_bytes: int
    flops: float


def config_of(base: Config, case: Case) -> Config:
    """Returns the run that a case is of: `base`, but for its images, its shape and its kind of layers."""
    shape = VARIANTS[case.size]
    kind: dict[str, Any] = {"family": case.family, "num_experts": case.num_experts, "top_k": case.top_k}
    if case.family == "butterfly":
        kind |= {"form": case.form, "dispatch": case.dispatch, "num_stages": case.stages}
    model = dataclasses.replace(base.model, **dataclasses.asdict(shape), **kind).canonical()
    data = dataclasses.replace(base.data, image_size=shape.image_size, stored_size=shape.image_size)
    layer_images = max(round(LAYER_TOKENS / num_tokens(model)), 1)
    images = TRAIN_IMAGES if case.job == "train step" else layer_images
    return dataclasses.replace(base, data=data, model=model, batch_size=images * case.copies)


def num_tokens(model: ModelConfig) -> int:
    """Tokens of an image: its patches and the class token."""
    return model.grid[0] * model.grid[1] + 1


def unfit(case: Case) -> str:
    """Says why a case is not to be timed on the default device; "" if it is."""
    platform = jax.default_backend()
    return f"not on {platform.upper()}" if case.dispatch == "fused" and platform != "tpu" else ""


def measure(base: Config, group: Sequence[Case], repetitions: int, on_step: Callable[[], Any]) -> list[Row]:
    """Times the cases of one group in turn; what cannot run becomes a row that says so.

    Args:
        base: what the cases leave open.
        group: the cases.
        repetitions: rounds, as in `interleave`.
        on_step: called after each case is compiled and after each run of so many rounds.
    """
    programs: dict[Case, Program] = {}
    rows: dict[Case, Row] = {}
    for case in group:
        config = config_of(base, case)
        tokens = config.batch_size * num_tokens(config.model)
        rows[case] = Row(case, tokens, unfit(case) or "ok")
        if rows[case].status != "ok":
            continue
        try:
            program = compile_case(config, case.job)
            program.run()
            programs[case] = program
        except Exception as error:  # kernels that cannot be compiled raise errors of many kinds
            rows[case] = Row(case, tokens, *outcome(error))
        on_step()
    times = interleave([program.run for program in programs.values()], repetitions, on_step)
    quartiles = [[1e3 * float(at) for at in np.percentile(seconds, (25, 50, 75))] for seconds in times]
    medians = {case.name: median for case, (_, median, _) in zip(programs, quartiles, strict=True)}
    for (case, program), (lower, median, upper) in zip(programs.items(), quartiles, strict=True):
        relative = median / medians["dense"] if "dense" in medians else None
        figures = (median, lower, upper, relative, program.temp_bytes, program.flops)
        rows[case] = Row(case, rows[case].tokens, "ok", "", len(times[0]), *figures)
    return list(rows.values())


def interleave(
    runs: Sequence[Callable[[], Any]],
    repetitions: int,
    on_step: Callable[[], Any],
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Runs each in turn, round by round, and returns the seconds that each took in each round.

    In its turn each runs twice, and the second time counts: the first one after a program that has taken and given back
    gigabytes waits for memory to be mapped again, which made small programs four times slower.

    There are `repetitions` rounds, and more until they have taken `LEAST_SECONDS`: short runs are the less certain.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    rounds = 0
    while rounds < repetitions or 0 < sum(map(sum, seconds)) < LEAST_SECONDS:
        for run, own in zip(runs, seconds, strict=True):
            run()
            start = clock()
            run()
            own.append(clock() - start)
            if rounds < repetitions:
                on_step()
        rounds += 1
    return seconds


def outcome(error: Exception) -> tuple[str, str]:
    """Returns the status of what raised an error when it was compiled or run, and the gist of the error."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    short = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
    return "out of memory" if short else "failed", text


def compile_case(config: Config, job: Job) -> Program:
    """Compiles a job of a run, with inputs drawn from the run's seed."""
    return _train_step(config) if job == "train step" else _layer(config, job)


def _layer(config: Config, job: Job) -> Program:
    model = config.model
    params_key, x_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(functools.partial(init_layer, model))(params_key)
    x_BxTxD = jax.random.normal(x_key, (config.batch_size, num_tokens(model), model.d_model), model.compute_dtype)
    compiled = jax.jit(layer_function(model, job)).lower(params, x_BxTxD).compile()
    return _program(compiled, lambda: jax.block_until_ready(compiled(params, x_BxTxD)))


def init_layer(model: ModelConfig, key: jax.Array) -> Any:
    """Draws the parameters of one feed-forward layer of a model whose every layer is of its family."""
    x_BxTxD = jnp.zeros((1, num_tokens(model), model.d_model), model.compute_dtype)
    return nn.unbox(vit.FFN_OF_FAMILY[model.family](model).init(key, x_BxTxD, train=False)["params"])


def layer_function(model: ModelConfig, job: Job) -> Callable[[Any, jax.Array], Any]:
    """Returns (params, x) -> y of that layer, or -> (mean of y^2, gradients of params and x)."""
    layer = vit.FFN_OF_FAMILY[model.family](model)

    def forward(params: Any, x_BxTxD: jax.Array) -> jax.Array:
        return layer.apply({"params": params}, x_BxTxD, train=False)[0]

    def loss(params: Any, x_BxTxD: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(forward(params, x_BxTxD).astype(jnp.float32)))

    return forward if job == "layer forward" else jax.value_and_grad(loss, argnums=(0, 1))


def _train_step(config: Config) -> Program:
    placement = sharding.place(config.model, config.batch_size, devices=jax.devices()[:1])
    shardings = train_step.state_shardings(config, placement)
    state = jax.jit(lambda: train_step.init_state(config), out_shardings=shardings)()
    key, data_key = jax.random.split(jax.random.key(config.seed))
    pixels = (config.batch_size, config.data.stored_size, config.data.stored_size, config.data.channels)
    images_BxHxWxc = jax.device_put(jax.random.bits(data_key, pixels, jnp.uint8), placement.batch)
    labels_B = jax.device_put(jnp.arange(config.batch_size) % config.model.num_classes, placement.batch)
    arguments = jax.device_put(key, placement.replicated), images_BxHxWxc, labels_B
    compiled = train_step.make_train_step(config, placement).lower(state, *arguments).compile()

    def run() -> Any:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, *arguments))  # the state passed in is gone
        return metrics

    return _program(compiled, run)


def _program(compiled: jax.stages.Compiled, run: Callable[[], Any]) -> Program:
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    return Program(run, memory.temp_size_in_bytes, float(cost["flops"]))
