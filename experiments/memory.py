"""Counts the bytes of a model's file against its number of experts: dense, standard and butterfly, in all formats.

    python -m experiments.memory --config=configs/paper.py --experts=1,2,4,8,16,32,64 --out=runs/memory

Nothing is trained and no array is made: the counts follow from shapes, and the exported file has exactly the bytes
counted. Also writes which devices hold how many experts, and a model of the energy of a step.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from bvit_jax import config, memory_report, scaling
from bvit_jax.model_config import require
from experiments import entry, storage_flags, tables

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/paper.py.")
_EXPERTS = flags.DEFINE_list("experts", [str(2**power) for power in range(13)], "Numbers of experts, comma between.")
_OUT = flags.DEFINE_string("out", None, "The directory to write to; made if absent.")


def main(argv: Sequence[str]) -> None:
    """Writes the report and prints its tables for the largest number of experts up to 64."""
    del argv
    resolved = config.resolve(_CONFIG.value.to_dict())
    experts = _numbers(_EXPERTS.value)
    rest = storage_flags.rest(resolved.model)
    out = entry.make_directory("out", str(_OUT.value))
    points = memory_report.write(resolved, rest, experts, out)
    shown = max([number for number in experts if number <= 64] or experts[:1])
    listed = [p for p in points if p.num_experts == shown or p.variant.family == "dense"]
    print(f"{memory_report.describe(resolved)}, {shown} experts, {storage_flags.describe(rest)}.")
    print("MB are 10^6 bytes. paper: the paper's formula; FFN: mixture layers, every byte; file: the whole file;")
    print("x: bytes of the float32 standard mixture over it; E^: exponent of the growth of FFN with the experts.")
    tables.show(tables.memory_table(listed, scaling.growth(points)))
    print(f"report: {out / 'memory.csv'}, {out / 'memory_totals.csv'}, {out / 'memory.json'}, {out / 'plots'}")


def _numbers(listed: Sequence[str]) -> tuple[int, ...]:
    for text in listed:
        require(text.strip().isdigit() and int(text) > 0, "experts", ",".join(listed), "numbers from 1, comma between")
    numbers = tuple(sorted({int(text) for text in listed}))
    require(bool(numbers), "experts", "", "numbers from 1, comma between")
    return numbers


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    entry.run(main)
