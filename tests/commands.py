"""Commands of `experiments`, in processes of their own and in the tests' own.

In the tests' own process a command ends after a fraction of the time: what it imports and compiles is there already.
"""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from absl import app, flags

from tests.conftest import ROOT

SHORT = [
    *("--config.total_steps=6", "--config.log_every=2", "--config.eval_every=3", "--config.optimizer.warmup_steps=2"),
    "--config.model.num_layers=1",
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", *map(str, arguments)]


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `python -m` with these arguments, as a user does: a module, its flags and its files."""
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=500)


def train(workdir: Path, *flags: str, config: str = "configs/digits.py") -> subprocess.CompletedProcess[str]:
    """Trains six steps, here."""
    return start_here("experiments.train", f"--config={config}", f"--workdir={workdir}", *SHORT, *flags)


def start_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Returns the same as `start`, by running the command here."""
    module, *rest = map(str, arguments)
    out, errors = io.StringIO(), io.StringIO()
    with (
        _as_if_alone(),
        mock.patch.dict(os.environ),  # --data_dir sets a variable
        warnings.catch_warnings(),
        mock.patch.object(sys, "argv", [module, *rest]),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        warnings.simplefilter("ignore")  # as Python does for deprecations in libraries
        warnings.simplefilter("error", UserWarning)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            status = 1
    return subprocess.CompletedProcess([module, *rest], status, out.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _as_if_alone() -> Iterator[None]:
    """Forgets what a command defines: flags have one namespace, and every command has a --workdir of its own."""
    app.define_help_flags()  # which happens once
    known, modules = set(flags.FLAGS), _modules()
    for name in modules:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - known:
            module = str(flags.FLAGS.find_module_defining_flag(name))
            is_own = module not in sys.modules or module.startswith(("experiments.", "absl.flags"))
            if is_own:  # what libraries define when they are first imported stays, as they do
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(modules)


def _modules() -> dict[str, object]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "experiments"}
