"""Parameters of a trained dense model as the first ones of a mixture.

Embeddings, attention, norms and head are taken over as they are, and so is the FFN of a layer that stays dense. In a
mixture every stored expert starts as the dense FFN of its layer; of rotated experts the prototypes do, as the floats
behind the ternary matrices, with the angles and the router as they were drawn; so do the shared matrices of low-rank
experts, whose differences are drawn as 0. With those, or with angles of 0 and no rounding, the first outputs are
therefore those of the dense model, in the form `tied` but for the down projection, which it lacks. A single selected
expert's gate is its probability, which scales its output.

References:
    Komatsuzaki et al., "Sparse Upcycling", arXiv 2212.05055, which does so for stored experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bvit_jax import vit
from bvit_jax.model_config import ModelConfig
from bvit_jax.vit import Params

_FROM_DENSE: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("prototype", "up_prototype", "up_kernel"), ("up", "kernel")),
    **dict.fromkeys(("down_prototype", "down_kernel"), ("down", "kernel")),
    "up_bias": ("up", "bias"),
    "down_bias": ("down", "bias"),
}
"""Parameter of a mixture: the one of the dense FFN that it starts as. All others stay as they were drawn."""


def upcycled(config: ModelConfig, drawn: Params, dense: Params) -> Params:
    """Returns the first parameters of a model.

    Args:
        config: the model, of any family; not the form `reference`, which has no place for the up bias and no
            nonlinearity.
        drawn: its parameters as `vit.init_params` draws them.
        dense: those of a dense model of equal shape.
    """
    params = {name: leaf for name, leaf in dense.items() if not name.startswith("segment_")}
    layers = dense["segment_0"]["block_0"]  # of equal layers there is one segment
    first = 0
    for index, (pattern, repeats) in enumerate(vit.layer_segments(config.is_moe_by_layer)):
        end, blocks = first + len(pattern) * repeats, {}
        for number, is_moe in enumerate(pattern):
            block = _chosen(layers, slice(first + number, end, len(pattern)))
            name = f"block_{number}"
            blocks[name] = (
                block | {"ffn": _mixture(drawn[f"segment_{index}"][name]["ffn"], block["ffn"])} if is_moe else block
            )
        params[f"segment_{index}"] = blocks
        first = end
    return params


def _chosen(layers: Params, which: slice) -> Params:
    """Returns some of the layers, in order."""
    return jax.tree.map(lambda leaf: leaf[which], layers)


def _mixture(drawn: Params, dense: Params) -> Params:
    """Returns the parameters of mixtures, each leaf with a leading axis of layers, made of those of dense FFNs."""

    def first(name: str, leaf: Any) -> Any:
        if name not in _FROM_DENSE:
            return leaf
        side, kind = _FROM_DENSE[name]
        found = dense[side][kind]
        return jnp.broadcast_to(found if found.ndim == leaf.ndim else found[:, None], leaf.shape)  # (L, E, ...)

    return {name: first(name, leaf) for name, leaf in drawn.items()}
