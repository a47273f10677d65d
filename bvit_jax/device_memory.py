"""Bytes on a device while a run goes on, as far as the backend tells them."""

from typing import Any

import jax

from bvit_jax.train_step import TrainState


def of_state(state: TrainState) -> dict[str, int]:
    """Returns params_bytes and optimizer_bytes on the device of this process that holds most of them.

    A moving average of the parameters counts with the optimiser.
    """
    return {"params_bytes": _most(state.params), "optimizer_bytes": _most((state.average, state.opt_state))}


def peak() -> dict[str, int]:
    """Returns peak_bytes (since the process started) and limit_bytes of this process's fullest device.

    CPUs tell neither, and an empty dict comes back.
    """
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"peak_bytes_in_use": "peak_bytes", "bytes_limit": "limit_bytes"}
    return {ours: max(stats[name] for stats in told) for name, ours in names.items() if all(name in s for s in told)}


def _most(tree: Any) -> int:
    """Adds up the bytes of all arrays, device by device, and returns the largest sum."""
    totals: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    return max(totals.values(), default=0)
