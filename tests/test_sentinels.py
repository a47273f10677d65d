import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import sentinels, train_step
from bvit_jax.batches import Batch
from bvit_jax.sentinels import Sentinel
from tests.conftest import make_config

INF, NAN = float("inf"), float("nan")
NOTHING = (0, 0, 0.0, {"head": 0.0, "norms": 0.0})


def first() -> Sentinel:
    zero = jnp.int32(0)
    return Sentinel(zero, zero, jnp.float32(0), {"head": jnp.float32(0), "norms": jnp.float32(0)})


def seen(before: Sentinel, step: int, loss: float, head: float, norms: float, allowed: int) -> tuple[Sentinel, bool]:
    squared = {"head": jnp.float32(head), "norms": jnp.float32(norms)}
    after, taken = jax.jit(sentinels.watch, static_argnums=4)(
        before, jnp.int32(step), jnp.float32(loss), squared, allowed
    )
    return after, bool(taken)


def plain(sentinel: Sentinel) -> tuple[int, int, float, dict[str, float]]:
    squared = {name: float(value) for name, value in sentinel.squared_norms.items()}
    return int(sentinel.skipped), int(sentinel.step), float(sentinel.loss), squared


def told(sentinel: Sentinel) -> str:
    """NaN is not equal to itself, its name is."""
    return str(plain(sentinel))


@pytest.mark.parametrize("allowed", [0, 2])
def test_good_steps_are_taken_and_leave_nothing(allowed):
    sentinel = first()
    for step, loss in ((1, 2.0), (2, -1e30), (3, 0.0)):
        sentinel, taken = seen(sentinel, step, loss, 1e30, 0.0, allowed)
        assert taken
        assert plain(sentinel) == NOTHING


@pytest.mark.parametrize(
    ("loss", "head", "norms"),
    [(NAN, 1.0, 1.0), (INF, 1.0, 1.0), (-INF, 1.0, 1.0), (1.0, NAN, 1.0), (1.0, 1.0, INF), (NAN, NAN, NAN)],
)
def test_a_loss_or_a_gradient_that_is_not_finite_is_seen_each_for_itself(loss, head, norms):
    sentinel, taken = seen(first(), 7, loss, head, norms, 0)
    assert not taken
    assert told(sentinel) == str((1, 7, loss, {"head": head, "norms": norms}))


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_so_many_are_left_out_and_after_one_more_nothing_moves(allowed):
    sentinel = first()
    for number in range(1, allowed + 1):
        sentinel, taken = seen(sentinel, 2 * number, NAN, 1.0, 1.0, allowed)
        assert (taken, int(sentinel.skipped), int(sentinel.step)) == (False, number, 2 * number)
        sentinel, taken = seen(sentinel, 2 * number + 1, 1.0, 1.0, 1.0, allowed)
        assert (taken, int(sentinel.skipped), int(sentinel.step)) == (True, number, 2 * number)
    last, taken = seen(sentinel, 50, INF, 3.0, NAN, allowed)
    assert not taken
    expected = str((allowed + 1, 50, INF, {"head": 3.0, "norms": NAN}))
    assert told(last) == expected
    for step, loss in ((51, 1.0), (52, NAN), (53, 1.0)):
        last, taken = seen(last, step, loss, 1.0, 1.0, allowed)
        assert not taken
        assert told(last) == expected


@pytest.mark.parametrize("kind", ["dense", "standard,4", "butterfly,4"])
def test_squared_norms_of_the_groups_sum_to_that_of_all(kind):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: train_step.init_state(make_config(kind))).params
    gradients = jax.tree.map(lambda leaf: np.asarray(rng.standard_normal(leaf.shape), np.float32), shapes)
    found = jax.jit(sentinels.squared_norms)(gradients)
    whole = sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradients))
    assert sum(map(float, found.values())) == pytest.approx(whole, rel=1e-5)
    own = {"dense": {"ffn"}, "standard,4": {"router", "experts"}, "butterfly,4": {"router", "prototype", "angles"}}
    assert {"attention", "embeddings", "norms", "head"} | own[kind] <= found.keys()
    head = sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradients["head"]))
    assert float(found["head"]) == pytest.approx(head, rel=1e-6)


def test_squared_norms_by_hand():
    tree = {"head": {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([3.0])}, "norm": {"scale": jnp.array([4.0])}}
    found = sentinels.squared_norms(tree | {"class_token": jnp.array([INF])})
    assert {name: float(value) for name, value in found.items()} == {"head": 14, "norms": 16, "embeddings": INF}


def test_the_first_sentinel_has_a_zero_for_every_group():
    params = {"head": {"kernel": jnp.ones((1, 2))}, "norm": {"scale": jnp.ones(3)}}
    found = sentinels.initial(params)
    assert plain(found) == NOTHING
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.shape), found) == jax.tree.map(
        lambda leaf: (leaf.dtype, leaf.shape), first()
    )


def bad() -> Sentinel:
    squared = {"head": jnp.float32(INF), "norms": jnp.float32(6.25), "router": jnp.float32(NAN)}
    return Sentinel(jnp.int32(1), jnp.int32(12), jnp.float32(NAN), squared)


def strict(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_a_report_says_what_was_not_finite_and_holds_the_batch(tmp_path):
    images = np.full((2, 3, 3, 1), 128, np.uint8)
    images[1, 2, 0] = 64
    batch = Batch(images, np.array([4, 9], np.int32), np.ones(2, np.float32))
    path = sentinels.write_report(tmp_path, bad(), batch, np.array([1100, 3]))
    assert path == tmp_path / "nonfinite" / "step_12.json"
    assert json.loads(path.read_text(), parse_constant=strict) == {
        "step": 12,
        "loss": "nan",
        "groups": ["head", "router"],
        "gradient_norm": {"head": "inf", "norms": 2.5, "router": "nan"},
        "batch": {"indices": [1100, 3], "labels": [4, 9], "pixel_min": 64, "pixel_max": 128},
    }
    with np.load(path.with_suffix(".npz")) as stored:
        assert set(stored) == {"images", "labels", "indices"}
        np.testing.assert_array_equal(stored["images"], images)
        np.testing.assert_array_equal(stored["labels"], [4, 9])
        np.testing.assert_array_equal(stored["indices"], [1100, 3])
        assert stored["images"].dtype == np.uint8


def test_reports_of_several_steps_lie_side_by_side(tmp_path):
    batch = Batch(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, np.int32), np.ones(1, np.float32))
    good_loss = bad().replace(step=jnp.int32(13), loss=jnp.float32(2.5))
    for sentinel in (bad(), good_loss, bad()):
        sentinels.write_report(tmp_path, sentinel, batch, np.zeros(1, np.int64))
    names = {path.name for path in (tmp_path / "nonfinite").iterdir()}
    assert names == {"step_12.json", "step_12.npz", "step_13.json", "step_13.npz"}
    assert json.loads((tmp_path / "nonfinite" / "step_13.json").read_text())["loss"] == 2.5


@pytest.mark.parametrize(
    ("loss", "squared", "text"),
    [
        (NAN, {"head": INF, "norms": 1.0, "router": NAN}, "loss nan, gradient of head, router not finite"),
        (INF, {"head": 1.0}, "loss inf, every group's gradient finite"),
        (2.34567, {"head": NAN}, "loss 2.346, gradient of head not finite"),
    ],
)
def test_a_bad_step_in_words(loss, squared, text):
    sentinel = Sentinel(
        jnp.int32(1), jnp.int32(12), jnp.float32(loss), {name: jnp.float32(value) for name, value in squared.items()}
    )
    assert sentinels.describe(sentinel) == f"step 12: {text}"


# One expert takes 0.9 and fifteen share the rest: entropy -0.9 ln 0.9 - 0.1 ln(0.1 / 15) = 0.595888 nats.
PEAKED = (0.9, *(0.1 / 15 for _ in range(15)))


@pytest.mark.parametrize(
    ("loads", "dead", "busiest", "effective"),
    [
        ((1.0,), 0, 1.0, 1.0),
        ((0.25,) * 4, 0, 0.25, 4.0),
        ((1.0, 0.0, 0.0, 0.0), 3, 1.0, 1.0),
        ((0.0, 0.5, 0.0, 0.5), 2, 0.5, 2.0),
        ((0.5, 0.25, 0.25), 0, 0.5, 2 * math.sqrt(2)),  # entropy 1.5 ln 2
        (PEAKED, 0, 0.9, 0.9**-0.9 * 150**0.1),
        ((0.0, 0.0), 2, 0.0, 1.0),  # nothing came at all
    ],
)
def test_spread_by_hand(loads, dead, busiest, effective):
    found = sentinels.spread(loads)
    assert (found.experts, found.dead, found.busiest) == (len(loads), dead, busiest)
    assert found.effective == pytest.approx(effective, rel=1e-6)


@pytest.mark.parametrize("loads", [(1.0,), (0.25,) * 4, (0.5, 0.25, 0.25), (0.7, 0.1, 0.1, 0.1)])
def test_a_good_spread_is_no_reason_to_warn(loads):
    assert sentinels.spread(loads).warning is None


@pytest.mark.parametrize(
    ("loads", "warning"),
    [
        (
            (1.0, 0.0, 0.0, 0.0),
            "3 of 4 experts dead, the busiest took 100.0 % of the load (fair share 25.0 %), "
            "as if spread over 1.0 experts",
        ),
        (
            (0.0, 0.5, 0.5),
            "1 of 3 experts dead, the busiest took 50.0 % of the load (fair share 33.3 %), "
            "as if spread over 2.0 experts",
        ),
        (
            PEAKED,  # 1.8 of 16 is less than a quarter
            "0 of 16 experts dead, the busiest took 90.0 % of the load (fair share 6.2 %), "
            "as if spread over 1.8 experts",
        ),
    ],
)
def test_dead_and_collapsing_experts_are_warned_of(loads, warning):
    assert sentinels.spread(loads).warning == warning


def test_collapse_begins_below_a_quarter_of_the_experts():
    def halves(of: int) -> sentinels.Spread:
        return sentinels.Spread(of, 0, 0.5, 2.0)

    assert halves(8).warning is None
    assert halves(9).warning is not None


def test_warnings_name_their_layers():
    even, peaked = (0.25,) * 4, (1.0, 0.0, 0.0, 0.0)
    found = sentinels.expert_warnings((even, peaked, even, peaked))
    assert [line.split(":")[0] for line in found] == ["mixture layer 1", "mixture layer 3"]
    assert found[0].removeprefix("mixture layer 1: ") == sentinels.spread(peaked).warning
    assert sentinels.expert_warnings(()) == []
    assert sentinels.expert_warnings((even,)) == []
