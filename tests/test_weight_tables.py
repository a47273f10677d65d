import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from bvit_jax.opened import Opened
from bvit_jax.weight_tables import angle_table, angles, trit_table
from tests.conftest import make_model
from tests.test_expert_maps import SMALL, opened_of

ANGLE_COLUMNS = ["layer", "rotation", "stage", "angles", "mean", "std", "q5", "median", "q95", "spread"]
TRIT_COLUMNS = ["layer", "matrix", "weights", "minus", "zero", "plus", "scale", "scale_min", "scale_max", "dead"]
WITHOUT_ROTATIONS = ("standard", "ternary", "low_rank")


def with_ffn(opened: Opened, **changes: Any) -> Opened:
    """A model of one layer with some of its parameters replaced."""
    ffn = opened.params["segment_0"]["block_0"]["ffn"]
    ffn = ffn | {name: jnp.asarray(array, jnp.float32)[None] for name, array in changes.items()}
    return dataclasses.replace(opened, params={"segment_0": {"block_0": {"ffn": ffn}}})


def dense_model() -> Opened:
    return dataclasses.replace(opened_of(), model=make_model(**SMALL | {"family": "dense"}).deployed())


ROTATIONS = {
    # Rotations by name with the side that they turn, in the order of an expert's.
    "separate": {"up_theta": 12, "up_phi": 20, "down_theta": 20, "down_phi": 12},
    "tied": {"theta": 12, "phi": 20},
    "reference": {"phi": 12, "theta": 20},
    "separate, outer": {"up_theta": 12, "down_phi": 12},
    "tied, outer": {"theta": 12},
    "reference, outer": {"phi": 12},
}


@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("case", ROTATIONS)
def test_angles_are_those_of_every_layer_rotation_and_stage(case, order):
    form, _, rotations = case.partition(", ")
    # 12 channels have four stages, 20 have five.
    depth = {"num_stages": 5, "stride_order": order, "form": form, "rotations": rotations or "all"}
    opened = opened_of(num_layers=4, moe_layers="1,2,3", **depth)
    found = angles(opened)
    stages = {name: oracles.stage_pairs(dim, 5, order) for name, dim in ROTATIONS[case].items()}
    keys = [(layer, name, stage) for layer in (1, 2, 3) for name in stages for stage in range(len(stages[name]))]
    assert sorted(found) == sorted(keys)
    for layer in opened.mixtures:
        for name, pairs in stages.items():
            parts = [found[layer.index, name, stage] for stage in range(len(pairs))]
            assert [part.shape for part in parts] == [(3, len(of_stage)) for of_stage in pairs]
            leaf = np.array(opened.ffn(layer)[f"{name}_angles"], np.float64)
            assert leaf.shape[1] == oracles.count_angles(ROTATIONS[case][name], 5, order)
            wrapped = np.concatenate(parts, axis=1)
            turns = (leaf - wrapped) / (2 * np.pi)  # whole ones, if any
            np.testing.assert_allclose(turns, turns.round(), rtol=0, atol=1e-9)
            assert np.abs(wrapped).max() <= np.pi
            assert np.abs(turns).max() > 0.5


ONE_STAGE = {"d_model": 4, "d_ff": 1, "num_heads": 1, "num_stages": 1, "form": "tied"}
"""Two angles, of pairs (0, 2) and (1, 3); a single hidden channel, which nothing turns."""


def test_angles_are_wrapped_to_half_a_turn_by_hand():
    opened = opened_of(**ONE_STAGE, num_experts=4)
    given = [[0.0, 1.5], [1.5 * np.pi, 7.0], [-4.0, -3.0], [20.0, 3.0]]
    # 20 - 3 whole turns = 20 - 18.85 = 1.15.
    expected = [[0.0, 1.5], [-np.pi / 2, 7 - 2 * np.pi], [2 * np.pi - 4, -3.0], [20 - 6 * np.pi, 3.0]]
    [(key, found)] = angles(with_ffn(opened, theta_angles=given)).items()
    assert key == (0, "theta", 0)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_the_table_of_angles_by_hand():
    opened = opened_of(**ONE_STAGE, num_experts=2)
    table = angle_table(with_ffn(opened, theta_angles=[[0.0, 0.2], [0.4, 0.2]]))
    assert list(table.columns) == ANGLE_COLUMNS
    [row] = table.to_dict("records")
    assert (row["layer"], row["rotation"], row["stage"], row["angles"]) == (0, "theta", 0, 4)
    # Of 0, 0.2, 0.2, 0.4 the deviations from 0.2 are 0.2 twice and 0 twice. Quantiles are 0.05 * 3 = 0.15 places from
    # either end. The first angle deviates by 0.2 between the experts, the second not at all.
    expected = {"mean": 0.2, "std": 0.02**0.5, "q5": 0.03, "median": 0.2, "q95": 0.37, "spread": 0.1}
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_the_table_of_angles_has_a_row_for_each_part():
    opened = opened_of(form="separate", num_layers=2, num_stages=5)
    table, found = angle_table(opened), angles(opened)
    assert len(table) == len(found) == 2 * (4 + 5 + 5 + 4)
    for row in table.to_dict("records"):
        values_ExA = found[row["layer"], row["rotation"], row["stage"]]
        assert row["angles"] == values_ExA.shape[0] * values_ExA.shape[1]
        deviations = [np.mean((column - column.mean()) ** 2) ** 0.5 for column in values_ExA.T]
        assert row["spread"] == pytest.approx(sum(deviations) / len(deviations))
        assert row["mean"] == pytest.approx(values_ExA.sum() / row["angles"])
        assert row["std"] == pytest.approx(np.mean((values_ExA - row["mean"]) ** 2) ** 0.5)
        assert -np.pi <= row["q5"] <= row["median"] <= row["q95"] <= np.pi


def test_experts_that_turn_alike_have_no_spread():
    opened = opened_of(form="tied", num_experts=3)
    one = {name: opened.ffn(opened.mixtures[0])[f"{name}_angles"][:1] for name in ("theta", "phi")}
    alike = {f"{name}_angles": np.repeat(np.array(leaf), 3, axis=0) for name, leaf in one.items()}
    assert (angle_table(opened)["spread"] > 0.1).all()
    assert angle_table(with_ffn(opened, **alike))["spread"].tolist() == [0.0] * 6
    assert angle_table(opened_of(form="tied", num_experts=1))["spread"].tolist() == [0.0] * 6
    # A whole turn more is the same rotation.
    a_turn_more = {name: leaf + 2 * np.pi * np.array([[0], [1], [-1]]) for name, leaf in alike.items()}
    near_a_half = {name: np.abs(np.abs(leaf) - np.pi).min() for name, leaf in alike.items()}
    assert min(near_a_half.values()) > 1e-3  # where -pi and pi meet, a little is a whole turn
    np.testing.assert_allclose(angle_table(with_ffn(opened, **a_turn_more))["spread"], 0, atol=3e-6)


def test_models_without_rotations_have_no_angles():
    for opened in (*(opened_of(family=family) for family in WITHOUT_ROTATIONS), dense_model()):
        assert angles(opened) == {}
        table = angle_table(opened)
        assert len(table) == 0
        assert list(table.columns) == ANGLE_COLUMNS


TERNARY: dict[str, dict[str, Any]] = {
    "ternary, a scale per row": {"family": "ternary"},
    "ternary, a scale per tensor": {"family": "ternary", "ternary_scale": "tensor"},
    "separate, a scale per tensor": {"form": "separate", "ternary_scale": "tensor"},
    "tied, a scale per row": {"form": "tied"},
    "reference, a scale per row": {"form": "reference"},
}


def counted(trained_MxIxO: np.ndarray, kind: str) -> dict[str, float]:
    """What a row says of the matrices of all experts, each rounded for itself."""
    counts, scales, dead = {-1: 0, 0: 0, 1: 0}, [], 0
    for w_IxO in trained_MxIxO:
        trits, scale_O = oracles.ternarise(w_IxO, kind)
        for o in range(trits.shape[1]):
            for trit in trits[:, o]:
                counts[int(trit)] += 1
            if any(trits[:, o] != 0):
                scales.append(scale_O[o])
            else:
                dead += 1
    total = sum(counts.values())
    shares = {name: counts[trit] / total for name, trit in (("minus", -1), ("zero", 0), ("plus", 1))}
    scale = {"scale": sum(scales) / len(scales), "scale_min": min(scales), "scale_max": max(scales)}
    return {"weights": total, **shares, **scale, "dead": dead / (dead + len(scales))}


@pytest.mark.parametrize("case", TERNARY)
def test_trits_are_counted_as_training_rounds_them(case):
    trained = opened_of(num_layers=2, **TERNARY[case])
    model, kind = trained.config.model, trained.config.model.ternary_scale
    # Outputs of weights so small that all are rounded to 0: in the first layer of one expert and in the second of all.
    params = jax.tree.map(np.array, trained.params)
    ending = "kernel" if model.family == "ternary" else "prototype"
    for name, leaf in params["segment_0"]["block_0"]["ffn"].items():
        if name.endswith(ending):
            leaf[1, ..., 3:5] = 1e-7
            leaf[(0, 1, ..., 7) if model.family == "ternary" else (0, ..., 7)] = 1e-7
    trained = dataclasses.replace(trained, params=params)
    rounded = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params)
    for name, leaf in rounded["segment_0"]["block_0"]["ffn"].items():
        if name.endswith(ending):
            for matrix in leaf.reshape(-1, *leaf.shape[-2:]):
                matrix[...] = oracles.quantise(matrix, kind)
    table = trit_table(dataclasses.replace(trained, params=rounded))
    assert list(table.columns) == TRIT_COLUMNS
    names = [f"up_{ending}", f"down_{ending}"]
    names = ["prototype"] if model.family == "butterfly" and model.form != "separate" else names
    assert [(row.layer, row.matrix) for row in table.itertuples()] == [(i, name) for i in (0, 1) for name in names]
    for row in table.to_dict("records"):
        leaf = oracles.float64(params)["segment_0"]["block_0"]["ffn"][row["matrix"]][row["layer"]]
        expected = counted(leaf.reshape(-1, *leaf.shape[-2:]), kind)
        assert expected["dead"] > 0
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_the_table_of_trits_by_hand():
    opened = opened_of(d_model=2, d_ff=3, num_heads=1, num_stages=1, form="tied")
    [row] = trit_table(with_ffn(opened, prototype=[[0.5, 0.0, -2.0], [0.0, 0.0, 2.0]])).to_dict("records")
    # Of three outputs the first has scale 1/2, the second none, and the third 2.
    expected = {"weights": 6, "minus": 1 / 6, "zero": 1 / 2, "plus": 1 / 3, "dead": 1 / 3}
    expected |= {"scale": 1.25, "scale_min": 0.5, "scale_max": 2.0}
    assert (row.pop("layer"), row.pop("matrix")) == (0, "prototype")
    assert row == pytest.approx(expected, abs=1e-9)


def test_a_matrix_of_zeros_has_dead_outputs_and_no_scale():
    opened = opened_of(d_model=2, d_ff=3, num_heads=1, num_stages=1, form="tied")
    [row] = trit_table(with_ffn(opened, prototype=np.zeros((2, 3)))).to_dict("records")
    assert (row["minus"], row["zero"], row["plus"], row["dead"]) == (0.0, 1.0, 0.0, 1.0)
    assert all(np.isnan(row[name]) for name in ("scale", "scale_min", "scale_max"))


def test_models_without_ternary_matrices_have_no_trits():
    floats = {"ternary_scale": "none"}
    models = [opened_of(family="ternary", **floats), opened_of(form="tied", **floats)]
    models += [opened_of(family="standard"), opened_of(family="low_rank"), dense_model()]
    for opened in models:
        table = trit_table(opened)
        assert len(table) == 0
        assert list(table.columns) == TRIT_COLUMNS
