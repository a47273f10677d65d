"""Images that are read from disk and decoded as they are needed, some batches ahead (grain).

Axes: B batch, S pixels a side, c channels.
"""

import dataclasses
import sys
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from bvit_jax import cores, orphans
from bvit_jax.batches import PADDING, Batch, Plan
from bvit_jax.prepared import Source

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

BATCHES_AHEAD = 2
"""That are read, or wait to be taken, in each process that reads; a process of its own holds as many again."""
CORES_A_WORKER = 16
"""Decoding takes Python's lock often enough that one process cannot use more; machines with more have several read."""
BATCHES_A_WORKER = 8
"""That make starting it, which takes a second or two, worth while."""


def workers(batches: int) -> int:
    """Returns how many processes of their own read so many batches; 0 if the one that takes them does."""
    # Grain's workers read command-line flags, which notebooks do not parse.
    cores_there = len(cores.available()) if flags.FLAGS.is_parsed() else 0
    return min(cores_there // CORES_A_WORKER, batches // BATCHES_A_WORKER)


def held(batches: int) -> int:
    """Returns how many of so many batches are ready or in the making, at most, while nobody takes one."""
    return 2 * BATCHES_AHEAD * workers(batches) or BATCHES_AHEAD


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
        done = 0
        try:
            for arrays in self._ahead(plan, numbers, workers(len(numbers))):
                done += 1
                yield Batch(*arrays)
        except RuntimeError as error:
            # Whoever sends SIGTERM to all processes of a run ends its workers, while the run itself has yet to save.
            if workers(len(numbers)) == 0:
                raise
            print(f"warning: reading images goes on in one process, slower: {error}", file=sys.stderr)
        yield from (Batch(*arrays) for arrays in self._ahead(plan, numbers[done:], 0))

    def _ahead(self, plan: Plan, numbers: range, processes: int) -> Iterator[Arrays]:
        every = cores.available()

        def share_out(worker: int, count: int) -> None:
            orphans.end_with_parent()
            cores.keep_to(every[worker::count])  # as many threads decode as there are cores

        read = grain.MapDataset.source(numbers).map(lambda number: self._read(plan(number)))
        ahead = grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
        options = grain.MultiprocessingOptions(num_workers=processes)
        yield from read.to_iter_dataset(ahead).mp_prefetch(options, worker_init_fn=share_out if processes else None)

    def _read(self, indices: np.ndarray) -> Arrays:
        """Returns the arrays of a batch: those, but no objects, grain moves between processes in shared memory."""
        real = indices != PADDING
        images = np.zeros((len(indices), self.size, self.size, self.channels), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        if real.any():
            images[real], labels[real] = self.source.read(self.indices[indices[real]], self.size, self.channels)
        return images, labels, real.astype(np.float32)
