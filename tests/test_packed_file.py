import dataclasses
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import file_format, memory, packed_file, reductions, vit
from bvit_jax.config import Config
from bvit_jax.encoding import encode
from bvit_jax.packed_file import PackedFileError
from bvit_jax.storage import Storage, layout
from bvit_jax.tensors import NUMPY_DTYPE
from tests import reduced
from tests.conftest import KINDS, make_config

# As small as a model gets: one layer, one patch, 4 channels, 2 experts.
SMALL = {"d_model": 4, "d_ff": 6, "num_heads": 2, "patch_size": 8, "num_experts": 2, "num_stages": 2, "top_k": 1}
SMALL["num_layers"] = 1
STORAGES = {
    "as trained": None,
    "halves": Storage(16, "bfloat16", "bfloat16", "bfloat16", "2bit"),
    "bytes": Storage(8, "int8", "int8", "int8", "base3"),
    "least": Storage(4, "int4", "int2", "int8", "base3"),
    "six bits": Storage(6, "int4", "ternary", "float32", "2bit"),
}
# The file that is damaged below: every dtype is in it.
STORED_AS = Storage(angle_bits=16, router="bfloat16")
ZEROS = b"0" * 64


def small(family: str = "butterfly", form: str = "tied", **changes: object) -> Config:
    fields = {"family": family, "form": form} | SMALL | changes
    return make_config("butterfly,2", **{f"model__{name}": value for name, value in fields.items()})


def random_params(config: Config) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), vit.param_shapes(config.model))


@functools.cache
def original() -> bytes:
    config = small()
    return packed_file.pack(random_params(config), config, STORED_AS)


def header_of(raw: bytes) -> tuple[int, dict[str, Any]]:
    """Reads a safetensors header: bytes before the tensors, entries."""
    length = int.from_bytes(raw[:8], "little")
    return 8 + length, json.loads(raw[8 : 8 + length])


def content_of(raw: bytes) -> dict[str, Any]:
    return json.loads(header_of(raw)[1]["__metadata__"]["bvit_jax"])


def sealed(raw: bytes) -> bytes:
    """Puts the digest that belongs there over 64 zeros."""
    assert raw.count(ZEROS) == 1
    return raw.replace(ZEROS, hashlib.sha256(raw).hexdigest().encode())


def unsealed(raw: bytes) -> bytes:
    return raw.replace(content_of(raw)["digest"].encode(), ZEROS)


def swapped(old: bytes, new: bytes) -> bytes:
    """The original with a few bytes exchanged in one place, its digest right again."""
    assert len(old) == len(new)
    raw = unsealed(original())
    assert old in raw
    return sealed(raw.replace(old, new, 1))


def with_content(change: Callable[[dict[str, Any]], Any], sort_keys: bool = True) -> bytes:
    """The original with other metadata; its digest is right unless `change` sets one."""
    content = content_of(unsealed(original()))
    change(content)
    return with_text(json.dumps(content, sort_keys=sort_keys, separators=(",", ":")))


def with_text(text: str) -> bytes:
    before, header = header_of(original())
    return with_header(header | {"__metadata__": {"bvit_jax": text}}, original()[before:])


def with_header(header: dict[str, Any], tensors: bytes, length: int = 0) -> bytes:
    """A file made by hand, its header filled with spaces up to `length`, and its digest made right if there is one."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(max(length, -(-len(text) // 8) * 8))
    raw = len(text).to_bytes(8, "little") + text + tensors
    return sealed(raw) if ZEROS in raw else raw


def without(name: str) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of the original, not sealed, less one tensor."""
    before, header = header_of(unsealed(original()))
    start, end = header.pop(name)["data_offsets"]
    tensors = original()[before:]
    for other in header:
        if other != "__metadata__" and header[other]["data_offsets"][0] >= end:
            header[other]["data_offsets"] = [offset - (end - start) for offset in header[other]["data_offsets"]]
    return header, tensors[:start] + tensors[end:]


# A header that grows over a multiple of 8 bytes is refused by its size first.
NOT_AS_WRITTEN = "its metadata is not what this library writes|the model in its header takes"


def is_refused(raw: bytes, match: str | None = None) -> None:
    with pytest.raises(PackedFileError, match=match) as error:
        packed_file.unpack(raw)
    assert type(error.value) is PackedFileError
    assert str(error.value)
    assert len(str(error.value).splitlines()) == 1, str(error.value)
    assert error.value.__cause__ is None  # one message, no chain of them
    assert error.value.__suppress_context__ or error.value.__context__ is None


# Writing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STORAGES)
def test_the_ledger_counts_the_file_and_plain_safetensors_reads_it(
    kind: tuple[str, str], name: str, tmp_path: Path
) -> None:
    config = small(*kind)
    stored_as = STORAGES[name] or Storage()
    params = random_params(config)
    raw = packed_file.pack(params, config, STORAGES[name])
    ledger = memory.ledger(config, stored_as)
    assert len(raw) == ledger.bytes_full == sum(row.bytes_full for row in ledger.rows)

    tensors = {tensor.name: tensor for stored in layout(config.model, stored_as) for tensor in stored.tensors}
    before, header = header_of(raw)
    assert before % 8 == 0
    content = json.loads(header["__metadata__"]["bvit_jax"])
    blank = file_format.metadata_text(content["config"], content["storage"], content["ledger"])
    assert before == file_format.header_bytes(tensors.values(), blank)
    assert before == next(row.bytes_full for row in ledger.rows if row.component == "header")
    assert len(raw) == before + sum(tensor.nbytes for tensor in tensors.values())

    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    arrays = encode(params, config.model, stored_as)
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(tensors)
        assert set(file.metadata()) == {"bvit_jax"}
        for tensor in tensors.values():
            if tensor.dtype != "BF16":  # which plain NumPy has not
                found = file.get_tensor(tensor.name)
                assert (found.dtype, found.shape) == (NUMPY_DTYPE[tensor.dtype], tensor.shape)
                np.testing.assert_array_equal(found, arrays[tensor.name])
    for tensor_name, entry in safetensors.deserialize(raw):
        tensor = tensors[tensor_name]
        assert (entry["dtype"], tuple(entry["shape"])) == (tensor.dtype, tensor.shape)
        assert bytes(entry["data"]) == arrays[tensor_name].tobytes()

    packed = packed_file.read(path)
    assert (packed.config, packed.storage, packed.ledger) == (config, stored_as, ledger)
    assert packed.arrays.keys() == arrays.keys()
    for tensor_name, array in arrays.items():
        assert (packed.arrays[tensor_name].dtype, packed.arrays[tensor_name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(packed.arrays[tensor_name], array)


def test_the_metadata_says_what_the_file_holds() -> None:
    config, content = small(), content_of(original())
    assert set(content) == {"config", "digest", "ledger", "storage", "version"}
    assert content["version"] == 3
    assert content["config"] == config.to_dict()
    assert content["storage"] == {
        "angle_bits": 16,
        "router": "bfloat16",
        "experts": "float32",
        "backbone": "float32",
        "trits": "base3",
        "ends": None,
        "reductions": {"ranks": {}, "kept": {}, "groups": {}},
    }
    assert content["ledger"] == memory.ledger(config, STORED_AS).to_dict()
    assert content["ledger"]["bytes_full"] == len(original())


def test_tensors_lie_by_falling_alignment_then_by_name() -> None:
    before, header = header_of(original())
    header.pop("__metadata__")
    order = sorted(header, key=lambda name: (["F32", "BF16", "U16", "U8"].index(header[name]["dtype"]), name))
    assert {entry["dtype"] for entry in header.values()} == {"F32", "BF16", "U16", "U8"}
    start = 0
    for name in order:
        assert header[name]["data_offsets"][0] == start
        start = header[name]["data_offsets"][1]
    assert before + start == len(original())


def test_the_digest_by_hand() -> None:
    raw = original()
    digest = content_of(raw)["digest"]
    assert raw.count(digest.encode()) == 1
    assert hashlib.sha256(raw.replace(digest.encode(), ZEROS)).hexdigest() == digest
    assert packed_file.unpack(raw).digest == digest


def test_tensors_may_look_like_an_empty_digest() -> None:
    config = small()
    params = random_params(config)
    params["head"]["kernel"] = np.frombuffer(b"0" * 160, np.float32).reshape(4, 10)
    raw = packed_file.pack(params, config, STORED_AS)
    assert ZEROS in raw
    np.testing.assert_array_equal(packed_file.unpack(raw).arrays["head/kernel"], params["head"]["kernel"])


def test_helpers_of_this_module_leave_the_file_as_it_is() -> None:
    # So that what they change is what is found.
    assert sealed(unsealed(original())) == original()
    assert with_content(lambda content: None) == original()
    before, header = header_of(unsealed(original()))
    assert packed_file.unpack(with_header(header, original()[before:], before - 8)).config == small()


def test_equal_models_give_equal_files() -> None:
    config = small()
    params = random_params(config)
    again = packed_file.pack(jax.tree.map(np.copy, params), small(), dataclasses.replace(STORED_AS))
    assert again == original()
    params["head"]["bias"][0] += 1
    assert packed_file.pack(params, config, STORED_AS) != original()


def test_another_process_writes_the_same_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import test_packed_file as t\n"
        "from bvit_jax import packed_file\n"
        "packed_file.write(Path(sys.argv[1]), t.random_params(t.small()), t.small(), t.STORED_AS)"
    )
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "model"], env=env, check=True, timeout=300)
    assert (tmp_path / "model").read_bytes() == original()


def test_by_default_it_is_stored_as_trained() -> None:
    config = small(angle_bits=6, router_precision="int4")
    raw = packed_file.pack(random_params(config), config)
    assert packed_file.unpack(raw).storage == Storage(angle_bits=6, router="int4")
    assert raw == packed_file.pack(random_params(config), config, Storage(angle_bits=6, router="int4"))
    assert len(raw) == memory.ledger(config).bytes_full


def test_zero_has_no_sign() -> None:
    # One character more in the header would show; filled up to 8 bytes, so that one length of eight shows it.
    for digits in range(9):
        zero, minus = (dataclasses.replace(small(router_noise=noise), seed=10**digits) for noise in (0.0, -0.0))
        assert packed_file.pack(random_params(zero), zero) == packed_file.pack(random_params(minus), minus)


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path, config = tmp_path / "model.safetensors", small()
    path.write_bytes(b"what was there")
    params = random_params(config)
    params["head"]["bias"][0] = np.nan
    with pytest.raises(ValueError, match="parameter head/bias is not finite"):
        packed_file.write(path, params, config, STORED_AS)
    assert path.read_bytes() == b"what was there"
    ledger = packed_file.write(path, random_params(config), config, STORED_AS)
    assert ledger == memory.ledger(config, STORED_AS)
    assert path.read_bytes() == original()
    assert [found.name for found in tmp_path.iterdir()] == ["model.safetensors"]


def test_writing_moves_a_finished_file_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = tmp_path / "model.safetensors", small()
    seen = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((self.read_bytes(), target, target.exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    packed_file.write(path, random_params(config), config, STORED_AS)
    assert seen == [(original(), path, False)]


def test_packed_arrays_are_read_once_and_for_all(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(original())
    packed = packed_file.read(path)
    path.write_bytes(b"")
    again = packed_file.unpack(original())
    for name, array in packed.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])


# Reduced models


@pytest.mark.parametrize(
    ("kind", "family", "name"),
    [
        ("factored", "dense", "float32"),
        ("factored", "butterfly", "int4"),
        ("pruned", "low_rank", "bfloat16"),
        ("merged", "ternary", "int8"),
    ],
)
def test_the_ledger_counts_the_file_of_a_reduced_model(kind: str, family: str, name: Any) -> None:
    config = reduced.config_of(family)
    leaves, stored_as = reduced.reduced(config.model, kind, name)
    params = reduced.tree_of(leaves)
    raw = packed_file.pack(params, config, stored_as)
    ledger = memory.ledger(config, stored_as)
    assert len(raw) == ledger.bytes_full == sum(row.bytes_full for row in ledger.rows)
    found = packed_file.unpack(raw)
    assert (found.config, found.storage, found.ledger) == (config, stored_as, ledger)
    arrays = encode(params, config.model, stored_as)
    assert found.arrays.keys() == arrays.keys()
    for tensor, array in arrays.items():
        assert (found.arrays[tensor].dtype, found.arrays[tensor].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found.arrays[tensor], array)
    # What is not stored is not counted.
    as_it_is = memory.ledger(config, dataclasses.replace(stored_as, reductions=reductions.NONE))
    assert ledger.params < as_it_is.params == sum(leaf.size for leaf in leaves.values())


def test_scales_that_are_given_are_in_the_file(tmp_path: Path) -> None:
    config = reduced.config_of("standard")
    leaves, _ = reduced.reduced(config.model, "merged", "float32")
    params, path, stored_as = reduced.tree_of(leaves), f"{reduced.FFN}/up_kernel", Storage(experts="int4")
    scales = {path: np.random.default_rng(0).uniform(0.1, 0.2, (2, 3, 6)).astype(np.float32)}
    ledger = packed_file.write(tmp_path / "model", params, config, stored_as, scales)
    raw = (tmp_path / "model").read_bytes()
    assert raw == packed_file.pack(params, config, stored_as, scales)
    assert len(raw) == ledger.bytes_full == len(packed_file.pack(params, config, stored_as))
    np.testing.assert_array_equal(packed_file.unpack(raw).arrays[f"{path}.scale"], scales[path])


# Damage


def test_a_file_cut_short_is_refused() -> None:
    raw = original()
    assert len(raw) < 10_000
    for length in range(len(raw)):
        with pytest.raises(PackedFileError):
            packed_file.unpack(raw[:length])
    for length in (0, 7, 8, 9, 400, len(raw) - 1):
        is_refused(raw[:length])


@pytest.mark.parametrize("part", range(4))
def test_a_flipped_bit_in_the_header_is_found(part: int) -> None:
    raw = bytearray(original())
    before, _ = header_of(original())
    for index in range(part, before, 4):
        for bit in range(8):
            raw[index] ^= 1 << bit
            with pytest.raises(PackedFileError):
                packed_file.unpack(bytes(raw))
            raw[index] ^= 1 << bit
    assert raw == original()


def test_a_flipped_bit_in_the_tensors_is_found() -> None:
    before, _ = header_of(original())
    rng = random.Random(0)
    places = {before, len(original()) - 1} | {rng.randrange(before, len(original())) for _ in range(300)}
    for index in places:
        raw = bytearray(original())
        raw[index] ^= 1 << rng.randrange(8)
        is_refused(bytes(raw), "damaged: its digest is")


@pytest.mark.parametrize("tail", [b"\0", b" ", b"\n", b"0" * 64, b"a" * 1000])
def test_appended_bytes_are_found(tail: bytes) -> None:
    is_refused(original() + tail, "damaged")
    is_refused(tail + original())
    # With a digest that counts them, too.
    if ZEROS not in tail:
        is_refused(sealed(unsealed(original()) + tail), "bytes; the model in its header takes")


def test_a_file_twice_is_refused() -> None:
    is_refused(original() * 2, "damaged")


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_no_file(raw: bytes) -> None:
    is_refused(raw)
    is_refused(len(raw).to_bytes(8, "little") + raw)


@given(st.binary(max_size=100), st.integers(0, 10_000), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_a_file_with_random_bytes_in_it_is_refused(new: bytes, start: int, length: int) -> None:
    raw = original()[:start] + new + original()[start + length :]
    if raw != original():
        is_refused(raw)


@pytest.mark.parametrize("wide", [False, True])
def test_errors_of_reading_name_the_file(wide: bool, tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(PackedFileError) as error:
            packed_file.read(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ")
        assert message.count(str(path)) == 1
        assert match in message
        assert len(message.splitlines()) == 1
        assert error.value.__suppress_context__

    folder = tmp_path / ("a folder" if wide else "folder")
    folder.mkdir()
    refused(folder, "Is a directory")
    refused(folder / "missing", "No such file or directory")
    path = folder / "model"
    for content, match in {
        b"": "its header does not end",
        b"text, not a model": "its header does not end",
        original()[:-1]: "damaged: its digest is",
        original()[:100]: "its header does not end",
        swapped(b'\\"version\\":3', b'\\"version\\":2'): "format version 2; this library reads 3",
        swapped(b'"dtype":"U8"', b'"dtype":"I8"'): "wanted: U8",
    }.items():
        path.write_bytes(content)
        refused(path, match)


def test_files_of_others_are_refused() -> None:
    tensors = {"a": np.zeros((2, 3), np.float32)}
    is_refused(safetensors.numpy.save(tensors), "not a packed model: its header cannot be read")
    is_refused(safetensors.numpy.save(tensors, {"format": "pt"}), "not a packed model: its header cannot be read")
    is_refused(safetensors.numpy.save(tensors, {"bvit_jax": "text"}), "damaged: its metadata cannot be read")
    for text in ("[]", "1", '"version"', "null", "{}", '{"digest": 1}'):
        is_refused(safetensors.numpy.save(tensors, {"bvit_jax": text}), "not a packed model: its metadata has no vers")
    before, header = header_of(original())
    header.pop("__metadata__")
    is_refused(with_header(header, original()[before:]), "not a packed model")


# Files whose digest is right: only the check in question is left to find what is wrong.


@pytest.mark.parametrize("version", [0, 1, 2, 4, -3, "3", True, None, [], {}, 1.5, pytest.param(7**500, id="huge")])
def test_other_versions_are_refused(version: object) -> None:
    is_refused(with_content(lambda content: content.update(version=version)), "format version .*; this library reads 3")


def test_a_version_that_equals_it_is_not_the_text_that_is_written() -> None:
    is_refused(with_content(lambda content: content.update(version=3.0)), NOT_AS_WRITTEN)


def test_other_versions_may_have_other_fields() -> None:
    is_refused(with_text('{"version":1}'), "format version 1")


@pytest.mark.parametrize("field", ["config", "ledger", "storage", "digest"])
def test_every_field_of_the_metadata_is_needed(field: str) -> None:
    is_refused(with_content(lambda content: content.pop(field)), "damaged: its metadata has the fields")


def test_unknown_fields_of_the_metadata_are_refused() -> None:
    is_refused(with_content(lambda content: content.update(more=1)), "damaged: its metadata has the fields .*more")
    is_refused(with_content(lambda content: content["config"].update(more=1)), "unknown configuration field: more")
    is_refused(with_content(lambda content: content["storage"].update(more=1)), "its configuration cannot be used")


@pytest.mark.parametrize(
    "digest",
    [
        None,
        0,
        [],
        {},
        True,
        "",
        "0",
        "0" * 63,
        "0" * 65,
        "x" * 64,
        ["0"] * 64,
        "\u00e9" * 64,
        '"' * 64,
        pytest.param("\ud800" * 64, id="surrogates"),
    ],
)
def test_what_is_no_digest_is_refused(digest: object) -> None:
    content = content_of(original()) | {"digest": digest}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    before, header = header_of(original())
    raw = with_header(header | {"__metadata__": {"bvit_jax": text}}, original()[before:])
    is_refused(raw, "damaged: it")


def test_a_digest_in_capitals_is_refused() -> None:
    digest = content_of(original())["digest"]
    is_refused(original().replace(digest.encode(), digest.upper().encode()), "damaged")


def test_the_digest_of_another_file_is_refused() -> None:
    config = small()
    params = random_params(config)
    params["head"]["bias"][0] += 1
    other = content_of(packed_file.pack(params, config, STORED_AS))["digest"]
    is_refused(original().replace(content_of(original())["digest"].encode(), other.encode()), "damaged: its digest is")


def test_the_digest_may_stand_in_one_place_only() -> None:
    # Else bytes in a second place could be exchanged for it unseen.
    before, _ = header_of(original())
    raw = original()
    digest = content_of(raw)["digest"].encode()
    is_refused(raw[:before] + digest + raw[before + 64 :], "damaged: it states no digest")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dtype":"U8"', b'"dtype":"I8"'),
        (b'"dtype":"U16"', b'"dtype":"I16"'),
        (b'"dtype":"U16"', b'"dtype":"F16"'),
        (b'"dtype":"F32"', b'"dtype":"I32"'),
        (b'"dtype":"F32"', b'"dtype":"U32"'),
    ],
)
def test_a_tensor_of_another_dtype_is_refused(old: bytes, new: bytes) -> None:
    is_refused(swapped(old, new), f"is {new[9:-1].decode()} .*; wanted: {old[9:-1].decode()}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shape":[64,4]', b'"shape":[4,64]'),
        (b'"shape":[1,2,4]', b'"shape":[1,4,2]'),
        (b'"shape":[4,10]', b'"shape":[10,4]'),
        (b'"shape":[1,1,4]', b'"shape":[1,2,2]'),
    ],
)
def test_a_tensor_of_another_shape_is_refused(old: bytes, new: bytes) -> None:
    is_refused(swapped(old, new), "wanted: F32")


@pytest.mark.parametrize(
    ("old", "new"), [(b'"head/bias"', b'"heat/bias"'), (b'"head/bias"', b'"head/bi\\n"'), (b".codes", b".kodes")]
)
def test_a_tensor_of_another_name_is_refused(old: bytes, new: bytes) -> None:
    is_refused(swapped(old, new), "wanted: no such tensor")


def test_an_extra_tensor_is_refused() -> None:
    before, header = header_of(unsealed(original()))
    tensors = original()[before:]
    for size in (0, 3):
        extra = {"dtype": "U8", "shape": [size], "data_offsets": [len(tensors), len(tensors) + size]}
        is_refused(with_header(header | {"extra": extra}, tensors + bytes(size)), "the model in its header takes")


@pytest.mark.parametrize("name", ["head/bias", "class_token", "segment_0/block_0/ffn/prototype.codes"])
def test_a_missing_tensor_is_refused(name: str) -> None:
    before, _ = header_of(original())
    header, tensors = without(name)
    is_refused(with_header(header, tensors), "bytes; the model in its header takes")
    # The same size in total: spaces in the place of the tensor and its entry.
    raw = with_header(header, tensors, len(original()) - len(tensors) - 8)
    assert len(raw) == len(original())
    assert header_of(raw)[0] > before
    is_refused(raw, f"tensor {name!r} is missing")


@pytest.mark.parametrize(
    "offsets", [[0, 0], [4, 4], [0, 10**30], [-16, 0], [16, 0], ["0", 16], [0], None, [0.0, 16.0], [0, 12]]
)
def test_tensors_that_lie_elsewhere_are_refused(offsets: object) -> None:
    before, header = header_of(unsealed(original()))
    changed = header | {"class_token": header["class_token"] | {"data_offsets": offsets}}
    raw = with_header(changed, original()[before:], before - 8)
    is_refused(raw, "not a safetensors file" if len(raw) == len(original()) else "the model in its header takes")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"bytes_paper\\":0.0', b'\\"bytes_paper\\":1.0'),
        (b'{\\"config\\":', b'{ \\"config\\":'),
        (b'\\"params\\":48', b'\\"params\\":49'),
        (b'\\"component\\":\\"head\\"', b'\\"component\\":\\"heat\\"'),
    ],
)
def test_metadata_that_is_not_what_would_be_written_is_refused(old: bytes, new: bytes) -> None:
    before, header = header_of(unsealed(original()))
    text = json.dumps(header, separators=(",", ":")).encode()
    if old not in text:
        old, new = old.replace(b"48", b"24"), new.replace(b"49", b"25")
    assert old in text
    changed = json.loads(text.replace(old, new, 1))
    is_refused(with_header(changed, original()[before:]), NOT_AS_WRITTEN)


def test_metadata_in_another_order_is_refused() -> None:
    def turned(content: dict[str, Any]) -> None:
        for name in reversed(list(content)):
            content[name] = content.pop(name)

    raw = with_content(turned, sort_keys=False)
    assert len(raw) == len(original())
    is_refused(raw, NOT_AS_WRITTEN)


def test_a_ledger_of_another_model_is_refused() -> None:
    other = memory.ledger(small(d_ff=7), STORED_AS).to_dict()
    is_refused(
        with_content(lambda content: content.update(ledger=other)), "its metadata is not what this library writes"
    )


@pytest.mark.parametrize("value", [None, 1, [], "", {}, {"components": []}, [[[]]]])
def test_what_is_no_ledger_is_refused(value: object) -> None:
    is_refused(with_content(lambda content: content.update(ledger=value)), "the model in its header takes")


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        True,
        1.5,
        [],
        [1],
        {},
        {"model": 1},
        ["ab"],
        "text",
        [[]],
        ["text"],
    ],
)
def test_what_is_no_configuration_is_refused(value: object) -> None:
    is_refused(with_content(lambda content: content.update(config=value)), "its configuration cannot be used")


@pytest.mark.parametrize("value", [None, 1, True, [], "text", [1], ["angle_bits"], [["angle_bits", 8]]])
def test_what_is_no_storage_is_refused(value: object) -> None:
    is_refused(with_content(lambda content: content.update(storage=value)), "its configuration cannot be used")
    is_refused(with_content(lambda content: content["storage"].update(angle_bits=value)), "storage.angle_bits")
    is_refused(with_content(lambda content: content["storage"].update(trits=value)), "storage.trits")
    if value is not None:
        is_refused(with_content(lambda content: content["storage"].update(ends=value)), "storage.ends")


OUT, FFN = "segment_0/block_0/attention/out/kernel", "segment_0/block_0/ffn"


@pytest.mark.parametrize("field", ["ranks", "kept", "groups"])
def test_reductions_of_wrong_types_are_refused(field: str) -> None:
    def change(content: dict[str, Any], value: object) -> None:
        content["storage"]["reductions"][field] = value

    wrong = [None, 1, True, [], "text", [1], [["a", 1]], 7**500, float("nan")]
    for each in wrong:
        is_refused(with_content(lambda content, each=each: change(content, each)), "its configuration cannot be used")
    for each in (*wrong, -1, 0.5, [-1], ["1"], [True], [[1.0]], [["1"]], [[True]], [[None]], {}, {"1": 1}, "\ud800"):
        for path in (OUT, FFN, "two\nlines", "\ud800"):
            raw = with_content(lambda content, each=each, path=path: change(content, {path: each}))
            fits = path == OUT and (field, each) in (("ranks", [1]), ("kept", 1))
            if not fits:
                is_refused(raw, "its configuration cannot be used")


def test_reductions_that_are_not_whole_are_refused() -> None:
    for change in (
        lambda content: content["storage"].pop("reductions"),
        lambda content: content["storage"].update(reductions=None),
        lambda content: content["storage"].update(reductions=[]),
        lambda content: content["storage"].update(reductions={}),
        lambda content: content["storage"]["reductions"].pop("kept"),
        lambda content: content["storage"]["reductions"].update(more={}),
    ):
        is_refused(with_content(change), "its configuration cannot be used")


@pytest.mark.parametrize(
    ("reductions", "match"),
    [
        ({"ranks": {OUT: [5]}}, "rank of .* = 5: it must be such that factors are fewer numbers than"),
        ({"ranks": {OUT: [7**500]}}, "rank of "),
        ({"ranks": {OUT: [1, 1]}}, "ranks of .* = 2: it must be 1, one a matrix"),
        ({"ranks": {OUT: []}}, "ranks of .* = 0: it must be 1, one a matrix"),
        ({"kept": {OUT: 17}}, "kept weights of .* = 17: it must be at most 16"),
        ({"kept": {OUT: 10**18}}, "kept weights of "),
        ({"ranks": {OUT: [1]}, "kept": {OUT: 1}}, "it must be reduced in one way"),
        ({"kept": {"head/kernel": 1}}, "it must be a kernel of a layer of the model"),
        ({"groups": {FFN: [[0, 0]]}}, "it must be a mixture of stored experts of the model"),
        # They fit, but the file is that of a model without.
        ({"ranks": {OUT: [1]}}, "bytes; the model in its header takes"),
        ({"kept": {OUT: 3}}, "bytes; the model in its header takes"),
    ],
)
def test_reductions_that_the_model_cannot_have_are_refused(reductions: dict[str, Any], match: str) -> None:
    is_refused(with_content(lambda content: content["storage"]["reductions"].update(reductions)), match)


@pytest.mark.parametrize(
    "groups", [[], [[]], [[0]], [[0, 1], [0, 1]], [[1, 0]], [[0, 2]], [[0, 10**15]], [[0, 7**500]]]
)
def test_groups_that_the_model_cannot_have_are_refused(groups: list[list[int]]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["config"] = small("standard", "separate").to_dict()
        content["storage"]["reductions"]["groups"] = {FFN: groups}

    is_refused(with_content(change), "groups of ")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(small().model)])
def test_model_fields_of_wrong_types_are_refused(field: str) -> None:
    for value in (None, [], {}, "", "text", True, -1, 0.5, [[1]], 7**500, float("nan"), float("inf"), "\ud800"):
        if value != 0.5 or field not in ("angle_init", "router_noise", "attention_dropout", "stochastic_depth"):
            raw = with_content(lambda content, value=value: content["config"]["model"].update({field: value}))
            is_refused(raw, f"its configuration cannot be used: ConfigError: model.{field}")
    is_refused(with_content(lambda content: content["config"]["model"].pop(field)), "missing configuration field")


@pytest.mark.parametrize("section", ["config", "data", "augment", "model", "loss", "optimizer"])
def test_sections_of_wrong_types_are_refused(section: str) -> None:
    for value in (None, 1, [], "text", True, {}, {"seed": {}}):
        raw = with_content(lambda content, value=value: content["config"].update({section: value}))
        is_refused(raw, "its configuration cannot be used")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 10**12},
        {"num_layers": 10**9},
        {"num_layers": 512},
        {"image_size": 2**40},
        {"num_experts": 2**53},
        {"num_experts": 5000},
        {"d_model": 5000, "num_heads": 5000, "d_ff": 5000},
        {"d_ff": 10**9},
        {"d_ff": 4096, "num_stages": 12},
        {"num_classes": 10**9},
        pytest.param({"family": "standard", "num_experts": 5000, "top_k": 5000}, marks=pytest.mark.long),
        {"num_layers": 10, "moe_layers": ",".join("9" * 1000)},
        {"moe_layers": "9" * 5000},
    ],
)
def test_absurd_sizes_are_refused_at_once(fields: dict[str, Any]) -> None:
    is_refused(with_content(lambda content: content["config"]["model"].update(fields)))


@pytest.mark.parametrize(
    "family",
    ["dense", "butterfly", "standard"],
)
def test_absurd_images_are_refused_at_once(family: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["config"]["data"].update(name="procedural", image_size=4096, stored_size=4096)
        fields = {"family": family, "image_size": 4096, "patch_size": 1, "num_experts": 4096, "top_k": 4096}
        content["config"]["model"].update(fields)

    is_refused(with_content(change), "cannot hold a model with")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**32, 10**9, 10_000])
def test_a_header_longer_than_the_file_is_refused(length: int) -> None:
    is_refused(length.to_bytes(8, "little") + original()[8:], "its header does not end")


@pytest.mark.parametrize("length", [0, 1, 2, 100])
def test_a_header_that_ends_early_is_refused(length: int) -> None:
    is_refused(length.to_bytes(8, "little") + original()[8:], "not a packed model")


@pytest.mark.parametrize(
    "text",
    [
        b"null",
        b"[]",
        b"{}",
        b'"__metadata__"',
        b'{"__metadata__":null}',
        b'{"__metadata__":[]}',
        b'{"__metadata__":"bvit_jax"}',
        b'{"__metadata__":{"bvit_jax":1}}',
        b'{"__metadata__":{"bvit_jax":{}}}',
        b'{"__metadata__":{"bvit_jax":["{}"]}}',
        b'\xff\xfe{\x00"\x00',
        b"\xff" * 50,
        b'{"__metadata__":{"bvit_jax":"\xff"}}',
        b"1" * 5000,
        b'{"a":' * 100_000,
        b"[" * 100_000,
    ],
)
def test_a_header_that_is_something_else_is_refused(text: bytes) -> None:
    is_refused(len(text).to_bytes(8, "little") + text, "not a packed model")


@pytest.mark.parametrize(
    "field",
    [
        *('"version":3', '"angle_bits":16', '"total_steps":6', '"trits":"base3"', '"family":'),
        *('"ranks":{}', '"kept":{}', '"groups":{}', '"reductions":', '"ends":null'),
    ],
)
def test_deeply_nested_metadata_is_refused(field: str) -> None:
    text = json.dumps(content_of(unsealed(original())), sort_keys=True, separators=(",", ":"))
    assert field in text
    name = field.split(":")[0]
    # Python's own limit, 1,000 calls, counts those of the test as well; nothing may break at either side of it.
    for depth in (10, 500, *range(800, 1000), 5_000, 100_000):
        nested = "[" * depth + "]" * depth + (',"x":' if field.endswith(":") else "")
        is_refused(with_text(text.replace(field, f"{name}:{nested}")))


@pytest.mark.parametrize("section", [None, "storage", "config"])
def test_names_of_several_lines_make_a_message_of_one(section: str | None) -> None:
    def change(content: dict[str, Any]) -> None:
        (content if section is None else content[section]).update({"two\nlines": 1})

    is_refused(with_content(change))
