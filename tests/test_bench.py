import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import bench, bench_cases, vit
from bvit_jax.bench_cases import Case, Plan, Row
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError, ModelConfig
from tests.conftest import make_config

PLAN = Plan(bench_cases.JOBS, ("tiny", "small"), (1, 8, 64, 256), (1, 2))
FORWARD = Case("layer forward", "tiny", 2, "dense")
MIXTURE = dataclasses.replace(FORWARD, family="standard", num_experts=4)
ROTATED = dataclasses.replace(FORWARD, family="butterfly", num_experts=4, form="separate", dispatch="rows", stages=2)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Config:
    """Small inputs: two images a layer, of 17 tokens each, and two a training step."""
    monkeypatch.setattr(bench, "LAYER_TOKENS", 34)
    monkeypatch.setattr(bench, "TRAIN_IMAGES", 2)
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0)
    return make_config("butterfly,4")


def in_group(*group: object) -> list[Case]:
    return [case for case in PLAN.cases(2) if case.group == group]


def test_a_group_holds_all_kinds_and_numbers_of_experts_by_every_path():
    found = in_group("layer forward+backward", "small", 2)
    assert len(found) == len(set(found))
    assert [(case.name, case.num_experts) for case in found[:5]] == [
        *[("dense", 1), ("dense x 2", 1), ("standard", 8), ("standard", 64), ("standard", 256)]
    ]
    little = {(case.name, case.num_experts) for case in found if case.stages == 2}
    names = [
        f"butterfly {path} {form}" for path in ("rows", "blocks", "fused", "auto") for form in ("separate", "tied")
    ]
    assert little == set(itertools.product(names, (8, 64, 256)))
    # Full depth of 128 and 512 channels: log2 512 = 9 stages.
    assert {(case.name, case.num_experts) for case in found if case.stages == 9} == set(itertools.product(names, (64,)))


def test_what_says_little_is_left_out():
    top_1 = in_group("layer forward", "small", 1)
    assert {case.num_experts for case in top_1 if case.family != "dense"} == {1, 8, 64, 256}
    assert [case.name for case in top_1 if case.family == "dense"] == ["dense"]
    assert {case.form for case in top_1} == {case.form for case in in_group("layer forward", "tiny", 2)}
    assert {case.form for case in top_1} == {None, "separate"}
    assert {case.group for case in PLAN.cases(2) if case.job == "train step"} == {("train step", "small", 2)}
    assert {case.num_experts for case in in_group("train step", "small", 2)} == {1, 8, 64}
    assert Plan(bench_cases.JOBS, ("tiny",), (1,), (2,)).cases(2) == []


def test_a_case_reaches_the_model_and_the_batch(base):
    model = bench.config_of(base, dataclasses.replace(ROTATED, dispatch="blocks", form="tied", stages=5)).model
    assert (model.family, model.form, model.dispatch) == ("butterfly", "tied", "blocks")
    assert (model.num_experts, model.top_k, model.num_stages, model.d_model) == (4, 2, 5, 64)
    small = bench.config_of(base, dataclasses.replace(FORWARD, size="small", copies=2))
    assert (small.model.family, small.model.d_ff, small.data.image_size) == ("dense", 512, 32)
    # 34 tokens asked for: one image of 65, twice.
    assert small.batch_size == 2
    assert bench.config_of(base, FORWARD).batch_size == 2
    assert bench.config_of(base, dataclasses.replace(ROTATED, job="train step")).batch_size == 2


def test_a_case_that_is_no_model_is_refused(base):
    with pytest.raises(ConfigError, match="model.num_stages = 8: it must be at most 7"):
        bench.config_of(base, dataclasses.replace(ROTATED, stages=8))


def test_dense_twice_is_the_same_layer_on_twice_the_tokens(base):
    rows = bench.measure(base, [FORWARD, dataclasses.replace(FORWARD, copies=2)], 1, lambda: None)
    assert [row.tokens for row in rows] == [34, 68]
    assert rows[1].flops == pytest.approx(2 * rows[0].flops, rel=0.01)


def test_a_backward_pass_returns_the_gradients_of_parameters_and_input(base):
    model = bench.config_of(base, ROTATED).model
    params = jax.jit(lambda key: bench.init_layer(model, key))(jax.random.key(0))
    x_BxTxD = jax.random.normal(jax.random.key(1), (2, 17, 64))
    forward, backward = (jax.jit(bench.layer_function(model, job)) for job in bench_cases.JOBS[:2])
    loss, (d_params, d_x) = backward(params, x_BxTxD)
    assert loss == pytest.approx(float(jnp.mean(forward(params, x_BxTxD) ** 2)), rel=1e-5)
    assert jax.tree.map(jnp.shape, d_params) == jax.tree.map(jnp.shape, params)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(d_params))
    step = 1e-2 * jax.random.normal(jax.random.key(2), x_BxTxD.shape)
    moved = [float(jnp.mean(forward(params, x_BxTxD + sign * step) ** 2)) for sign in (1, -1)]
    assert (moved[0] - moved[1]) / 2 == pytest.approx(float(jnp.sum(d_x * step)), rel=0.02)


def test_the_layer_is_given_the_path_of_its_case(base, monkeypatch):
    seen: list[ModelConfig] = []

    class Spy(vit.FFN_OF_FAMILY["butterfly"]):
        def __post_init__(self) -> None:
            seen.append(self.config)
            super().__post_init__()

    monkeypatch.setitem(vit.FFN_OF_FAMILY, "butterfly", Spy)
    bench.measure(base, [dataclasses.replace(ROTATED, dispatch="blocks")], 1, lambda: None)
    assert {model.dispatch for model in seen} == {"blocks"}


def test_a_training_step_goes_on_from_the_state_that_it_left(base):
    config = bench.config_of(base, dataclasses.replace(FORWARD, job="train step"))
    program = bench.compile_case(config, "train step")
    rates = [float(program.run()["learning_rate"]) for _ in range(3)]
    # The rate differs from step to step.
    assert len(set(rates)) == 3


def test_short_runs_are_timed_in_more_rounds(monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", 10)
    ticks, steps = itertools.count(), itertools.count()
    # Each run takes 1 second by this clock, so 5 rounds of 2 take 10.
    seconds = bench.interleave([lambda: None] * 2, 3, lambda: next(steps), clock=lambda: next(ticks))
    assert seconds == [[1] * 5, [1] * 5]
    assert next(steps) == 6


def test_runs_take_turns():
    order: list[str] = []
    ticks, steps = itertools.count(), itertools.count()
    runs = [lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")]
    seconds = bench.interleave(runs, 3, lambda: next(steps), clock=lambda: next(ticks) ** 2)
    assert "".join(order) == "aabbccaabbccaabbcc"
    # The clock is read before and after each second run, 18 times: run n takes (2n + 1)^2 - (2n)^2 = 4n + 1.
    assert seconds == [[1, 13, 25], [5, 17, 29], [9, 21, 33]]
    assert next(steps) == 9


def test_medians_quartiles_and_ratios_by_hand(base, monkeypatch):
    times = [[0.004, 0.002, 0.001, 0.003, 0.005], [0.006, 0.006, 0.007, 0.007, 0.1]]
    monkeypatch.setattr(bench, "interleave", lambda *_: times)
    monkeypatch.setattr(bench, "compile_case", lambda *_: bench.Program(lambda: None, 10, 20.0))
    dense, stored = bench.measure(base, [FORWARD, MIXTURE], 5, lambda: None)
    assert [dense.median_ms, dense.lower_ms, dense.upper_ms] == pytest.approx([3, 2, 4])
    assert [stored.median_ms, stored.lower_ms, stored.upper_ms] == pytest.approx([7, 6, 7])
    assert (dense.relative, stored.relative) == pytest.approx((1, 7 / 3))
    assert (stored.temp_bytes, stored.flops, stored.status, stored.error, stored.rounds) == (10, 20.0, "ok", "", 5)


def test_what_cannot_run_is_a_row_that_says_so(base, monkeypatch):
    def refuse(config: Config, job: str) -> bench.Program:
        if config.model.family == "standard":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes\nand more")
        if config.model.dispatch == "blocks":
            raise NotImplementedError("no such kernel")
        return bench.Program(lambda: None, 0, 0.0)

    monkeypatch.setattr(bench, "compile_case", refuse)
    paths = [dataclasses.replace(ROTATED, dispatch=path) for path in ("blocks", "fused")]
    rows = bench.measure(base, [FORWARD, MIXTURE, *paths], 2, lambda: None)
    assert [row.status for row in rows] == ["ok", "out of memory", "failed", "not on CPU"]
    assert rows[1].error.endswith("Out of memory allocating 5 bytes")
    assert rows[2].error == "NotImplementedError: no such kernel"
    assert {row.median_ms for row in rows[1:]} == {None}


def test_without_a_dense_program_there_are_times_and_no_ratios(base):
    (row,) = bench.measure(base, [MIXTURE], 1, lambda: None)
    assert row.median_ms
    assert row.relative is None


def test_inputs_are_those_of_the_seed(base):
    config = bench.config_of(base, MIXTURE)
    first, again = (np.asarray(bench.compile_case(config, "layer forward").run()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = bench.compile_case(dataclasses.replace(config, seed=1), "layer forward").run()
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("case", [FORWARD, MIXTURE, ROTATED])
def test_a_row_goes_to_plain_data_and_back(case):
    for row in (Row(case, 34, "ok", "", 5, 1.5, 1.0, 2.0, 1.0, 100, 3e6), Row(case, 34, "failed", "no")):
        flat = json.loads(json.dumps(row.to_dict()))
        assert Row.from_dict(flat) == row
        assert flat["name"] == case.name
        assert not any(isinstance(value, dict | list) for value in flat.values())
