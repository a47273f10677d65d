"""Counts the bytes of a model's file against its number of experts: every family and form, in all formats.

    python -m experiments.memory --config=configs/paper.py --experts=1,2,4,8,16,32,64 --out=runs/memory

Nothing is trained and no array is made: the counts follow from shapes, and the exported file has exactly the bytes
counted. Also writes which devices hold how many experts, and a model of the energy of a step.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags
from rich.table import Table

from bvit_jax import config, devices, energy, memory_report, scaling
from bvit_jax.storage import Storage
from experiments import entry, number_flags, storage_flags, tables

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/paper.py.")
_EXPERTS = flags.DEFINE_list("experts", [str(2**power) for power in range(13)], "Numbers of experts, comma between.")
flags.adopt_module_key_flags(storage_flags)
_OUT = flags.DEFINE_string("out", None, "The directory to write to; made if absent.")
IMAGES = (1, 128)
"""Images a step, for the energy."""


def main(argv: Sequence[str]) -> None:
    """Writes the report and prints its tables for the largest number of experts up to 64."""
    del argv
    resolved = config.resolve(entry.read_config(_CONFIG))
    experts = number_flags.numbers("experts", _EXPERTS.value)
    rest = storage_flags.given(resolved.model)
    out = entry.make_directory("out", str(_OUT.value))
    points = memory_report.write(resolved, rest, experts, out)
    shown = max([number for number in experts if number <= 64] or experts[:1])
    listed = [p for p in points if p.num_experts == shown or p.variant.family == "dense"]
    print(f"{memory_report.describe(resolved)}, {shown} experts, {_describe(rest)}.")
    print("MB are 10^6 bytes. paper: the paper's formula; FFN: mixture layers, every byte; file: the whole file;")
    print("x: bytes of the float32 standard mixture of as many experts over it (dense: of one); E^: exponent of the")
    print("growth of FFN with the experts.")
    tables.show(tables.memory_table(listed, scaling.growth(points)))
    print(f"Most experts whose file fits the flash and whose activations fit the RAM, backbone {rest.backbone}:")
    tables.show(_devices(memory_report.write_devices(resolved, rest, out)))
    of_shown = scaling.with_experts(resolved, points[-1].variant, shown)
    print(f"Energy of a step in the mixture layers, {shown} experts: a model, not a measurement (bvit_jax/energy.py).")
    print("Saving against the float32 standard mixture: in all; fused, rotations moving nothing; of weights alone.")
    print(f"The paper reports {100 * energy.PAPER_SAVING:.1f} %, by a model that is not public.")
    tables.show(_energies(memory_report.write_energy(of_shown, rest, IMAGES, out)))
    written = (*memory_report.OUTPUTS, "devices.csv", "devices.json", "energy.csv", "energy.json")
    print(f"report: {', '.join(written)} in {out}")


def _devices(rows: Sequence[devices.Fit]) -> Table:
    made = tables.table(*dict.fromkeys(row.variant for row in rows))
    for device in devices.DEVICES:
        made.add_row(device.name, *[_count(row) for row in rows if row.device == device.name])
    return made


def _count(row: devices.Fit) -> str:
    return f"{row.num_experts:,}" + ("+" if row.bound == "limit" else "")


def _energies(rows: Sequence[energy.Comparison]) -> Table:
    made = tables.table(*[text for n in IMAGES for text in (f"{n} im. mJ", "saving %", "fused %", "weights %")])
    for variant in dict.fromkeys(row.variant for row in rows):
        cells = []
        for row in (row for row in rows if row.variant == variant):
            savings = (row.saving, row.saving_fused, row.saving_weights)
            cells += [f"{row.total / 1e9:,.2f}", *[f"{100 * saving:.2f}" for saving in savings]]
        made.add_row(variant, *cells)
    return made


def _describe(rest: Storage) -> str:
    trits = "5 trits a byte" if rest.trits == "base3" else "2 bits a trit"
    return f"router {rest.router}, dense matrices {rest.experts}, backbone {rest.backbone}, {trits}"


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    entry.run(main)
