"""One computation in several ways, each for a platform: TPUs, CPUs, and all others.

`jax.lax.platform_dependent` traces every way and chooses when the program is lowered. That is needed where a program
may be lowered for any platform, and costs most of the time that tracing takes. Where it will run on CPUs alone, the
others are not traced. For TPUs all of them still are: without the choice around it XLA lays the memory of a training
step out worse (`tests/recorded_tpu.json`: 12 % more temporaries with 64 stored experts).
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

_for_cpus: contextvars.ContextVar[bool] = contextvars.ContextVar("for_cpus", default=False)


@contextlib.contextmanager
def lowered_for(platform: str) -> Iterator[None]:
    """Says what the program is for; around what is traced, or around the function that is.

    Args:
        platform: of the devices: `cpu`, `tpu`, ... What is traced for CPUs may be lowered for no other.
    """
    token = _for_cpus.set(platform == "cpu")
    try:
        yield
    finally:
        _for_cpus.reset(token)


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
    if _for_cpus.get():
        return ways.get("cpu", ways["default"])(*operands)
    result: jax.Array = jax.lax.platform_dependent(*operands, **ways)
    return result
