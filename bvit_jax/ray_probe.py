"""A first look at the nodes of a Ray cluster, before trials of a sweep run there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bvit_jax import ray_cluster, ray_trial, topology
from bvit_jax.executor import Platform
from bvit_jax.model_config import ConfigError
from bvit_jax.ray_cluster import Need

LOOK_SECONDS = 600.0
"""For a node to become free for a first look at it."""


def probe(need: Need) -> int:
    """Returns the number of devices that a trial finds: of a slice by its name, else as JAX on a node says.

    Raises:
        ConfigError: if no node has what a trial takes, JAX finds no device there, or one that all trials of that node
            would take at the same time.
    """
    ray_cluster.check_there(need)
    if need.slice:
        return topology.num_devices(need.slice)
    [found] = _ask(need, ray_trial.platform, [need.options])
    _check_own(need, found)
    return int(found.devices)


def _check_own(need: Need, found: Platform) -> None:
    """Raises ConfigError if JAX would take an accelerator that the trial did not ask Ray for."""
    own = {"cpu": None, "gpu": "GPU", "cuda": "GPU", "rocm": "GPU"}.get(found.backend, found.backend.upper())
    if own is not None and own not in need.resources:
        raise ConfigError(
            f"resources_per_trial = {str(need)!r}: the nodes have {own}s, which trials would take from each other; ask "
            f'for them, such as {{"{own}": {found.devices}}}, or start Ray with JAX_PLATFORMS=cpu'
        )


def check_shared(need: Need, identity: Path) -> None:
    """Raises ConfigError unless all nodes that may run trials see a file of the sweep, and have its packages."""
    wanted = ray_trial.shared(identity)
    ids = [node["NodeID"] for node in ray_cluster.fitting(need, ray_cluster.alive())]
    options = [{"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)} for node in ids]
    for wrong in _ask(need, ray_trial.differing, options, wanted):
        if wrong is not None:
            raise ConfigError(
                f"workdir = {str(identity.parent)!r}: it must be one that all nodes share, with equal "
                f"packages on all; {wrong}"
            )


def _ask(need: Need, function: Callable[..., Any], options: Sequence[dict[str, Any]], *arguments: object) -> list[Any]:
    """Returns what a function returns on some nodes, one for each options of a task."""
    refs = [ray.remote(function).options(**each, max_retries=2).remote(*arguments) for each in options]
    try:
        return list(ray.get(refs, timeout=LOOK_SECONDS))
    except ray.exceptions.GetTimeoutError:
        for ref in refs:
            ray.cancel(ref, force=True)
        raise ConfigError(
            f"resources_per_trial = {str(need)!r}: no node had that free for {LOOK_SECONDS:.0f} s; wait for other jobs"
        ) from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise ConfigError(f"on a node: {error.cause}") from None
        raise
    except ray.exceptions.RayError as error:
        gist = (str(error).strip() or "no message").splitlines()[0]
        raise ConfigError(f"a node cannot run trials: {type(error).__name__}: {gist}") from None
