"""Butterfly rotations of blocks of rows that share their angles, laid out for vector registers, by XLA.

Three things make them fast where `butterfly.rotate`, one row at a time, is bound by memory:

- Two stages that lie next to each other are applied in one pass: the channels are four parts, turned as wholes.
- Stages whose pairs lie nearer than `_NEAR` channels are applied to transposed channels, a run of them becoming rows,
  so that their pairs lie far apart. Between two rotations that both begin or end so, nothing is transposed: what lies
  in between (`arrange`, once for all rows) is.
- Sums over the rows of a block are written out: XLA's reductions over few elements are many times slower on CPUs.

Axes: P blocks, b rows of a block, D channels, E experts, A angles of one rotation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from bvit_jax import butterfly
from bvit_jax.butterfly import Stage, Stages

_NEAR = 8
T = TypeVar("T")
Parts = list[Any]
"""Arrays that are turned with each other, and None or what has no partner."""
Table = tuple[jax.Array, jax.Array]
"""Cosines and sines, both (P, A)."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """One or two stages that are applied in one pass.

    Attributes:
        stages: the layout of the stages; of channels already transposed, if `near`.
        near: whether channels are transposed.
    """

    stages: Stages
    near: bool

    @property
    def num_angles(self) -> int:
        """Angles A of its stages."""
        return butterfly.num_angles(self.stages)

    def split(self, x: jax.Array) -> Parts:
        """Splits (P, b, D) into parts that are turned with each other."""
        if len(self.stages) == 1:
            return list(butterfly.split(self.stages[0], x))
        x = x.reshape(*x.shape[:-1], -1, 4, self._inner)
        return [x[..., part, :] for part in range(4)]

    def join(self, parts: Parts) -> jax.Array:
        """Undoes `split`."""
        if len(self.stages) == 1:
            return butterfly.join(self.stages[0], *parts)
        # Joined by stacking, XLA keeps the arithmetic of each part apart; by concatenation it chooses per channel.
        x = jnp.stack(parts, axis=-2)
        return x.reshape(*x.shape[:-3], -1)

    def turns(self, cos: jax.Array, sin: jax.Array) -> list[list[tuple[int, int, jax.Array, jax.Array]]]:
        """Lists for each stage the parts that are turned, first and second, and by which cosines and sines."""
        if len(self.stages) == 1:
            (stage,) = self.stages
            shape = (-1, 1, stage.outer, len(stage.first), stage.inner)
            return [[(0, 1, cos.reshape(shape), sin.reshape(shape))]]
        turns = []
        tables = (butterfly.by_stage(self.stages, table) for table in (cos, sin))
        for stage, *own in zip(self.stages, *tables, strict=True):
            pairs = ((0, 1), (2, 3)) if stage.inner == self._inner else ((0, 2), (1, 3))
            c, s = (table.reshape(table.shape[0], 1, -1, 2, self._inner) for table in own)
            turns.append([(first, second, c[..., i, :], s[..., i, :]) for i, (first, second) in enumerate(pairs)])
        return turns

    @property
    def _inner(self) -> int:
        return min(stage.inner for stage in self.stages)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One rotation, its stages grouped into passes.

    Attributes:
        passes: in the order of the stages.
        dim: channels D.
        run: neighbouring channels that near passes turn among themselves, a divisor of D.
    """

    passes: tuple[Pass, ...]
    dim: int
    run: int


def make_plan(stages: Stages, dim: int) -> Plan:
    """Groups the stages of a rotation of `dim` channels."""
    run = max((stage.length * stage.inner for stage in stages if stage.inner < _NEAR), default=dim)
    passes: list[Pass] = []
    for stage in stages:
        near = stage.inner < _NEAR and run < dim
        if near:
            stage = Stage(stage.outer * run // dim, stage.length, stage.stride, stage.inner * dim // run)
        if passes and passes[-1].near == near and _pair(passes[-1].stages, stage):
            passes[-1] = Pass((*passes[-1].stages, stage), near)
        else:
            passes.append(Pass((stage,), near))
    return Plan(tuple(passes), dim, run)


def _pair(stages: Stages, stage: Stage) -> bool:
    """Tells whether one more stage makes a pass of two."""
    even = len(stages) == 1 and stages[0].length == stage.length == 2
    return even and (stages[0].inner == 2 * stage.inner or stage.inner == 2 * stages[0].inner)


def arrange(plan: Plan, x: jax.Array, end: int) -> jax.Array:
    """Orders channels, on the last axis, as the first pass (`end` 0) or the last (-1) takes and leaves them."""
    return _transposed(x, plan.dim // plan.run) if _is_near(plan, end) else x


def restore(plan: Plan, x: jax.Array, end: int) -> jax.Array:
    """Undoes `arrange`."""
    return _transposed(x, plan.run) if _is_near(plan, end) else x


def arrange_angles(plan: Plan, angles_ExA: jax.Array) -> jax.Array:
    """Orders angles as the passes take them."""
    near = [one.near for one in plan.passes for _ in one.stages]
    stages = tuple(stage for one in plan.passes for stage in one.stages)
    parts = [
        _transposed(part, plan.dim // plan.run) if is_near else part
        for is_near, part in zip(near, butterfly.by_stage(stages, angles_ExA), strict=True)
    ]
    return jnp.concatenate([angles_ExA[:, :0], *parts], axis=-1)


def turn(plan: Plan, x_PxbxD: jax.Array, table: Table, inverse: bool) -> jax.Array:
    """Turns the rows of each block by its angles.

    Args:
        plan: of the rotation.
        x_PxbxD: float32, channels arranged for the first pass (for the last, if `inverse`).
        table: of angles arranged for the passes.
        inverse: turn back.

    Returns:
        (P, b, D), arranged for the last pass (for the first, if `inverse`).
    """
    near, x = _is_near(plan, -1 if inverse else 0), x_PxbxD
    for one, cos, sin in _walk(plan, table, inverse):
        x = _meet(plan, x, near, one.near)
        parts, near = one.split(x), one.near
        for turns in _in_order(one.turns(cos, sin), inverse):
            _turn(parts, turns, inverse)
        x = one.join(parts)
    return x


def unturn(
    plan: Plan, y_PxbxD: jax.Array, dy_PxbxD: jax.Array, table: Table, inverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents of the input of `turn` (P, b, D), and of its angles (P, A), from output and cotangent."""
    near, y, dy = _is_near(plan, 0 if inverse else -1), y_PxbxD, dy_PxbxD
    gradients: list[jax.Array] = []
    for one, cos, sin in _walk(plan, table, not inverse):
        y, dy = _meet(plan, y, near, one.near), _meet(plan, dy, near, one.near)
        parts, d_parts, near = one.split(y), one.split(dy), one.near
        for turns in _in_order(one.turns(cos, sin), not inverse):
            gradients.append(_angle_gradient(parts, d_parts, turns))
            _turn(parts, turns, not inverse)
            _turn(d_parts, turns, not inverse)
        y, dy = one.join(parts), one.join(d_parts)
    none = jnp.zeros((y.shape[0], 0), y.dtype)
    d_angles_PxA = jnp.concatenate([none, *_in_order(gradients, not inverse)], axis=-1)
    return dy, -d_angles_PxA if inverse else d_angles_PxA


def _is_near(plan: Plan, end: int) -> bool:
    return bool(plan.passes) and plan.passes[end].near


def _transposed(x: jax.Array, rows: int) -> jax.Array:
    """Transposes the last axis as a matrix of so many rows."""
    return x.reshape(*x.shape[:-1], rows, -1).swapaxes(-1, -2).reshape(x.shape)


def _meet(plan: Plan, x: jax.Array, near: bool, wanted: bool) -> jax.Array:
    """Transposes channels if the next pass wants it."""
    return x if near == wanted else _transposed(x, plan.dim // plan.run if wanted else plan.run)


def _in_order(steps: Sequence[T], reverse: bool) -> Sequence[T]:
    return steps[::-1] if reverse else steps


def _walk(plan: Plan, table: Table, inverse: bool) -> Sequence[tuple[Pass, jax.Array, jax.Array]]:
    """Lists passes with their cosines and sines, in the order of application."""
    walk, start = [], 0
    for one in plan.passes:
        cos, sin = (part[:, start : start + one.num_angles] for part in table)
        walk.append((one, cos, sin))
        start += one.num_angles
    return _in_order(walk, inverse)


def _turn(parts: Parts, turns: list[tuple[int, int, jax.Array, jax.Array]], inverse: bool) -> None:
    for first, second, cos, sin in turns:
        sin = -sin if inverse else sin
        x1, x2 = parts[first], parts[second]
        parts[first], parts[second] = cos * x1 - sin * x2, sin * x1 + cos * x2


def _angle_gradient(parts: Parts, d_parts: Parts, turns: list[tuple[int, int, jax.Array, jax.Array]]) -> jax.Array:
    """Returns the cotangents (P, A) of one stage's angles from its outputs and their cotangents."""
    by_pair = [_sum_rows(d_parts[j] * parts[i] - d_parts[i] * parts[j]) for i, j, _, _ in turns]
    gradient = by_pair[0] if len(by_pair) == 1 else jnp.stack(by_pair, axis=-2)
    return gradient.reshape(gradient.shape[0], -1)


def _sum_rows(x_Pxb: jax.Array) -> jax.Array:
    total = x_Pxb[:, 0]
    for row in range(1, x_Pxb.shape[1]):
        total = total + x_Pxb[:, row]
    return total
