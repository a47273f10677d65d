"""Runs of several processes, one a host: how they start, and how they agree.

On Cloud TPU the addresses come from the machine; elsewhere they are given. Every process runs the same program. Files
that are not checkpoints are the first process's business, and what it finds there is told to the others.
"""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bvit_jax import peers
from bvit_jax.model_config import ConfigError, require

START_SECONDS = 300.0
"""For all processes of a run to start: schedulers start hosts one after the other."""
_PLATFORMS = "jax_platforms"  # an attribute that type checkers do not see
_GOOGLE_PCI_VENDOR = "0x1ae0"
_TPU_PCI_DEVICES = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""v3, v4, v5p, v5e, v6e, 7x: Google's network cards have the same vendor. Source: `jax._src.hardware_utils`."""


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others of its run; call it before anything asks JAX for devices.

    Args:
        coordinator: HOST:PORT of the first process, which listens there; None on Cloud TPU, where nothing needs to be
            given, and for a run of one process.
        num_processes: processes of the run.
        process_id: this one's number, from 0.

    Raises:
        ConfigError: if only some of the three are given, or they do not fit each other. Where the others do not come
            within `START_SECONDS`, this process ends with one line and `peers.EXIT_STATUS`.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        # On a TPU's machine JAX itself has set its platforms to "tpu,cpu", unless it was told otherwise.
        if has_tpu() and str(getattr(jax.config, _PLATFORMS)).split(",")[0] == "tpu":
            _join("the hosts of the slice did not find each other; give coordinator, num_processes and process_id")
        return
    require(
        not missing,
        ", ".join(missing),
        None,
        "given together with the others of coordinator, num_processes and process_id",
    )
    host, _, port = str(coordinator).rpartition(":")
    require(
        bool(host) and port.isdecimal() and port.isascii() and 0 < int(port) < 2**16,
        "coordinator",
        coordinator,
        "HOST:PORT",
    )
    count, number = int(num_processes or 0), int(process_id or 0)
    require(count >= 1, "num_processes", count, "at least 1")
    require(0 <= number < count, "process_id", number, f"0 to {count - 1}, one under num_processes")
    _join(f"coordinator = {coordinator!r}: the {count} processes did not come together", coordinator, count, number)


def _join(failed: str, *addresses: Any) -> None:
    # JAX then takes SIGTERM for itself, in all processes of the run; see `bvit_jax.preemption`.
    jax.config.update("jax_enable_preemption_service", True)
    alarm = threading.Timer(START_SECONDS, _give_up, [failed])
    alarm.daemon = True
    alarm.start()
    later: Any = {"initialization_timeout": int(2 * START_SECONDS)}
    try:
        jax.distributed.initialize(*addresses, **later)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{failed} ({str(error).splitlines()[0]})") from None
    finally:
        alarm.cancel()


def _give_up(failed: str) -> None:
    """Ends the process from another thread while JAX waits; JAX's own end of it is an abort."""
    os.write(2, f"error: {failed} within {START_SECONDS:.0f} s; start the same command on all hosts\n".encode())
    os._exit(peers.EXIT_STATUS)


def has_tpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Says whether a TPU is plugged into this machine, without starting it."""
    for path in devices.glob("*/vendor"):
        vendor, device = (path.with_name(name).read_text().strip() for name in ("vendor", "device"))
        if vendor == _GOOGLE_PCI_VENDOR and device in _TPU_PCI_DEVICES:
            return True
    return False


def is_first() -> bool:
    """Says whether this is the process that writes logs."""
    return jax.process_index() == 0


def on_first(work: Callable[[], Any]) -> Any:
    """Does `work` in the first process, and returns what it returns, plain data, in all.

    Raises:
        ConfigError: in all processes if `work` raises one; another error of the first is a RuntimeError in the others.
    """
    if jax.process_count() == 1:
        return work()
    error: Exception | None = None
    told: dict[str, Any] = {}
    if is_first():
        try:
            told = {"returned": work()}
            json.dumps(told)
        except Exception as raised:
            error, told = raised, {"raised": str(raised), "config": isinstance(raised, ConfigError)}
    told = json.loads(_broadcast(json.dumps(told)))
    if error is not None:
        raise error
    if "raised" in told:
        raise (ConfigError if told["config"] else RuntimeError)(told["raised"])
    return told["returned"]


def in_all(work: Callable[[], Any]) -> Any:
    """Does `work` in each process, and returns what it returns there.

    Raises:
        ConfigError: if `work` raises anything in another process; where it does, that is raised.
    """
    error: Exception | None = None
    done = None
    try:
        done = work()
    except Exception as raised:
        error = raised
    if not all_agree(error is None):
        raise error or ConfigError("another process of the run cannot go on; its message says why")
    return done


def check_same(name: str, value: str) -> None:
    """Raises ConfigError in all processes unless `value` is that of the first process in all."""
    if jax.process_count() > 1:
        check_everywhere(_broadcast(value) == value, name, value, "that of the first process")


def check_everywhere(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raises ConfigError in all processes unless `holds` in all; the message adds where it does not."""
    if jax.process_count() == 1:
        return require(holds, name, value, wanted)
    failing = np.flatnonzero(~_from_all(holds)).tolist()
    return require(not failing, name, value, f"{wanted}; not so in processes {failing}")


def all_agree(holds: bool) -> bool:
    """Says in all processes whether `holds` in all."""
    return holds if jax.process_count() == 1 else bool(_from_all(holds).all())


def _from_all(holds: bool) -> np.ndarray:
    """Returns what each process gave, in all processes."""
    return np.asarray(multihost_utils.process_allgather(np.array(holds))).reshape(-1)


def _broadcast(text: str) -> str:
    """Returns the first process's text in all processes."""
    content = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    same_length = np.resize(content, length)  # only the first process's content counts
    return np.asarray(multihost_utils.broadcast_one_to_all(same_length)).tobytes().decode()
