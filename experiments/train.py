"""Trains one model and reports on its test split.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits

Started again on the same workdir, it goes on from the newest good checkpoint and ends as if it had never stopped, to
the bit. Any field of the configuration can be changed on the command line: --config.model.num_experts=32

Exit status: 0 finished; 2 a bad configuration or workdir; 65 a loss or gradient that is not finite (report in
WORKDIR/nonfinite); 74 checkpoints cannot be written; 75 told to stop (SIGTERM), saved; 76 another process of the run
was lost; 130 Ctrl-C.

All devices are used. On several hosts the same command runs on each; on Cloud TPU they find each other, elsewhere they
need --coordinator=HOST:PORT --num_processes=N --process_id=I. What is computed does not depend on the devices, and a
workdir can be taken up again on others.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from bvit_jax import config, peers, processes, train
from experiments import data_flags, entry, mesh_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file, e.g. configs/digits.py:standard,16.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; made if absent, taken up again if not.")
flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(mesh_flags)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in all; with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0; with --coordinator.")


def main(argv: Sequence[str]) -> None:
    """Trains, and prints the gist of `result.json`."""
    del argv
    data_flags.apply()
    resolved = config.resolve(entry.read_config(_CONFIG))
    workdir, layout = Path(str(_WORKDIR.value)), mesh_flags.layout()
    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if processes.is_first():
        print(f"run {resolved.digest()} in {workdir}, {jax.device_count()} devices, {jax.process_count()} processes")
    with peers.together():
        result = train.run(resolved, workdir, layout=layout)
    if processes.is_first():
        _report(result, workdir)


def _report(result: dict[str, Any], workdir: Path) -> None:
    shown = (
        "test_accuracy",
        "test_nll",
        "validation_accuracy",
        "best_step",
        "steps",
        "params",
        "seed",
        "timing",
        "memory",
    )
    print(json.dumps({name: result[name] for name in shown}, indent=2))
    print(f"result: {workdir / 'result.json'}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    entry.run(main, resumes=True)
