from bvit_jax.tensors import Tensor


def test_bytes_of_a_tensor() -> None:
    assert Tensor("a", "F32", (2, 3)).nbytes == 24
    assert Tensor("a", "BF16", (2, 3)).nbytes == 12
    assert Tensor("a", "U16", (2, 3)).nbytes == 12
    assert Tensor("a", "U8", (2, 3)).nbytes == 6
    assert Tensor("a", "F32", ()).nbytes == 4
