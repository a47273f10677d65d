"""What runs in the process of one trial of a sweep."""

import contextlib
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from absl import flags

from bvit_jax import compress_request, compressed, config, cores, failures, orphans, preemption, train

OUTPUT_FILE = "output.txt"
"""What a trial prints, in its directory."""
STOP = b"stop"
"""What the sweep sends to have the trial save and stop."""


def run(
    stored: dict[str, Any],
    directory: Path,
    compressions: list[dict[str, Any]],
    share: list[int],
    compilation_cache: Path,
    sweep_pipe: Connection,
) -> None:
    """Runs one trial to its end, and compresses what it trained; if it fails, sends the cause, and exits with status 1.

    One that is told to stop exits with `preemption.EXIT_STATUS`.

    Args:
        stored: the configuration as plain data.
        directory: of the trial; made if absent.
        compressions: `compress_request.Request` as plain data; those that are done are left as they are.
        share: cores to run on.
        compilation_cache: directory for compiled programs.
        sweep_pipe: to the process of the sweep; the trial ends when that does.
    """
    signal.signal(signal.SIGTERM, _exit_as_preempted)
    orphans.end_with_parent()
    threading.Thread(target=_obey_sweep, args=(sweep_pipe,), daemon=True).start()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / OUTPUT_FILE).open("a") as output:
            os.dup2(output.fileno(), sys.stdout.fileno())
            os.dup2(output.fileno(), sys.stderr.fileno())
        cores.keep_to(share)  # before JAX counts its threads
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
        flags.FLAGS.mark_as_parsed()  # those of the sweep are not this process's, and readers of images look at theirs
        train.run(config.from_dict(stored), directory, show_progress=False)
        if compressions:
            compressed.run_all(directory, [compress_request.from_dict(fields) for fields in compressions])
    except (preemption.Preempted, KeyboardInterrupt):
        sys.exit(preemption.EXIT_STATUS)
    except Exception as error:
        sweep_pipe.send_bytes(failures.describe(error).encode(errors="replace"))
        sys.exit(1)


def _exit_as_preempted(number: int, frame: FrameType | None) -> None:
    """Ends a trial before its training takes note of SIGTERM itself."""
    del number, frame
    sys.exit(preemption.EXIT_STATUS)


def _obey_sweep(pipe: Connection) -> None:
    """Stops this process when the sweep says so."""
    with contextlib.suppress(OSError, EOFError):
        pipe.recv_bytes()
        main = threading.main_thread().ident
        # It may have had SIGTERM itself, and a second one does not wait until the run is saved.
        if main is not None and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            signal.pthread_kill(main, signal.SIGTERM)
