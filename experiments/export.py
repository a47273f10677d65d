"""Writes a trained model as one packed file, and checks it against the trained model.

    python -m experiments.export --workdir=runs/digits --out=model.safetensors --angle_bits=8

The best checkpoint on validation is taken. The file holds every byte that inference needs: packed ternary weights,
scales, angles, router, biases, backbone, and the configuration; `experiments.predict` and `experiments.evaluate` read
it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bvit_jax import encoding, memory, packed, packed_file, trained, vit
from bvit_jax.model_config import ConfigError, require
from experiments import entry, storage_flags, tables

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run of experiments.train.")
flags.adopt_module_key_flags(storage_flags)
_OUT = flags.DEFINE_string("out", None, "The file to write, e.g. model.safetensors; its folder is made if absent.")
_ANGLE_BITS = flags.DEFINE_integer("angle_bits", None, "Bits an angle, 32, 16, 8, 6 or 4; as trained if left out.")

CHECK_IMAGES = 16


def main(argv: Sequence[str]) -> None:
    """Exports, reads the file back, and prints its ledger."""
    del argv
    out = _file_to_write()
    config, step, params = trained.best_params(Path(str(_WORKDIR.value)))
    bits: Any = config.model.angle_bits if _ANGLE_BITS.value is None else _ANGLE_BITS.value
    chosen = dataclasses.replace(storage_flags.given(config.model), angle_bits=bits)
    try:
        ledger = packed_file.write(out, params, config, chosen)
    except ValueError as error:
        raise ConfigError(f"workdir = {_WORKDIR.value!r}, step {step}: {error}") from None
    except OSError as error:
        raise ConfigError(f"out = {str(out)!r}: it cannot be written ({error})") from None

    m = config.model
    shape = (CHECK_IMAGES, m.image_size, m.image_size, m.channels)
    noise = np.random.default_rng(0).random(shape, np.float32)
    loaded = packed.load(out)
    wanted, _ = jax.jit(vit.apply, static_argnums=0)(
        m.deployed(), encoding.as_stored(params, m, chosen), jnp.asarray(noise)
    )
    difference = float(np.abs(loaded(noise) - np.asarray(wanted)).max())

    standard = memory.standard_ledger(config)
    made = tables.table("numbers", "paper bytes", "file bytes")
    for row in ledger.rows:
        made.add_row(row.component, f"{row.params:,}", f"{row.bytes_paper:,.0f}", f"{row.bytes_full:,}")
    made.add_section()
    made.add_row("all", f"{ledger.params:,}", f"{ledger.bytes_paper:,.0f}", f"{ledger.bytes_full:,}")
    made.add_row("mixture layers", "", "", f"{ledger.bytes_full_ffn:,}")
    tables.show(made)
    print(
        "float32 standard mixture of as many experts, over it: "
        f"paper {standard.bytes_paper / ledger.bytes_paper:.1f}x, "
        f"mixture layers {standard.bytes_full_ffn / ledger.bytes_full_ffn:.1f}x, "
        f"whole file {standard.bytes_full / ledger.bytes_full:.1f}x"
    )
    print(f"checkpoint of step {step}; {storage_flags.describe(chosen, config.model)}")
    print(f"logits of the file against the trained model so rounded, {CHECK_IMAGES} images: within {difference:.1e}")
    print(f"written: {out}, {out.stat().st_size:,} bytes, SHA-256 {loaded.digest[:16]}...")


def _file_to_write() -> Path:
    """Returns the file of `--out`, which may exist; nothing but a file is ever replaced."""
    out = Path(str(_OUT.value))
    entry.make_directory("out", str(out.parent))
    try:
        require(out.is_file() or not out.exists(), "out", str(out), "a file, new or old")
    except OSError as error:
        raise ConfigError(f"out = {str(out)!r}: it must be a file ({error})") from None
    return out


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    entry.run(main)
