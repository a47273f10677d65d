"""Butterfly rotations of rows that lie in a TPU's vector registers: code for the inside of a Pallas kernel.

A register holds 8 rows of 128 channels (lanes). A stage whose pairs are whole registers apart takes its members as
slices, which move nothing. Any other stage is y = cos * x + sin * partner(x), with the partners brought by rolling
lanes, and the sign of the sine in its table. A table holds, for each expert, one column per pair of a stage of the
first kind and one per channel of a stage of the other kind, as rows of cosines and of sines.

Axes: R rows, D channels, E experts, A angles of one rotation, C columns of a table.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from bvit_jax import butterfly

LANES = 128


@dataclasses.dataclass(frozen=True)
class Turn:
    """One rotation of a kernel, and where its columns begin in the table."""

    stages: butterfly.Stages
    start: int
    inverse: bool

    @property
    def walk(self) -> list[tuple[butterfly.Stage, slice]]:
        """Stages with their columns, in the order of application."""
        steps, start = [], self.start
        for stage in self.stages:
            steps.append((stage, slice(start, start + _columns(stage))))
            start += _columns(stage)
        return steps[::-1] if self.inverse else steps


def num_columns(stages: butterfly.Stages) -> int:
    """Columns C of the table of one rotation."""
    return sum(map(_columns, stages))


def tables(angles_ExA: jax.Array, stages: butterfly.Stages) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of angles in the columns that `turn` reads, float32 (E, C) both."""
    none = angles_ExA[:, :0].astype(jnp.float32)
    cos, sin = [none], [none]
    for stage, angles in zip(stages, butterfly.by_stage(stages, angles_ExA.astype(jnp.float32)), strict=True):
        angles = angles.reshape(-1, stage.outer, len(stage.first), stage.inner)
        c, s = jnp.cos(angles), jnp.sin(angles)
        if not _in_registers(stage):
            alone = jnp.zeros((*c.shape[:-2], stage.length - 2 * c.shape[-2], c.shape[-1]))
            c, s = butterfly.join(stage, c, c, alone + 1), butterfly.join(stage, -s, s, alone)
        cos.append(c.reshape(c.shape[0], -1))
        sin.append(s.reshape(s.shape[0], -1))
    return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)


def angle_gradients(columns_ExC: jax.Array, stages: butterfly.Stages) -> jax.Array:
    """Turns what `unturn` leaves in the columns of a table into gradients of angles, (E, A)."""
    gradients, start = [columns_ExC[:, :0]], 0
    for stage in stages:
        part = columns_ExC[:, start : start + _columns(stage)]
        if not _in_registers(stage):
            first, second, _ = butterfly.split(stage, part)
            part = (second - first).reshape(part.shape[0], -1)
        gradients.append(part)
        start += _columns(stage)
    return jnp.concatenate(gradients, axis=-1)


def turn(turn: Turn, x_RxD: jax.Array, cos_ref: Any, sin_ref: Any) -> jax.Array:
    """Rotates rows of one expert, float32; `cos_ref` and `sin_ref` (1, C) are the rows of its table."""
    for stage, columns in turn.walk:
        x_RxD = _stage(stage, x_RxD, cos_ref[:, columns], _signed(turn, sin_ref[:, columns]))
    return x_RxD


def unturn(
    turn: Turn, y_RxD: jax.Array, dy_RxD: jax.Array, cos_ref: Any, sin_ref: Any, gradient_ref: Any
) -> tuple[jax.Array, jax.Array]:
    """Undoes `turn` for rows and their cotangents, and adds the gradients of the angles to `gradient_ref` (1, C)."""
    for stage, columns in reversed(turn.walk):
        gradient_ref[:, columns] += _signed(turn, _angle_gradient(stage, y_RxD, dy_RxD))
        cos, sin = cos_ref[:, columns], -_signed(turn, sin_ref[:, columns])
        y_RxD, dy_RxD = _stage(stage, y_RxD, cos, sin), _stage(stage, dy_RxD, cos, sin)
    return y_RxD, dy_RxD


def _in_registers(stage: butterfly.Stage) -> bool:
    return stage.length == 2 and stage.inner % LANES == 0


def _columns(stage: butterfly.Stage) -> int:
    return stage.num_angles if _in_registers(stage) else stage.outer * stage.length * stage.inner


def _signed(turn: Turn, x: jax.Array) -> jax.Array:
    return -x if turn.inverse else x


def _stage(stage: butterfly.Stage, x_RxD: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    if not _in_registers(stage):
        return cos * x_RxD + sin * _partner(stage, x_RxD)
    turned = []
    for pair, (x1, x2) in enumerate(_members(stage, x_RxD)):
        c, s = (table[:, pair * stage.inner : (pair + 1) * stage.inner] for table in (cos, sin))
        turned += [c * x1 - s * x2, s * x1 + c * x2]
    return jnp.concatenate(turned, axis=-1)


def _angle_gradient(stage: butterfly.Stage, y_RxD: jax.Array, dy_RxD: jax.Array) -> jax.Array:
    if not _in_registers(stage):
        return (dy_RxD * _partner(stage, y_RxD)).sum(axis=0, keepdims=True)
    members = zip(_members(stage, y_RxD), _members(stage, dy_RxD), strict=True)
    crossed = [(dy2 * y1 - dy1 * y2).sum(axis=0, keepdims=True) for (y1, y2), (dy1, dy2) in members]
    return jnp.concatenate(crossed, axis=-1)


def _members(stage: butterfly.Stage, x_RxD: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Slices the first and second members of pairs, (R, inner) both, for each position of the outer axis."""
    strips = [x_RxD[:, start : start + stage.inner] for start in range(0, x_RxD.shape[-1], stage.inner)]
    return list(zip(strips[::2], strips[1::2], strict=True))


def _partner(stage: butterfly.Stage, x_RxD: jax.Array) -> jax.Array:
    """Returns for each channel the one that it is paired with; anything for channels without a partner."""
    distance, width = stage.stride * stage.inner, x_RxD.shape[-1]
    if stage.length == 2 and LANES % (2 * distance) == 0:  # within a register
        strips = [x_RxD[:, start : start + LANES] for start in range(0, width, LANES)]
        return jnp.concatenate([_swapped(stage, strip, distance) for strip in strips], axis=-1)
    return _swapped(stage, x_RxD, distance)


def _swapped(stage: butterfly.Stage, x_RxD: jax.Array, distance: int) -> jax.Array:
    width = x_RxD.shape[-1]
    before = pltpu.roll(x_RxD, distance, axis=1)
    if width == 2 * distance:
        return before
    channel = jax.lax.broadcasted_iota(jnp.int32, x_RxD.shape, 1)
    position = jax.lax.rem(jax.lax.div(channel, stage.inner), stage.length)
    is_second = position & stage.stride != 0
    return jnp.where(is_second, before, pltpu.roll(x_RxD, width - distance, axis=1))
