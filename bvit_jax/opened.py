"""A trained model, opened to be looked at: a run's best checkpoint, whatever devices wrote it, or a packed file.

    model = opened.load("runs/digits")
    images = model.images("test", 64)

Its numbers are those that it is used with: what training rounds, the ternary matrices, angles and router, is rounded.

Axes: B images, H and W pixels, c channels.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, cast, get_args

import jax
import numpy as np

from bvit_jax import batches, calibration, data, encoding, packed_file, pixels, run_images, storage, trained
from bvit_jax.config import Config
from bvit_jax.model_config import ConfigError, ModelConfig, require


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Some images of one split, as the model takes them.

    Attributes:
        pixels: uint8 (B, H, W, c).
        labels: int (B,).
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A trained model.

    Attributes:
        path: the run's directory, or the packed file.
        config: of the run.
        step: of the checkpoint; None of a packed file.
        model: what `params` are for: the run's model with everything rounded already, computed in float32.
        params: as `vit.init_params`.
    """

    path: Path
    config: Config
    step: int | None
    model: ModelConfig
    params: Any

    @property
    def mixtures(self) -> tuple[calibration.Layer, ...]:
        """The layers that hold a mixture, first to last."""
        return tuple(layer for layer in calibration.layers(self.model) if layer.is_moe)

    def ffn(self, layer: calibration.Layer) -> dict[str, Any]:
        """Returns the parameters of the FFN of one layer."""
        own = self.params[layer.segment][layer.block]["ffn"]
        return cast(dict[str, Any], jax.tree.map(lambda leaf: leaf[layer.repeat], own))

    def images(self, split: data.SplitName = "test", count: int = 64) -> Images:
        """Reads images that are spread evenly over a split of the run's data.

        Args:
            split: `train`, `validation` or `test`.
            count: how many; of a smaller split, all.

        Raises:
            ConfigError: if there is no such split, no image is asked for, or the data set is not there, or another.
        """
        require(split in get_args(data.SplitName), "split", split, " or ".join(get_args(data.SplitName)))
        require(count >= 1, "count", count, "at least 1")
        found = data.opened(self.config.data)
        if self.path.is_dir():
            run_images.check(self.path, self.config.data.name, found)
        whole = data.load_split(self.config.data, split, found)
        count = min(count, len(whole))
        [batch] = whole.batches(batches.SpreadPlan(len(whole), count, np.arange(count)), range(1))
        return Images(pixels.centre(batch.images, self.model.image_size), batch.labels)


def load(path: str | os.PathLike[str]) -> Opened:
    """Opens a run's directory, a packed file, or a directory of `experiments.compress`.

    The arrays lie on JAX's first device. Nothing is written, so a run that goes on is not disturbed.

    Raises:
        ConfigError: if there is no model, or its checkpoints are damaged (`trained.best_params`).
        PackedFileError: if the file is no packed model, or is damaged.
    """
    place = Path(path)
    packed = packed_at(place)
    if packed is not None:
        return _of_file(packed)
    trials = sorted(found.name for found in place.glob("trials/*") if found.is_dir())
    if trials:
        one = str(place / "trials" / trials[0])
        raise ConfigError(f"{str(place)!r} is a sweep; open one of its runs, such as {one!r}")
    config, step, params = trained.best_params(place)
    return Opened(place, config, step, _model(config), as_used(params, config.model))


def packed_at(path: Path) -> Path | None:
    """Returns the packed file that a path stands for: itself, or that of a directory which is no run's; else None."""
    if path.is_file():
        return path
    inside = path / "model.safetensors"
    return inside if inside.is_file() and not (path / "config.json").is_file() else None


def as_used(params: Any, model: ModelConfig) -> Any:
    """Returns parameters as `vit.init_params` with everything rounded that training rounds."""
    return encoding.as_stored(params, model, storage.as_trained(model))


def _of_file(path: Path) -> Opened:
    packed = packed_file.read(path)
    params = encoding.decode_all(packed.arrays, packed.config.model, packed.storage)
    return Opened(path, packed.config, None, _model(packed.config), params)


def _model(config: Config) -> ModelConfig:
    return dataclasses.replace(config.model.deployed(), compute_dtype="float32")
