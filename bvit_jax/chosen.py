"""A function for some images of a batch, each on its own."""

from collections.abc import Callable
from typing import Any

import jax

from bvit_jax import platforms


def where_chosen(
    function: Callable[..., jax.Array], chosen_B: jax.Array, images_B: jax.Array, *arguments_B: Any
) -> jax.Array:
    """Returns `function(image, *arguments)` for images that are chosen, and the others as they are.

    On a CPU the images are gone through one by one, and only those chosen cost anything; elsewhere the function is
    mapped over all of them, which wastes arithmetic and no time. The result is the same, but for rounding.

    Args:
        function: of one image and its arguments; its result is of the image's shape and dtype.
        chosen_B: bool (B,).
        images_B: (B, ...).
        arguments_B: arrays (B, ...).
    """

    def one(operands: tuple[Any, ...]) -> jax.Array:
        chosen, image, *arguments = operands
        result: jax.Array = jax.lax.cond(chosen, function, lambda image, *_: image, image, *arguments)
        return result

    def one_by_one(*operands_B: Any) -> Any:
        return jax.lax.map(one, operands_B)

    def at_once(*operands_B: Any) -> Any:
        return jax.vmap(one)(operands_B)

    operands_B = (chosen_B, images_B, *arguments_B)
    result_B: jax.Array = platforms.dependent(*operands_B, cpu=one_by_one, default=at_once)
    return result_B
