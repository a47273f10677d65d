"""The flag that says where prepared data sets lie."""

import os
from pathlib import Path

from absl import flags

from bvit_jax import data_dirs

_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    f"The directory of prepared data sets; without it ${data_dirs.VARIABLE}, or ~/tensorflow_datasets.",
)


def apply() -> Path:
    """Makes the flag hold for this process and those it starts, and returns the directory that holds now."""
    if _DATA_DIR.value:
        os.environ[data_dirs.VARIABLE] = str(Path(_DATA_DIR.value).expanduser().absolute())
    return data_dirs.current()
