import concurrent.futures
import functools
import io
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from bvit_jax import decoding, prepared
from bvit_jax.model_config import ConfigError
from tests.conftest import ROOT
from tests.made_archive import TinyJpegs, jpeg, prepare_builder, prepare_drawn, prepare_jpegs, stored_order


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepare_jpegs(tmp_path_factory.mktemp("jpegs"), train=40, validation=20, shards=3)


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of the prepared JPEGs that a test may damage, and where prepared sets are looked for."""
    shutil.copytree(made, tmp_path / "data")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def version(place):
    return place / "tiny_jpegs" / "1.0.0"


def describe(folder, **changes):
    """Changes fields of the description of a prepared version."""
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tiny_png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Whatever features and examples a test gives it."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(dict(self.FEATURES)))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self.EXAMPLES)


def prepare_small(place, name, features, examples):
    with tfds.core.registered.skip_registration():
        made = type(name.capitalize(), (Small,), {"name": name, "FEATURES": features, "EXAMPLES": examples})
    return prepare_builder(made, place)


LABEL = tfds.features.ClassLabel(num_classes=4)


def test_a_set_is_described(version):
    found = prepared.open_set("tiny_jpegs")
    assert (found.name, found.version, found.directory) == ("tiny_jpegs", "1.0.0", version)
    assert found.splits == {"train": 40, "validation": 20}
    assert (found.num_classes, found.class_names, found.channels) == (4, ("0", "1", "2", "3"), 3)
    assert len(found.digest) == 16
    assert int(found.digest, 16) >= 0


def test_the_digest_follows_the_content_and_not_the_place(made, place, tmp_path):
    digest = prepared.open_set("tiny_jpegs").digest
    assert prepared.open_set("tiny_jpegs", made).digest == digest
    describe(place / "tiny_jpegs" / "1.0.0", description="another text")
    assert prepared.open_set("tiny_jpegs").digest == digest
    stored = json.loads((place / "tiny_jpegs" / "1.0.0" / "dataset_info.json").read_text())
    fewer, longer = (json.loads(json.dumps(stored["splits"])) for _ in range(2))
    fewer[0]["shardLengths"][0] = "3"
    longer[1]["numBytes"] = "1"
    others = set()
    for splits in (fewer, longer, stored["splits"][:1]):
        describe(place / "tiny_jpegs" / "1.0.0", splits=splits)
        others.add(prepared.open_set("tiny_jpegs").digest)
    assert len(others | {digest}) == 4


def test_a_configuration_is_part_of_the_name(place):
    shutil.move(place / "tiny_jpegs", place / "other")
    (place / "tiny_jpegs").mkdir()
    shutil.move(place / "other", place / "tiny_jpegs" / "small")
    found = prepared.open_set("tiny_jpegs/small:1.0.0")
    assert (found.name, found.splits["train"]) == ("tiny_jpegs/small", 40)
    assert len(found.source("train")) == 40
    with pytest.raises(ConfigError, match=rf"not prepared in {place} \(there: tiny_jpegs/small:1\.0\.0\)"):
        prepared.open_set("tiny_jpegs")


@pytest.mark.parametrize("fields", [{"fileFormat": "tfrecord"}, {"fileFormat": "riegeli"}])
def test_another_file_format_is_refused_with_what_to_run(place, version, fields):
    describe(version, **fields)
    with pytest.raises(ConfigError) as raised:
        prepared.open_set("tiny_jpegs")
    assert str(raised.value) == (
        f"data.name = 'tiny_jpegs': {version} holds {fields['fileFormat']} files, not array_record; remove it, then "
        f"where TensorFlow is installed, run: tfds build tiny_jpegs --data_dir={place} --file_format=array_record"
    )


@pytest.mark.parametrize("first", ["tfrecord", "parquet"])
def test_array_record_beside_another_format_is_read(version, first):
    describe(version, fileFormat=first, alternativeFileFormats=["array_record"])
    _, labels = prepared.open_set("tiny_jpegs").source("train").read(np.arange(40), 8, 3)
    np.testing.assert_array_equal(labels, np.array(stored_order("train", 40)) % 4)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"fileFormat": "array_record", "splits": 3}'])
def test_a_damaged_description_is_said(version, file, content):
    (version / file).write_text(content)
    with pytest.raises(ConfigError, match="data.name = 'tiny_jpegs': its description cannot be read; remove ") as said:
        prepared.open_set("tiny_jpegs")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("features", "example", "match"),
    [
        ({"image": tfds.features.Image()}, {"image": tiny_png()}, "must have an image and a label.*it has image$"),
        ({"label": LABEL}, {"label": 1}, "must have an image and a label.*it has label$"),
        (
            {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)},
            {"image": tiny_png(), "label": 1},
            "must have an image and a label.*it has image, label$",
        ),
        (
            {"image": tfds.features.Text(), "label": LABEL},
            {"image": "a horse", "label": 1},
            "must have an image and a label.*it has image, label$",
        ),
        (
            {"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16), "label": LABEL},
            {"image": tiny_png(), "label": 1},
            "must have uint8 images.*it has uint16 and 4 classes$",
        ),
    ],
)
def test_a_set_without_labelled_images_is_refused(tmp_path, features, example, match):
    prepare_small(tmp_path, "others", features, [example])
    with pytest.raises(ConfigError, match=match):
        prepared.open_set("others", tmp_path)


@pytest.mark.parametrize(("size", "channels"), [(32, 3), (20, 1), (64, 3)])
def test_images_and_labels_come_as_they_were_stored_in_any_order(place, size, channels):
    for split, count in (("train", 40), ("validation", 20)):
        source = prepared.open_set("tiny_jpegs").source(split)
        assert len(source) == count
        order = stored_order(split, count)
        indices = np.random.default_rng(0).integers(0, count, 70)
        images, labels = source.read(indices, size, channels)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        assert images.shape == (70, size, size, channels)
        np.testing.assert_array_equal(labels, [order[index] % 4 for index in indices])
        for index, image in zip(indices, images, strict=True):
            np.testing.assert_array_equal(image, decoding.decode(jpeg(split, order[index]), size, channels))


def test_an_image_is_what_pillow_makes_of_it(place):
    """The whole way once by hand: of the 40 files, one that is wide and less than twice as high as wanted."""
    order = stored_order("train", 40)
    sizes, _ = prepared.open_set("tiny_jpegs").source("train").measure(np.arange(40))
    wide = next(index for index, (height, width) in enumerate(sizes) if 40 < height < 64 and width > height)
    with Image.open(io.BytesIO(jpeg("train", order[wide]))) as image:
        width, height = image.size
        assert (height, width) == tuple(sizes[wide])
        left = (width - height) // 2
        square = image.convert("RGB").crop((left, 0, left + height, height))
    by_hand = np.asarray(square.resize((32, 32), Image.Resampling.BILINEAR))
    (found,), _ = prepared.open_set("tiny_jpegs").source("train").read(np.array([wide]), 32, 3)
    np.testing.assert_array_equal(found, by_hand)


def test_no_images_are_read_as_none_and_no_index_is_out_of_range(place):
    source = prepared.open_set("tiny_jpegs").source("train")
    images, labels = source.read(np.array([], np.int64), 8, 3)
    assert (images.shape, labels.shape) == ((0, 8, 8, 3), (0,))
    for indices in ([0, 40], [-1]):
        with pytest.raises(IndexError, match="tiny_jpegs:1.0.0, split train has 40 images"):
            source.read(np.array(indices), 8, 3)


def test_all_images_are_read_in_parts(place, monkeypatch):
    source = prepared.open_set("tiny_jpegs").source("train")
    indices = np.random.default_rng(0).permutation(40)
    expected = source.read(indices, 16, 3)
    monkeypatch.setattr(prepared, "_CHUNK", 7)
    for found, wanted in zip(prepared.read_all(source, indices, 16, 3), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_parts_make_up_the_whole_and_move_the_bar(place, monkeypatch):
    source = prepared.open_set("tiny_jpegs").source("train")
    monkeypatch.setattr(prepared, "_CHUNK", 7)
    terminal = Terminal()
    monkeypatch.setattr(prepared, "tqdm", functools.partial(tqdm, file=terminal, mininterval=0, miniters=1))
    assert [np.arange(40)[part].size for part in prepared.parts(source, 40)] == [7] * 5 + [5]
    assert list(prepared.parts(source, 0)) == []
    assert "reading tiny_jpegs:1.0.0, split train:" in terminal.getvalue()
    for done in (7, 35, 40):
        assert f" {done}/40 " in terminal.getvalue()


def test_a_source_is_read_by_threads_at_once_and_from_a_pickle(place):
    source = prepared.open_set("tiny_jpegs").source("train")
    restored = pickle.loads(pickle.dumps(source))
    rows = np.random.default_rng(0).integers(0, 40, (24, 10))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda row: restored.read(row, 12, 3)[0], rows))
    for row, images in zip(rows, found, strict=True):
        np.testing.assert_array_equal(images, source.read(row, 12, 3)[0])


@pytest.mark.parametrize("last", [1, 3])
def test_missing_files_are_named(version, last):
    for shard in range(last):
        (version / f"tiny_jpegs-train.array_record-0000{shard}-of-00003").unlink()
    found = prepared.open_set("tiny_jpegs")
    more = f" and {last - 1} more" if last > 1 else ""
    with pytest.raises(ConfigError, match=rf": tiny_jpegs-train.array_record-00000-of-00003{more} missing; remove /"):
        found.source("train")
    assert len(found.source("validation")) == 20


def test_an_unknown_split_is_refused_with_those_there_are(place):
    with pytest.raises(ConfigError, match="tiny_jpegs has no split 'test'; it must be one of train, validation"):
        prepared.open_set("tiny_jpegs").source("test")


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "vanished"])
def test_a_damaged_file_is_said_when_it_is_read(version, damage):
    path = version / "tiny_jpegs-train.array_record-00001-of-00003"
    source = prepared.open_set("tiny_jpegs").source("train")
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 300] ^= 1  # inside the first JPEG
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-70_000])
        case "empty":
            path.write_bytes(b"")
        case "flipped":
            path.write_bytes(content)
        case "vanished":
            path.unlink()
    with pytest.raises(ConfigError, match=r"split train: a record file is missing or damaged; remove /.*1\.0\.0 and"):
        source.read(np.arange(40), 8, 3)


def test_bad_images_are_named(tmp_path):
    features = {"file_name": tfds.features.Text(), "image": tfds.features.Image(), "label": LABEL}
    examples = [
        {"file_name": "fine.png", "image": tiny_png(), "label": 1},
        {"file_name": "cut.png", "image": tiny_png()[:40], "label": 1},
    ]
    prepare_small(tmp_path, "faulty", features, examples)
    source = prepared.open_set("faulty", tmp_path).source("train")
    cut, fine = (stored_order("train", 2).index(index) for index in (1, 0))
    assert source.read(np.array([fine]), 4, 3)[1].tolist() == [1]
    for read in (lambda index: source.read(np.array([index]), 4, 3), lambda index: source.measure(np.array([index]))):
        with pytest.raises(ConfigError, match=rf"split train, image {cut} \(cut.png\): the image cannot be decoded"):
            read(cut)


def test_images_without_labels_are_measured_and_not_read(tmp_path):
    features = {"file_name": tfds.features.Text(), "image": tfds.features.Image(), "label": LABEL}
    examples = [{"file_name": f"{n}.png", "image": tiny_png(), "label": label} for n, label in enumerate((-1, 3))]
    prepare_small(tmp_path, "halfway", features, examples)
    source = prepared.open_set("halfway", tmp_path).source("train")
    order = stored_order("train", 2)
    _, labels = source.measure(np.arange(2))
    assert labels.tolist() == [(-1, 3)[index] for index in order]
    with pytest.raises(ConfigError) as raised:
        source.read(np.arange(2), 4, 3)
    assert str(raised.value) == (
        f"halfway:1.0.0, split train, image {order.index(0)} (0.png): the label is -1: images of this split have no "
        f"labels; they must be 0 to 3"
    )


@pytest.mark.parametrize("label", [-2, 4])
def test_labels_that_no_class_has_are_named(tmp_path, label, monkeypatch):
    prepare_small(
        tmp_path, "faulty", {"image": tfds.features.Image(), "label": LABEL}, [{"image": tiny_png(), "label": 1}]
    )
    source = prepared.open_set("faulty", tmp_path).source("train")
    fetched = {"image": tiny_png(), "label": label}
    monkeypatch.setattr(prepared.Source, "_fetch", lambda *_: [fetched])
    for read in (lambda index: source.read(index, 4, 3), source.measure):
        with pytest.raises(ConfigError, match=rf"split train, image 0: the label is {label}; it must be 0 to 3$"):
            read(np.array([0]))


def test_a_bad_image_may_have_a_number_for_its_name(tmp_path):
    features = {"id": tfds.features.Scalar(np.int64), "image": tfds.features.Image(), "label": LABEL}
    prepare_small(tmp_path, "faulty", features, [{"id": 7, "image": b"none", "label": 1}])
    with pytest.raises(ConfigError, match=r"split train, image 0: the image cannot be decoded"):
        prepared.open_set("faulty", tmp_path).source("train").read(np.array([0]), 4, 3)


def test_tensorflow_is_neither_needed_nor_imported(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import numpy\n"
        "from bvit_jax import prepared\n"
        "from tests.made_archive import prepare_drawn, prepare_jpegs\n"
        "place = prepare_drawn(Path(sys.argv[1]), train=20, test=20)\n"
        "prepare_jpegs(place, 4, 4)\n"
        "for name in ('cifar100', 'tiny_jpegs'):\n"
        "    source = prepared.open_set(name, place).source('train')\n"
        "    prepared.read_all(source, numpy.arange(len(source)), 32, 3)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert (ran.stdout, ran.stderr) == ("", "")


def test_drawn_sets_may_be_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepare_drawn(tmp_path, "cifar10", train=30, test=10)))
    assert prepared.open_set("cifar10").splits == {"train": 30, "test": 10}
    assert TinyJpegs.counts == {"train": 40, "validation": 20}
