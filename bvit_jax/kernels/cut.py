"""How the kernels of `bvit_jax.kernels.ffn` divide an FFN so that it fits a TPU core's VMEM.

Rows go by tiles and experts' angles by chunks. An FFN whose prototypes do not fit is cut along its hidden channels into
strips that no rotation links: each is an FFN of its own, and their outputs add up.

Axes: D d_model, F d_ff, E experts, A angles of one rotation.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from bvit_jax import butterfly
from bvit_jax.kernels import rotation
from bvit_jax.kernels.ffn import BLOCK, Plan, Weights

Angles = dict[str, jax.Array]
"""Float32 (E, A) by the names of rotations."""
_CHUNKS = (512, 256, 128, 64, 32, 16, 8)
_TILES = (256, 128)
_PLANNED, _ALLOWED = 0.85, 0.95
"""Parts of VMEM that are planned for, and that a kernel may take."""
_MOST_ROWS = 2**21
"""Whose experts fit the 1 MiB of scalar memory, padding included."""
_ELSEWHERE = 64 * 2**20
"""VMEM to plan for where the kind of device is not known, bytes."""


class UnfitError(ValueError):
    """The kernels cannot run an FFN; the message says why."""


class Side(NamedTuple):
    """One of the four rotations: the name of its angles, its stages, and whether it turns back."""

    name: str
    stages: butterfly.Stages
    inverse: bool


Sides = tuple[Side, ...]
"""Four: before the first product and after it, before the second and after it."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """An FFN divided.

    Attributes:
        sides: the rotations of a strip.
        strips: into how many the hidden channels are cut, 1 for none.
        plan: of the kernels for a strip.
    """

    sides: Sides
    strips: int
    plan: Plan

    @property
    def interpreted(self) -> "Cut":
        """The same to run anywhere, slowly."""
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, interpret=True))


def choose(sides: Sides, d_model: int, d_ff: int, num_rows: int, num_experts: int, dtype: jnp.dtype) -> Cut:
    """Chooses as few strips, then as large chunks and tiles as fit.

    Args:
        sides: the rotations.
        d_model: channels of a token.
        d_ff: hidden channels.
        num_rows: tokens times the experts of each.
        num_experts: of all tokens.
        dtype: of the rows.

    Raises:
        UnfitError: if nothing fits, or channels do not fill whole registers.
    """
    for name, width in (("d_model", d_model), ("d_ff", d_ff)):
        if width % rotation.LANES:
            raise UnfitError(f"{name} = {width}: the fused kernels need a multiple of {rotation.LANES}")
    if num_rows > _MOST_ROWS:
        raise UnfitError(f"{num_rows:,} rows: the fused kernels keep account of at most {_MOST_ROWS:,} at a time")
    capacity = _vmem_bytes()
    rows = max(BLOCK, 1 << (num_rows - 1).bit_length())
    chunks = [num_experts, *(chunk for chunk in _CHUNKS if chunk < num_experts)]
    tiles = [min(tile, rows) for tile in _TILES]
    for strips, chunk, tile in itertools.product(_strip_counts(sides[1].stages, d_ff), chunks, tiles):
        of_strip = _narrow(sides, d_ff // strips) if strips > 1 else sides
        slots = _even_slots(num_rows, num_experts, chunk, tile)
        plan = Plan(_turns(of_strip), tile, chunk, int(capacity * _ALLOWED), slots, interpret=False)
        if _bytes(plan, d_model, d_ff // strips, jnp.dtype(dtype).itemsize) <= capacity * _PLANNED:
            return Cut(of_strip, strips, plan)
    raise UnfitError(
        f"d_model = {d_model}, d_ff = {d_ff}, {len(sides[1].stages)} stages: too large for the {capacity / 2**20:.0f} "
        "MiB of VMEM that the fused kernels have; fewer descending stages leave strips that fit, or a smaller d_ff"
    )


def strips_of(cut: Cut, angles: Angles, weights: Weights) -> Iterator[tuple[Angles, Weights]]:
    """Yields angles and weights of each strip."""
    if cut.strips == 1:
        yield angles, weights
        return
    wide = {side.name for side in (cut.sides[1], cut.sides[2])}
    depth = len(cut.sides[1].stages)  # 0: there are no angles to divide
    for strip in range(cut.strips):

        def own(x: jax.Array, groups: int, strip: int = strip) -> jax.Array:
            """Slices the strip out of the last axis, which holds so many groups of channels that rotations link."""
            parts = x.reshape(*x.shape[:-1], groups, cut.strips, -1)
            return parts[..., strip, :].reshape(*x.shape[:-1], -1)

        yield (
            {
                name: own(table, depth << (depth - 1)) if name in wide and depth else table
                for name, table in angles.items()
            },
            Weights(
                up_DxF=own(weights.up_DxF, 1 << depth),
                up_bias=own(weights.up_bias, 1 << depth),
                down_FxD=own(weights.down_FxD.T, 1 << depth).T,
            ),
        )


def _strip_counts(stages: butterfly.Stages, d_ff: int) -> list[int]:
    """Lists into how many strips of whole registers the hidden channels may be cut."""
    unit = d_ff >> len(stages)  # channels on one side of the last stage's pairs
    if stages != butterfly.make_stages(d_ff, len(stages)) or any(stage.length != 2 for stage in stages):
        return [1]  # rotations link neighbours
    return [1] + [count for count in range(2, unit // rotation.LANES + 1) if unit % (count * rotation.LANES) == 0]


def _narrow(sides: Sides, width: int) -> Sides:
    before, up, down, after = sides
    stages = butterfly.make_stages(width, len(up.stages))
    return before, up._replace(stages=stages), down._replace(stages=stages), after


def _turns(sides: Sides) -> tuple[rotation.Turn, ...]:
    starts, end = {}, 0
    for side in sides:
        if side.name not in starts:
            starts[side.name] = end
            end += rotation.num_columns(side.stages)
    return tuple(rotation.Turn(side.stages, starts[side.name], side.inverse) for side in sides)


def _bytes(plan: Plan, d_model: int, d_ff: int, itemsize: int) -> int:
    """VMEM of the backward kernel, the larger one; what passes by is there twice, on its way in or out."""
    columns = max(turn.start + rotation.num_columns(turn.stages) for turn in plan.turns)
    prototypes = 2 * d_model * d_ff * (itemsize + 4)
    rows = 2 * 4 * plan.tile * d_model * itemsize
    tables = 2 * 3 * (plan.chunk + -plan.chunk % 8) * columns * 4
    scratch = plan.tile * (d_model * (2 * itemsize + 4) + d_ff * (itemsize + 8))
    # Products in full float32 take their operands apart; seen of the compiler.
    spilled = 20 * plan.tile * d_ff if itemsize == 4 else 0
    return prototypes + rows + tables + scratch + spilled


def _even_slots(num_rows: int, num_experts: int, chunk: int, tile: int) -> int:
    """Slots of the tiles in use where rows fall evenly on experts."""
    by_expert = -(-num_rows // (num_experts * BLOCK)) * BLOCK
    sizes = [min(chunk, num_experts - first) for first in range(0, num_experts, chunk)]
    return sum(-(-size * by_expert // tile) * tile for size in sizes)


def _vmem_bytes() -> int:
    """VMEM of one core of the device that is traced for."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else _ELSEWHERE
