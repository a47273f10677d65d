"""One table from parameter paths to what they are; the optimiser's groups and the memory ledger both read it."""

import re
from typing import Any, Literal, get_args

import jax

Component = Literal[
    "prototype",
    "angles",
    "router",
    "experts",
    "ffn",
    "projection",
    "ffn_bias",
    "attention",
    "embeddings",
    "norms",
    "head",
]
COMPONENTS: tuple[Component, ...] = get_args(Component)

_TABLE: tuple[tuple[str, Component], ...] = (
    (r"ffn/(up_|down_)?prototype$", "prototype"),
    (r"ffn/(up_|down_)?(theta|phi)_angles$", "angles"),
    (r"ffn/router/kernel$", "router"),
    (r"ffn/(up|down)_(kernel|left|right)$", "experts"),
    (r"ffn/(up|down)/kernel$", "ffn"),
    (r"ffn/projection/kernel$", "projection"),
    (r"ffn/((up|down)_bias|(up|down|projection)/bias)$", "ffn_bias"),
    (r"/attention/(query|key|value|out)/(kernel|bias)$", "attention"),
    (r"^(patch_embedding/(kernel|bias)|class_token|position_embedding)$", "embeddings"),
    (r"norm/(scale|bias)$", "norms"),
    (r"^head/(kernel|bias)$", "head"),
)
_DECAYED = re.compile(r"(kernel|prototype|left|right)$")


def path_of(key_path: tuple[Any, ...]) -> str:
    """Joins a JAX key path with slashes: `segment_0/block_0/ffn/up_prototype`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def component_of(path: str) -> Component:
    """Returns the component that a parameter belongs to.

    Raises:
        ValueError: if the path is in no row of the table.
    """
    for pattern, component in _TABLE:
        if re.search(pattern, path):
            return component
    raise ValueError(f"parameter {path!r} belongs to no component; add it to the table in bvit_jax.components")


def tree_of(params: Any) -> Any:
    """Returns a tree of components with the structure of `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: component_of(path_of(path)), params)


def decay_mask(params: Any) -> Any:
    """Returns True for the parameters that weight decay may shrink: matrices; never angles, norms, biases or positions.

    Angles live on a circle, where shrinking towards 0 has no meaning; ternary scales are derived, not stored.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(_DECAYED.search(path_of(path))), params)
