"""Images that are read from disk and decoded as they are needed, some batches ahead (grain).

Axes: B batch, S pixels a side, c channels.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from bvit_jax import cores, prepared
from bvit_jax.batches import PADDING, Batch, Plan
from bvit_jax.prepared import Source

BATCHES_AHEAD = 2
CORES_A_WORKER = 16
"""Decoding takes Python's lock often enough that one process cannot use more; machines with more have several read."""


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
        ahead = grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
        # Grain's workers read command-line flags, which notebooks do not parse.
        workers = len(cores.available()) // CORES_A_WORKER if flags.FLAGS.is_parsed() else 0
        yield from read.to_iter_dataset(ahead).mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))

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
