"""Classifies images with an exported model.

    python -m experiments.predict --model=model.safetensors digit.png more.npy

Images are PNG, JPEG or .npy files (`bvit_jax.images` says how they are made to fit).
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from bvit_jax import images, packed
from bvit_jax.images import Loaded
from bvit_jax.model_config import require
from experiments import entry, tables

_MODEL = flags.DEFINE_string("model", None, "The packed file, as experiments.export writes it.")
_TOP = flags.DEFINE_integer("top", 3, "Classes shown for each image.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time; fewer take less memory.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON, with the probabilities of all classes, instead of a table.")


def main(argv: Sequence[str]) -> None:
    """Prints the classes of each image with their probabilities."""
    paths = argv[1:]
    require(bool(paths), "IMAGE", "", "one file or more: PNG, JPEG or .npy")
    require(bool(_MODEL.value), "model", _MODEL.value, "a packed file")
    model = packed.load(str(_MODEL.value))
    loaded = [image for path in paths for image in images.load(Path(path), model.config.data)]
    require(bool(loaded), "IMAGE", " ".join(paths), "files that hold an image")
    size = min(_BATCH_SIZE.value, len(loaded))
    batches = _batches(loaded, size)
    bar = tqdm(batches, unit="batch", disable=None if len(batches) > 1 else True, leave=False)
    probabilities = np.concatenate([model.probabilities(pixels, size) for pixels in bar])
    if _JSON.value:
        rows = [_row(image, found) for image, found in zip(loaded, probabilities, strict=True)]
        print(json.dumps(rows, indent=2))
        return
    _show(loaded, probabilities)
    print(tables.memory_line(model.memory(size)), file=sys.stderr)


def _batches(loaded: Sequence[Loaded], size: int) -> list[np.ndarray]:
    """Returns the pixels in order, at most `size` images at a time; bytes and floating pixels are never mixed."""
    alike = [list(run) for _, run in itertools.groupby(loaded, lambda image: image.pixels.dtype)]
    parts = [run[start : start + size] for run in alike for start in range(0, len(run), size)]
    return [np.stack([image.pixels for image in part]) for part in parts]


def _row(image: Loaded, found: np.ndarray) -> dict[str, object]:
    best = int(found.argmax())
    row = {"image": image.name, "class": best, "probability": float(found[best]), "probabilities": found.tolist()}
    return row | ({"note": image.note} if image.note else {})


def _show(loaded: Sequence[Loaded], probabilities: np.ndarray) -> None:
    shown = min(_TOP.value, probabilities.shape[1])
    table = tables.table(*[text for rank in range(shown) for text in (f"class {rank + 1}", "%")], "")
    for image, found in zip(loaded, probabilities, strict=True):
        order = np.argsort(-found, kind="stable")[:shown]
        cells = [text for index in order for text in (str(index), f"{100 * found[index]:.1f}")]
        table.add_row(image.name, *cells, image.note)
    tables.show(table)


if __name__ == "__main__":
    flags.mark_flag_as_required("model")
    entry.run(main, positional=True)
