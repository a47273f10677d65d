"""Times training steps with a checkpoint written beside them and without one, in turn in one process.

    python -m experiments.bench_checkpoints --config=configs/digits.py --out=runs/bench_checkpoints
    python -m experiments.bench_checkpoints --config=configs/paper.py --out=runs/bench_checkpoints_paper --repeats=5

Writes checkpoint_cost.csv and checkpoint_cost.json, one row; the checkpoints themselves go to a folder in --out that is
removed at the end. A window is as many steps as take twice a save; in every other one a save begins with the first step
and is waited for at the end. Interval and per cent are computed from these windows, which are shorter.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from bvit_jax import bench_checkpoints, bench_report, config, files
from bvit_jax.bench_checkpoints import COLUMNS
from bvit_jax.model_config import require
from experiments import data_flags, entry, tables

__doc__ = "\n\n".join([str(__doc__), "Columns:", *[f"{name}: {meaning}." for name, meaning in COLUMNS.items()]])

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/digits.py.")
flags.adopt_module_key_flags(data_flags)
_REPEATS = flags.DEFINE_integer("repeats", 20, "Times that all is timed.")
_OUT = flags.DEFINE_string("out", None, "The directory to write to; made if absent.")


def main(argv: Sequence[str]) -> None:
    """Times, writes the row and prints it as a table."""
    del argv
    data_flags.apply()
    resolved = config.resolve(entry.read_config(_CONFIG))
    require(_REPEATS.value >= 1, "repeats", _REPEATS.value, "at least 1")
    out = entry.make_directory("out", str(_OUT.value))
    where = bench_report.machine()
    with tqdm(total=2 * _REPEATS.value, unit="turn", disable=None, leave=False) as bar:
        figures = bench_checkpoints.measure(resolved, out, _REPEATS.value, bar.update)
    files.write_rows(out / "checkpoint_cost.csv", [{"run": resolved.digest(), **where, **figures}])
    print(f"run {resolved.digest()} on {bench_report.describe(where)}")
    tables.show_figures(figures, COLUMNS)
    print(f"report: checkpoint_cost.csv, checkpoint_cost.json in {out}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    entry.run(main)
