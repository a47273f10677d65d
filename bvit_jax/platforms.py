"""One computation in several ways, each for a platform: TPUs, CPUs, and all others.

`jax.lax.platform_dependent` traces every way and chooses when the program is lowered. That is needed where a program
may be lowered for any platform, and costs most of the time that tracing takes; where the devices are known, so is the
way.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

_known: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def lowered_for(platform: str) -> Iterator[None]:
    """Has `dependent` trace what is for one platform alone; for use around what is traced, inside the traced function.

    Args:
        platform: of the devices: `cpu`, `tpu`, ... A program that is traced so may be lowered for no other.
    """
    token = _known.set(platform)
    try:
        yield
    finally:
        _known.reset(token)


def lowered_here() -> contextlib.AbstractContextManager[None]:
    """As `lowered_for` the platform of JAX's default device, where arrays are that have been put nowhere else."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return lowered_for(device if isinstance(device, str) else device.platform)


def dependent(*operands: jax.Array | dict[str, jax.Array], **ways: Callable[..., jax.Array]) -> jax.Array:
    """Applies the way of the platform that the program is lowered for.

    Args:
        operands: arrays, or trees of them.
        ways: functions of these, by platform; `default` is for those that are not named.
    """
    platform = _known.get()
    if platform is None:
        result: jax.Array = jax.lax.platform_dependent(*operands, **ways)
        return result
    return ways.get(platform, ways["default"])(*operands)
