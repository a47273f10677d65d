"""Settings of the whole test suite, made before JAX starts."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from bvit_jax.config import Config, resolve
from bvit_jax.model_config import ModelConfig
from configs import digits

# Compiled programs are shared between test processes and runs.
_CACHE = Path(tempfile.gettempdir()) / f"bvit_jax_tests_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE)))
jax.config.update("jax_numpy_rank_promotion", "raise")

_STRICT = (
    *("test_ternary", "test_butterfly", "test_packing", "test_precision"),
    *("test_losses", "test_routing", "test_dispatch", "test_moe", "test_vit"),
)


# Every family, and every form of the butterfly one.
KINDS = [
    ("dense", "separate"),
    ("standard", "separate"),
    ("butterfly", "separate"),
    ("butterfly", "tied"),
    ("butterfly", "reference"),
]


def make_config(argument: str = "butterfly,4", **changes: object) -> Config:
    """Returns the digits configuration, made short; `changes` are dotted fields with __ for the dot."""
    raw = digits.get_config(argument)
    raw.update({"total_steps": 6, "batch_size": 16, "log_every": 2, "eval_every": 3})
    raw.optimizer.warmup_steps = 2
    raw = raw.to_dict()
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = raw
        for section in sections:
            place = place[section]
        place[field] = value
    return resolve(raw)


def make_model(**changes: object) -> ModelConfig:
    """Returns the model of `make_config` with fields changed."""
    return make_config("butterfly,4", **{f"model__{name}": value for name, value in changes.items()}).model


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forbids silent changes of dtype in the maths of this project; optax does not keep to it."""
    strict = request.module.__name__.rsplit(".", 1)[-1] in _STRICT
    with jax.numpy_dtype_promotion("strict") if strict else contextlib.nullcontext():
        yield
