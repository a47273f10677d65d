import dataclasses
import json

import jax
import pytest

from bvit_jax import bench, bench_cases, bench_compiled, topology
from bvit_jax.bench_cases import Case
from bvit_jax.bench_compiled import CompiledRow
from tests.conftest import make_config

DENSE = Case("layer forward", "tiny", 1, "dense")
BASE = make_config("butterfly,4")


def test_cases_are_every_kind_and_path_but_auto():
    found = bench_compiled.cases(bench_cases.JOBS, ("paper", "vit_b16"), (1, 8, 64, 256), 2)
    assert len(found) == len(set(found))
    here = [case for case in found if (case.job, case.size) == ("layer forward", "vit_b16")]
    paths = ("rows", "blocks", "fused")
    separate = ["standard", *(f"butterfly {path} separate" for path in paths)]
    tied = [f"butterfly {path} tied" for path in paths]
    assert [case.name for case in here] == ["dense", *separate, *separate, *tied, *separate]
    assert [case.top_k for case in here if case.name == "standard"] == [2, 2, 2]
    training = [case for case in found if case.job == "train step"]
    assert [(case.name, case.num_experts) for case in training] == [
        ("dense x 2", 1),
        *[(name, 64) for name in (*separate, *tied)],
    ]
    assert {case.size for case in training} == {"paper"}
    assert {case.num_experts for case in bench_compiled.cases(("layer forward",), ("tiny",), (256,), 2)} == {1, 256}
    few = bench_compiled.cases(("layer forward",), ("tiny",), (8,), 2, ("separate",))
    assert {case.form for case in few} == {None, "separate"}


def test_all_layers_take_as_many_rows_and_train_steps_as_many_images():
    for size in ("tiny", "vit_b16"):
        layers = bench_compiled.cases(("layer forward",), (size,), (1, 8), 2)
        configs = [bench_compiled.config_of(BASE, case) for case in layers]
        rows = [c.batch_size * bench.num_tokens(c.model) * case.top_k for c, case in zip(configs, layers, strict=True)]
        assert set(rows) == {16 * 1025}
        assert {c.model.compute_dtype for c in configs} == {"bfloat16"}
    dense, standard, *_ = bench_compiled.cases(("train step",), ("paper",), (8,), 2)
    assert bench_compiled.config_of(BASE, dense).batch_size == 2 * bench_compiled.config_of(BASE, standard).batch_size


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(bench_compiled, "GRID", 4)
    monkeypatch.setattr(bench_compiled, "LAYER_IMAGES", 2)


def test_a_layer_is_compiled_for_a_chip(few_rows, monkeypatch):
    cached: list[object] = []
    compile_uncached = topology.compile_uncached
    monkeypatch.setattr(
        topology, "compile_uncached", lambda lowered: cached.append(lowered) or compile_uncached(lowered)
    )
    row = bench_compiled.compile_case(BASE, DENSE)
    assert (row.status, row.error, row.rows) == ("ok", "", 2 * 17)
    # Two products of 34 rows with 64 x 128 weights, two operations a multiply-add.
    assert row.matmul_flops == 2 * 2 * 34 * 64 * 128
    # The weights at least come from HBM, float32.
    assert row.hbm_bytes >= 4 * 2 * 64 * 128
    assert row.accessed_bytes > 0
    assert row.kernel_bytes == 0
    assert len(cached) == 1


def test_the_bytes_that_kernels_say_they_move_are_summed():
    line = (
        '  %k = f32[8]{{0}} custom-call(%a), custom_call_target="{target}", backend_config={{"custom_call_config":{{'
        '"body":"TUzv","cost_estimate":{{"flops":"8","transcendentals":"0","bytes_accessed":"{moved}"}}}}}}'
    )
    kernels = [line.format(target="tpu_custom_call", moved=moved) for moved in (600, 50)]
    others = [line.format(target="other", moved=7), "  %x = f32[8]{0} add(%a, %b)"]
    assert bench_compiled.kernel_bytes("\n".join([*kernels, *others])) == 650


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"), "out of memory"),
        (NotImplementedError("no lowering"), "failed"),
    ],
)
def test_what_is_refused_is_a_row_that_says_so(few_rows, monkeypatch, error, status):
    def refuse(lowered: jax.stages.Lowered) -> None:
        raise error

    monkeypatch.setattr(topology, "compile_uncached", refuse)
    row = bench_compiled.compile_case(BASE, DENSE)
    assert (row.status, row.hbm_bytes) == (status, None)
    assert str(error) in row.error


def test_a_row_goes_to_plain_data_and_back():
    case = dataclasses.replace(DENSE, family="butterfly", num_experts=8, form="tied", dispatch="fused", stages=2)
    for row in (CompiledRow(case, 34, "ok", 1, 2.0, 3, 4, 5, 6, 7.0), CompiledRow(case, 34, "failed", error="no")):
        flat = json.loads(json.dumps(row.to_dict()))
        assert CompiledRow.from_dict(flat) == row
        assert flat["name"] == "butterfly fused tied"
