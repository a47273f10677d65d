import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import make_model, on_devices
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from bvit_jax import exchange, moe, sharding
from bvit_jax.sharding import Layout, Placement

EXPERTS, D, F = 16, 3, 5

# Capacity


@pytest.mark.parametrize(
    ("rows", "chips", "expected"),
    [
        (256, 8, 56),  # mean 32, four deviations of sqrt(32) = 5.66: 54.6
        (256, 4, 96),  # 64 + 32, a multiple of 8 already
        (256, 2, 176),  # 128 + 45.3
        (64, 2, 56),  # 32 + 22.6 = 54.6
        (64, 16, 16),  # 4 + 8 = 12
        (2**20, 16, 66560),  # 65536 + 1024
        (24, 2, 24),  # 12 + 13.9 = 25.9 would be 32, more than there are
        (5, 4, 5),
        (1, 8, 1),
        (7, 1, 7),
    ],
)
def test_capacity_by_hand(rows, chips, expected):
    assert exchange.capacity(rows, chips) == expected


@given(st.integers(1, 10**7), st.integers(1, 4096))
def test_capacity_holds_what_balanced_routing_sends(rows, chips):
    found = exchange.capacity(rows, chips)
    assert found * chips >= rows
    assert found <= rows
    assert found % 8 == 0 or found == rows
    mean = rows / chips
    assert found == rows or mean + 4 * math.sqrt(mean) <= found < mean + 4 * math.sqrt(mean) + 8


# Rows on their way


def even(chips: int, rows: int) -> np.ndarray:
    """Every device has as many rows for each expert."""
    return np.tile(np.arange(rows) % EXPERTS, (chips, 1))


def random(chips: int, rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, EXPERTS, (chips, rows))


def to_one(chips: int, rows: int) -> np.ndarray:
    return np.full((chips, rows), EXPERTS - 2)


def to_few(chips: int, rows: int) -> np.ndarray:
    """Experts 3, 4 and 5 alone: most devices get nothing."""
    return 3 + random(chips, rows) % 3


def uneven(chips: int, rows: int) -> np.ndarray:
    """Device d sends a share of its own to the first expert, from nothing to all."""
    first = np.arange(rows) < np.linspace(0, rows, chips)[:, None]
    return np.where(first, 0, random(chips, rows))


def one_more_than_fits(chips: int, rows: int) -> np.ndarray:
    """The first device fills what the last one takes in a round, and one row more."""
    experts = random(chips, rows) % (EXPERTS // chips)  # of the first device
    experts[0, : exchange.capacity(rows, chips) + 1] = EXPERTS - 1
    return experts


def just_fits(chips: int, rows: int) -> np.ndarray:
    """As many rows as a round takes from each device to the last, the rest spread over the others."""
    others = EXPERTS // chips * (chips - 1)
    experts = np.tile(np.arange(rows) % others, (chips, 1))
    experts[:, rows - exchange.capacity(rows, chips) :] = EXPERTS - 1
    return experts


ROUTINGS = {function.__name__: function for function in (even, random, to_one, to_few, uneven, one_more_than_fits)}
CASES = {
    **{f"{name}, {chips} devices": (chips, 1, 64, routing) for name, routing in ROUTINGS.items() for chips in (2, 4)},
    **{f"{name}, 8 devices": (8, 1, 256, routing) for name, routing in ROUTINGS.items()},
    **{f"just fits, {chips} devices": (chips, 1, rows, just_fits) for chips, rows in ((2, 64), (4, 64), (8, 256))},
    **{f"one row a device, {chips} devices": (chips, 1, 1, random) for chips in (2, 8)},
    # Two groups of four exchange apart from each other, and their gradients are added up.
    **{f"{name}, 2 x 4 devices": (4, 2, 64, routing) for name, routing in ROUTINGS.items()},
}
ROUNDS_BY_HAND = {
    # Rows of the fullest pair over the capacity: 64 / 56, 64 / 32, 256 / 56.
    "to_one, 2 devices": 2,
    "to_one, 4 devices": 2,
    "to_one, 8 devices": 5,
    "to_one, 2 x 4 devices": 2,
    **{f"just fits, {chips} devices": 1 for chips in (2, 4, 8)},
    **{f"even, {chips} devices": 1 for chips in (2, 4, 8, "2 x 4")},
    **{f"one_more_than_fits, {chips} devices": 2 for chips in (2, 4)},
    "one_more_than_fits, 8 devices": 5,  # what goes to the first device has the most rounds
    **{f"one row a device, {chips} devices": 1 for chips in (2, 8)},
}


def expert_of_rows(case: str) -> np.ndarray:
    """The expert of every row, device by device: (groups * chips * rows,)."""
    chips, groups, rows, routing = CASES[case]
    return np.concatenate([(routing(chips, rows) + 3 * group) % EXPERTS for group in range(groups)]).reshape(-1)


def rounds_of(case: str) -> int:
    """Rounds that the fullest pair of devices needs."""
    chips, _, rows, _ = CASES[case]
    fullest = 0
    for own in expert_of_rows(case).reshape(-1, rows):
        fullest = max(fullest, *Counter((own // (EXPERTS // chips)).tolist()).values())
    return math.ceil(fullest / exchange.capacity(rows, chips))


def draw(case: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    count = expert_of_rows(case).size
    shapes = {"w": (EXPERTS, D, F), "a": (EXPERTS, F), "v": (EXPERTS, F, D), "b": (EXPERTS, D)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return {"params": params, "rows": rng.normal(size=(count, D)), "upstream": rng.normal(size=(count, D))}


def ffn(params: Any, rows_SxD: jax.Array, expert_S: jax.Array) -> jax.Array:
    """Each row by its own expert; rows of zeros do not stay zeros."""
    h = jnp.tanh(jnp.einsum("sd,sdf->sf", rows_SxD, params["w"][expert_S]) + params["a"][expert_S])
    return jnp.einsum("sf,sfd->sd", h, params["v"][expert_S]) + params["b"][expert_S]


def ffn_by_hand(params: Any, rows: np.ndarray, expert_N: np.ndarray, upstream: np.ndarray) -> dict[str, Any]:
    """Values and gradients, row by row in float64."""
    y, d_rows = np.zeros_like(rows), np.zeros_like(rows)
    gradient = {name: np.zeros_like(value) for name, value in params.items()}
    for n, e in enumerate(expert_N):
        h = np.tanh(rows[n] @ params["w"][e] + params["a"][e])
        y[n] = h @ params["v"][e] + params["b"][e]
        d_a = (params["v"][e] @ upstream[n]) * (1 - h**2)
        d_rows[n] = params["w"][e] @ d_a
        gradient["w"][e] += np.outer(rows[n], d_a)
        gradient["a"][e] += d_a
        gradient["v"][e] += np.outer(h, upstream[n])
        gradient["b"][e] += upstream[n]
    return {"y": y, "d_rows": d_rows, **gradient}


def mesh_of(case: str) -> Placement:
    chips, groups, _, _ = CASES[case]
    model = make_model(family="standard", num_experts=EXPERTS)
    return sharding.place(model, 16, Layout(expert=chips), jax.devices()[: groups * chips])


def exchanged(case: str, experts: exchange.Experts, params: Any, rows: jax.Array, expert_N: jax.Array) -> jax.Array:
    mesh = mesh_of(case).mesh
    batch = PartitionSpec(sharding.BATCH_AXES)
    return jax.shard_map(
        functools.partial(exchange.apply_experts, experts, axis=sharding.EXPERT, mesh_axes=mesh.axis_names),
        mesh=mesh,
        in_specs=(PartitionSpec(sharding.EXPERT), batch, batch),
        out_specs=batch,
        check_vma=False,
    )(params, rows, expert_N)


@functools.cache
def compiled(chips: int, groups: int, rows: int, limited: bool) -> Any:
    """Values and gradients of all routings of one size: one program, which does not know the routing.

    `limited` goes no further than the first round.
    """
    case = next(name for name, (*size, _) in CASES.items() if size == [chips, groups, rows])

    def run(params: Any, rows: jax.Array, expert_N: jax.Array, upstream: jax.Array) -> Any:
        y, pull = jax.vjp(lambda params, rows: exchanged(case, ffn, params, rows, expert_N), params, rows)
        gradient, d_rows = pull(upstream)
        return {"y": y, "d_rows": d_rows, **gradient}

    further = exchange._further_rounds
    try:
        if limited:
            exchange._further_rounds = lambda experts, axis, rows_NxD, *_: jnp.zeros_like(rows_NxD)
        drawn = draw(case)
        arguments = (drawn["params"], drawn["rows"], expert_of_rows(case), drawn["upstream"])
        return jax.jit(run).lower(*as_float32(arguments)).compile()
    finally:
        exchange._further_rounds = further


def as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.int32 if leaf.dtype == np.int64 else np.float32), tree)


def count_rounds(case: str) -> int:
    """Applications of the experts, over all devices: each device applies its own once a round."""
    seen = []

    def counting(params: Any, rows: jax.Array, expert_N: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: seen.append(1), rows[0, 0])
        return ffn(params, rows, expert_N)

    drawn = as_float32(draw(case))
    y = jax.jit(functools.partial(exchanged, case, counting))(
        drawn["params"], drawn["rows"], as_float32(expert_of_rows(case))
    )
    jax.block_until_ready(y)
    jax.effects_barrier()
    chips, groups, _, _ = CASES[case]
    assert len(seen) % (chips * groups) == 0
    return len(seen) // (chips * groups)


def all_cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case, (chips, groups, rows, _) in CASES.items():
        drawn = as_float32(draw(case))
        arguments = (drawn["params"], drawn["rows"], as_float32(expert_of_rows(case)), drawn["upstream"])
        found[case] = jax.tree.map(np.asarray, compiled(chips, groups, rows, False)(*arguments))
        if chips == 4 and groups == 1:
            found[case, "first round alone"] = np.asarray(compiled(chips, groups, rows, True)(*arguments)["y"])
            found[case, "rounds"] = count_rounds(case)
    return found


# Stored experts on a mesh

LAYERS = {(expert, model, top_k) for expert, model in ((1, 1), (2, 1), (8, 1), (4, 2), (1, 4)) for top_k in (1, 2)}
FEW = {(8, 1, 1), (4, 2, 2)}
BATCH, TOKENS = 32, 5


def layer(layout: Layout | None, top_k: int, dtype: str = "float32", family: str = "standard") -> Any:
    """Output, report and gradients of a layer on eight devices, or on one without any mesh."""
    changes = {"d_model": 12, "d_ff": 20, "num_heads": 4, "patch_size": 4, "num_experts": 8, "num_stages": 1}
    config = make_model(family=family, top_k=top_k, compute_dtype=dtype, **changes)
    module = moe.StandardMoe(config)
    rng = np.random.default_rng(0)
    x = (1 + rng.normal(size=(BATCH, TOKENS, 12))).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    shapes = {"up_kernel": (8, 12, 20), "up_bias": (8, 20), "down_kernel": (8, 20, 12), "down_bias": (8, 12)}
    params: Any = {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    # Nearly all tokens choose the first two experts, so that rows overflow.
    kernel = rng.normal(size=(12, 8)) / 4 + np.array([0.35, 0.2, *[0] * 6])
    params["router"] = {"kernel": kernel.astype(np.float32)}
    weight = (np.arange(BATCH) < 25).astype(np.float32)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params: Any, x: jax.Array) -> Any:
        y, report = module.apply({"params": params}, x, train=False, weight_B=weight)
        return (upstream * y).sum(), (y.astype(jnp.float32), report)

    if layout is None:
        (_, outputs), gradients = jax.jit(run)(params, x)
    else:
        placement = sharding.place(config, BATCH, layout)
        with placement.active():
            (_, outputs), gradients = jax.jit(run, in_shardings=(placement.replicated, placement.batch))(params, x)
    return jax.tree.map(np.asarray, (outputs, gradients))


def layers(meshes: set[tuple[int, int, int]]) -> dict[Any, Any]:
    found = {top_k: layer(None, top_k) for top_k in (1, 2)}
    return found | {
        (expert, model, top_k): layer(Layout(expert=expert, model=model), top_k) for expert, model, top_k in meshes
    }


def few_layers() -> dict[Any, Any]:
    found = layers(FEW)
    found["bfloat16"] = layer(Layout(expert=4, model=2), 2, "bfloat16")
    found["ternary"] = [layer(layout, 2, family="ternary") for layout in (None, Layout(expert=4, model=2))]
    return found


def everything() -> tuple[Any, Any]:
    return all_cases(), few_layers()


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any]:
    return on_devices(8, everything)


@pytest.mark.parametrize("case", CASES)
def test_every_row_meets_its_expert_wherever_that_is(found, case):
    drawn = draw(case)
    # Rounded to what the devices were given.
    exact = oracles.float64(as_float32(drawn))
    expected = ffn_by_hand(exact["params"], exact["rows"], expert_of_rows(case), exact["upstream"])
    assert found[0][case].keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[0][case][name], value, rtol=2e-5, atol=2e-5, err_msg=name)
    idle = sorted(set(range(EXPERTS)) - set(expert_of_rows(case).tolist()))
    for name in drawn["params"]:
        assert not found[0][case][name][idle].any()


def test_the_routings_need_the_rounds_that_they_are_made_for():
    assert {case: rounds_of(case) for case in ROUNDS_BY_HAND} == ROUNDS_BY_HAND
    assert {rounds_of(f"uneven, {chips} devices") for chips in (2, 4, 8)} >= {2, 5}


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(", 4 devices")])
def test_there_are_as_many_rounds_as_the_fullest_pair_needs(found, case):
    assert found[0][case, "rounds"] == rounds_of(case)
    first, all_rounds = found[0][case, "first round alone"], found[0][case]["y"]
    if rounds_of(case) == 1:
        np.testing.assert_array_equal(first, all_rounds)
    else:
        late = np.flatnonzero(np.any(first != all_rounds, axis=1))
        chips, _, rows, _ = CASES[case]
        excess = 0
        for own in expert_of_rows(case).reshape(-1, rows):
            counts = Counter((own // (EXPERTS // chips)).tolist()).values()
            excess += sum(max(count - exchange.capacity(rows, chips), 0) for count in counts)
        assert len(late) == excess > 0
        assert not first[late].any()


@pytest.mark.parametrize("mesh", sorted(FEW))
def test_stored_experts_on_a_mesh_equal_those_on_one_device(found, mesh):
    check_mesh(found[1], mesh)


@pytest.mark.long
def test_stored_experts_on_other_meshes_equal_those_on_one_device():
    found = on_devices(8, layers, LAYERS - FEW)
    for mesh in LAYERS - FEW:
        check_mesh(found, mesh)


def check_mesh(found: dict[Any, Any], mesh: tuple[int, int, int]) -> None:
    expert, model, top_k = mesh
    one, on_mesh = found[top_k], found[mesh]
    (y, report), gradients = one
    assert jax.tree.structure(on_mesh) == jax.tree.structure(one)
    for a, b in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6 * np.abs(b).max())
    np.testing.assert_array_equal(on_mesh[0][1].assignments_E, report.assignments_E)
    if expert >= 4:
        # The first device gets more rows from each other than a round takes, in the mean of the images that count.
        rows = BATCH * TOKENS * top_k * model // 8
        share = report.assignments_E[: 8 // expert].sum() / report.assignments_E.sum()
        assert share * rows > exchange.capacity(rows, expert)
    assert np.abs(y).max() > 0.5
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(gradients))


def test_ternary_experts_on_a_mesh_have_the_scales_of_one_device(found):
    # Over `model` the inputs of the down matrices are split: a part's mean would be another scale.
    one, on_mesh = found[1]["ternary"]
    for a, b in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6 * np.abs(b).max())
    assert np.abs(one[0][0] - found[1][2][0][0]).max() > 0.1


def test_stored_experts_on_a_mesh_compute_in_bfloat16(found):
    ((y, _), _), ((expected, _), _) = found[1]["bfloat16"], found[1][2]
    assert 1e-4 < np.abs(y - expected).max() < 0.05 * np.abs(expected).max()
