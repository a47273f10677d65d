"""Compresses a trained model and says what that costs.

    python -m experiments.compress --workdir=runs/digits --method=mixed_rank --keep=0.4 --out=runs/compressed
    python -m experiments.evaluate --model=runs/compressed/model.safetensors

Methods, for dense models and stored experts but where noted:

    rounding          weights as integers of 8, 4 or 2 bits, to nearest; any family
    quantise          likewise, rounded by calibration images; any family
    prune             weights of least magnitude are left out
    svd               low-rank factors of every map, the same share of each
    activation_aware  factors that keep the outputs on calibration images, the same share of each map
    mixed             likewise, ranks by what each map loses
    mixed_rank        likewise, and a part of each rank is fitted to what the maps before it, compressed, give
    merge             experts that do alike are merged; stored experts only

The best checkpoint on validation is compressed. Calibration images are of the training split. --out receives the model
as one packed file, compression.json, and maps.csv with the rank and the error of every linear map.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from absl import flags

from bvit_jax import compressed
from bvit_jax.compress_request import Method, from_dict
from bvit_jax.compress_source import MapRow
from bvit_jax.model_config import require
from experiments import data_flags, entry, tables

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run of experiments.train.")
_OUT = flags.DEFINE_string("out", None, "The directory to write; made if absent, else empty or an earlier result's.")
_METHOD = flags.DEFINE_enum("method", None, get_args(Method), "How to compress; see above.")
_KEEP = flags.DEFINE_float("keep", None, "Share of the model's numbers to keep; not for rounding and quantise.")
_BITS = flags.DEFINE_integer("bits", None, "Bits a weight, 8, 4 or 2 (patches, head, router: 8); 32 leaves floats.")
_IMAGES = flags.DEFINE_integer(
    "calibration_images", None, "Images of the training split, to calibrate and to report errors by; 256."
)
flags.adopt_module_key_flags(data_flags)

OUTPUTS = {compressed.MODEL_FILE, compressed.RESULT_FILE, "maps.csv", "maps.json"}


def main(argv: Sequence[str]) -> None:
    """Compresses one run, and prints what became of its maps and its accuracy."""
    del argv
    data_flags.apply()
    given = {"method": _METHOD.value, "keep": _KEEP.value, "bits": _BITS.value, "calibration_images": _IMAGES.value}
    request = from_dict({name: value for name, value in given.items() if value is not None})
    run = compressed.Run(Path(str(_WORKDIR.value)))
    run.check(request)
    out = entry.make_directory("out", str(_OUT.value))
    others = sorted({path.name for path in out.iterdir()} - OUTPUTS)
    require(not others, "out", str(out), f"a directory of its own; this one holds {', '.join(others[:3])}")
    result, maps = run.write(request, out)
    _show_maps(maps)
    _show(result)
    print(f"written: {out / compressed.MODEL_FILE}, {out / compressed.RESULT_FILE}, {out / compressed.MAPS_FILE}")


def _show_maps(rows: Sequence[MapRow]) -> None:
    """Prints a line for each kind of map: its ranks layer by layer, or the least and the largest of experts."""
    kinds: dict[str, list[MapRow]] = {}
    for row in rows:
        kinds.setdefault(row.path, []).append(row)
    made = tables.table("maps", "inputs", "outputs", "ranks", "numbers kept", "output error")
    for path, found in kinds.items():
        numbers = sum(row.numbers for row in found) / sum(row.inputs * row.outputs for row in found)
        errors = [row.output_error for row in found]
        cells = (str(len(found)), str(found[0].inputs), str(found[0].outputs), _ranks(found))
        made.add_row(path, *cells, f"{numbers:.1%}", f"{min(errors):.4f} to {max(errors):.4f}")
    if rows:
        tables.show(made)


def _ranks(found: Sequence[MapRow]) -> str:
    ranks = [row.rank for row in found if row.rank is not None]
    if not ranks:
        return "-"
    wholes = min(found[0].inputs, found[0].outputs)
    named = ["whole" if rank == wholes else str(rank) for rank in ranks]
    return ", ".join(named) if len(ranks) <= 6 else f"{min(ranks)} to {max(ranks)}"


def _show(result: compressed.Result) -> None:
    """Prints sizes and scores, before and after."""
    made = tables.table("before", "after", "change")
    for name, whole, left in (
        ("numbers", result.numbers_before, result.numbers),
        ("file, bytes", result.bytes_before, result.bytes_full),
    ):
        made.add_row(name, f"{whole:,}", f"{left:,}", f"{whole / left:.2f}x smaller")
    for name, before, after in (
        ("test accuracy, %", result.accuracy_before, result.test_accuracy),
        ("validation accuracy, %", result.val_accuracy_before, result.val_accuracy),
    ):
        made.add_row(name, f"{100 * before:.2f}", f"{100 * after:.2f}", f"{100 * (after - before):+.2f} points")
    change = f"{result.test_nll - result.nll_before:+.4f}"
    made.add_row("test NLL", f"{result.nll_before:.4f}", f"{result.test_nll:.4f}", change)
    tables.show(made)
    if result.experts is not None:
        print(f"{result.experts} experts are stored of each mixture")
    print(f"{result.method} of step {result.step} in {result.seconds:.1f} s")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "method", "out"])
    entry.run(main)
