"""Draws what a model sees in training: images as they are stored and, beneath each, as a step gets them.

    python -m experiments.show_batch --config=configs/cifar100.py --data_dir=DIR --out=batch.png

Nothing is trained. The images are those of the step of a run of this configuration, drawn by the code of the training
step itself; captions say the classes and, where images are mixed, their shares.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from bvit_jax import config, data, pictures, pixels, sharding, train_step
from bvit_jax.batches import Batch
from bvit_jax.config import Config
from bvit_jax.model_config import require
from experiments import data_flags, entry

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/cifar100.py.")
flags.adopt_module_key_flags(data_flags)
_STEP = flags.DEFINE_integer("step", 0, "Of the run, from 0.", lower_bound=0)
_IMAGES = flags.DEFINE_integer("images", 24, "How many of the batch are drawn, at most.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "batch.png", "The picture to write, PNG.")


def main(argv: Sequence[str]) -> None:
    """Draws the picture and says where it is."""
    del argv
    data_flags.apply()
    resolved = config.resolve(entry.read_config(_CONFIG))
    require(resolved.data.channels in (1, 3), "data.channels", resolved.data.channels, "1 or 3, to be drawn")
    path = Path(str(_OUT.value))
    require(not path.is_dir(), "out", str(path), "a file")
    entry.make_directory("out", str(path.parent))
    streamed = dataclasses.replace(resolved.data, reading="stream")  # a batch is less than all
    origin = data.opened(streamed)
    split = data.load_split(streamed, "train", origin)
    rows = np.arange(resolved.batch_size)
    batch = data.train_batch(split, resolved.batch_size, resolved.seed, _STEP.value, rows)
    seen, captions = _as_seen(resolved, batch, origin.class_names if origin else ())
    shown = slice(0, min(_IMAGES.value, len(rows)))
    title = f"{resolved.data.name}, seed {resolved.seed}, step {_STEP.value}: as stored, and as the model sees them"
    pictures.pairs(pixels.centre(batch.images, seen.shape[1])[shown] / 255, seen[shown], captions[shown], title, path)
    print(f"{shown.stop} of {len(rows)} images, {seen.shape[1]} x {seen.shape[2]} x {seen.shape[3]}: {path}")


def _as_seen(resolved: Config, batch: Batch, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Returns the images as the training step has them, clipped to 0..1, and what they show."""
    placement = sharding.place(resolved.model, resolved.batch_size, devices=jax.devices()[:1])
    key, _ = train_step.step_keys(jax.random.key(resolved.seed), _STEP.value)
    draw = jax.jit(lambda *arrays: train_step.as_seen(resolved, placement, *arrays))
    seen, mixed = draw(key, batch.images, batch.labels)

    def name(label: int) -> str:
        return names[label] if names else str(label)

    captions = [name(label) for label in batch.labels]
    if mixed is not None:
        share = float(mixed.share)
        captions = [
            f"{share:.2f} {own}\n{1 - share:.2f} {name(label)}"
            for own, label in zip(captions, np.asarray(mixed.labels_B), strict=True)
        ]
    return np.clip(np.asarray(seen), 0, 1), captions


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    entry.run(main)
