"""ButterflyViT in JAX and Flax: Vision Transformers whose experts are rotations of one ternary matrix."""

__version__ = "0.1.0"
