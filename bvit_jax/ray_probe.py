"""A first look at the nodes of a Ray cluster, before trials of a sweep run there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from bvit_jax import ray_cluster, ray_trial, topology
from bvit_jax.model_config import ConfigError, require
from bvit_jax.ray_cluster import Need

LOOK_SECONDS = 600.0
"""For a node to become free for a first look at it."""


def probe(need: Need) -> int:
    """Asks a node that has what a trial takes how many devices it will find there; of a slice its name tells it.

    Raises:
        ConfigError: if there is no such node, JAX finds no device there, or its packages are others.
    """
    ray_cluster.check_there(need)
    seen: ray_trial.Seen = _ask(need, ray_trial.look, not need.slice)
    here = ray_cluster.versions()
    require(seen.versions == here, "packages of a node", seen.versions, f"those of the sweep, {here}")
    return topology.num_devices(need.slice) if seen.platform is None else seen.platform.devices


def check_shared(need: Need, identity: Path) -> None:
    """Raises ConfigError unless a node sees a file that was written here."""
    same = _ask(need, ray_trial.read, identity) == identity.read_bytes()
    require(same, "workdir", str(identity.parent), "a directory that all nodes share; a node does not see it")


def _ask(need: Need, function: Callable[..., Any], argument: object) -> Any:
    """Returns what a function returns on a node that has what a trial takes."""
    of_slice = {"num_cpus": 0, "label_selector": {ray_cluster.SHAPE_LABEL: need.shape}}
    options = of_slice if need.slice else need.options
    ref = ray.remote(function).options(**options, max_retries=2).remote(argument)
    try:
        return ray.get(ref, timeout=LOOK_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(ref, force=True)
        raise ConfigError(
            f"resources_per_trial = {str(need)!r}: no node had that free for {LOOK_SECONDS:.0f} s; wait for other jobs"
        ) from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise ConfigError(f"on a node: {error.cause}") from None
        raise
