"""Times the input of a training run: reading, moving, augmenting, and whether the steps ever wait for images.

    python -m experiments.bench_data --config=configs/cifar100.py --data_dir=DIR --out=runs/bench_data

Writes data_cost.csv and data_cost.json, one row. Steps that get their batches as a run does are timed in turn with
steps that get one batch again and again, which is on the device already.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from bvit_jax import bench_data, bench_report, config, files
from bvit_jax.bench_data import COLUMNS
from bvit_jax.model_config import require
from experiments import data_flags, entry, tables

__doc__ = "\n\n".join([str(__doc__), "Columns:", *[f"{name}: {meaning}." for name, meaning in COLUMNS.items()]])

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/cifar100.py.")
flags.adopt_module_key_flags(data_flags)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Times that all is timed.")
_OUT = flags.DEFINE_string("out", None, "The directory to write to; made if absent.")


def main(argv: Sequence[str]) -> None:
    """Times, writes the row and prints it as a table."""
    del argv
    data_flags.apply()
    resolved = config.resolve(entry.read_config(_CONFIG))
    require(_REPEATS.value >= 1, "repeats", _REPEATS.value, "at least 1")
    out = entry.make_directory("out", str(_OUT.value))
    where = bench_report.machine()
    with tqdm(total=_REPEATS.value, unit="turn", disable=None, leave=False) as bar:
        figures = bench_data.measure(resolved, _REPEATS.value, bar.update)
    images = {"images": resolved.data.name, "reading": resolved.data.reading}
    files.write_rows(out / "data_cost.csv", [{"run": resolved.digest(), **images, **where, **figures}])
    print(f"run {resolved.digest()}, {' '.join(images.values())}, on {bench_report.describe(where)}")
    tables.show_figures(figures, COLUMNS)
    print(f"report: data_cost.csv, data_cost.json in {out}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    entry.run(main)
