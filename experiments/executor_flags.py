"""Flags that say where the trials of a sweep run: on this machine, or on a Ray cluster."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from absl import flags

from bvit_jax import executor, preemption, ray_cluster
from bvit_jax.failures import Failures
from bvit_jax.model_config import require
from bvit_jax.ray_cluster import Need
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


class Executor(Protocol):
    """Runs the trials of a sweep; `devices` are those of a trial, and as text it says how they run."""

    devices: int

    def run(
        self,
        trials: Sequence[Trial],
        failed: Failures,
        workdir: Path,
        on_end: Callable[[Trial], None],
        notice: preemption.Notice,
    ) -> None:
        """As `executor.run_trials`."""


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
    platform = executor.probe_platform()
    return _Local(platform.devices, _JOBS.value or platform.default_jobs)


@dataclasses.dataclass
class _Local:
    devices: int
    jobs: int

    def __str__(self) -> str:
        return f"{self.jobs} at a time"

    def run(
        self,
        trials: Sequence[Trial],
        failed: Failures,
        workdir: Path,
        on_end: Callable[[Trial], None],
        notice: preemption.Notice,
    ) -> None:
        cache = workdir / "compilation_cache"
        executor.run_trials(trials, failed, self.jobs, retry_failed(), cache, on_end, notice)


def _on_ray(trials: Sequence[Trial], say: Callable[[str], None]) -> Executor:
    retries = 3 if _MAX_RETRIES.value is None else _MAX_RETRIES.value
    require(retries >= 0, "max_retries", retries, "0 or more")
    need = ray_cluster.need(_RESOURCES.value or "", _TOPOLOGY.value or "")
    for start in {trial.config.start_from for trial in trials} - {""}:
        require(Path(start).is_absolute(), "start_from", start, "an absolute path, for nodes of a cluster to find it")
    ray_cluster.connect(_ADDRESS.value or "auto")
    from bvit_jax import ray_probe  # needs Ray

    return _OnRay(ray_probe.probe(need), need, _JOBS.value, retries, say)


@dataclasses.dataclass
class _OnRay:
    devices: int
    need: Need
    jobs: int
    max_retries: int
    say: Callable[[str], None]

    def __str__(self) -> str:
        return f"on Ray, each with {self.need}" + (f", {self.jobs} at a time" if self.jobs else "")

    def run(
        self,
        trials: Sequence[Trial],
        failed: Failures,
        workdir: Path,
        on_end: Callable[[Trial], None],
        notice: preemption.Notice,
    ) -> None:
        from bvit_jax import ray_executor, ray_probe

        def on_loss(trial: Trial, why: str) -> None:
            self.say(f"{trial.label:<40} lost       at step {trial.steps_done}, to be started again: {why}")

        cache, identity = workdir / "compilation_cache", workdir / "sweep.json"
        ray_probe.check_shared(self.need, identity)
        plan = ray_executor.Plan(self.need, self.jobs, self.max_retries, retry_failed(), cache, identity)
        ray_executor.run_trials(trials, failed, plan, on_end, on_loss, notice)
