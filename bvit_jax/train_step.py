"""One training step and one evaluation step: pure functions, compiled once for each model and placement.

Axes: B batch, H and W pixels, S pixels a side as stored, c channels, C classes, M mixture layers, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bvit_jax import augment, losses, mixing, pixels, platforms, sentinels, upcycling, vit
from bvit_jax.config import Config, LossConfig
from bvit_jax.model_config import ModelConfig
from bvit_jax.optimizer import averaged, learning_rate, make_optimizer
from bvit_jax.routing import RouterReport
from bvit_jax.sharding import Placement

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """All that changes in training.

    Attributes:
        step: int32 (), steps done.
        params: as `vit.init_params`.
        average: moving average of `params`, in the same structure; None if the configuration wants none.
        opt_state: optax's.
        sentinel: steps that were not finite; they leave all of these as they were.
    """

    step: jax.Array
    params: Any
    average: Any
    opt_state: Any
    sentinel: sentinels.Sentinel

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated and exported: their average if there is one."""
        return self.params if self.average is None else self.average


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
    """Draws the state before the first step from `config.seed`; what `config.start_from` brings is not in it."""
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
    average = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, average, opt_state, sentinels.initial(params))


def make_init_step(config: Config, placement: Placement) -> jax.stages.Wrapped:
    """Compiles (key) -> state before the first step; `init_state` is that of the run's key. Shared as the step is.

    With `config.start_from` it is (key, parameters of that run) -> state.
    """
    return _make_init_step(config.without_seeds(), placement)


@functools.lru_cache(maxsize=4)
def _make_init_step(config: Config, placement: Placement) -> jax.stages.Wrapped:
    def init(key: jax.Array, *dense: Any) -> TrainState:
        params = vit.init_params(config.model, key)
        return _first_state(config, upcycling.upcycled(config.model, params, *dense) if config.start_from else params)

    return jax.jit(init, out_shardings=state_shardings(config, placement))


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
    params = placement.params(axes, shapes.params)
    return shapes.replace(
        step=placement.replicated,
        params=params,
        average=None if shapes.average is None else params,
        opt_state=opt_state,
        sentinel=jax.tree.map(lambda _: placement.replicated, shapes.sentinel),
    )


def total_loss(
    config: LossConfig,
    logits_BxC: jax.Array,
    labels_B: jax.Array,
    report: RouterReport | None,
    mixed: mixing.Mixed | None = None,
) -> tuple[jax.Array, Metrics]:
    """Forms the training loss, the one place where losses are weighted; also returns its unweighted parts."""
    entropy_of = functools.partial(losses.cross_entropy, logits_BxC, label_smoothing=config.label_smoothing)
    parts = {"cross_entropy": _of_mixed(entropy_of, labels_B, mixed).mean()}
    total = parts["cross_entropy"]
    if report is not None:
        for name in ("load_balance", "router_z", "smoothness"):
            parts[name] = getattr(report, name).mean()
            total = total + getattr(config, name) * parts[name]
    return total, parts


def _of_mixed(value_of: Callable[[jax.Array], jax.Array], labels_B: jax.Array, mixed: mixing.Mixed | None) -> jax.Array:
    """Returns a value of labels, (B,), where images are mixed that of both labels by their shares."""
    own_B = value_of(labels_B)
    return own_B if mixed is None else mixed.share * own_B + (1 - mixed.share) * value_of(mixed.labels_B)


def make_train_step(config: Config, placement: Placement) -> jax.stages.Wrapped:
    """Compiles (state, key, images, labels) -> (state, metrics); the state passed in is donated.

    Images are uint8 (B, S, S, c), of `stored_size` pixels a side, as `batches.Batch` has them.
    `key` is the run's (from its seed) and the same at every step: all randomness comes of folding the step into it.
    Runs that differ in nothing but the seed share one compiled program.
    """
    return _make_train_step(config.without_seeds(), placement)


@functools.lru_cache(maxsize=4)
def _make_train_step(config: Config, placement: Placement) -> jax.stages.Wrapped:
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    schedule = learning_rate(config.optimizer, config.total_steps)

    @platforms.lowered_for(placement.platform)  # around the backward pass too
    def step(
        state: TrainState, key: jax.Array, images_BxSxSxc: jax.Array, labels_B: jax.Array
    ) -> tuple[TrainState, Metrics]:
        image_key, train_key = step_keys(key, state.step)
        images_BxHxWxc, mixed = as_seen(config, placement, image_key, images_BxSxSxc, labels_B)

        def loss_of(params: Any) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
            with placement.active():
                logits_BxC, report = vit.apply(config.model, params, images_BxHxWxc, train_key=train_key)
            total, parts = total_loss(config.loss, logits_BxC, labels_B, report, mixed)
            return total, (parts, logits_BxC)

        (loss, (parts, logits_BxC)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        squared_norms = sentinels.squared_norms(gradients)
        sentinel, taken = sentinels.watch(state.sentinel, state.step + 1, loss, squared_norms, config.max_skipped_steps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params, average = optax.apply_updates(state.params, updates), state.average
        taken_before = state.step - state.sentinel.skipped
        if average is not None:
            average = averaged(average, params, config.optimizer.ema_decay, taken_before)
        before = (state.params, state.average, state.opt_state)
        params, average, opt_state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), (params, average, opt_state), before
        )
        best_B = logits_BxC.argmax(axis=-1)
        metrics = {
            "loss": loss,
            **parts,
            "accuracy": _of_mixed(lambda y_B: (best_B == y_B).astype(jnp.float32), labels_B, mixed).mean(),
            "grad_norm": jnp.sqrt(sum(squared_norms.values())),
            "learning_rate": schedule(taken_before),
        }
        return TrainState(state.step + 1, params, average, opt_state, sentinel), metrics

    whole, split, state_place = placement.replicated, placement.batch, state_shardings(config, placement)
    places = (state_place, whole, split, split)
    return jax.jit(step, in_shardings=places, out_shardings=(state_place, whole), donate_argnums=0)


def step_keys(key: jax.Array, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of a step's images and of the model in training, from that of the run and the steps done."""
    image_key, train_key = jax.random.split(jax.random.fold_in(key, step))
    return image_key, train_key


def as_seen(
    config: Config, placement: Placement, key: jax.Array, images_BxSxSxc: jax.Array, labels_B: jax.Array
) -> tuple[jax.Array, mixing.Mixed | None]:
    """Makes of a batch what the model is trained on: augmented, each device's images where they are, and mixed.

    Args:
        config: of the run.
        placement: of the batch.
        key: of the step's images (`step_keys`).
        images_BxSxSxc: uint8, as stored.
        labels_B: int32.

    Returns:
        Images, float32 (B, H, W, c), 0 to 1 but for noise, and what was mixed in; None if nothing was.
    """
    augment_key, mix_key = jax.random.split(key)

    def on_device(keys_b: jax.Array, images_bxSxSxc: jax.Array) -> jax.Array:
        return augment.augment(keys_b, pixels.to_unit(images_bxSxSxc), config.data.image_size, config.augment)

    # A key for each place in the batch: what becomes of an image does not depend on the devices.
    keys_B = jax.random.split(augment_key, len(images_BxSxSxc))
    by_shard = on_device
    if placement.mesh.size > 1:
        rows = placement.batch.spec
        by_shard = jax.shard_map(on_device, mesh=placement.mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)
    return mixing.mix(mix_key, by_shard(keys_B, images_BxSxSxc), labels_B, config.augment)


@functools.lru_cache(maxsize=4)
def make_eval_step(config: ModelConfig, placement: Placement) -> jax.stages.Wrapped:
    """Compiles (params, images, labels, weights) -> sums over the images of weight 1, `EvalSums`.

    Images are uint8 (B, S, S, c), of which the model sees the middle.
    """

    def step(params: Any, images_BxSxSxc: jax.Array, labels_B: jax.Array, weights_B: jax.Array) -> EvalSums:
        images_BxHxWxc = pixels.centre(images_BxSxSxc, config.image_size)
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
