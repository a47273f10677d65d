"""Flags that say where the trials of a sweep run: on this machine, or on a Ray cluster."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from bvit_jax import executor, preemption, ray_cluster
from bvit_jax.failures import Failures
from bvit_jax.model_config import require
from bvit_jax.sweep import Trial

_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "ray"], "Run trials on this machine, or on a Ray cluster.")
_JOBS = flags.DEFINE_integer(
    "jobs", 0, "Trials at a time; 0: one per core on CPUs (8 at most), one on accelerators; on Ray all that have room."
)
_RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Run again the trials that failed in an earlier call.")
_ADDRESS = flags.DEFINE_string("ray_address", None, "Of the Ray cluster: auto (default; this machine's), or HOST:PORT.")
_RESOURCES = flags.DEFINE_string(
    "resources_per_trial", None, 'What a trial takes of a node, of each with --topology; {"CPU": 1} if left out.'
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "A trial takes such a slice of TPUs, all its hosts: v6e:4x4.")
_MAX_RETRIES = flags.DEFINE_integer(
    "max_retries", None, "Times that a trial is started again whose node was lost, from each checkpoint; 3 if left out."
)
_COMPILED = "compilation_cache"
"""The folder of compiled programs, in the sweep's directory."""

Run = Callable[[Sequence[Trial], Failures, Path, Callable[[Trial], None], preemption.Notice], None]
"""Runs trials: all of a sweep, its failures, its directory, and `on_end` and `notice` of `executor.run_trials`."""


@dataclasses.dataclass(frozen=True)
class Executor:
    """Runs the trials of a sweep.

    Attributes:
        devices: of a trial.
        how: they run, in words.
        run: what runs them.
    """

    devices: int
    how: str
    run: Run


def workdir(given: str) -> Path:
    """Returns a sweep's directory as its executor is to know it: nodes of a cluster have another current directory.

    Raises:
        ConfigError: if it is an address of storage and not a directory.
    """
    require("://" not in given, "workdir", given, "a directory; have the storage mounted on all machines of the sweep")
    return Path(given).absolute() if _EXECUTOR.value == "ray" else Path(given)


def retry_failed() -> bool:
    """Says whether to run again what failed in an earlier call."""
    return bool(_RETRY_FAILED.value)


def chosen(trials: Sequence[Trial], say: Callable[[str], None]) -> Executor:
    """Returns the executor that the flags ask for, once it is known that it can run trials.

    Args:
        trials: that it is to run.
        say: called with lines about what happens to trials.

    Raises:
        ConfigError: if a flag has a wrong value, JAX finds no device, or a cluster does not have what is asked for.
    """
    require(_JOBS.value >= 0, "jobs", _JOBS.value, "0 or more")
    if _EXECUTOR.value == "ray":
        return _on_ray(trials, say)
    for flag in (_ADDRESS, _RESOURCES, _TOPOLOGY, _MAX_RETRIES):
        require(flag.value is None, flag.name, flag.value, "left out, or given with --executor=ray")
    return _local()


def _local() -> Executor:
    platform = executor.probe_platform()
    jobs = _JOBS.value or platform.default_jobs

    def run(
        trials: Sequence[Trial],
        failed: Failures,
        directory: Path,
        on_end: Callable[[Trial], None],
        notice: preemption.Notice,
    ) -> None:
        executor.run_trials(trials, failed, jobs, retry_failed(), directory / _COMPILED, on_end, notice)

    return Executor(platform.devices, f"{jobs} at a time", run)


def _on_ray(trials: Sequence[Trial], say: Callable[[str], None]) -> Executor:
    retries = 3 if _MAX_RETRIES.value is None else _MAX_RETRIES.value
    require(retries >= 0, "max_retries", retries, "0 or more")
    need = ray_cluster.need(_RESOURCES.value or "", _TOPOLOGY.value or "")
    for start in {trial.config.start_from for trial in trials} - {""}:
        require(Path(start).is_absolute(), "start_from", start, "an absolute path, for nodes of a cluster to find it")
    ray_cluster.connect(_ADDRESS.value or "auto")
    from bvit_jax import ray_executor, ray_probe  # need Ray

    jobs = _JOBS.value

    def on_loss(trial: Trial, why: str) -> None:
        say(f"{trial.label:<40} lost       at step {trial.steps_done}, to be started again: {why}")

    def run(
        trials: Sequence[Trial],
        failed: Failures,
        directory: Path,
        on_end: Callable[[Trial], None],
        notice: preemption.Notice,
    ) -> None:
        identity = directory / "sweep.json"
        ray_probe.check_shared(need, identity)
        plan = ray_executor.Plan(need, jobs, retries, retry_failed(), directory / _COMPILED, identity)
        ray_executor.run_trials(trials, failed, plan, on_end, on_loss, notice)

    how = f"on Ray, each with {need}" + (f", {jobs} at a time" if jobs else "")
    return Executor(ray_probe.probe(need), how, run)
