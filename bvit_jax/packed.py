"""Inference from a packed file, on one device: no mesh, no checkpoint, no training code.

    model = packed.load("model.safetensors")
    probabilities = model.probabilities(images)

The tensors stay packed in memory; inside the compiled program each layer's parameters are unpacked when the scan comes
to it, and dropped. Reduced parameters (`bvit_jax.reductions`) are decoded when the file is loaded.

Axes: n images, H and W pixels, c channels, C classes.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bvit_jax import packed_file
from bvit_jax.config import Config
from bvit_jax.encoding import decode, nest
from bvit_jax.memory import Ledger
from bvit_jax.model_config import ModelConfig
from bvit_jax.packed_file import Packed
from bvit_jax.storage import Storage, StoredParam, layout
from bvit_jax.vit import Vit

DEFAULT_BATCH = 32


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of one call, as the compiler lays them out.

    Attributes:
        packed: of the model's tensors, held throughout; of reduced parameters, what they are decoded to.
        images: of one batch and its logits.
        working: activations and unpacked parameters, at their peak.
    """

    packed: int
    images: int
    working: int

    @property
    def peak(self) -> int:
        """Everything at once."""
        return self.packed + self.images + self.working


class PackedModel:
    """A callable model that holds its packed tensors.

    Attributes:
        config: the run that trained it.
        storage: number formats.
        ledger: bytes of its file by component.
        digest: of its file.
    """

    def __init__(self, packed: Packed) -> None:
        self.config: Config = packed.config
        self.storage: Storage = packed.storage
        self.ledger: Ledger = packed.ledger
        self.digest: str = packed.digest
        params = layout(packed.config.model, packed.storage)
        self._tree = nest((stored.path, _held(stored, packed)) for stored in params)

    def __call__(self, images_nxHxWxc: Any, batch_size: int = DEFAULT_BATCH) -> np.ndarray:
        """Returns logits, float32 (n, C).

        Args:
            images_nxHxWxc: uint8, 0 to 255, or floating, 0 to 1, of the size and channels that the model was trained
                on; any number.
            batch_size: images at a time at most; the last batch is padded. Smaller takes less memory.

        Raises:
            ValueError: if the images have another shape.
        """
        images = np.asarray(images_nxHxWxc)
        if images.dtype != np.uint8:
            images = images.astype(np.float32)
        m = self.config.model
        expected = (m.image_size, m.image_size, m.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images have shape {images.shape}; this model needs (images, {str(expected)[1:]}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        logits = np.empty((len(images), m.num_classes), np.float32)
        size = min(batch_size, 1 << max(len(images) - 1, 0).bit_length())  # few sizes, so few compilations
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)])
            logits[start : start + size] = _forward(m, self.storage, self._tree, padded)[: len(part)]
        return logits

    def probabilities(self, images_nxHxWxc: Any, batch_size: int = DEFAULT_BATCH) -> np.ndarray:
        """Returns the softmax of the logits, float64 (n, C); arguments as for a call."""
        logits = self(images_nxHxWxc, batch_size).astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    def memory(self, batch_size: int = DEFAULT_BATCH) -> MemoryUse:
        """Asks the compiler what a call with this batch size, of floating images, takes."""
        m = self.config.model
        images = jax.ShapeDtypeStruct((batch_size, m.image_size, m.image_size, m.channels), np.float32)
        found: Any = _forward.lower(m, self.storage, self._tree, images).compile().memory_analysis()
        packed = sum(leaf.nbytes for leaf in jax.tree.leaves(self._tree))
        images_and_logits = found.argument_size_in_bytes - packed + found.output_size_in_bytes
        return MemoryUse(packed, images_and_logits, found.temp_size_in_bytes)


def _held(stored: StoredParam, packed: Packed) -> Any:
    """Returns what of a parameter is held in memory: its tensors by name, or the parameter itself if it is reduced."""
    arrays = {tensor.name: packed.arrays[tensor.name] for tensor in stored.tensors}
    if stored.reduction is not None:
        return decode(stored, arrays, packed.storage)
    return jax.tree.map(jnp.asarray, arrays)


def load(path: str | os.PathLike[str]) -> PackedModel:
    """Loads a packed file (`python -m experiments.export` writes one).

    Raises:
        PackedFileError: if it cannot be read, is no packed model, is damaged, or is of another format version.
    """
    return PackedModel(packed_file.read(Path(path)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(model: ModelConfig, storage: Storage, tree: Any, images_nxHxWxc: jax.Array) -> jax.Array:
    params = layout(model, storage)
    outside = [stored for stored in params if not stored.path.startswith("segment_")]

    def unpack(segment: str, layers: Any) -> Any:
        inside = [stored for stored in params if stored.path.startswith(f"{segment}/")]
        return _decoded(inside, {segment: layers}, storage)[segment]

    ready = tree | _decoded(outside, tree, storage)
    logits, _ = Vit(model.deployed(), unpack=unpack).apply({"params": ready}, images_nxHxWxc)
    return logits


def _decoded(params: list[StoredParam], tree: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """Decodes the parameters listed; their tensors lie in `tree` at their paths."""

    def tensors(path: str) -> Any:
        place: Any = tree
        for folder in path.split("/"):
            place = place[folder]
        return place

    return nest(
        (
            stored.path,
            decode(stored, tensors(stored.path), storage) if stored.reduction is None else tensors(stored.path),
        )
        for stored in params
    )
