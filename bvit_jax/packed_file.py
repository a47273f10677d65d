"""Writing and reading the packed file: a safetensors file of `storage.layout`'s tensors under `file_format`'s header.

What comes back is what was written, or one `PackedFileError`: version, digest, configuration, names, dtypes and shapes
are all checked before a tensor is used. The digest finds damage, not forgery: it is no signature.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from bvit_jax import file_format, files, memory
from bvit_jax import storage as formats
from bvit_jax.config import Config, from_dict
from bvit_jax.encoding import Scales, encode
from bvit_jax.memory import Ledger
from bvit_jax.model_config import ConfigError
from bvit_jax.storage import Storage, as_trained, layout
from bvit_jax.tensors import NUMPY_DTYPE

LONGEST_MESSAGE = 600
_FIELDS = {"config", "digest", "ledger", "storage", "version"}


class PackedFileError(ValueError):
    """A file that is no packed model, or a damaged one; the message, one line, names the file and what is wrong."""

    def __init__(self, message: str) -> None:
        # What a damaged file says of itself may be quoted here, line breaks and all.
        super().__init__("".join(c if c.isprintable() else "?" for c in message)[:LONGEST_MESSAGE])


@dataclasses.dataclass(frozen=True)
class Packed:
    """A model as stored.

    Attributes:
        config: the run that trained it.
        storage: number formats.
        ledger: bytes by component; their sum is the file's size.
        digest: SHA-256 of the file, hexadecimal (`file_format` says how).
        arrays: the packed tensors by name.
    """

    config: Config
    storage: Storage
    ledger: Ledger
    digest: str
    arrays: dict[str, np.ndarray]


def pack(params: Any, config: Config, storage: Storage | None = None, scales: Scales | None = None) -> bytes:
    """Returns the file of a trained model; the same input gives the same bytes.

    Args:
        params: as `vit.init_params`, trained or not.
        config: the run that they come from.
        storage: number formats; by default those that the model is trained with.
        scales: as in `encoding.encode`.

    Raises:
        ValueError: for a parameter that is missing, unknown, of the wrong shape or not finite.
    """
    storage = storage or as_trained(config.model)
    arrays = encode(params, config.model, storage, scales)
    ledger = memory.ledger(config, storage)
    text = memory.metadata(config, storage, ledger)
    raw = safetensors.numpy.save(arrays, {file_format.METADATA_KEY: text})
    if len(raw) != ledger.bytes_full:
        raise RuntimeError(f"the file has {len(raw)} bytes and the ledger counts {ledger.bytes_full}")
    digest = hashlib.sha256(raw).hexdigest()
    return raw.replace(file_format.NO_DIGEST.encode(), digest.encode(), 1)


def write(
    path: Path, params: Any, config: Config, storage: Storage | None = None, scales: Scales | None = None
) -> Ledger:
    """Writes the file of a trained model, all or nothing, and returns its ledger; arguments as in `pack`."""
    raw = pack(params, config, storage, scales)
    files.write_bytes(path, raw)
    return memory.ledger(config, storage)


def read(path: Path) -> Packed:
    """Reads a packed file into memory.

    Raises:
        PackedFileError: if it cannot be read, is no packed model, is damaged, or is of another format version.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PackedFileError(f"{path}: {error.strerror or error}") from None
    try:
        return unpack(raw)
    except PackedFileError as error:
        raise PackedFileError(f"{path}: {error}") from None


def unpack(raw: bytes) -> Packed:
    """Reads the bytes of a packed file; raises as `read`."""
    text = _text(raw)
    content = _content(text)
    if content["version"] != file_format.VERSION:
        raise PackedFileError(f"format version {content['version']!r}; this library reads {file_format.VERSION}")
    digest = content["digest"]
    _check_digest(raw, digest)
    config, storage = _configuration(content, len(raw))
    tensors = {tensor.name: tensor for stored in layout(config.model, storage) for tensor in stored.tensors}
    ledger = memory.ledger(config, storage)
    if len(raw) != ledger.bytes_full:
        raise PackedFileError(f"{len(raw)} bytes; the model in its header takes {ledger.bytes_full}")
    # Equal to the letter, so that there is one text for one content, and none that can be read in two ways.
    if text != memory.metadata(config, storage, ledger, digest):
        raise PackedFileError("its metadata is not what this library writes for the model in it")
    arrays: dict[str, np.ndarray] = {}
    try:
        found = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        raise PackedFileError(f"not a safetensors file ({error})") from None
    for name, entry in found:
        tensor = tensors.get(name)
        if tensor is None or entry["dtype"] != tensor.dtype or tuple(entry["shape"]) != tensor.shape:
            wanted = "no such tensor" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            raise PackedFileError(f"tensor {name!r} is {entry['dtype']} {tuple(entry['shape'])}; wanted: {wanted}")
        dtype = np.dtype(NUMPY_DTYPE[tensor.dtype]).newbyteorder("<")
        arrays[name] = np.frombuffer(entry["data"], dtype).reshape(tensor.shape)
    missing = sorted(tensors.keys() - arrays.keys())
    if missing:
        raise PackedFileError(f"tensor {missing[0]!r} is missing")
    return Packed(config, storage, ledger, digest, arrays)


def _text(raw: bytes) -> str:
    """Returns the JSON text in the metadata of a safetensors file."""
    length = int.from_bytes(raw[: file_format.LENGTH_BYTES], "little")
    if len(raw) < file_format.LENGTH_BYTES or length > len(raw) - file_format.LENGTH_BYTES:
        raise PackedFileError("not a packed model, or cut short: its header does not end")
    try:
        header = json.loads(raw[file_format.LENGTH_BYTES : file_format.LENGTH_BYTES + length])
        text = header["__metadata__"][file_format.METADATA_KEY]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackedFileError(f"not a packed model: its header cannot be read ({_gist(error)})") from None
    if not isinstance(text, str):
        raise PackedFileError("not a packed model: its metadata is no text")
    return text


def _content(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"damaged: its metadata cannot be read ({_gist(error)})") from None
    if not (isinstance(content, dict) and "version" in content):
        raise PackedFileError("not a packed model: its metadata has no version")
    if content["version"] == file_format.VERSION and content.keys() != _FIELDS:
        raise PackedFileError(f"damaged: its metadata has the fields {', '.join(sorted(content))}")
    return content


def _check_digest(raw: bytes, digest: Any) -> None:
    stated = digest.encode() if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else b""
    if not stated or raw.count(stated) != 1:
        raise PackedFileError("damaged: it states no digest")
    found = hashlib.sha256(raw.replace(stated, file_format.NO_DIGEST.encode())).hexdigest()
    if found != digest:
        raise PackedFileError(f"damaged: its digest is {found[:12]}..., stated is {digest[:12]}...")


def _configuration(content: dict[str, Any], size: int) -> tuple[Config, Storage]:
    """Rebuilds configuration and storage, which may be anything."""
    try:
        config = from_dict(content["config"])
        storage = formats.from_dict(content["storage"])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise PackedFileError(f"its configuration cannot be used: {_gist(error)}") from None
    # Whatever a model has many of takes a byte each, so nothing larger is laid out.
    m = config.model
    largest = max(value for value in dataclasses.asdict(m).values() if isinstance(value, int))
    rows = (m.grid[0] * m.grid[1] + 1) * m.top_k
    if largest > size or rows >= 2**31:
        raise PackedFileError(f"{size} bytes cannot hold a model with {max(largest, rows)} of anything")
    try:
        layout(config.model, storage)
    except ConfigError as error:
        raise PackedFileError(f"its configuration cannot be used: {_gist(error)}") from None
    return config, storage


def _gist(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
