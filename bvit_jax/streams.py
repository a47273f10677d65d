"""Images that are read from disk and decoded as they are needed, some batches ahead (grain).

Axes: B batch, S pixels a side, c channels.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from bvit_jax import prepared
from bvit_jax.batches import PADDING, Batch, Plan
from bvit_jax.prepared import Source

BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A split that is never in memory whole.

    Attributes:
        source: where the images are.
        indices: int64 (n,), of the split's images in the source.
        size: pixels a side, S, that images are brought to.
        channels: 1 or 3.
    """

    source: Source
    indices: np.ndarray
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, plan: Plan, numbers: range) -> Iterator[Batch]:
        """Yields the batches of these numbers, some read ahead; padding is images of zeros with label 0."""
        read = grain.MapDataset.source(numbers).map(lambda number: self._read(plan(number)))
        yield from read.to_iter_dataset(
            grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
        )

    def read_all(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all images, uint8 (n, S, S, c), and labels, int32 (n,)."""
        return prepared.read_all(self.source, self.indices, self.size, self.channels)

    def _read(self, indices: np.ndarray) -> Batch:
        real = indices != PADDING
        images = np.zeros((len(indices), self.size, self.size, self.channels), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        if real.any():
            images[real], labels[real] = self.source.read(self.indices[indices[real]], self.size, self.channels)
        return Batch(images, labels, real.astype(np.float32))
