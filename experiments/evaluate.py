"""Accuracy of an exported file or of trained runs on one split of their data.

    python -m experiments.evaluate --model=model.safetensors
    python -m experiments.evaluate --workdir=runs/digits
    python -m experiments.evaluate --workdir=runs/digits --angle_bits=32,16,8,6,4 --out=runs/bits

With formats named (--angle_bits, --router, ...), a run is packed in memory each way and scored as the exported file
would be; several runs (--workdir=A,B,C) give a row each and their mean. --experts adds whether the experts differ and
are used (`bvit_jax.expert_use`).
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from bvit_jax import (
    data,
    evaluate,
    expert_use,
    files,
    memory,
    packed,
    packed_file,
    packing,
    pixels,
    run_images,
    sharding,
    trained,
)
from bvit_jax.config import Config
from bvit_jax.data_config import DataConfig
from bvit_jax.model_config import ConfigError, require
from bvit_jax.storage import Storage
from experiments import data_flags, entry, storage_flags, tables

SPLITS = get_args(data.SplitName)
_MODEL = flags.DEFINE_string("model", None, "A packed file, as experiments.export writes it.")
_WORKDIR = flags.DEFINE_list("workdir", [], "Directories of runs of experiments.train, comma between.")
_SPLIT = flags.DEFINE_enum("split", "test", SPLITS, "Which images.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1)
_ANGLE_BITS = flags.DEFINE_list("angle_bits", [], "Bits an angle, comma between: score the runs packed in each way.")
_WITHOUT_ROTATIONS = flags.DEFINE_bool(
    "without_rotations", False, "Score the runs with every angle 0 as well: what the rotations give."
)
_EXPERTS = flags.DEFINE_bool("experts", False, "Say of the runs whether their experts differ and are used as well.")
flags.adopt_module_key_flags(storage_flags)
flags.adopt_module_key_flags(data_flags)
_OUT = flags.DEFINE_string("out", None, "A directory for evaluation.csv and evaluation.json.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


@dataclasses.dataclass(frozen=True)
class Scored:
    """One line of the result.

    Attributes:
        source: the file or the run.
        numbers: how its numbers are kept.
        bytes_full: of the file that holds them.
        bytes_full_ffn: of its mixture layers.
        accuracy, nll, count: as in `evaluate.Evaluation`.
        output_cosine, experts_used, lost_shuffled, lost_one: as in `expert_use.Means`; None without --experts.
    """

    source: str
    numbers: str
    bytes_full: int
    bytes_full_ffn: int
    accuracy: float
    nll: float
    count: int
    output_cosine: float | None = None
    experts_used: float | None = None
    lost_shuffled: float | None = None
    lost_one: float | None = None


def main(argv: Sequence[str]) -> None:
    """Scores what the flags name and prints a line each."""
    del argv
    data_flags.apply()
    runs = list(dict.fromkeys(name for name in _WORKDIR.value if name))
    require(bool(_MODEL.value) != bool(runs), "model, workdir", (_MODEL.value, runs), "given, exactly one of them")
    bits = [_bits(text) for text in _ANGLE_BITS.value]
    repack = bool(bits) or storage_flags.any_given()
    alone = not (repack or _WITHOUT_ROTATIONS.value)
    require(alone or not _MODEL.value, "model", _MODEL.value, "without formats: the file has its own")
    require(not (_EXPERTS.value and (repack or _MODEL.value)), "experts", True, "of runs as they were trained")
    out = None if _OUT.value is None else entry.make_directory("out", _OUT.value)
    rows = [_file(Path(_MODEL.value))] if _MODEL.value else _runs(runs, bits, repack)
    content = [dataclasses.asdict(row) for row in rows]
    if out is not None:
        files.write_rows(out / "evaluation.csv", content)
    if _JSON.value:
        print(json.dumps(content, indent=2))
        return
    _show(rows)
    if out is not None:
        print(f"results: {out / 'evaluation.csv'}, {out / 'evaluation.json'}")


def _bits(text: str) -> packing.AngleBits:
    found: Any = int(text) if text.strip().isdigit() else text
    require(found in packing.ANGLE_BITS, "angle_bits", text, " or ".join(map(str, packing.ANGLE_BITS)))
    return found


def _file(path: Path) -> Scored:
    model = packed.load(path)
    scored = _score(model, path.name, _split(model.config.data))
    print(tables.memory_line(model.memory(_BATCH_SIZE.value)), file=sys.stderr)
    return scored


def _runs(runs: Sequence[str], bits: Sequence[packing.AngleBits], repack: bool) -> list[Scored]:
    rows = []
    for name in tqdm(runs, unit="run", disable=None if len(runs) > 1 else True, leave=False):
        config, _, params = trained.best_params(Path(name))
        rotates = config.model.family == "butterfly" or not (bits or _WITHOUT_ROTATIONS.value)
        require(rotates, "workdir", name, "the run of a butterfly, for only these have angles")
        run_images.check(Path(name), config.data.name, data.opened(config.data))
        split = _split(config.data)
        if _WITHOUT_ROTATIONS.value:
            still = _trained(name, config, evaluate.without_rotations(params), split)
            rows.append(dataclasses.replace(still, numbers="as trained, every angle 0"))
        if not repack:
            rows.append(_trained(name, config, params, split))
            continue
        formats = storage_flags.given(config.model)
        for number in bits or [config.model.angle_bits]:
            model = _packed(config, params, dataclasses.replace(formats, angle_bits=number))
            rows.append(_score(model, name, split))
    return rows


@functools.cache
def _split(config: DataConfig) -> data.AnySplit:
    name: Any = _SPLIT.value
    return data.load_split(config, name)


def _packed(config: Config, params: Any, storage: Storage) -> packed.PackedModel:
    try:
        return packed.PackedModel(packed_file.unpack(packed_file.pack(params, config, storage)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _score(model: packed.PackedModel, source: str, split: data.AnySplit) -> Scored:
    size, side = _BATCH_SIZE.value, model.config.model.image_size
    batches = data.eval_batches(split, size, np.arange(size))
    parts = [(model(pixels.centre(batch.images, side), size), batch.labels, batch.weights > 0) for batch in batches]
    logits, labels, real = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    found = evaluate.from_logits(logits[real], labels[real])
    numbers = storage_flags.describe(model.storage, model.config.model)
    sizes = model.ledger
    return Scored(source, numbers, sizes.bytes_full, sizes.bytes_full_ffn, found.accuracy, found.nll, found.count)


def _trained(source: str, config: Config, params: Any, split: data.AnySplit) -> Scored:
    """Scores a run by the forward pass that it was trained with."""
    placement = sharding.place(config.model, _BATCH_SIZE.value, devices=jax.devices()[:1])
    found = evaluate.evaluate(params, config.model, split, _BATCH_SIZE.value, placement)
    sizes, use = memory.ledger(config), None
    if _EXPERTS.value:
        use = expert_use.measure(params, config.model, split, found, _BATCH_SIZE.value, placement, config.seed)
    means = dataclasses.asdict(expert_use.means(None if use is None else use.to_dict()))
    parts = sizes.bytes_full, sizes.bytes_full_ffn, found.accuracy, found.nll, found.count
    return Scored(source, "as trained", *parts, **means)


def _show(rows: Sequence[Scored]) -> None:
    made = tables.table("numbers", "file bytes", "FFN bytes", f"{_SPLIT.value} %", "nll", "images")
    for row in rows:
        cells = (row.numbers, f"{row.bytes_full:,}", f"{row.bytes_full_ffn:,}", f"{100 * row.accuracy:.2f}")
        made.add_row(row.source, *cells, f"{row.nll:.4f}", str(row.count))
    groups: dict[str, list[Scored]] = {}
    for row in rows:
        groups.setdefault(row.numbers, []).append(row)
    if max(map(len, groups.values())) > 1:
        made.add_section()
        for numbers, group in groups.items():
            accuracies = 100 * np.array([row.accuracy for row in group])
            mean = f"{accuracies.mean():.2f} ± {accuracies.std(ddof=1):.2f}"
            nll = f"{np.mean([row.nll for row in group]):.4f}"
            made.add_row(f"mean of {len(group)} runs", numbers, "", "", mean, nll, "")
    tables.show(made)
    if _EXPERTS.value:
        _show_experts(rows)


def _show_experts(rows: Sequence[Scored]) -> None:
    """Prints what is known of experts, means over their layers; what is lost in points of accuracy."""
    made = tables.table("numbers", "output cosine", "experts used", "lost shuffled", "lost one")
    for row in rows:
        figures = (
            (row.output_cosine, 3, 1),
            (row.experts_used, 2, 1),
            (row.lost_shuffled, 2, 100),
            (row.lost_one, 2, 100),
        )
        cells = ["-" if value is None else f"{unit * value:.{digits}f}" for value, digits, unit in figures]
        made.add_row(row.source, row.numbers, *cells)
    tables.show(made)


if __name__ == "__main__":
    entry.run(main)
