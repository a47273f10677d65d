import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from bvit_jax import butterfly, topology
from bvit_jax.kernels import cut as cutting
from bvit_jax.kernels import ffn
from bvit_jax.kernels.cut import Cut, Side, Sides, UnfitError
from bvit_jax.kernels.ffn import Plan, Weights

MIB = 2**20
BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


def make_sides(
    d_model: int, d_ff: int, stages: int = 2, order: butterfly.StrideOrder = "descending", tied: bool = False
) -> Sides:
    narrow, wide = (
        butterfly.make_stages(dim, min(stages, butterfly.max_stages(dim)), order) for dim in (d_model, d_ff)
    )
    last = ("phi", "theta") if tied else ("down_theta", "down_phi")
    return (
        Side("theta", narrow, True),
        Side("phi", wide, False),
        Side(last[0], wide, True),
        Side(last[1], narrow, False),
    )


@contextlib.contextmanager
def vmem(size: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_vmem_bytes", lambda: int(size))
        yield


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    mesh = Mesh(np.array(topology.devices_of(name)), ("data",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


# What is chosen


def test_all_in_one_where_it_fits() -> None:
    with vmem(64 * MIB):
        cut = cutting.choose(make_sides(256, 1024), 256, 1024, 16384, 64, BF16)
    assert (cut.strips, cut.plan.chunk, cut.plan.tile, cut.plan.interpret) == (1, 64, 256, False)
    assert cut.sides == make_sides(256, 1024)
    assert cut.plan.vmem_bytes == int(0.95 * 64 * MIB)
    # Columns of 2 stages: of 256 channels 128 (whole registers apart) + 256; of 1024 channels 512 + 512.
    assert [turn.start for turn in cut.plan.turns] == [0, 384, 1408, 2432]
    assert [turn.inverse for turn in cut.plan.turns] == [True, False, True, False]


def test_tied_rotations_share_their_columns() -> None:
    with vmem(64 * MIB):
        cut = cutting.choose(make_sides(256, 1024, tied=True), 256, 1024, 16384, 64, BF16)
    assert [turn.start for turn in cut.plan.turns] == [0, 384, 384, 0]


@pytest.mark.parametrize(("rows", "tile"), [(1, 16), (16, 16), (17, 32), (100, 128), (129, 256), (10**6, 256)])
def test_tiles_are_no_larger_than_the_rows_need(rows: int, tile: int) -> None:
    with vmem(64 * MIB):
        assert cutting.choose(make_sides(128, 256), 128, 256, rows, 4, F32).plan.tile == tile


def test_bytes_by_hand() -> None:
    # d 128, d_ff 256, bfloat16, 10 experts (16 rows of registers), tile 32, one stage. Columns: of 128 channels 128
    # (half a register), of 256 channels 128 pairs, each twice: 512.
    # Prototypes and their sums: 2 * 128 * 256 * (2 + 4) = 393,216. Rows x, y, dy, dx, twice: 2 * 4 * 32 * 128 * 2 =
    # 65,536. Cosines, sines, gradients, twice: 2 * 3 * 16 * 512 * 4 = 196,608. Scratch of a tile, by channel: of
    # d_model u, dz (2 B each) and du (4 B), of d_ff v (2 B), h and dv (4 B): 32 * (128 * 8 + 256 * 10) = 114,688.
    plan = Plan(cutting._turns(make_sides(128, 256, 1)), 32, 10, 0, 0, False)
    assert cutting._bytes(plan, 128, 256, 2) == 393_216 + 65_536 + 196_608 + 114_688


@given(
    st.sampled_from([(256, 1024), (128, 2048), (384, 1536), (768, 3072), (640, 1280)]),
    st.integers(1, 600),
    st.integers(1, 4),
    st.sampled_from([BF16, F32]),
    st.floats(0.5, 128),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_chosen_fits_and_nothing_simpler_does(
    widths: tuple[int, int], experts: int, stages: int, dtype: np.dtype, mib: float, tied: bool
) -> None:
    d_model, d_ff = widths
    sides = make_sides(d_model, d_ff, stages, tied=tied)

    def bytes_of(strips: int, chunk: int, tile: int) -> int:
        narrow = cutting._narrow(sides, d_ff // strips) if strips > 1 else sides
        return cutting._bytes(
            Plan(cutting._turns(narrow), tile, chunk, 0, 0, False), d_model, d_ff // strips, dtype.itemsize
        )

    planned = 0.85 * int(mib * MIB)
    with vmem(mib * MIB):
        try:
            cut = cutting.choose(sides, d_model, d_ff, 4096, experts, dtype)
        except UnfitError:
            strips = max(cutting._strip_counts(sides[1].stages, d_ff))
            assert bytes_of(strips, min(experts, 8), 128) > planned
            return
    plan, width = cut.plan, d_ff // cut.strips
    assert bytes_of(cut.strips, plan.chunk, plan.tile) <= planned
    assert plan.chunk == experts or (plan.chunk < experts and plan.chunk % 8 == 0)
    assert plan.tile in (128, 256)
    assert width % ffn.BLOCK == d_ff % cut.strips == 0
    assert [turn.stages for turn in plan.turns] == [side.stages for side in cut.sides]
    assert cut.sides[1].stages == cut.sides[2].stages == butterfly.make_stages(width, stages)
    smaller = [count for count in cutting._strip_counts(sides[1].stages, d_ff) if count < cut.strips]
    assert all(bytes_of(strips, min(experts, 8), 128) > planned for strips in smaller)
    larger = [chunk for chunk in (experts, 512, 256, 128, 64, 32, 16, 8) if plan.chunk < chunk <= experts]
    assert all(bytes_of(cut.strips, chunk, 128) > planned for chunk in larger)
    if plan.tile == 128:
        assert bytes_of(cut.strips, plan.chunk, 256) > planned


def test_strip_counts_by_hand() -> None:
    # 2048 channels, 2 stages: pairs at distances 1024 and 512, so four runs of 512 channels, 4 registers each.
    assert cutting._strip_counts(butterfly.make_stages(2048, 2), 2048) == [1, 2, 4]
    assert cutting._strip_counts(butterfly.make_stages(768, 1), 768) == [1, 3]  # two runs of 3 registers
    assert cutting._strip_counts(butterfly.make_stages(512, 2), 512) == [1]  # runs of one register
    assert cutting._strip_counts(butterfly.make_stages(2048, 5), 2048) == [1]  # runs of half a register
    assert cutting._strip_counts(butterfly.make_stages(2048, 2, "ascending"), 2048) == [1]
    assert cutting._strip_counts(butterfly.make_stages(640, 8), 640) == [1]  # odd stages
    assert cutting._strip_counts(butterfly.make_stages(640, 9), 640) == [1]
    assert cutting._strip_counts((), 512) == [1, 2, 4]  # no rotation links channels: any strips of whole registers


# What does not fit


@pytest.mark.parametrize(
    ("widths", "said"), [((100, 256), "d_model = 100"), ((128, 200), "d_ff = 200"), ((64, 64), "d_model = 64")]
)
def test_channels_that_fill_no_whole_registers(widths: tuple[int, int], said: str) -> None:
    with pytest.raises(UnfitError, match=f"{said}: .* a multiple of 128"):
        cutting.choose(make_sides(*widths, stages=1), *widths, 64, 4, F32)


@pytest.mark.parametrize(("stages", "order"), [(12, "descending"), (2, "ascending"), (6, "descending")])
def test_what_is_too_large_and_cannot_be_cut(stages: int, order: butterfly.StrideOrder) -> None:
    with vmem(16 * MIB):
        with pytest.raises(UnfitError, match=rf"d_model = 768, d_ff = 3072, {stages} stages: too large for the 16 MiB"):
            cutting.choose(make_sides(768, 3072, stages, order), 768, 3072, 4096, 64, BF16)
        assert cutting.choose(make_sides(768, 3072, 2), 768, 3072, 4096, 64, BF16).strips == 3


def test_what_is_too_large_even_in_strips() -> None:
    with vmem(MIB), pytest.raises(UnfitError, match=r"d_model = 1024, .* too large for the 1 MiB of VMEM"):
        cutting.choose(make_sides(1024, 2048), 1024, 2048, 4096, 64, BF16)


# Strips


def make_cut(sides: Sides, d_ff: int, strips: int) -> Cut:
    sides = cutting._narrow(sides, d_ff // strips) if strips > 1 else sides
    return Cut(sides, strips, Plan(cutting._turns(sides), 16, 8, 0, 0, True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("d_ff", "stages", "strips"), [(16, 0, 2), (16, 1, 2), (24, 1, 3), (32, 2, 2), (32, 2, 4), (64, 3, 2)]
)
def test_the_ffns_of_strips_add_up_to_the_whole(d_ff: int, stages: int, strips: int, tied: bool) -> None:
    rng = np.random.default_rng(0)
    sides, d_model = make_sides(8, d_ff, stages, tied=tied), 8
    angles = {side.name: rng.uniform(-3, 3, (2, butterfly.num_angles(side.stages))) for side in sides}
    up, up_bias, down = (rng.normal(size=size) for size in ((8, d_ff), (d_ff,), (d_ff, 8)))
    x, expert, dy = rng.normal(size=(5, d_model)), rng.integers(2, size=(5, 2)), rng.normal(size=(5, 2, 8))

    def outputs(angles: dict[str, np.ndarray], weights: Weights) -> np.ndarray:
        of_oracle = [oracles.Side(side.name, stages, "descending", side.inverse) for side in sides]
        leaves = [weights.up_DxF, weights.up_bias, weights.down_FxD, np.zeros(8)]
        return oracles.rotated_ffn(of_oracle, x, expert, angles, leaves, dy)[0]

    whole = Weights(up, up_bias, down)
    parts = list(cutting.strips_of(make_cut(sides, d_ff, strips), angles, whole))
    assert len(parts) == strips
    assert {part.up_DxF.shape for _, part in parts} == {(8, d_ff // strips)}
    np.testing.assert_allclose(sum(outputs(*part) for part in parts), outputs(angles, whole), atol=1e-12)


@pytest.mark.parametrize("strips", [1, 2, 4])
def test_strips_take_every_hidden_channel_and_angle_once(strips: int) -> None:
    sides = make_sides(8, 32, 2)
    angles = {side.name: np.arange(2 * butterfly.num_angles(side.stages)).reshape(2, -1) for side in sides}
    weights = Weights(np.arange(256).reshape(8, 32), np.arange(32), np.arange(256).reshape(32, 8))
    parts = list(cutting.strips_of(make_cut(sides, 32, strips), angles, weights))
    for name in ("phi", "down_theta"):
        taken = np.concatenate([part[name] for part, _ in parts], axis=-1)
        np.testing.assert_array_equal(np.sort(taken, axis=-1), angles[name])
    for name in ("theta", "down_phi"):  # of all strips alike
        assert all(part[name] is angles[name] for part, _ in parts)
    for name in ("up_DxF", "up_bias", "down_FxD"):
        taken = np.concatenate([getattr(part, name).flatten() for _, part in parts])
        np.testing.assert_array_equal(np.sort(taken), getattr(weights, name).flatten())


def test_strips_by_hand() -> None:
    # 16 channels, one stage: i meets i + 8. Of two strips the first has 0-3 and 8-11.
    sides = make_sides(8, 16, 1)
    angles = {side.name: np.arange(butterfly.num_angles(side.stages))[None] for side in sides}
    weights = Weights(np.tile(np.arange(16), (8, 1)), np.arange(16), np.tile(np.arange(16)[:, None], 8))
    (first, of_first), (second, of_second) = cutting.strips_of(make_cut(sides, 16, 2), angles, weights)
    np.testing.assert_array_equal(of_first.up_bias, [0, 1, 2, 3, 8, 9, 10, 11])
    np.testing.assert_array_equal(of_second.up_bias, [4, 5, 6, 7, 12, 13, 14, 15])
    np.testing.assert_array_equal(of_first.up_DxF[3], of_first.up_bias)
    np.testing.assert_array_equal(of_second.down_FxD[:, 3], of_second.up_bias)
    np.testing.assert_array_equal(first["phi"], [[0, 1, 2, 3]])
    np.testing.assert_array_equal(second["phi"], [[4, 5, 6, 7]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strips_keep_to_strict_promotion(dtype: str) -> None:
    sides = make_sides(8, 16, 1)
    angles = {side.name: jnp.ones((1, butterfly.num_angles(side.stages))) for side in sides}
    weights = Weights(*(jnp.ones(size, dtype) for size in ((8, 16), (16,), (16, 8))))
    with jax.numpy_dtype_promotion("strict"):
        parts = list(cutting.strips_of(make_cut(sides, 16, 2), angles, weights))
    assert {leaf.dtype for _, part in parts for leaf in jax.tree.leaves(part)} == {jnp.dtype(dtype)}


# Devices


def test_the_device_traced_for_says_how_much_vmem_there_is() -> None:
    sizes = {"v4:2x2x1": 16, "v5e:2x2": 128, "v5p:2x2x1": 64, "v6e:2x2": 128}
    for name, mib in sizes.items():
        with traced_for(name):
            assert cutting._vmem_bytes() == mib * MIB
    assert cutting._vmem_bytes() == 64 * MIB  # on a CPU


def test_v4_has_little() -> None:
    with traced_for("v4:2x2x1"):
        cut = cutting.choose(make_sides(768, 3072), 768, 3072, 4096, 64, BF16)
    assert cut.strips > 1
    assert cut.plan.vmem_bytes == int(0.95 * 16 * MIB)
    with traced_for("v5e:2x2"):
        assert cutting.choose(make_sides(768, 3072), 768, 3072, 4096, 64, BF16).strips == 1


@functools.cache
def compiles(name: str, widths: tuple[int, int], experts: int, plan: Plan, dtype: str) -> bool:
    """Whether the TPU compiler gets the backward kernel into the VMEM that its plan allows."""
    sharding = jax.sharding.SingleDeviceSharding(topology.devices_of(name)[0])

    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    d_model, d_ff = widths
    columns = max(turn.start + cutting.rotation.num_columns(turn.stages) for turn in plan.turns)
    tiles = ffn.Tiles(
        array(4, dtype="int32"), array(4 * plan.tile // ffn.BLOCK, dtype="int32"), array(1, dtype="int32")
    )
    rows, table = array(4 * plan.tile, d_model, dtype=dtype), (array(experts, columns),) * 2
    weights = Weights(array(d_model, d_ff, dtype=dtype), array(1, d_ff), array(d_ff, d_model, dtype=dtype))
    lowered = jax.jit(functools.partial(ffn.backward, plan)).lower(tiles, rows, table, weights, rows, rows)
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "scoped vmem limit" not in message and "in memory space vmem" not in message:
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("name", "widths", "experts", "stages", "dtype"),
    [
        ("v4:2x2x1", (256, 1024), 100, 2, "bfloat16"),
        pytest.param("v4:2x2x1", (256, 1024), 8, 10, "float32", marks=pytest.mark.long),
    ],
)
def test_the_plan_is_what_the_compiler_needs(
    name: str, widths: tuple[int, int], experts: int, stages: int, dtype: str, uncached: None
) -> None:
    with traced_for(name):
        cut = cutting.choose(make_sides(*widths, stages), *widths, 4096, experts, jnp.dtype(dtype))
    assert cut.strips == 1
    assert compiles(name, widths, experts, cut.plan, dtype)
    planned = cutting._bytes(cut.plan, *widths, jnp.dtype(dtype).itemsize)
    assert not compiles(name, widths, experts, dataclasses.replace(cut.plan, vmem_bytes=int(0.95 * planned)), dtype)
    if dtype == "bfloat16":  # biases and spilled registers are not planned for; of float32 these are more
        just = dataclasses.replace(cut.plan, vmem_bytes=int(planned * 0.95 / 0.85))
        assert compiles(name, widths, experts, just, dtype)


def test_a_kernel_right_at_the_planned_limit_compiles_for_v4(uncached: None) -> None:
    # The largest d_ff, in registers, that is taken whole.
    sides, fits = {}, []
    with traced_for("v4:2x2x1"):
        for d_ff in range(128, 4096, 128):
            sides[d_ff] = make_sides(256, d_ff, 1)
            try:
                cut = cutting.choose(sides[d_ff], 256, d_ff, 4096, 24, BF16)
            except UnfitError:
                continue
            if cut.strips == 1:
                fits.append((d_ff, cut.plan))
    d_ff, plan = fits[-1]
    planned = cutting._bytes(plan, 256, d_ff, 2)
    assert 0.97 * 0.85 < planned / (16 * MIB) <= 0.85
    assert compiles("v4:2x2x1", (256, d_ff), 24, plan, "bfloat16")


def test_float32_right_at_the_planned_limit_compiles_for_v4(uncached: None) -> None:
    with traced_for("v4:2x2x1"):
        cut = cutting.choose(make_sides(256, 2048), 256, 2048, 4096, 64, F32)
    assert compiles("v4:2x2x1", (256, 2048 // cut.strips), 64, cut.plan, "float32")
