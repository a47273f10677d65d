import copy
import dataclasses
import hashlib
import importlib
import json
import pkgutil
import re
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configs
from bvit_jax.config import Config, LossConfig, OptimizerConfig, from_dict, resolve
from bvit_jax.data_config import EMBEDDED, AugmentConfig, DataConfig
from bvit_jax.model_config import ConfigError, Family, ModelConfig
from configs import cifar10, cifar100, digits, imagenet_s16, paper
from tests.conftest import make_config

CONFIG_FILES = [module.name for module in pkgutil.iter_modules(configs.__path__) if module.name != "studies"]
SWEEPS = [name for name in CONFIG_FILES if name.startswith(("sweep_", "ablation_", "parity", "rivals", "dense_runs"))]
RUN_CONFIGS = [name for name in CONFIG_FILES if name not in SWEEPS]

PROCEDURAL = {
    "name": "procedural",
    "image_size": 8,
    "channels": 3,
    "num_classes": 5,
    "num_train": 20,
    "num_validation": 5,
    "num_test": 5,
    "seed": 3,
}

# Another possible value for every leaf of the configuration of `raw_config(PROCEDURAL)`.
OTHER: dict[str, Any] = {
    "seed": 1,
    "total_steps": 7,
    "batch_size": 8,
    "log_every": 3,
    "eval_every": 4,
    "keep_every": 3,
    "max_skipped_steps": 2,
    "start_from": "runs/dense",
    **{
        f"data.{name}": value + 1
        for name, value in PROCEDURAL.items()
        if isinstance(value, int) and name != "image_size"
    },
    "augment.crop": "resized",
    "augment.max_shift": 2,
    "augment.shift_probability": 1.0,
    "augment.min_area": 0.5,
    "augment.flip_probability": 0.123,
    "augment.randaugment_ops": 1,
    "augment.randaugment_magnitude": 0.123,
    "augment.randaugment_deviation": 0.123,
    "augment.randaugment_probability": 0.123,
    "augment.erase_probability": 0.123,
    "augment.noise": 0.123,
    "augment.mixup": 0.123,
    "augment.cutmix": 0.123,
    "model.family": "standard",
    "model.form": "tied",
    "model.num_experts": 5,
    "model.top_k": 1,
    "model.moe_layers": "1",
    "model.rank": 2,
    "model.rotations": "outer",
    "model.num_stages": 1,
    "model.stride_order": "ascending",
    "model.ternary_scale": "tensor",
    "model.angle_bits": 8,
    "model.router_precision": "int8",
    "model.angle_init": 0.123,
    "model.router_noise": 0.123,
    "model.attention_dropout": 0.123,
    "model.stochastic_depth": 0.123,
    "model.dispatch": "blocks",
    "model.compute_dtype": "bfloat16",
    "model.patch_size": 4,
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.d_ff": 64,
    "model.num_heads": 2,
    "loss.label_smoothing": 0.123,
    "loss.load_balance": 0.123,
    "loss.router_z": 0.123,
    "loss.smoothness": 0.123,
    "optimizer.learning_rate": 0.123,
    "optimizer.final_learning_rate": 0.001,
    "optimizer.warmup_steps": 1,
    "optimizer.weight_decay": 0.123,
    "optimizer.clip_norm": 0.123,
    "optimizer.ema_decay": 0.123,
    "optimizer.expert_multiplier": 0.123,
    "optimizer.angle_multiplier": 0.123,
    "optimizer.router_multiplier": 0.123,
}


def raw_config(data: dict[str, Any] | None = None, **changes: object) -> dict[str, Any]:
    """Returns a nested configuration as in configs/, made short; `changes` as `make_config`."""
    raw = digits.get_config("butterfly,4").to_dict()
    raw |= {"total_steps": 6, "batch_size": 16, "log_every": 2, "eval_every": 3}
    raw["model"] |= {"top_k": 2, "num_stages": 2}
    raw["optimizer"]["warmup_steps"] = 2
    if data is not None:
        raw["data"] = dict(data)
    for name, value in changes.items():
        put(raw, name.replace("__", "."), value)
    return raw


def put(raw: dict[str, Any], name: str, value: object) -> None:
    *sections, field = name.split(".")
    for section in sections:
        raw = raw[section]
    raw[field] = value


def changed(name: str, value: object, data: dict[str, Any] | None = None) -> Config:
    raw = raw_config(data)
    put(raw, name, value)
    return resolve(raw)


def leaves(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("seed", -1, "0 to 2^32 - 1"),
        ("seed", 2**32, "0 to 2^32 - 1"),
        ("seed", 2**53, "an integer"),
        ("optimizer.clip_norm", 2.0**53, "a finite number"),
        ("total_steps", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("eval_every", -5, "at least 1"),
        ("keep_every", -1, "0 or more"),
        ("max_skipped_steps", -1, "0 or more"),
        ("optimizer.warmup_steps", 6, "under total_steps = 6"),
        ("optimizer.warmup_steps", -1, "0 or more"),
        ("optimizer.learning_rate", 0.0, "above 0"),
        ("optimizer.clip_norm", 0.0, "above 0"),
        ("optimizer.weight_decay", -0.1, "0 or more"),
        ("optimizer.expert_multiplier", -1.0, "0 or more"),
        ("optimizer.angle_multiplier", -1.0, "0 or more"),
        ("optimizer.router_multiplier", -1.0, "0 or more"),
        ("loss.label_smoothing", 1.0, "0 to under 1"),
        ("loss.label_smoothing", -0.1, "0 to under 1"),
        ("loss.load_balance", -0.01, "0 or more"),
        ("loss.router_z", -0.01, "0 or more"),
        ("loss.smoothness", -0.01, "0 or more"),
        ("data.name", "CIFAR-100", f"{', '.join(EMBEDDED)} or a data set's name such as cifar100"),
        ("data.name", "cifar100:newest", f"{', '.join(EMBEDDED)} or a data set's name such as cifar100"),
        ("augment.crop", "centre", "shift or resized"),
        ("augment.max_shift", -1, "0 or more"),
        ("augment.max_shift", 8, "under image_size = 8"),
        ("augment.shift_probability", 1.5, "0 to 1"),
        ("augment.shift_probability", -0.5, "0 to 1"),
        ("augment.min_area", 0.0, "above 0 to 1"),
        ("augment.min_area", 1.5, "above 0 to 1"),
        ("augment.flip_probability", 1.5, "0 to 1"),
        ("augment.randaugment_ops", -1, "0 or more"),
        ("augment.randaugment_magnitude", 10.5, "0 to 10"),
        ("augment.randaugment_magnitude", -0.5, "0 to 10"),
        ("augment.randaugment_deviation", -0.5, "0 or more"),
        ("augment.randaugment_probability", -0.5, "0 to 1"),
        ("augment.erase_probability", 1.5, "0 to 1"),
        ("augment.noise", -0.1, "0 or more"),
        ("augment.mixup", -0.1, "0 or more"),
        ("augment.cutmix", -0.1, "0 or more"),
        ("model.attention_dropout", 1.0, "0 to under 1"),
        ("model.stochastic_depth", -0.1, "0 to under 1"),
        ("optimizer.final_learning_rate", 0.5, "0 to learning_rate = 0.003"),
        ("optimizer.final_learning_rate", -0.5, "0 to learning_rate = 0.003"),
        ("optimizer.ema_decay", 1.0, "0 to under 1"),
        ("data.seed", -2, "0 or more"),
        ("data.image_size", 0, "at least 1"),
        ("data.channels", 0, "at least 1"),
        ("data.num_classes", 0, "at least 1"),
        ("data.num_train", 0, "at least 1"),
        ("data.num_validation", 0, "at least 1"),
        ("data.num_test", 0, "at least 1"),
        ("model.image_size", 16, "that of the procedural images, 8"),
        ("model.variant", "huge", "tiny or small or paper or vit_s16 or vit_b16"),
        ("model.variant", None, "tiny or small or paper or vit_s16 or vit_b16"),
        ("model.family", "sparse", "dense or standard or ternary or butterfly or low_rank"),
        ("model.top_k", 5, "at most num_experts = 4"),
    ],
)
def test_an_impossible_value_is_named_with_what_would_be_right(name, value, right):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{name} = {value!r}: it must be {right}')}$"):
        changed(name, value, PROCEDURAL)


@pytest.mark.parametrize("value", ["3", True, False, None, float("nan"), float("inf"), [3]])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("seed", "an integer"),
        ("total_steps", "an integer"),
        ("keep_every", "an integer"),
        ("max_skipped_steps", "an integer"),
        ("augment.max_shift", "an integer"),
        ("model.num_experts", "an integer"),
        ("optimizer.warmup_steps", "an integer"),
        ("augment.noise", "a finite number"),
        ("model.angle_init", "a finite number"),
        ("loss.smoothness", "a finite number"),
        ("optimizer.learning_rate", "a finite number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, kind, value):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{name} = {value!r}: it must be {kind}')}$"):
        changed(name, value)


@pytest.mark.parametrize("name", ["seed", "model.num_experts", "model.d_model", "data.num_test"])
def test_a_fraction_is_no_integer_even_if_whole(name):
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)} = 4\.0: it must be an integer$"):
        changed(name, 4.0, PROCEDURAL)


@pytest.mark.parametrize("value", [2, None, ["every"]])
def test_text_must_be_text(value):
    with pytest.raises(ConfigError, match=rf"^model\.moe_layers = {re.escape(repr(value))}: it must be text$"):
        changed("model.moe_layers", value)


@pytest.mark.parametrize("value", [8.0, True, "8", None])
def test_bits_are_an_integer_among_the_choices(value):
    with pytest.raises(ConfigError, match=r"^model\.angle_bits = .*: it must be 32 or 16 or 8 or 6 or 4$"):
        changed("model.angle_bits", value)


@pytest.mark.parametrize("name", ["model.family", "model.form", "model.compute_dtype", "data.name", "model.variant"])
@pytest.mark.parametrize("value", [3, None, ["dense"]])
def test_a_choice_of_another_type_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{name} = {value!r}: it must be ')}"):
        changed(name, value, PROCEDURAL)


@pytest.mark.parametrize("name", ["loss.smoothness", "optimizer.learning_rate"])
def test_an_integer_beyond_all_floats_is_refused(name):
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)} = 10+: it must be a finite number$"):
        changed(name, 10**400)


def test_nothing_need_be_kept_for_good_and_no_step_left_out():
    config = resolve(raw_config(keep_every=0, max_skipped_steps=0))
    assert (config.keep_every, config.max_skipped_steps) == (0, 0)
    assert changed("keep_every", 10**6).keep_every == 10**6  # never reached: as 0


def test_the_largest_seed_is_taken():
    assert changed("seed", 2**32 - 1).seed == 2**32 - 1


def test_ints_pass_for_floats_and_mean_the_same():
    config = changed("model.angle_init", 1)
    assert isinstance(config.model.angle_init, float)
    assert config == changed("model.angle_init", 1.0)
    assert config.digest() == changed("model.angle_init", 1.0).digest()


@pytest.mark.parametrize("name", ["sed", "data.sharpness", "model.experts", "loss.balance", "optimizer.momentum"])
def test_an_unknown_field_is_named(name):
    with pytest.raises(ConfigError, match=f"unknown configuration field: {re.escape(name)}$"):
        changed(name, 1)


@pytest.mark.parametrize(
    "name",
    [
        "seed",
        "total_steps",
        "keep_every",
        "max_skipped_steps",
        "augment.noise",
        "model.top_k",
        "loss.router_z",
        "optimizer.clip_norm",
    ],
)
def test_a_missing_field_is_named(name):
    raw = raw_config()
    *sections, field = name.split(".")
    del (raw[sections[0]] if sections else raw)[field]
    with pytest.raises(ConfigError, match=f"missing configuration field: {re.escape(name)}$"):
        resolve(raw)


def test_several_unknown_fields_are_all_named():
    raw = raw_config()
    raw["loss"] |= {"b": 1, "a": 2}
    with pytest.raises(ConfigError, match=r"unknown configuration field: loss\.a, loss\.b$"):
        resolve(raw)


@pytest.mark.parametrize("section", ["data", "augment", "model", "loss", "optimizer"])
@pytest.mark.parametrize("value", [None, 3, "tiny"])
def test_a_section_must_be_a_section(section, value):
    with pytest.raises(ConfigError, match=f"^{section} = {re.escape(repr(value))}: it must be a section of fields$"):
        changed(section, value)


@pytest.mark.parametrize("section", ["data", "augment", "model", "loss", "optimizer"])
def test_a_section_cannot_be_left_out(section):
    raw = raw_config()
    del raw[section]
    with pytest.raises(ConfigError, match=f"^{section} = None: it must be a section of fields$"):
        resolve(raw)


def test_warm_up_may_last_till_the_last_step_but_one():
    assert changed("optimizer.warmup_steps", 5).optimizer.warmup_steps == 5


def test_resolve_leaves_its_argument_alone():
    raw = raw_config()
    before = copy.deepcopy(raw)
    resolve(raw)
    assert raw == before


def test_the_digits_fill_in_what_they_fix():
    data = make_config().data
    assert (data.image_size, data.channels, data.num_classes) == (8, 1, 10)
    assert (data.num_train, data.num_validation, data.num_test, data.seed) == (1200, 197, 400, 0)


def test_channels_and_classes_of_the_model_are_the_datas():
    model = resolve(raw_config(PROCEDURAL)).model
    assert (model.channels, model.num_classes) == (3, 5)


def test_a_shape_field_replaces_the_variants():
    model = changed("model.d_model", 32).model
    assert (model.d_model, model.d_ff, model.num_layers) == (32, 128, 2)


def test_none_keeps_the_variants_shape_and_so_does_absence():
    raw = raw_config()
    assert raw["model"]["d_model"] is None
    del raw["model"]["d_model"]
    assert resolve(raw) == resolve(raw_config())
    assert resolve(raw).model.d_model == 64


def test_a_wrong_shape_field_is_not_taken_for_absent():
    for value in (0, False):
        with pytest.raises(ConfigError, match=rf"model\.d_model = {value}: it must be"):
            changed("model.d_model", value)


def test_dense_models_of_four_and_sixteen_experts_are_one():
    configs_ = [resolve(digits.get_config(f"dense,{experts}").to_dict()) for experts in (4, 16)]
    assert configs_[0] == configs_[1]
    assert configs_[0].digest() == configs_[1].digest()


def multiplier(family: str, value: float | None = None) -> float:
    raw = raw_config(model__family=family, optimizer__expert_multiplier=value)
    return resolve(raw).optimizer.expert_multiplier


def test_the_multiplier_of_experts_is_their_familys_unless_one_is_given():
    usual = {"dense": 1.0, "standard": 1.0, "ternary": 3.0, "butterfly": 3.0, "low_rank": 1.0}
    assert {family: multiplier(family) for family in get_args(Family)} == usual
    assert {family: multiplier(family, 2.0) for family in get_args(Family)} == dict.fromkeys(usual, 2.0) | {"dense": 1}
    assert multiplier("standard", 0.0) == 0


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("dense", set()),
        ("standard", {"expert", "router"}),
        ("ternary", {"expert", "router"}),
        ("butterfly", {"expert", "router", "angle"}),
        ("low_rank", {"expert", "router"}),
    ],
)
def test_only_multipliers_of_what_a_family_has_tell_its_runs_apart(family, own):
    names = ("expert", "angle", "router")
    given = {f"optimizer__{name}_multiplier": 0.5 for name in names}
    found = resolve(raw_config(model__family=family, **given)).optimizer
    assert {name for name in names if getattr(found, f"{name}_multiplier") == 0.5} == own


def test_a_dense_model_made_of_another_has_no_multiplier_of_experts():
    config = changed("optimizer.expert_multiplier", 2.0)
    assert config.with_experts("dense", "separate", 1) == changed("model.family", "dense")
    assert config.with_experts("standard", "separate", 4).optimizer == config.optimizer


def test_the_form_matters_to_butterflies_alone():
    for family, number in (("dense", 1), ("standard", 1), ("butterfly", 3)):
        digests = {
            resolve(digits.get_config(f"{family},4,{form}").to_dict()).digest()
            for form in ("separate", "tied", "reference")
        }
        assert len(digests) == number


@pytest.mark.parametrize(
    ("field", "right"),
    [
        ("image_size", 8),
        ("channels", 1),
        ("num_classes", 10),
        ("num_train", 1200),
        ("num_validation", 197),
        ("num_test", 400),
        ("seed", 0),
    ],
)
def test_what_the_digits_fix_cannot_be_asked_for_otherwise(field, right):
    with pytest.raises(ConfigError, match=rf"^data\.{field} = 5: it must be {right}, which digits fixes$"):
        changed(f"data.{field}", 5)
    assert changed(f"data.{field}", right) == resolve(raw_config())


def test_the_digest_names_a_configuration_in_twelve_hexadecimal_digits():
    digest = resolve(raw_config()).digest()
    assert re.fullmatch("[0-9a-f]{12}", digest)
    # By this formula, so that runs made by one version are found again by the next.
    text = json.dumps(resolve(raw_config()).to_dict(), sort_keys=True)
    assert digest == hashlib.sha256(text.encode()).hexdigest()[:12]


@given(st.randoms(use_true_random=False))
def test_the_digest_does_not_depend_on_the_order_of_fields(random):
    def shuffled(nested: dict[str, Any]) -> dict[str, Any]:
        names = list(nested)
        random.shuffle(names)
        return {name: shuffled(nested[name]) if isinstance(nested[name], dict) else nested[name] for name in names}

    config = resolve(shuffled(raw_config()))
    assert config.digest() == resolve(raw_config()).digest()
    assert from_dict(shuffled(config.to_dict())).digest() == config.digest()


# With these every part of the augmentation is there, whose fields would otherwise be reset.
STRONG = {"shift_probability": 0.5, "randaugment_ops": 2, "randaugment_magnitude": 9.0, "randaugment_probability": 0.5}


def strongly_augmented(**changes: object) -> Config:
    raw = raw_config(PROCEDURAL)
    raw["augment"] |= STRONG | changes
    return resolve(raw)


@pytest.mark.parametrize("name", sorted(OTHER.keys() - {"augment.min_area", "model.rank"}))
def test_every_field_changes_the_digest(name):
    section, _, field = name.rpartition(".")
    if section == "augment":
        assert strongly_augmented(**{field: OTHER[name]}).digest() != strongly_augmented().digest()
    else:
        config = resolve(raw_config(PROCEDURAL))
        assert changed(name, OTHER[name], PROCEDURAL).digest() != config.digest()


def test_the_rank_changes_the_digest_of_low_rank_experts_alone():
    for family, number in (("low_rank", 2), ("butterfly", 1)):
        found = {resolve(raw_config(PROCEDURAL, model__family=family, model__rank=rank)).digest() for rank in (2, 4)}
        assert len(found) == number


def test_fields_of_what_is_left_out_do_not_change_the_digest():
    cut = strongly_augmented(crop="resized", min_area=0.5)
    assert cut.digest() != strongly_augmented(crop="resized", min_area=0.6).digest()
    assert cut == strongly_augmented(crop="resized", min_area=0.5, max_shift=3, shift_probability=0.25)
    assert strongly_augmented(min_area=0.5) == strongly_augmented()
    assert strongly_augmented(max_shift=0) == strongly_augmented(shift_probability=0.0)
    still = strongly_augmented(randaugment_ops=0).augment
    assert still == strongly_augmented(randaugment_probability=0.0, randaugment_deviation=1.0).augment
    assert (still.randaugment_ops, still.randaugment_magnitude, still.randaugment_deviation) == (0, 0.0, 0.0)


def test_every_leaf_is_covered_above():
    derived = {"data.name", "data.image_size", "model.image_size", "model.channels", "model.num_classes"}
    derived |= {"data.reading", "data.test_split", "data.stored_size"}  # of prepared sets, below
    assert OTHER.keys() | derived == leaves(resolve(raw_config(PROCEDURAL)).to_dict()).keys()


def test_equal_sizes_of_other_images_have_another_digest():
    sizes = {
        "image_size": 8,
        "channels": 1,
        "num_classes": 10,
        "num_train": 1200,
        "num_validation": 197,
        "num_test": 400,
    }
    procedural = resolve(raw_config(PROCEDURAL | sizes | {"seed": 0}))
    digits_ = resolve(raw_config(PROCEDURAL | sizes | {"seed": 0, "name": "digits"}))
    assert procedural.digest() != digits_.digest()


def test_image_sizes_change_the_digest_together():
    raw = raw_config(PROCEDURAL | {"image_size": 16}, model__image_size=16)
    assert resolve(raw).digest() != resolve(raw_config(PROCEDURAL)).digest()


PREPARED = PROCEDURAL | {
    "name": "imagenet_resized/64x64:0.1.0",
    "reading": "stream",
    "test_split": "validation",
    "stored_size": 64,
    "image_size": 8,
}


def prepared_config(crop: str = "resized", **changes: object) -> Config:
    return resolve(raw_config(PREPARED | changes, augment__crop=crop))


def test_the_fields_of_a_prepared_set_change_the_digest():
    others = {"name": "mnist", "reading": "memory", "test_split": "test", "stored_size": 32}
    digests = {prepared_config(**{name: value}).digest() for name, value in others.items()}
    assert len(digests | {prepared_config().digest()}) == 5


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("reading", "disk", "memory or stream"),
        ("stored_size", 7, "image_size = 8 or more"),
        ("test_split", "", "the name of a split, such as test"),
        ("channels", 2, "1 or 3"),
    ],
)
def test_an_impossible_prepared_set_is_refused(name, value, right):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'data.{name} = {value!r}: it must be {right}')}$"):
        prepared_config(**{name: value})


def test_images_that_are_stored_larger_must_be_resized():
    with pytest.raises(ConfigError, match=r"augment.crop = 'shift': .* resized, as stored_size is not image_size = 8"):
        prepared_config(crop="shift")
    assert prepared_config(crop="shift", stored_size=8).data.stored_size == 8


def test_what_cifar_fixes_need_not_be_given_and_cannot_be_changed():
    config = resolve(cifar100.get_config().to_dict())
    assert (config.data.image_size, config.data.stored_size, config.data.channels) == (32, 32, 3)
    assert (config.data.num_classes, config.data.test_split) == (100, "test")
    assert resolve(cifar10.get_config().to_dict()).data.num_classes == 10
    raw = cifar100.get_config().to_dict()
    raw["data"]["num_classes"] = 10
    with pytest.raises(ConfigError, match=r"^data\.num_classes = 10: it must be 100, which cifar100 fixes$"):
        resolve(raw)


def test_the_model_sees_the_images_of_the_data_whatever_its_variant():
    raw = raw_config(PROCEDURAL | {"image_size": 16}, model__variant="small")
    assert resolve(raw).model.image_size == 16


def test_a_field_of_the_data_that_is_none_is_as_one_left_out():
    assert resolve(raw_config(PROCEDURAL | {"stored_size": None})) == resolve(raw_config(PROCEDURAL))
    with pytest.raises(ConfigError, match=r"^missing configuration field: data\.num_train$"):
        resolve(raw_config(PROCEDURAL | {"num_train": None}))


def test_a_version_of_cifar_is_cifar():
    raw = cifar100.get_config().to_dict()
    raw["data"]["name"] = "cifar100:3.0.2"
    assert resolve(raw).data == dataclasses.replace(
        resolve(cifar100.get_config().to_dict()).data, name="cifar100:3.0.2"
    )


def test_a_single_expert_is_selected_alone():
    for get_config in (digits.get_config, paper.get_config, cifar100.get_config, imagenet_s16.get_config):
        for experts, top_k in ((1, 1), (2, 2), (256, 2)):
            assert resolve(get_config(f"standard,{experts}").to_dict()).model.top_k == top_k


def test_the_warm_up_of_a_recipe_goes_with_its_length():
    config = cifar100.get_config()
    assert config.total_steps == 105_468  # 300 epochs of 45,000 images, 128 a step
    assert config.optimizer.warmup_steps == 3_515  # 10 of them
    config.total_steps = 20
    assert resolve(config.to_dict()).optimizer.warmup_steps == 0
    assert imagenet_s16.get_config().optimizer.warmup_steps == 10_000


@pytest.mark.parametrize("family", ["dense", "standard", "butterfly", "low_rank"])
def test_a_stored_configuration_comes_back_equal(family):
    config = resolve(raw_config(PROCEDURAL, model__family=family))
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored == config.to_dict()
    back = from_dict(stored)
    assert back == config
    assert back.digest() == config.digest()
    assert isinstance(back.model, ModelConfig)
    assert isinstance(back.data, DataConfig)
    assert isinstance(back.augment, AugmentConfig)
    assert isinstance(back.loss, LossConfig)
    assert isinstance(back.optimizer, OptimizerConfig)


def test_a_stored_configuration_is_checked_on_its_return():
    stored = make_config().to_dict()
    with pytest.raises(ConfigError, match=r"unknown configuration field: model\.variant"):
        from_dict(stored | {"model": stored["model"] | {"variant": "tiny"}})
    with pytest.raises(ConfigError, match=r"loss\.router_z = -1\.0: it must be 0 or more"):
        from_dict(stored | {"loss": stored["loss"] | {"router_z": -1}})
    del stored["optimizer"]
    with pytest.raises(ConfigError, match="optimizer = None: it must be a section"):
        from_dict(stored)


def test_configurations_are_frozen_and_hashable():
    config = make_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    assert hash(config) == hash(make_config())


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_every_configuration_file_resolves_for_every_family(name, family):
    get_config = importlib.import_module(f"configs.{name}").get_config
    config = resolve(get_config(f"{family},16").to_dict())
    assert config.model.family == family
    assert config.model.num_experts == (1 if family == "dense" else 16)
    assert resolve(get_config().to_dict()).model.family == "butterfly"


def test_the_configuration_files_are_found():
    assert {"digits", "paper", "cifar10", "cifar100", "imagenet_s16"} <= set(RUN_CONFIGS)


def test_the_arguments_of_a_configuration_file_are_family_experts_form():
    model = resolve(digits.get_config(" butterfly , 16 , reference").to_dict()).model
    assert (model.family, model.num_experts, model.form) == ("butterfly", 16, "reference")
    assert resolve(digits.get_config("butterfly").to_dict()).model.num_experts == 8


def test_the_paper_file_is_the_papers_setting():
    model = resolve(paper.get_config().to_dict()).model
    assert (model.num_layers, model.d_model, model.d_ff, model.num_experts) == (7, 256, 1024, 64)
    assert (model.form, model.num_stages, model.moe_layers) == ("tied", 2, "every")
    assert (model.image_size, model.channels, model.num_classes) == (32, 3, 100)
