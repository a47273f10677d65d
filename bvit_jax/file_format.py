"""The bytes before the tensors of a packed file: a safetensors header whose metadata holds one JSON text.

    8 bytes   length of the header, little-endian
    header    {"__metadata__":{"bvit_jax":TEXT},NAME:{"dtype":..,"shape":..,"data_offsets":[..]},..}, spaces to a
              multiple of 8 bytes
    tensors   by falling alignment of their dtype, then by name

TEXT is the JSON of {"config", "digest", "ledger", "storage", "version"}. The digest is the SHA-256, in hexadecimal, of
the whole file with 64 zeros in the digest's place; so it covers every byte.

References:
    https://github.com/huggingface/safetensors (the file format).
"""

import json
from collections.abc import Iterable
from typing import Any

from bvit_jax.tensors import Dtype, Tensor

VERSION = 3
METADATA_KEY = "bvit_jax"
NO_DIGEST = "0" * 64
LENGTH_BYTES = 8
_ORDER: dict[Dtype, int] = {"F32": 0, "BF16": 1, "U16": 2, "U8": 3}


def metadata_text(
    config: dict[str, Any], storage: dict[str, Any], ledger: dict[str, Any], digest: str = NO_DIGEST
) -> str:
    """Returns the JSON text that describes a file; one text for one content."""
    content = {"version": VERSION, "config": config, "storage": storage, "ledger": ledger, "digest": digest}
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def header_bytes(tensors: Iterable[Tensor], metadata: str) -> int:
    """Counts the bytes before the tensors, as safetensors writes them."""
    entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: metadata}}
    start = 0
    for tensor in sorted(tensors, key=lambda tensor: (_ORDER[tensor.dtype], tensor.name)):
        offsets = [start, start + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        start += tensor.nbytes
    length = len(json.dumps(entries, separators=(",", ":")))
    return LENGTH_BYTES + -(-length // 8) * 8
