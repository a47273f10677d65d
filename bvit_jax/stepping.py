"""One process's steps of a run: its images, its compiled step, and the state before the first."""

from collections.abc import Iterator

import jax
import numpy as np

from bvit_jax import batches, data, processes, start_run, train_step
from bvit_jax.config import Config
from bvit_jax.prepared import PreparedSet
from bvit_jax.sharding import Placement
from bvit_jax.train_step import Metrics, TrainState

Inputs = tuple[jax.Array, jax.Array]
MOST_STEPS = 2**31 - 1
"""What the state can count; benchmarks go on past a run's end."""


class Stepper:
    """Takes the steps of one configuration on one placement; what a step does depends on its state and number alone.

    Attributes:
        dataset: the three splits.
    """

    def __init__(self, config: Config, placement: Placement, images: PreparedSet | None = None) -> None:
        """Loads the images and describes the step, which is compiled when it is first taken.

        Args:
            config: of the run.
            placement: of its arrays.
            images: as `data.opened` gives them, if that is done already.
        """
        self._config = config
        self._placement = placement
        self._shardings = train_step.state_shardings(config, placement)
        self._rows = placement.host_rows(config.batch_size)
        self._step = train_step.make_train_step(config, placement)
        self._key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=placement.replicated)()
        # Queued steps with collectives can deadlock when several host devices share few cores.
        self._waits = placement.mesh.size > 1 and jax.default_backend() == "cpu"
        self._batches: Iterator[batches.Batch] = iter(())
        self._next: int | None = None
        self.dataset = processes.in_all(lambda: data.load(config.data, images))

    def first_state(self, start: start_run.Start | None = None) -> TrainState:
        """Makes the state before the first step, every array where it belongs.

        Args:
            start: what the configuration's `start_from` is; looked for if left out.

        Raises:
            ConfigError: as `start_run.find` and `start_run.Start.params`.
        """
        config, whole = self._config, self._placement.replicated
        start = start or processes.in_all(lambda: start_run.find(config))
        dense = [start.params(whole)] if start is not None else []
        first: TrainState = train_step.make_init_step(config, self._placement)(self._key, *dense)
        return first

    def abstract_state(self) -> TrainState:
        """Describes a state: shapes, dtypes and shardings."""
        return train_step.abstract_state(train_step.state_shapes(self._config), self._shardings)

    def take(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """Takes the step after `step` steps are done; the state passed in is given away."""
        return self.take_with(state, self.inputs(step))

    def inputs(self, step: int) -> Inputs:
        """Returns images and labels of the step after `step` are done, on the devices."""
        return self.moved(self.batch(step))

    def moved(self, batch: batches.Batch) -> Inputs:
        """Moves this process's part of a batch to the devices."""
        arrays = (batch.images, batch.labels)
        inputs: Inputs = self._placement.put_batch(arrays, self._rows, self._config.batch_size)
        return inputs

    def take_with(self, state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
        """Takes a step as `take`, with these images and labels."""
        state, values = self._step(state, self._key, *inputs)
        if self._waits:
            jax.block_until_ready(values)
        return state, values

    def batch(self, step: int) -> batches.Batch:
        """Returns this process's part of a batch; steps in succession are read ahead."""
        if step != self._next:
            self._batches = self.reader(range(step, MOST_STEPS))
        self._next = step + 1
        return next(self._batches)

    def reader(self, steps: range) -> Iterator[batches.Batch]:
        """Returns a new reader of this process's part of the batches of these steps."""
        config = self._config
        return data.train_batches(self.dataset.train, config.batch_size, config.seed, steps, self._rows)

    def whole_batch(self, step: int) -> tuple[batches.Batch, np.ndarray]:
        """Returns the batch of all processes of the step after `step` are done, and its indices in the split."""
        config = self._config
        every = np.arange(config.batch_size)
        batch = data.train_batch(self.dataset.train, config.batch_size, config.seed, step, every)
        return batch, batches.batch_indices(len(self.dataset.train), config.batch_size, config.seed, step)
