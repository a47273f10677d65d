"""Lists of numbers in flags."""

from collections.abc import Sequence

from bvit_jax.model_config import require


def numbers(flag: str, listed: Sequence[str]) -> tuple[int, ...]:
    """Returns distinct numbers from 1, rising; raises ConfigError, naming the flag, for anything else or none."""
    valid = bool(listed) and all(text.isascii() and text.strip().isdigit() and int(text) > 0 for text in listed)
    require(valid, flag, ",".join(listed), "numbers from 1, comma between")
    return tuple(sorted({int(text) for text in listed}))
