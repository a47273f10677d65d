import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.chosen import where_chosen


def doubled(image: jax.Array, added: jax.Array) -> jax.Array:
    return 2 * image + added


def test_only_those_chosen_change():
    images = jnp.arange(12.0).reshape(4, 3)
    chosen = jnp.array([True, False, True, False])
    result = where_chosen(doubled, chosen, images, jnp.arange(4.0))
    np.testing.assert_array_equal(result, [[0, 2, 4], [3, 4, 5], [14, 16, 18], [9, 10, 11]])


@pytest.mark.every_platform
def test_a_cpu_goes_through_them_and_a_tpu_takes_all_at_once():
    program = jax.jit(lambda *arguments: where_chosen(doubled, *arguments))
    arguments = (jnp.zeros(4, bool), jnp.zeros((4, 3)), jnp.zeros(4))
    assert "while" in program.trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    assert "while" not in program.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
