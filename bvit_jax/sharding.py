"""Where arrays live: one mesh over all devices, batches split over it, everything else on every device."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bvit_jax.model_config import require

DATA_AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a one-axis mesh over `devices`, all of the process's by default."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Keeps the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, devices: int) -> None:
    """Raises ConfigError unless a batch splits evenly over the devices."""
    require(batch_size % devices == 0, "batch_size", batch_size, f"a multiple of the {devices} devices")


def put_batch(arrays: Any, mesh: Mesh) -> Any:
    """Moves a tree of host arrays to the devices, split along the first axis."""
    return jax.device_put(arrays, batch_sharding(mesh))
