"""One training step and one evaluation step: pure functions, compiled once for each model and placement.

Axes: B batch, H and W pixels, c channels, C classes, M mixture layers, E experts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bvit_jax import augment, losses, sentinels, vit
from bvit_jax.config import Config, LossConfig
from bvit_jax.model_config import ModelConfig
from bvit_jax.optimizer import learning_rate, make_optimizer
from bvit_jax.routing import RouterReport
from bvit_jax.sharding import Placement

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """All that changes in training.

    Attributes:
        step: int32 (), steps done.
        params: as `vit.init_params`.
        opt_state: optax's.
        sentinel: steps that were not finite; they leave `params` and `opt_state` as they were.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    sentinel: sentinels.Sentinel


@struct.dataclass
class EvalSums:
    """Sums over the images of a batch that count.

    Attributes:
        count, correct: float32 (), images, and those classified rightly.
        nll: float32 (), sum of negative log-likelihoods, nats.
        assignments_MxE: float32, (token, choice) pairs that each expert received; None without mixture layers.
        entropy_M: float32, sum over images of the mean routing entropy, nats; None without mixture layers.
    """

    count: jax.Array
    correct: jax.Array
    nll: jax.Array
    assignments_MxE: jax.Array | None
    entropy_M: jax.Array | None


def init_state(config: Config) -> TrainState:
    """Draws the state before the first step from `config.seed`."""
    return _first_state(config, vit.init_params(config.model, jax.random.key(config.seed)))


def state_shapes(config: Config) -> Any:
    """Returns `init_state` with shapes and dtypes in place of arrays; nothing is made."""
    return jax.eval_shape(lambda params: _first_state(config, params), vit.param_shapes(config.model))


def abstract_state(state: TrainState, shardings: Any) -> TrainState:
    """Describes a state that is not there, every array where `shardings` says; a single one stands for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, state)
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, shardings)


def _first_state(config: Config, params: Any) -> TrainState:
    opt_state = make_optimizer(config.optimizer, config.total_steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, sentinels.initial(params))


def make_init_step(config: Config, placement: Placement) -> jax.stages.Wrapped:
    """Compiles (key) -> state before the first step; `init_state` is that of the run's key. Shared as the step is."""
    return _make_init_step(dataclasses.replace(config, seed=0), placement)


@functools.lru_cache(maxsize=4)
def _make_init_step(config: Config, placement: Placement) -> jax.stages.Wrapped:
    return jax.jit(
        lambda key: _first_state(config, vit.init_params(config.model, key)),
        out_shardings=state_shardings(config, placement),
    )


def state_shardings(config: Config, placement: Placement) -> Any:
    """Returns where each array of the state lives: a sharding in place of every array."""
    shapes = state_shapes(config)
    axes = vit.param_axes(config.model)
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        placement.moments(axes, shapes.params),
        transform_non_params=lambda _: placement.replicated,
    )
    return shapes.replace(
        step=placement.replicated,
        params=placement.params(axes, shapes.params),
        opt_state=opt_state,
        sentinel=jax.tree.map(lambda _: placement.replicated, shapes.sentinel),
    )


def total_loss(
    config: LossConfig, logits_BxC: jax.Array, labels_B: jax.Array, report: RouterReport | None
) -> tuple[jax.Array, Metrics]:
    """Forms the training loss, the one place where losses are weighted; also returns its unweighted parts."""
    parts = {"cross_entropy": losses.cross_entropy(logits_BxC, labels_B, config.label_smoothing).mean()}
    total = parts["cross_entropy"]
    if report is not None:
        for name in ("load_balance", "router_z", "smoothness"):
            parts[name] = getattr(report, name).mean()
            total = total + getattr(config, name) * parts[name]
    return total, parts


def make_train_step(config: Config, placement: Placement) -> jax.stages.Wrapped:
    """Compiles (state, key, images, labels) -> (state, metrics); the state passed in is donated.

    `key` is the run's (from its seed) and the same at every step: all randomness comes of folding the step into it.
    Runs that differ in nothing but the seed share one compiled program.
    """
    return _make_train_step(dataclasses.replace(config, seed=0), placement)


@functools.lru_cache(maxsize=4)
def _make_train_step(config: Config, placement: Placement) -> jax.stages.Wrapped:
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    schedule = learning_rate(config.optimizer, config.total_steps)

    def step(
        state: TrainState, key: jax.Array, images_BxHxWxc: jax.Array, labels_B: jax.Array
    ) -> tuple[TrainState, Metrics]:
        augment_key, router_key = jax.random.split(jax.random.fold_in(key, state.step))
        images_BxHxWxc = augment.augment(augment_key, images_BxHxWxc, config.data)

        def loss_of(params: Any) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
            with placement.active():
                logits_BxC, report = vit.apply(config.model, params, images_BxHxWxc, router_key=router_key)
            total, parts = total_loss(config.loss, logits_BxC, labels_B, report)
            return total, (parts, logits_BxC)

        (loss, (parts, logits_BxC)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        squared_norms = sentinels.squared_norms(gradients)
        sentinel, taken = sentinels.watch(state.sentinel, state.step + 1, loss, squared_norms, config.max_skipped_steps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        moved = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), moved, (state.params, state.opt_state)
        )
        metrics = {
            "loss": loss,
            **parts,
            "accuracy": (logits_BxC.argmax(axis=-1) == labels_B).mean(dtype=jnp.float32),
            "grad_norm": jnp.sqrt(sum(squared_norms.values())),
            "learning_rate": schedule(state.step - state.sentinel.skipped),
        }
        return TrainState(state.step + 1, params, opt_state, sentinel), metrics

    whole, split, state_place = placement.replicated, placement.batch, state_shardings(config, placement)
    places = (state_place, whole, split, split)
    return jax.jit(step, in_shardings=places, out_shardings=(state_place, whole), donate_argnums=0)


@functools.lru_cache(maxsize=4)
def make_eval_step(config: ModelConfig, placement: Placement) -> jax.stages.Wrapped:
    """Compiles (params, images, labels, weights) -> sums over the images of weight 1, `EvalSums`."""

    def step(params: Any, images_BxHxWxc: jax.Array, labels_B: jax.Array, weights_B: jax.Array) -> EvalSums:
        with placement.active():
            logits_BxC, report = vit.apply(config, params, images_BxHxWxc, weight_B=weights_B)
        count = weights_B.sum()
        return EvalSums(
            count=count,
            correct=((logits_BxC.argmax(axis=-1) == labels_B) * weights_B).sum(),
            nll=(losses.cross_entropy(logits_BxC, labels_B) * weights_B).sum(),
            assignments_MxE=None if report is None else report.assignments_E,
            entropy_M=None if report is None else report.entropy * count,
        )

    split = placement.batch
    params_place = placement.params(vit.param_axes(config), vit.param_shapes(config))
    return jax.jit(step, in_shardings=(params_place, split, split, split), out_shardings=placement.replicated)
