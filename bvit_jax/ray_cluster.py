"""A Ray cluster: reached, asked whether it has what trials need, and given this package, which its nodes then run.

Ray is optional (`requirements-ray.txt`) and imported when it is asked for. It reports nothing to the outside unless
RAY_USAGE_STATS_ENABLED says so.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bvit_jax
from bvit_jax import data_dirs, topology
from bvit_jax.model_config import ConfigError, require

_REACH_SECONDS = 5.0
_START = "start one with: ray start --head"
_ACCELERATORS = {"v4": "V4", "v5e": "V5LITEPOD", "v5p": "V5P", "v6e": "V6E", "tpu7x": "V7X"}
"""Ray's names of the generations of TPUs that `bvit_jax.topology` knows. Source: `ray._private.accelerators.tpu`."""
_SHAPE_LABEL, _SLICE_LABEL, _KIND_LABEL = "ray.io/tpu-topology", "ray.io/tpu-slice-name", "ray.io/tpu-pod-type"
"""What Ray says of a host of TPUs: the slice's shape and name, and both its kind and size."""
_COMPILED = "JAX_COMPILATION_CACHE_DIR"
_LAST_STARTED = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` leaves the address of the cluster of this machine."""


@dataclasses.dataclass(frozen=True)
class Need:
    """What a trial takes of a cluster.

    Attributes:
        resources: amounts by Ray's names, of a trial, or of each host of one where there is a slice.
        slice: of TPUs, such as `v6e:4x4`; empty where a trial is a process on one node.
    """

    resources: Mapping[str, float]
    slice: str = ""

    @property
    def accelerator(self) -> str:
        """Ray's name of the kind of TPU of the slice."""
        return f"TPU-{_ACCELERATORS[self.slice.partition(':')[0]]}"

    @property
    def shape(self) -> str:
        """Of the slice, such as 4x4."""
        return self.slice.partition(":")[2]

    @property
    def threads(self) -> int | None:
        """Of computations on CPUs: as many as CPUs are asked for. None on accelerators, whose hosts have other work."""
        if self.slice or {"TPU", "GPU"} & self.resources.keys():
            return None
        return max(int(self.resources.get("CPU", 0)), 1)

    @property
    def options(self) -> dict[str, Any]:
        """Of a Ray task that takes the resources: some have names of their own there."""
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        own = {option: self.resources[name] for name, option in named.items() if name in self.resources}
        others = {name: amount for name, amount in self.resources.items() if name not in named}
        return {"num_cpus": 0, **own, "resources": others}

    def __str__(self) -> str:
        listed = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        return " with ".join(part for part in (self.slice, listed) if part)


def need(resources: str, slice_name: str) -> Need:
    """Reads what a trial takes from flags.

    Args:
        resources: a JSON object, such as {"CPU": 2}; empty for one CPU, or for what a host of the slice has.
        slice_name: as in `Need`; may be empty.

    Raises:
        ConfigError: if either cannot be read.
    """
    if slice_name:
        topology.num_devices(slice_name)
    wanted = 'a JSON object of positive amounts, such as {"CPU": 1}'
    try:
        found = json.loads(resources or ("{}" if slice_name else '{"CPU": 1}'))
    except ValueError:
        found = None
    amounts = found.values() if isinstance(found, dict) else ()
    good = isinstance(found, dict) and all(type(amount) in (int, float) and 0 < amount < math.inf for amount in amounts)
    require(good and bool(found or slice_name), "resources_per_trial", resources, wanted)
    return Need({str(name): float(amount) for name, amount in dict(found or {}).items()}, slice_name)


def connect(address: str) -> None:
    """Joins this process to a cluster, as the driver of a job.

    Args:
        address: HOST:PORT, or `auto` for $RAY_ADDRESS, or else the cluster that this machine is of.

    Raises:
        ConfigError: if Ray is not installed, there is no cluster, or this machine is none of its nodes.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("executor = 'ray': Ray is not installed: pip install -r requirements-ray.txt")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # pages of the state of each node that is lost
    _check_reachable(address)
    import ray

    runtime = {
        "py_modules": [str(Path(bvit_jax.__file__).parent)],
        "excludes": ["**/__pycache__"],
        "env_vars": _passed_on(),
    }
    try:
        ray.init(address=address, runtime_env=runtime, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        gist = " ".join(str(error).split()) or repr(error)
        wanted = (
            f"that of a cluster which this machine is a node of; {_START}, or join one: ray start --address=HOST:PORT"
        )
        raise ConfigError(f"ray_address = {address!r}: it must be {wanted} ({gist})") from None


def _passed_on() -> dict[str, str]:
    """Returns the variables that trials take from the sweep, with paths that mean the same on all machines."""
    found = {}
    if os.environ.get(data_dirs.VARIABLE):
        found[data_dirs.VARIABLE] = str(data_dirs.current().absolute())
    cache = os.environ.get(_COMPILED)
    if cache:
        found[_COMPILED] = cache if "://" in cache else str(Path(cache).absolute())
    return found


def _check_reachable(address: str) -> None:
    """Raises ConfigError unless something listens at the address: Ray itself would try for minutes."""
    found = address
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS", "")
        with contextlib.suppress(OSError):
            found = found or _LAST_STARTED.read_text().strip()
        if not found:
            raise ConfigError(f"ray_address = 'auto': no Ray cluster on this machine; {_START}")
    host, _, port = found.rpartition(":")
    good = bool(re.fullmatch(r"[^/\s]+", host)) and port.isdecimal() and 0 < int(port) < 2**16
    require(good, "ray_address", found, "auto or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), _REACH_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"ray_address = {found!r}: no Ray cluster there ({error}); {_START}") from None


def alive() -> list[dict[str, Any]]:
    """Returns the nodes of the cluster, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def hosts_of(wanted: Need) -> tuple[int, dict[str, float]]:
    """Returns the number of hosts of a slice, and what a trial takes of each.

    Raises:
        ConfigError: if the resources do not go with the slice.
    """
    from ray.util.tpu import get_tpu_worker_resources

    try:
        return get_tpu_worker_resources(wanted.shape, wanted.accelerator, dict(wanted.resources) or None)
    except ValueError as error:
        raise ConfigError(f"resources_per_trial = {str(wanted)!r}: they do not divide the slice ({error})") from None


def fitting(wanted: Need, nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the nodes that have what a trial takes of one; hosts of slices only if all of a slice are there."""
    if wanted.slice:
        return [node for hosts in _slices(wanted, nodes) for node in hosts]
    return _having(wanted.resources, nodes)


def _having(resources: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [node for node in nodes if all(node["Resources"].get(name, 0.0) >= resources[name] for name in resources)]


def count_slices(wanted: Need, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Returns how many whole slices of the wanted kind there are, free or not."""
    return len(_slices(wanted, nodes))


def _slices(wanted: Need, nodes: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Groups the hosts of whole slices, as Ray finds these when it reserves one: by their kind and size."""
    from ray.util.tpu import infer_tpu_pod_type_from_topology

    hosts, own = hosts_of(wanted)
    kind = infer_tpu_pod_type_from_topology(wanted.shape, wanted.accelerator)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for node in _having(own, nodes):
        if node["Labels"].get(_KIND_LABEL) == kind:
            name = node["NodeID"] if hosts == 1 else str(node["Labels"].get(_SLICE_LABEL))
            groups.setdefault(name, []).append(node)
    head = f"TPU-{kind}-head"
    whole = [group for group in groups.values() if len(group) == hosts]
    return [group for group in whole if hosts == 1 or any(head in node["Resources"] for node in group)]


def check_there(wanted: Need) -> None:
    """Raises ConfigError unless some node of the cluster, or for a slice several together, has what a trial takes."""
    import ray

    nodes = alive()
    try:
        ray.remote(check_there).options(**wanted.options)
    except ValueError as error:
        raise ConfigError(f"resources_per_trial = {str(wanted)!r}: {error}") from None
    if fitting(wanted, nodes):
        return
    if wanted.slice and not (wanted.resources and fitting(Need({}, wanted.slice), nodes)):
        shown = sorted({_slice_shown(node) for node in nodes if "TPU" in node["Resources"]}) or ["no TPUs"]
        require(False, "topology", wanted.slice, f"that of a slice of the cluster, which has {', '.join(shown)}")
    require(False, "resources_per_trial", str(wanted), f"what a node has; the nodes have {_shown(nodes)}")


def _slice_shown(node: Mapping[str, Any]) -> str:
    labels = node["Labels"]
    return f"{labels.get(_KIND_LABEL, 'TPUs')} of shape {labels.get(_SHAPE_LABEL, 'unknown')}"


def _shown(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Lists what nodes have, each kind of node once."""
    kinds = {
        ", ".join(
            f"{amount:g} {name}"
            for name, amount in sorted(node["Resources"].items())
            if not name.startswith(("node:", "accelerator_type:"))
        )
        for node in nodes
    }
    return "; ".join(sorted(kinds)) or "nothing"


def versions() -> dict[str, str]:
    """Returns what must be the same on all machines of a sweep for its trials to be comparable."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}
