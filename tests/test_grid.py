import dataclasses
import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import comparison, memory, rivals, sweep, tuning
from bvit_jax import grid as grids
from bvit_jax.config import resolve
from bvit_jax.model_config import ConfigError
from configs import dense_runs, digits, parity, parity_tuning, studies
from configs import rivals as rivals_config
from tests.test_config import SWEEPS


def base() -> dict[str, Any]:
    raw = digits.get_config("butterfly,4").to_dict()
    raw["total_steps"] = 200
    raw["optimizer"]["warmup_steps"] = 2
    return raw


def shorthand(trials: list[sweep.Trial]) -> list[tuple[Any, ...]]:
    models = [trial.config.model for trial in trials]
    return [(t.config.seed, m.family, m.num_experts, m.form) for t, m in zip(trials, models, strict=True)]


def test_a_grid_is_the_product_of_its_leaves_seed_by_seed(tmp_path):
    grid = {"model": {"family": ("standard", "butterfly"), "num_experts": (4, 8)}, "seed": [1, 0]}
    kinds = [("standard", 4), ("standard", 8), ("butterfly", 4), ("butterfly", 8)]
    found = grids.expand(base(), grid, tmp_path)
    assert shorthand(found) == [(seed, *kind, "separate") for seed in (0, 1) for kind in kinds]


def test_trials_are_the_base_but_for_the_grid(tmp_path):
    [trial] = grids.expand(base(), {"optimizer": {"learning_rate": (0.5,)}}, tmp_path)
    raw = base()
    raw["optimizer"]["learning_rate"] = 0.5
    assert trial.config == resolve(raw)
    assert trial.directory == tmp_path / "trials" / trial.config.digest()


def test_an_empty_grid_is_the_base_itself(tmp_path):
    [trial] = grids.expand(base(), {}, tmp_path)
    assert trial.config == resolve(base())
    assert trial.settings == ""


def test_combinations_that_mean_the_same_model_are_one_trial(tmp_path):
    grid = {
        "model": {"family": ("dense", "standard", "butterfly"), "num_experts": (4, 8), "form": ("separate", "tied")}
    }
    assert shorthand(grids.expand(base(), grid, tmp_path)) == [
        (0, "dense", 1, "separate"),
        (0, "standard", 4, "separate"),
        (0, "standard", 8, "separate"),
        *[(0, "butterfly", experts, form) for experts in (4, 8) for form in ("separate", "tied")],
    ]


def test_a_single_expert_is_selected_alone_unless_the_grid_says_otherwise(tmp_path):
    trials = grids.expand(base(), {"model": {"num_experts": (1, 4)}}, tmp_path)
    assert [(t.config.model.num_experts, t.config.model.top_k) for t in trials] == [(1, 1), (4, 2)]
    trials = grids.expand(base(), {"model": {"num_experts": (4,), "top_k": (1, 3)}}, tmp_path)
    assert [trial.config.model.top_k for trial in trials] == [1, 3]


def test_expanding_leaves_base_and_disk_alone(tmp_path):
    raw = base()
    trials = grids.expand(raw, {"model": {"num_experts": (8, 16)}}, tmp_path / "new")
    assert raw == base()
    assert len({trial.directory for trial in trials}) == 2
    assert not (tmp_path / "new").exists()


def test_settings_say_what_the_grid_set_beyond_the_usual(tmp_path):
    grid = {
        "seed": (0,),
        "model": {"family": ("butterfly", "dense"), "num_stages": (3,)},
        "loss": {"router_z": (0, 0.5)},
    }
    assert [trial.settings for trial in grids.expand(base(), grid, tmp_path)] == [
        "model.num_stages=3 loss.router_z=0.0",
        "model.num_stages=3 loss.router_z=0.5",
        "model.num_stages=1 loss.router_z=0.0",  # dense models have no stages: the neutral value
        "model.num_stages=1 loss.router_z=0.5",
    ]


def test_settings_name_variants(tmp_path):
    [trial] = grids.expand(base(), {"model": {"variant": ("tiny",)}}, tmp_path)
    assert trial.settings == "model.variant=tiny"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"seed": 3}, "grid.seed = 3: it must be a non-empty sequence of values"),
        ({"seed": ()}, "grid.seed = (): it must be a non-empty sequence of values"),
        ({"seed": None}, "grid.seed = None: it must be a non-empty sequence of values"),
        ({"model": {"family": "dense"}}, "grid.model.family = 'dense': it must be a non-empty sequence of values"),
        ({"modle": {"family": ("dense",)}}, "grid.modle.family = 'dense': it must be of a section that the base has"),
        ({"seed": {"model": (1,)}}, "grid.seed.model = 1: it must be of a section that the base has"),
        ({"model": {"expert": (4,)}}, "grid.model.expert = 4: it must be of a field that the base has"),
        ({"seeds": (0, 1)}, "grid.seeds = 0: it must be of a field that the base has"),
        ({"model": {"num_experts": (1,), "top_k": (2,)}}, "model.top_k = 2: it must be at most num_experts = 1"),
        ({"model": {"num_experts": (4, 0)}}, "model.num_experts = 0: it must be at least 1"),
        ({"seed": (0, "1")}, "seed = '1': it must be an integer"),
    ],
)
def test_a_bad_grid_is_reported_before_anything_is_written(tmp_path, grid, message):
    with pytest.raises(ConfigError) as caught:
        grids.expand(base(), grid, tmp_path / "new")
    assert str(caught.value) == message
    assert not (tmp_path / "new").exists()


CASES: list[grids.Case] = [
    ({"bed": "small", "kind": "dense"}, {"model": {"family": "dense", "d_ff": 32}}),
    ({"bed": "small", "kind": "butterfly"}, {"optimizer": {"learning_rate": 0.01}}),
]


def test_a_grid_is_run_in_every_case(tmp_path):
    found = grids.expand(base(), {"seed": (0, 1), "loss": {"router_z": (0.5,)}}, tmp_path, CASES)
    assert [(t.config.seed, t.labels["kind"], t.config.model.family, t.config.model.d_ff) for t in found] == [
        (seed, *kind) for seed in (0, 1) for kind in (("dense", "dense", 32), ("butterfly", "butterfly", 128))
    ]
    assert [trial.config.optimizer.learning_rate for trial in found[:2]] == [0.003, 0.01]
    assert [trial.settings for trial in found[:2]] == [
        "small dense loss.router_z=0.5",
        "small butterfly loss.router_z=0.5",
    ]
    assert found[0].chosen == {"seed": 0, "loss.router_z": 0.5}


def test_a_case_may_change_the_data_and_the_grid_outweighs_a_case(tmp_path):
    fields = {"data": {"name": "procedural", "image_size": 8, "channels": 1, "num_classes": 2, "num_train": 4}}
    fields["data"] |= {"num_validation": 2, "num_test": 2, "seed": 1}
    case = ({"bed": "gratings"}, fields | {"model": {"num_experts": 8}})
    [trial] = grids.expand(base(), {"model": {"num_experts": (16,)}}, tmp_path, [case])
    assert (trial.config.data.name, trial.config.data.num_train, trial.config.model.num_experts) == (
        *("procedural", 4, 16),
    )


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([], "cases = []: it must be pairs of labels and fields"),
        (["dense"], "cases = 'dense': it must be pairs of labels and fields"),
        ([({"kind": "a"}, {}), ({"kind": "a"}, {})], "cases = {'kind': 'a'}: it must be of labels that no other case"),
        (
            [({"kind": "a"}, {}), ({"bed": "a"}, {})],
            "cases = {'bed': 'a'}: it must be with the labels of the others",
        ),
        ([({"kind": "a"}, {"seeds": 1})], "cases.seeds = 1: it must be of a field that the base has"),
        ([({"kind": "a"}, {"model": {"experts": 1}})], "cases.model.experts = 1: it must be of a field that the base"),
    ],
)
def test_bad_cases_are_reported(tmp_path, cases, message):
    with pytest.raises(ConfigError) as caught:
        grids.expand(base(), {}, tmp_path, cases)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_of_configs_can_be_run(tmp_path, name):
    raw = importlib.import_module(f"configs.{name}").get_config().to_dict()
    trials = grids.expand(raw["base"], raw["grid"], tmp_path, raw.get("cases", (({}, {}),)))
    assert len(trials) > 1
    if "compare" in raw:
        comparison.check(**raw["compare"], trials=trials)
    if "choose" in raw:
        tuning.check(**raw["choose"], trials=trials)
    if "compress" in raw:
        trials = rivals.requested(trials, **raw["compress"])
    if "cases" in raw:  # no case is another one in disguise
        assert len(trials) == len(raw["cases"]) * len(raw["grid"]["seed"])


def test_cases_are_all_combinations_the_last_label_outweighing_the_first():
    found = studies.cases(
        bed={"a": {"model": {"x": 1, "y": 1}}, "b": {}}, kind={"c": {"model": {"x": 2}, "steps": 3}, "d": {}}
    )
    assert found == (
        ({"bed": "a", "kind": "c"}, {"model": {"x": 2, "y": 1}, "steps": 3}),
        ({"bed": "a", "kind": "d"}, {"model": {"x": 1, "y": 1}}),
        ({"bed": "b", "kind": "c"}, {"model": {"x": 2}, "steps": 3}),
        ({"bed": "b", "kind": "d"}, {}),
    )


def test_two_cases_of_one_run_are_refused(tmp_path):
    cases = [({"kind": "base"}, {}), ({"kind": "x 3"}, {"optimizer": {"expert_multiplier": 3.0}})]
    with pytest.raises(ConfigError) as caught:
        grids.expand(base(), {}, tmp_path, cases)  # a butterfly's multiplier is 3
    assert str(caught.value) == "cases = {'kind': 'x 3'}: it must be another run than {'kind': 'base'}, not the same"


def test_a_run_that_several_values_mean_knows_them_all(tmp_path):
    grid = {"model": {"family": ("dense",), "num_experts": (4, 8, 16)}}
    [found] = grids.expand(base(), grid, tmp_path)
    assert [each["model.num_experts"] for each in (found.chosen, *found.also)] == [4, 8, 16]


def test_the_images_can_follow_the_seed_of_the_run(tmp_path):
    case = ({"bed": "few"}, {"data": {"name": "few_digits"}})
    found = grids.expand(base(), {"seed": (3, 5), "data": {"seed": (-1,)}}, tmp_path, [case])
    assert [(trial.config.seed, trial.config.data.seed) for trial in found] == [(3, 3), (5, 5)]
    assert len({trial.group for trial in found}) == 1
    assert [trial.label for trial in found] == [
        "butterfly separate 4 experts few seed 3",
        "butterfly separate 4 experts few seed 5",
    ]


def test_trials_of_other_images_than_their_seeds_say_so(tmp_path):
    case = ({"bed": "few"}, {"data": {"name": "few_digits"}})
    found = grids.expand(base(), {"data": {"seed": (0, 7)}}, tmp_path, [case])
    assert [trial.label.partition("experts ")[2] for trial in found] == ["few seed 0", "few seed 0 data.seed=7"]
    assert [sweep.result_row(trial).data_seed for trial in found] == [0, 7]


def test_dense_runs_are_where_their_sweep_leaves_them():
    raw = dense_runs.get_config().to_dict()
    trials = grids.expand(raw["base"], raw["grid"], Path("runs/dense_runs"), raw["cases"])
    assert {trial.labels["bed"]: str(trial.directory) for trial in trials} == {
        bed: dense_runs.directory(bed) for bed in studies.BEDS
    }


def test_dense_models_of_equal_bytes_have_equal_bytes():
    raw = parity.get_config().to_dict()
    trials = grids.expand(raw["base"], {}, Path("runs"), raw["cases"])
    sizes = {trial.labels["kind"]: memory.ledger(trial.config).bytes_full_ffn for trial in trials}
    for experts in parity.EQUAL_BYTES:
        assert sizes[f"dense, bytes of butterfly {experts}"] == pytest.approx(sizes[f"butterfly {experts}"], rel=0.01)


def test_rivals_are_compressed_in_every_way_that_suits_them(tmp_path):
    raw = rivals_config.get_config().to_dict()
    trials = rivals.requested(grids.expand(raw["base"], raw["grid"], tmp_path, raw["cases"]), **raw["compress"])
    # Two beds, five seeds of run and images, six kinds.
    assert len(trials) == 2 * 5 * 6
    assert all(trial.config.seed == trial.config.data.seed for trial in trials)
    methods = {trial.labels["kind"]: Counter(each.method for each in trial.compressions) for trial in trials}
    calibrated = Counter(quantise=3)
    both = Counter(rounding=3, quantise=3, prune=3, svd=3, activation_aware=3, mixed=3, mixed_rank=6)
    assert methods == {
        "dense": both,
        "standard 16": both + Counter(merge=3),
        **dict.fromkeys(("dense, bytes of butterfly 16", "ternary 16", "butterfly 16", "low_rank 16"), calibrated),
    }
    # Rates are those that were tuned, of low-rank experts those of stored ones.
    rates = {trial.labels["kind"]: dataclasses.asdict(trial.config.optimizer) for trial in trials}
    assert rates["low_rank 16"] == rates["standard 16"]
    assert {trial.config.model.rank for trial in trials if trial.config.model.family == "low_rank"} == {4}


def test_parity_takes_what_tuning_offers():
    offered = {
        "dense": parity_tuning.OF_DENSE,
        **dict.fromkeys(("standard", "ternary", "butterfly"), parity_tuning.OF_MIXTURES),
    }
    for family, tuned in parity.TUNED.items():
        assert {"optimizer": tuned} in offered[family].values()
