"""What the entry points share: how they start, and how they end when they are asked for what cannot be done."""

import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, logging

from bvit_jax import preemption
from bvit_jax.checkpoints import SaveError
from bvit_jax.model_config import ConfigError
from bvit_jax.packed_file import PackedFileError
from bvit_jax.sentinels import NonFiniteError

Main = Callable[[Sequence[str]], None]
EXIT_NONFINITE, EXIT_UNSAVED = 65, 74
"""Of a run that its sentinel stopped, and of one that could not save: EX_DATAERR and EX_IOERR of sysexits.h."""


def run(main: Main, positional: bool = False, resumes: bool = False) -> None:
    """Runs an entry point and turns what ends it early into one line and an exit status.

    2: a bad configuration or file; 65: a loss or gradient that is not finite; 74: checkpoints cannot be written; 75:
    told to stop (SIGTERM), saved; 130: Ctrl-C. Libraries report from warnings upwards.

    Args:
        main: the entry point; it takes the arguments that are no flags after its own name.
        positional: whether there may be such arguments.
        resumes: whether the same command, given again, goes on where it was.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str]) -> None:
        if len(argv) > 1 and not positional:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except (ConfigError, PackedFileError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except NonFiniteError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_NONFINITE)
        except SaveError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_UNSAVED)
        except preemption.Preempted as stop:
            print(f"{stop}; the same command goes on from here", file=sys.stderr)
            sys.exit(preemption.EXIT_STATUS)
        except KeyboardInterrupt:
            print("interrupted" + ("; the same command goes on from here" if resumes else ""), file=sys.stderr)
            sys.exit(130)

    app.run(wrapped)


def read_config(flag: Any) -> dict[str, Any]:
    """Returns the content of a configuration file's flag as nested dicts; raises ConfigError if it cannot be read."""
    try:
        return flag.value.to_dict()
    except OSError as error:
        gist = str(error).splitlines()[-1].strip()
        raise ConfigError(f"config: the file cannot be read ({gist})") from None


def make_directory(flag: str, value: str) -> Path:
    """Makes the directory that a flag names; raises ConfigError if that cannot be done."""
    directory = Path(value)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} = {value!r}: it must be a directory that can be written to ({error})") from None
    return directory
