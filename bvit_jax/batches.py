"""Which images make up which batch: pure functions of (seed, step), the same on any number of hosts.

Axes: B batch, H and W pixels, c channels.
"""

import dataclasses
import functools

import numpy as np

PADDING = -1
"""In the place of an image's index: none."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images, labels and which of them count.

    Attributes:
        images: uint8 (B, H, W, c).
        labels: int32 (B,).
        weights: float32 (B,), 1, or 0 for padding.
    """

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """Which images each step trains on: called with the number of steps done, it returns indices, int64.

    Attributes:
        num_images: in the split.
        batch_size: over all processes.
        seed: of the run.
        rows: places in the batch that are wanted, as `Placement.host_rows`.
    """

    num_images: int
    batch_size: int
    seed: int
    rows: np.ndarray

    def __call__(self, step: int) -> np.ndarray:
        return batch_indices(self.num_images, self.batch_size, self.seed, step)[self.rows]


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """Batches of equal size which hold every image of a split once, in order; the last is filled with `PADDING`.

    Attributes:
        num_images, batch_size, rows: as in `TrainPlan`.
    """

    num_images: int
    batch_size: int
    rows: np.ndarray

    @property
    def numbers(self) -> range:
        """The batches."""
        return range(-(-self.num_images // self.batch_size))

    def __call__(self, number: int) -> np.ndarray:
        places = number * self.batch_size + self.rows
        return np.where(places < self.num_images, places, PADDING)


@dataclasses.dataclass(frozen=True)
class SpreadPlan:
    """One batch, of images spread evenly over a split; of a smaller split some come more than once.

    Attributes:
        num_images, batch_size, rows: as in `TrainPlan`.
    """

    num_images: int
    batch_size: int
    rows: np.ndarray

    def __call__(self, number: int) -> np.ndarray:
        del number
        return self.rows * self.num_images // self.batch_size


Plan = TrainPlan | EvalPlan | SpreadPlan


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns the indices of the training images of one step, int64 (batch_size,).

    Step s takes places s * batch_size onwards of an endless row of shuffled epochs; every epoch's order is drawn from
    (seed, epoch) alone. So a batch depends on (seed, step) and nothing else, and every image comes once an epoch.
    """
    places = step * batch_size + np.arange(batch_size)
    epochs = places // num_images
    indices = np.empty(batch_size, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        indices[here] = _epoch_order(num_images, seed, epoch)[places[here] % num_images]
    return indices


@functools.lru_cache(maxsize=4)
def _epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of the images; drawing one of a million takes as long as many steps."""
    return np.random.default_rng([seed, epoch]).permutation(num_images)
