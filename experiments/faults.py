"""Kills real training runs and damages their checkpoints, and compares what comes of it with an undisturbed run.

    python -m experiments.faults --out=runs/faults
    python -m experiments.faults --out=runs/faults --trials=20 --seed=1

A trial is a small run on digits, in processes of its own: killed one to three times (SIGKILL or SIGTERM, at random
moments or inside a save), its checkpoints damaged where the trial's kind says so, and started again by the same
command. It must end with the same metrics, result and parameters, to the bit. Writes faults.csv, faults.json and the
runs.
"""

import concurrent.futures
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from bvit_jax import faults, files
from bvit_jax.model_config import require, require_choice
from experiments import entry, tables

_OUT = flags.DEFINE_string("out", None, "The directory to write to; it must be empty or absent.")
_TRIALS = flags.DEFINE_integer(
    "trials", len(faults.KINDS), "Runs to disturb; the kinds of fault are gone through in turn."
)
_KINDS = flags.DEFINE_list("kinds", None, f"Kinds of fault, all if left out: {', '.join(faults.KINDS)}.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the kinds' random choices.")
_JOBS = flags.DEFINE_integer("jobs", 0, "Trials at a time; 0: one per core.")

STEPS = 400
SETTINGS = {
    "seed": 1,  # whose best checkpoint is an early one, which has to be kept
    "total_steps": STEPS,
    "batch_size": 16,
    "log_every": 10,
    "eval_every": 40,
    "keep_every": 3,
    "model.num_experts": 4,
    "model.d_model": 16,
    "model.d_ff": 32,
    "optimizer.warmup_steps": 20,
}


def main(argv: Sequence[str]) -> None:
    """Runs the trials and prints their table."""
    del argv
    require(_TRIALS.value >= 1, "trials", _TRIALS.value, "at least 1")
    require(_JOBS.value >= 0, "jobs", _JOBS.value, "0 or more")
    kinds = _KINDS.value or list(faults.KINDS)
    for kind in kinds:
        require_choice("kinds", kind, tuple(faults.KINDS))
    out = entry.make_directory("out", str(_OUT.value))
    require(not any(out.iterdir()), "out", str(out), "empty, so that no trial finds an earlier one's files")
    # Every start compiles the same programs.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.absolute() / "compilation_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    print(f"one run undisturbed, then {_TRIALS.value} disturbed ones")
    expected = faults.run_undisturbed(command, out / "undisturbed")
    jobs = _JOBS.value or len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(faults.run_trial, number, kind, _SEED.value, command, out / f"trial_{number}", expected)
            for number, kind in enumerate(faults.plan(_TRIALS.value, kinds), start=1)
        ]
        rows = []
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), unit="trial", disable=None):
            rows.append(future.result())
            _write(sorted(rows, key=lambda row: row.trial), out)
    _report(sorted(rows, key=lambda row: row.trial), out)


def command(workdir: Path) -> list[str]:
    """Returns the command of one run."""
    settings = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    program = [sys.executable, "-m", "experiments.train", "--config=configs/digits.py"]
    return [*program, f"--workdir={workdir}", *settings]


def _write(rows: Sequence[faults.TrialRow], out: Path) -> None:
    files.write_rows(out / "faults.csv", [dataclasses.asdict(row) for row in rows])


def _report(rows: Sequence[faults.TrialRow], out: Path) -> None:
    made = tables.table("trial", "kills", "in a save", "damages", "found", "repeated", "survived", "exact", "lost")
    for row in rows:
        counts = (row.kills, row.kills_in_a_save, row.damages, row.damages_found, row.steps_repeated)
        yes = ("yes" if row.survived else "NO", "yes" if row.exact else "NO")
        made.add_row(row.kind, str(row.trial), *map(str, counts), *yes, str(row.good_lost))
    tables.show(made)
    passed = sum(row.passed for row in rows)
    print(
        f"{sum(row.kills + row.damages for row in rows)} faults injected in {len(rows)} runs of {STEPS} steps; "
        f"{sum(row.survived for row in rows)} of {len(rows)} survived, {sum(row.exact for row in rows)} bit-exact; "
        f"{sum(row.damages_found for row in rows)} of {sum(row.damages for row in rows)} damages found; "
        f"good checkpoints lost: {sum(row.good_lost for row in rows)}"
    )
    print("repeated: steps that had been logged and were taken again; lost: good checkpoints not used or moved away")
    print(f"report: {out / 'faults.csv'}, with every trial's story and exit statuses")
    for row in rows:
        if not row.passed:
            print(f"failed: trial {row.trial}, {row.kind}: exits {row.exits}; {row.story}; see {out}/trial_{row.trial}")
    if passed < len(rows):
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    entry.run(main)
