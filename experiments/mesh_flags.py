"""Flags that lay a mesh over the devices."""

from absl import flags

from bvit_jax.model_config import require
from bvit_jax.sharding import Layout

_EXPERT_AXIS = flags.DEFINE_string(
    "expert_axis", "auto", "Devices that share out stored experts; auto: as many as divide both experts and devices."
)
_MODEL_AXIS = flags.DEFINE_integer("model_axis", 1, "Devices that share out heads and hidden channels.")
_FSDP = flags.DEFINE_bool("fsdp", False, "Split large parameters over the devices, not their optimiser state alone.")


def layout() -> Layout:
    """Returns the layout that the flags ask for; raises ConfigError for what is no number."""
    text = str(_EXPERT_AXIS.value)
    require(text == "auto" or (text.isascii() and text.isdigit()), "expert_axis", text, "auto or a number")
    return Layout(None if text == "auto" else int(text), int(_MODEL_AXIS.value or 0), bool(_FSDP.value))
