import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import pixels


def test_bytes_become_shares_of_255_and_floats_stay():
    found = pixels.to_unit(jnp.array([0, 51, 255], jnp.uint8))
    np.testing.assert_allclose(found, [0, 0.2, 1], rtol=1e-6)
    assert found.dtype == jnp.float32
    floats = jnp.array([-0.5, 0.25, 7.0])
    np.testing.assert_array_equal(pixels.to_unit(floats), floats)


@pytest.mark.parametrize(("size", "first"), [(6, 0), (4, 1), (2, 2), (3, 1), (5, 0)])
def test_the_middle_is_cut_out(size, first):
    # Of 6 pixels a side; where both margins cannot be equal, the first is the smaller.
    images = np.arange(2 * 6 * 6 * 3).reshape(2, 6, 6, 3)
    expected = images[:, first : first + size, first : first + size]
    np.testing.assert_array_equal(pixels.centre(images, size), expected)
    np.testing.assert_array_equal(pixels.centre(jnp.asarray(images), size), expected)
