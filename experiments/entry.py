"""What the entry points share: how they start, and how they end when they are asked for what cannot be done."""

import functools
import sys
from collections.abc import Callable, Sequence

from absl import app, logging

from bvit_jax.model_config import ConfigError

Main = Callable[[Sequence[str]], None]


def run(main: Main) -> None:
    """Runs an entry point: a ConfigError becomes one line and exit status 2, Ctrl-C one line and 130.

    Libraries report from warnings upwards.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)

    app.run(wrapped)
