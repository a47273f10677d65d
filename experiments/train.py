"""Trains one model and reports on its test split.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits

Started again on the same workdir, it goes on from the newest checkpoint. Any field of the configuration can be changed
on the command line: --config.model.num_experts=32 --config.seed=1
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from bvit_jax import config, train
from experiments import entry

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/digits.py:standard,16.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; made if absent, taken up again if not.")


def main(argv: Sequence[str]) -> None:
    """Trains, and prints the gist of `result.json`."""
    del argv
    resolved = config.resolve(entry.read_config(_CONFIG))
    workdir = Path(str(_WORKDIR.value))
    print(f"run {resolved.digest()} in {workdir}")
    result = train.run(resolved, workdir)
    shown = ("test_accuracy", "test_nll", "validation_accuracy", "best_step", "steps", "params", "seed", "timing")
    print(json.dumps({name: result[name] for name in shown}, indent=2))
    print(f"result: {workdir / 'result.json'}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    entry.run(main, resumes=True)
