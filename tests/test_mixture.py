import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import mixture, routing


def routed_with(gates_BxTxK: jax.Array) -> routing.Routing:
    return routing.Routing(jnp.zeros((1, 1, 4)), gates_BxTxK, jnp.zeros(gates_BxTxK.shape, jnp.int32))


def test_the_weighted_sum_by_hand():
    # One token of two experts: 0.25 * (1, 2) + 0.75 * (3, -2).
    y = jnp.array([[[[1.0, 2.0], [3.0, -2.0]]]])
    routed = routed_with(jnp.array([[[0.25, 0.75]]]))
    np.testing.assert_allclose(mixture.combine(y, routed), [[[2.5, -1.0]]])
    assert mixture.combine(y.astype(jnp.bfloat16), routed).dtype == jnp.bfloat16


def test_the_weighted_sum_is_formed_in_float32():
    # 256 + 1 is no bfloat16 number, and would be rounded to 256 before 256 is taken away again.
    y = jnp.array([256.0, 1.0, -256.0], jnp.bfloat16).reshape(1, 1, 3, 1)
    routed = routed_with(jnp.ones((1, 1, 3)))
    assert float(mixture.combine(y, routed).squeeze()) == 1


def test_each_token_is_as_many_rows_as_it_has_experts():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    found = np.asarray(mixture.rows(x, 2))
    np.testing.assert_array_equal(found, np.repeat(np.asarray(x).reshape(6, 2), 2, axis=0))


def test_without_a_mesh_experts_are_applied_as_they_are():
    x, expert = jnp.ones((2, 3, 2)), jnp.zeros((2, 3, 1), jnp.int32)
    found = mixture.in_each_shard(lambda params, x, expert: (params["a"] * x, expert), {"a": jnp.float32(3)}, x, expert)
    np.testing.assert_array_equal(found[0], 3 * x)
    assert found[1] is expert
