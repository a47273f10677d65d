"""The tensors of a file: names, dtypes as safetensors spells them, and shapes."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

Dtype = Literal["F32", "BF16", "U16", "U8"]
NUMPY_DTYPE: dict[Dtype, Any] = {"F32": np.float32, "BF16": jnp.bfloat16, "U16": np.uint16, "U8": np.uint8}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its name, dtype as safetensors spells it, and shape."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(NUMPY_DTYPE[self.dtype]).itemsize
