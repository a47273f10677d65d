"""Butterfly rotations: orthogonal maps built from stages of plane (Givens) rotations.

A stage splits the D channels into disjoint pairs and turns each pair by its own angle,

    y1 = c * x1 - s * x2        y2 = s * x1 + c * x2        c = cos(angle), s = sin(angle)

and a rotation B(angles) is the product of L stages. Every stage is a permuted block-diagonal of 2 x 2 rotations,
so B is orthogonal for every D, every L and all angles (float32 ones of up to a million radians, beyond which they are
too coarse); nothing is padded or cut off.

**Which channel meets which.** Write D = 2^a * q with q odd.

- The a *even* stages pair all channels (D / 2 angles each), at distances h
    `descending`: h = D/2, D/4, ..., q    first channels far apart, contiguous halves (vector- and lane-friendly);
    `ascending`:  h = 1, 2, ..., 2^(a-1)  first neighbours, the order of the public PyTorch code.
- If q > 1, ceil(log2 q) *odd* stages follow. They act along an axis of length q: inside each run of q neighbouring
  channels (`descending`), or between the q runs of 2^a channels (`ascending`). Position i of that axis meets
  position i XOR h (h a power of two, in the same order of size); a position whose partner lies beyond q is left alone.

With all a + ceil(log2 q) stages and q = 1, every output depends on every input. With q > 1 every channel is linked to
every other, yet a position left alone may reach some of them only through a second rotation.

Shapes: D channels, A angles of one rotation (all stages, flattened), E experts; `...` any leading axes.

References:
    Dao et al., "Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations", arXiv 1903.05895.
    Karmore, "ButterflyMoE", arXiv 2601.13563, and "ButterflyViT", arXiv 2603.06746.
"""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

StrideOrder = Literal["descending", "ascending"]
STRIDE_ORDERS: tuple[StrideOrder, ...] = ("descending", "ascending")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: channels viewed as (outer, length, inner), position i of the middle axis turned with i + stride."""

    outer: int
    length: int
    stride: int
    inner: int

    @property
    def first(self) -> np.ndarray:
        """Positions on the middle axis that are the first of a pair, int64 (pairs,)."""
        position = np.arange(self.length)
        return position[(position & self.stride == 0) & (position + self.stride < self.length)]

    @property
    def num_angles(self) -> int:
        """Number of angles, one per pair of channels."""
        return self.outer * len(self.first) * self.inner


Stages = tuple[Stage, ...]


def max_stages(dim: int) -> int:
    """Number of stages of a full-depth rotation of `dim` channels: log2(dim) for powers of two."""
    return (dim - 1).bit_length() if dim > 1 else 0


def make_stages(dim: int, num_stages: int, order: StrideOrder = "descending") -> Stages:
    """Lays out the first `num_stages` stages of a rotation of `dim` channels (module docstring: who meets whom).

    Args:
        dim: number of channels D, at least 1.
        num_stages: depth L, from 0 (the identity) to `max_stages(dim)`.
        order: `descending` or `ascending` strides.

    Raises:
        ValueError: for no channels, an impossible depth or an unknown order.
    """
    if order not in STRIDE_ORDERS:
        raise ValueError(f"stride order {order!r} is unknown; choose one of {', '.join(STRIDE_ORDERS)}")
    if dim < 1:
        raise ValueError(f"{dim} channels cannot be rotated; there must be at least 1")
    if not 0 <= num_stages <= max_stages(dim):
        raise ValueError(f"{num_stages} stages do not fit {dim} channels; choose 0 to {max_stages(dim)}")
    odd = dim
    while odd % 2 == 0:
        odd //= 2
    run = dim // odd  # 2^a
    halves = [run >> level for level in range(1, run.bit_length())]  # 2^(a-1), ..., 2, 1
    odd_strides = [1 << bit for bit in reversed(range(max_stages(odd)))]
    if order == "descending":
        even = [Stage(outer=run // (2 * h), length=2, stride=1, inner=h * odd) for h in halves]
        tail = [Stage(outer=run, length=odd, stride=h, inner=1) for h in odd_strides]
    else:
        even = [Stage(outer=dim // (2 * h), length=2, stride=1, inner=h) for h in reversed(halves)]
        tail = [Stage(outer=1, length=odd, stride=h, inner=run) for h in reversed(odd_strides)]
    return tuple((even + tail)[:num_stages])


def num_angles(stages: Stages) -> int:
    """Number of angles A of one rotation; L * D / 2 where every stage pairs all channels."""
    return sum(stage.num_angles for stage in stages)


def by_stage(stages: Stages, x: jax.Array) -> list[jax.Array]:
    """Splits the last axis, which runs over the angles of all stages, into those of each."""
    ends = itertools.accumulate(stage.num_angles for stage in stages)
    return [x[..., end - stage.num_angles : end] for stage, end in zip(stages, ends, strict=True)]


def cos_sin(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, in the dtype of the angles.

    In float32 by polynomials on [-pi/4, pi/4] (Cephes), exact to about 1e-7 for angles up to some thousands: on CPUs
    XLA takes cosines and sines one at a time, fourteen times slower, and with many experts they are many.
    """
    if angles.dtype != jnp.float32:
        return jnp.cos(angles), jnp.sin(angles)
    quarters = jnp.round(angles * jnp.float32(2 / np.pi))
    # pi/2 in three parts, the first two of few bits, so that their products are exact.
    x = ((angles - quarters * 1.5703125) - quarters * 4.837512969970703125e-4) - quarters * 7.549789948768648e-8
    x2 = x * x
    sin = x + x * x2 * (-1.6666654611e-1 + x2 * (8.3321608736e-3 + x2 * -1.9515295891e-4))
    cos = 1 - 0.5 * x2 + x2 * x2 * (4.166664568298827e-2 + x2 * (-1.388731625493765e-3 + x2 * 2.443315711809948e-5))
    quadrant = quarters.astype(jnp.int32)
    odd = quadrant & 1 == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    return jnp.where((quadrant + 1) & 2 == 2, -cos, cos), jnp.where(quadrant & 2 == 2, -sin, sin)


def rotate(
    x: jax.Array,
    angles: jax.Array,
    stages: Stages,
    *,
    inverse: bool = False,
    expert: jax.Array | None = None,
) -> jax.Array:
    """Applies B(angles), or its inverse B(angles)^T, to the last axis of `x`.

    The arithmetic is in float32 (float64 for float64 inputs) whatever the dtype of `x`. The backward pass saves the
    output alone: a rotation is undone by turning back, so stage inputs are recomputed, and with the outputs (y1, y2)
    of a stage and their cotangents, d(angle) = dy2 * y1 - dy1 * y2.

    Args:
        x: (..., D), floating.
        angles: (A,) for one rotation shared by all of `x` (use `jax.vmap` to run one per expert), or, with `expert`,
            a table (E, A). Radians.
        stages: layout from `make_stages`.
        inverse: turn back instead.
        expert: int (...), the row of `angles` to use for each vector of `x`.

    Returns:
        (..., D), dtype of `x`.

    Raises:
        ValueError: if the shapes do not fit each other or the stages.
    """
    _check_shapes(x.shape, angles.shape, stages, None if expert is None else expert.shape)
    if not stages:
        return x
    return _rotate(x, angles, expert, stages, inverse)


def _check_shapes(x: tuple[int, ...], angles: tuple[int, ...], stages: Stages, expert: tuple[int, ...] | None) -> None:
    expected = num_angles(stages)
    if angles[-1:] != (expected,) or len(angles) != (1 if expert is None else 2):
        wanted = f"({expected},)" if expert is None else f"(experts, {expected})"
        raise ValueError(f"angles have shape {angles}; these stages need {wanted}")
    if stages and x[-1] != stages[0].outer * stages[0].length * stages[0].inner:
        raise ValueError(f"x has {x[-1]} channels; these stages turn another number")
    if expert is not None and expert != x[:-1]:
        raise ValueError(f"expert has shape {expert}; x of shape {x} needs {x[:-1]}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _rotate(x: jax.Array, angles: jax.Array, expert: jax.Array | None, stages: Stages, inverse: bool) -> jax.Array:
    walk = _in_order(stages, angles, expert, x, inverse)
    y = x.astype(walk[0][1].dtype)
    for stage, cos, sin in walk:
        y = join(stage, *_turn(*split(stage, y), cos, sin))
    return y.astype(x.dtype)


def _rotate_forward(
    x: jax.Array, angles: jax.Array, expert: jax.Array | None, stages: Stages, inverse: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    y = _rotate(x, angles, expert, stages, inverse)
    return y, (y, angles, expert)


def _rotate_backward(
    stages: Stages, inverse: bool, saved: tuple[jax.Array, jax.Array, jax.Array | None], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    y, angles, expert = saved
    x_dtype = y.dtype
    walk = _in_order(stages, angles, expert, y, inverse)
    y, dy = y.astype(walk[0][1].dtype), dy.astype(walk[0][1].dtype)
    gradients: list[jax.Array] = []
    for stage, cos, sin in reversed(walk):
        (y1, y2, y_alone), (dy1, dy2, dy_alone) = split(stage, y), split(stage, dy)
        gradients.append((dy2 * y1 - dy1 * y2).reshape(-1, stage.num_angles))
        y = join(stage, *_turn(y1, y2, y_alone, cos, -sin))
        dy = join(stage, *_turn(dy1, dy2, dy_alone, cos, -sin))
    d_angles_NxA = jnp.concatenate(gradients if inverse else gradients[::-1], axis=-1)
    if expert is None:
        d_angles = d_angles_NxA.sum(axis=0)
    else:
        d_angles = jax.ops.segment_sum(d_angles_NxA, expert.reshape(-1), num_segments=angles.shape[0])
    return dy.astype(x_dtype), (-d_angles if inverse else d_angles).astype(angles.dtype), None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _in_order(
    stages: Stages, angles: jax.Array, expert: jax.Array | None, x: jax.Array, inverse: bool
) -> list[tuple[Stage, jax.Array, jax.Array]]:
    """Lists (stage, cos, sin) in the order of application; both as (..., outer, pairs, inner)."""
    angles = angles.astype(np.promote_types(x.dtype, np.float32))
    # Both tables side by side: one gather of long rows is several times faster than one per stage and function.
    table = jnp.concatenate(cos_sin(-angles if inverse else angles), axis=-1)
    rows = table.reshape(*(1,) * (x.ndim - 1), -1) if expert is None else table[expert]
    cos, sin = jnp.split(rows, 2, axis=-1)
    walk = []
    for stage, c, s in zip(stages, by_stage(stages, cos), by_stage(stages, sin), strict=True):
        shape = (*cos.shape[:-1], stage.outer, len(stage.first), stage.inner)
        walk.append((stage, c.reshape(shape), s.reshape(shape)))
    return walk[::-1] if inverse else walk


def split(stage: Stage, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Splits (..., D) into the pairs' first and second members, (..., outer, pairs, inner), and the rest."""
    x = x.reshape(*x.shape[:-1], stage.outer, stage.length, stage.inner)
    if stage.length == 2:
        return x[..., :1, :], x[..., 1:, :], None
    first = stage.first
    alone = np.setdiff1d(np.arange(stage.length), np.concatenate([first, first + stage.stride]))
    return x[..., first, :], x[..., first + stage.stride, :], x[..., alone, :]


def join(stage: Stage, x1: jax.Array, x2: jax.Array, alone: jax.Array | None) -> jax.Array:
    """Undoes `split`."""
    x = jnp.concatenate([x1, x2] if alone is None else [x1, x2, alone], axis=-2)
    if alone is not None:
        first = stage.first
        paired = np.concatenate([first, first + stage.stride])
        order = np.concatenate([paired, np.setdiff1d(np.arange(stage.length), paired)])
        x = x[..., np.argsort(order), :]
    return x.reshape(*x.shape[:-3], stage.outer * stage.length * stage.inner)


def _turn(
    x1: jax.Array, x2: jax.Array, alone: jax.Array | None, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    return cos * x1 - sin * x2, sin * x1 + cos * x2, alone
