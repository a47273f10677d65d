import jax
import jax.numpy as jnp
import pytest

from bvit_jax import platforms, sharding
from tests.conftest import make_model

pytestmark = pytest.mark.every_platform


def ways(traced: list[str]):
    """Returns functions that note when they are traced: x + 1 on CPUs, x + 2 on TPUs, x + 3 elsewhere."""

    def way(name: str, number: float):
        def add(x: jax.Array) -> jax.Array:
            traced.append(name)
            return x + number

        return add

    return {name: way(name, number) for name, number in (("cpu", 1.0), ("tpu", 2.0), ("default", 3.0))}


def program(traced: list[str], platform: str | None):
    def of(x: jax.Array) -> jax.Array:
        if platform is None:
            return platforms.dependent(x, **ways(traced))
        with platforms.lowered_for(platform):
            return platforms.dependent(x, **ways(traced))

    return jax.jit(of)


def test_for_cpus_their_way_alone_is_traced() -> None:
    traced: list[str] = []
    assert program(traced, "cpu")(jnp.zeros(())) == 1.0
    assert traced == ["cpu"]


def test_where_cpus_have_no_way_of_their_own_they_take_the_default() -> None:
    with platforms.lowered_for("cpu"):
        assert platforms.dependent(jnp.zeros(()), tpu=lambda x: x + 2, default=lambda x: x + 3) == 3.0


@pytest.mark.parametrize("platform", [None, "tpu", "gpu"])
def test_else_the_way_is_chosen_when_the_program_is_lowered(platform: str | None) -> None:
    traced: list[str] = []
    found = program(traced, platform).trace(jnp.zeros(()))
    assert set(traced) == {"cpu", "tpu", "default"}
    for name, added in (("cpu", "1.0"), ("tpu", "2.0"), ("cuda", "3.0")):
        text = found.lower(lowering_platforms=(name,)).as_text()
        assert [f"dense<{number}" in text for number in ("1.0", "2.0", "3.0")] == [
            number == added for number in ("1.0", "2.0", "3.0")
        ]


def test_the_platform_is_forgotten_again_even_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), platforms.lowered_for("tpu"), platforms.lowered_for("cpu"):
        raise ZeroDivisionError
    traced: list[str] = []
    assert program(traced, None)(jnp.zeros(())) == 1.0
    assert len(traced) == 3


def test_the_first_device_is_here() -> None:
    traced: list[str] = []
    with platforms.lowered_here():
        assert platforms.dependent(jnp.zeros(()), **ways(traced)) == 1.0
    assert traced == ["cpu"]


def test_a_placement_knows_its_platform() -> None:
    traced: list[str] = []

    def of(x: jax.Array) -> jax.Array:
        with sharding.place(make_model(), 16).active():
            return platforms.dependent(x, **ways(traced))

    assert jax.jit(of)(jnp.zeros(())) == 1.0
    assert traced == ["cpu"]
