"""AdamW with warm-up and cosine decay, weight decay on matrices only, and a learning rate each for some components.

References:
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; the parts are optax's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bvit_jax import components
from bvit_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear from 0 to the peak, then half a cosine down to the last."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Builds the optimiser.

    A component's multiplier scales its whole update, decay included, as a learning rate of its own would.
    """
    multipliers: dict[components.Component, float] = {
        "prototype": config.expert_multiplier,
        "experts": config.expert_multiplier,
        "angles": config.angle_multiplier,
        "router": config.router_multiplier,
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay, components.decay_mask),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)),
        *(_scale_component(component, factor) for component, factor in multipliers.items() if factor != 1),
    )


def averaged(average: Any, params: Any, decay: float, steps: jax.Array) -> Any:
    """Moves the exponential moving average of the parameters on by one step.

    Early on the decay is (1 + steps) / (10 + steps) instead, if that is less: the first parameters, which are random,
    would otherwise weigh for 1 / (1 - decay) steps. Source: TensorFlow's ExponentialMovingAverage, `num_updates`.

    Args:
        average: before, as `params`.
        params: after the step.
        decay: `OptimizerConfig.ema_decay`.
        steps: int32 (), taken before this one.
    """
    steps = steps.astype(jnp.float32)
    kept = jnp.minimum(decay, (1 + steps) / (10 + steps))
    return optax.incremental_update(params, average, 1 - kept)


def _scale_component(component: components.Component, factor: float) -> optax.GradientTransformation:
    def mask(params: Any) -> Any:
        return jax.tree.map(lambda found: found == component, components.tree_of(params))

    return optax.masked(optax.scale(factor), mask)
