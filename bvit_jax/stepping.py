"""One process's steps of a run: its images, its compiled step, and the state before the first."""

import jax
import numpy as np

from bvit_jax import data, train_step
from bvit_jax.config import Config
from bvit_jax.sharding import Placement
from bvit_jax.train_step import Metrics, TrainState


class Stepper:
    """Takes the steps of one configuration on one placement; what a step does depends on its state and number alone.

    Attributes:
        dataset: the three splits.
    """

    def __init__(self, config: Config, placement: Placement) -> None:
        self._config = config
        self._placement = placement
        self._shardings = train_step.state_shardings(config, placement)
        self._rows = placement.host_rows(config.batch_size)
        self._step = train_step.make_train_step(config, placement)
        self._key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=placement.replicated)()
        # Queued steps with collectives can deadlock when several host devices share few cores.
        self._waits = placement.mesh.size > 1 and jax.default_backend() == "cpu"
        self.dataset = data.load(config.data)

    def first_state(self) -> TrainState:
        """Makes the state before the first step, every array where it belongs."""
        first: TrainState = train_step.make_init_step(self._config, self._placement)(self._key)
        return first

    def abstract_state(self) -> TrainState:
        """Describes a state: shapes, dtypes and shardings."""
        return train_step.abstract_state(train_step.state_shapes(self._config), self._shardings)

    def take(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """Takes the step after `step` steps are done; the state passed in is given away."""
        config = self._config
        batch = data.train_batch(self.dataset.train, config.batch_size, config.seed, step, self._rows)
        images, labels = self._placement.put_batch((batch.images, batch.labels), self._rows, config.batch_size)
        state, values = self._step(state, self._key, images, labels)
        if self._waits:
            jax.block_until_ready(values)
        return state, values

    def whole_batch(self, step: int) -> tuple[data.Batch, np.ndarray]:
        """Returns the batch of all processes of the step after `step` are done, and its indices in the split."""
        config = self._config
        every = np.arange(config.batch_size)
        batch = data.train_batch(self.dataset.train, config.batch_size, config.seed, step, every)
        return batch, data.batch_indices(len(self.dataset.train), config.batch_size, config.seed, step)
