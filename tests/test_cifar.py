import contextlib
import hashlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums

from bvit_jax import cifar, prepared
from bvit_jax.model_config import ConfigError
from tests.conftest import ROOT
from tests.made_archive import CLASSES, LAYOUTS, Drawn, draw, file_contents, make, stored_order, write

OFFICIAL = {
    "cifar10": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar100": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
}
NAMES = list(OFFICIAL)


@pytest.fixture(scope="module")
def drawn():
    """Training and test images of each set, noise at the edge of what a byte holds included."""
    made = {}
    for name, classes in CLASSES.items():
        train, test = draw(classes, 203, 0), draw(classes, 41, 1)
        extremes = train.images.copy()
        extremes[:3] = np.array([0, 255, 128])[:, None, None, None]
        made[name] = (Drawn(extremes, train.labels), test)
    return made


@pytest.fixture
def ready(tmp_path, drawn):
    """A drawn CIFAR-100, its archive in tmp_path/archive, prepared in tmp_path/data; returns its SHA-256."""
    sha256 = write("cifar100", tmp_path / "archive", file_contents("cifar100", *drawn["cifar100"]))
    cifar.prepare("cifar100", tmp_path / "data", tmp_path / "archive", sha256)
    return sha256


def left_in(directory):
    """Lists what has a name in a directory of prepared sets."""
    return sorted(path.name for path in directory.glob("cifar*/*"))


@pytest.mark.parametrize("name", NAMES)
def test_pixels_labels_names_and_order_are_those_of_the_stock_builder(name, drawn, tmp_path):
    sha256 = write(name, tmp_path / "archive", file_contents(name, *drawn[name]))
    found = cifar.prepare(name, tmp_path / "data", tmp_path / "archive", sha256)
    assert found == prepared.open_set(name, tmp_path / "data")
    assert (found.name, found.version, found.splits) == (name, "3.0.2", {"train": 203, "test": 41})
    assert (found.num_classes, found.channels) == (CLASSES[name], 3)
    assert found.class_names == tuple(f"class_{number}" for number in range(CLASSES[name]))
    # Read once more, by tensorflow-datasets alone.
    stock = tfds.data_source(name, data_dir=tmp_path / "data")
    for split, pictures in zip(("train", "test"), drawn[name], strict=True):
        count = len(pictures.labels)
        images, labels = found.source(split).read(np.arange(count), 32, 3)
        order = stored_order(split, count)
        np.testing.assert_array_equal(images, pictures.images[order])
        np.testing.assert_array_equal(labels, pictures.labels[order])
        for index, record in zip(order, stock[split], strict=True):
            assert record["id"] == f"{split}_{index:05d}".encode()
            np.testing.assert_array_equal(record["image"], pictures.images[index])
            assert record["label"] == pictures.labels[index]
            assert name == "cifar10" or record["coarse_label"] == pictures.labels[index] // 5


def test_the_first_official_training_image_is_where_it_is_known_to_be():
    """Number 16,399 is the first that tensorflow-datasets gives of either official training set."""
    assert stored_order("train", 50_000)[:3] == [16399, 1680, 47917]


def test_the_stock_builders_stay_as_they_were(ready):
    assert tfds.builder_cls("cifar100").__module__ == "tensorflow_datasets.image_classification.cifar"
    recorded = (Path(tfds.__file__).parent / "url_checksums" / "cifar100.txt").read_text()
    assert recorded == (
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz\t168513733\t"
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec\tcifar-100-binary.tar.gz\n"
    )


def test_nothing_is_printed_where_there_is_no_terminal(drawn, tmp_path, capfd):
    sha256 = make("cifar10", tmp_path / "archive", 20, 10)
    cifar.prepare("cifar10", tmp_path / "data", tmp_path / "archive", sha256)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_the_official_checksum_is_enforced(name, tmp_path):
    sha256 = make(name, tmp_path / "archive", 10, 10)
    with pytest.raises(ConfigError) as raised:
        cifar.prepare(name, tmp_path / "data", tmp_path / "archive")
    file = "cifar-10-binary.tar.gz" if name == "cifar10" else "cifar-100-binary.tar.gz"
    assert str(raised.value) == (
        f"{tmp_path / 'archive' / file}: its SHA-256 is {sha256}, not {OFFICIAL[name]}; "
        f"the official archive comes from https://www.cs.toronto.edu/~kriz/{file}"
    )
    assert left_in(tmp_path / "data") == []


def test_another_checksum_is_enforced_too_and_goes_with_a_folder(tmp_path):
    make("cifar10", tmp_path, 10, 10)
    with pytest.raises(ConfigError, match=rf"its SHA-256 is [0-9a-f]{{64}}, not {'0' * 64}; "):
        cifar.prepare("cifar10", tmp_path / "data", tmp_path, "0" * 64)
    with pytest.raises(ConfigError, match="sha256 = '0000.*it must be given with archive_dir alone"):
        cifar.prepare("cifar10", tmp_path / "data", None, "0" * 64)
    with pytest.raises(ConfigError, match="dataset = 'mnist': it must be cifar10 or cifar100"):
        cifar.prepare("mnist", tmp_path / "data")


def test_a_missing_archive_is_named_with_where_it_comes_from(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "nowhere"):
        with pytest.raises(ConfigError) as raised:
            cifar.prepare("cifar10", tmp_path / "data", folder)
        assert str(raised.value) == (
            f"archive_dir: {folder}/cifar-10-binary.tar.gz cannot be read (No such file or directory); "
            "the file comes from https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
        )


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.97, "text"])
def test_a_truncated_archive_is_said_to_be_one(tmp_path, kept):
    make("cifar10", tmp_path, 20, 10)
    path = tmp_path / "cifar-10-binary.tar.gz"
    content = path.read_bytes()
    path.write_bytes(b"no archive" * 100 if kept == "text" else content[: int(len(content) * kept)])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=rf"archive {path}: it is truncated or no gzipped tar \("):
        cifar.prepare("cifar10", tmp_path / "data", tmp_path, sha256)
    assert left_in(tmp_path / "data") == []


def wrong_label(content, column, value):
    changed = bytearray(content)
    changed[column] = value
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "file", "change", "match"),
    [
        ("cifar100", "train.bin", None, "must hold cifar-100-binary/train.bin$"),
        ("cifar100", "coarse_label_names.txt", None, "must hold cifar-100-binary/coarse_label_names.txt$"),
        ("cifar10", "data_batch_4.bin", None, "must hold cifar-10-batches-bin/data_batch_4.bin$"),
        ("cifar10", "data_batch_4.bin", lambda c: c[:-1], "records of 3073 bytes, it has 24583 bytes"),
        ("cifar100", "test.bin", lambda c: c + b"\n", "test.bin must hold records of 3074 bytes, it has 30741 bytes"),
        ("cifar100", "test.bin", lambda c: b"", "test.bin must hold records of 3074 bytes, it has 0 bytes"),
        ("cifar100", "train.bin", lambda c: wrong_label(c, 3074, 20), "image 1: the label is 20; it must be 0 to 19"),
        ("cifar100", "train.bin", lambda c: wrong_label(c, 1, 100), "image 0: the label is 100; it must be 0 to 99"),
        ("cifar10", "test_batch.bin", lambda c: wrong_label(c, 0, 10), "image 0: the label is 10; it must be 0 to 9"),
        (
            "cifar100",
            "fine_label_names.txt",
            lambda c: c[8:],
            "must hold 100 different names.*it holds 99, 99 diff",
        ),
        (
            "cifar10",
            "batches.meta.txt",
            lambda c: c + b"owl\n",
            "must hold 10 different.*it holds 11, 11 diff",
        ),
        (
            "cifar10",
            "batches.meta.txt",
            lambda c: c.replace(b"_1", b"_2"),
            "it holds 10, 9 different ones",
        ),
    ],
)
def test_an_archive_of_another_layout_is_refused(tmp_path, name, file, change, match):
    files = file_contents(name, draw(CLASSES[name], 40, 0), draw(CLASSES[name], 10, 1))
    path = f"{LAYOUTS[name][0]}/{file}"
    content = files.pop(path)
    if change is not None:
        files[path] = change(content)
    sha256 = write(name, tmp_path, files)
    with pytest.raises(ConfigError, match=rf"^archive {tmp_path}/cifar-.*{match}"):
        cifar.prepare(name, tmp_path / "data", tmp_path, sha256)
    assert left_in(tmp_path / "data") == []


def test_files_that_are_no_part_of_the_set_are_left_out(tmp_path):
    files = file_contents("cifar10", draw(10, 40, 0), draw(10, 10, 1))
    sha256 = write("cifar10", tmp_path, files | {"cifar-10-batches-bin/readme.html": b"text"})
    assert cifar.prepare("cifar10", tmp_path / "data", tmp_path, sha256).splits["train"] == 40


def test_what_is_prepared_is_returned_without_its_archive(ready, tmp_path):
    before = prepared.open_set("cifar100", tmp_path / "data")
    times = {path: path.stat().st_mtime_ns for path in before.directory.iterdir()}
    shutil.rmtree(tmp_path / "archive")
    assert cifar.prepare("cifar100", tmp_path / "data", tmp_path / "archive", ready) == before
    assert {path: path.stat().st_mtime_ns for path in before.directory.iterdir()} == times


def test_a_set_from_another_archive_is_not_taken_for_the_official_one(ready, tmp_path):
    version = tmp_path / "data" / "cifar100" / "3.0.2"
    for sha256 in (None, "0" * 64):
        with pytest.raises(ConfigError) as raised:
            cifar.prepare("cifar100", tmp_path / "data", tmp_path / "archive", sha256)
        assert str(raised.value) == (
            f"{version} was made from an archive of SHA-256 {ready}, not {sha256 or OFFICIAL['cifar100']}: "
            f"remove {version} and prepare it again, or give another data_dir"
        )
    # As TensorFlow's own builder leaves it.
    (version / "archive.sha256").unlink()
    assert cifar.prepare("cifar100", tmp_path / "data").splits["train"] == 203
    with pytest.raises(ConfigError, match=f"SHA-256 {OFFICIAL['cifar100']}, not {ready}: remove"):
        cifar.prepare("cifar100", tmp_path / "data", tmp_path / "archive", ready)


def test_a_prepared_set_is_looked_over_before_it_is_returned(ready, tmp_path):
    version = tmp_path / "data" / "cifar100" / "3.0.2"
    (version / "cifar100-test.array_record-00000-of-00001").unlink()
    with pytest.raises(ConfigError, match=r"cifar100-test.array_record-00000-of-00001 missing; remove /.*3\.0\.2 and"):
        cifar.prepare("cifar100", tmp_path / "data", tmp_path / "archive", ready)
    (version / "features.json").unlink()
    with pytest.raises(ConfigError, match=r"3\.0\.2 is no prepared set: remove /.*3\.0\.2 and prepare it again"):
        cifar.prepare("cifar100", tmp_path / "data", tmp_path / "archive", ready)


def test_an_interrupted_preparation_leaves_nothing_and_is_begun_anew(tmp_path, monkeypatch):
    sha256 = make("cifar10", tmp_path, 40, 10)
    whole, calls = Image.fromarray, []

    def interrupted(array):
        calls.append(array)
        if len(calls) == 45:  # among the test images
            raise KeyboardInterrupt
        return whole(array)

    with monkeypatch.context() as patched:
        patched.setattr(Image, "fromarray", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cifar.prepare("cifar10", tmp_path / "data", tmp_path, sha256)
    assert left_in(tmp_path / "data") == []
    assert cifar.prepare("cifar10", tmp_path / "data", tmp_path, sha256).splits == {"train": 40, "test": 10}


def test_a_killed_preparation_is_not_taken_for_finished(tmp_path):
    sha256 = make("cifar10", tmp_path, 40, 10)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tensorflow_datasets.core import dataset_info\n"
        "from bvit_jax import cifar\n"
        # The last thing that is written: all files are there, under another name.
        "whole = dataset_info.DatasetInfo.write_to_directory\n"
        "def killed(*args, **options):\n"
        "    whole(*args, **options)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "dataset_info.DatasetInfo.write_to_directory = killed\n"
        "cifar.prepare('cifar10', Path(sys.argv[1]) / 'data', Path(sys.argv[1]), sys.argv[2])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path), sha256], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = (tmp_path / "data" / "cifar10").iterdir()
    assert (left / "dataset_info.json").exists()
    with pytest.raises(ConfigError, match=r"'cifar10': not prepared in .* \(there: none\)"):
        prepared.open_set("cifar10", tmp_path / "data")
    found = cifar.prepare("cifar10", tmp_path / "data", tmp_path, sha256)
    assert len(found.source("train").read(np.arange(40), 32, 3)[1]) == 40


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    make("cifar10", tmp_path, 10, 10)
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(ConfigError, match=rf"data_dir = '{directory}': it must be a directory to write to \("):
            cifar.prepare("cifar10", directory, tmp_path)


def test_a_full_disk_is_said_before_and_while_it_is_written(tmp_path, monkeypatch):
    sha256 = make("cifar10", tmp_path, 1000, 10)
    with monkeypatch.context() as patched:
        # 1,010 images of 3,073 bytes and a fifth more: 3.7 MB.
        patched.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2_200_000))
        with pytest.raises(ConfigError, match=rf"data_dir = '{tmp_path}/data': it needs 4 MB, its disk has 2 MB free"):
            cifar.prepare("cifar10", tmp_path / "data", tmp_path, sha256)

    def full(*_, **__):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "_download_and_prepare", full)
    with pytest.raises(ConfigError, match=r"/data': cifar10 cannot be written there \(write\(\) failed: No space left"):
        cifar.prepare("cifar10", tmp_path / "data", tmp_path, sha256)
    assert left_in(tmp_path / "data") == []


class Answer:
    """What a server sends, and how often it was asked."""

    def __init__(self, content, status=200):
        self.content, self.status_code, self.asked = content, status, 0
        self.headers = {"Content-length": str(len(content))}

    @contextlib.contextmanager
    def get(self, session, url, stream, verify):
        self.url, self.asked = url, self.asked + 1
        yield self

    def iter_content(self, chunk_size):
        yield from (self.content[start : start + chunk_size] for start in range(0, len(self.content), chunk_size))


def answer_with(monkeypatch, answer):
    monkeypatch.setattr(requests.Session, "get", lambda self, url, **options: answer.get(self, url, **options))


def make_official(monkeypatch, name, path):
    """Makes tensorflow-datasets expect this archive at the official address."""
    info = checksums.compute_url_info(path)
    url = f"https://www.cs.toronto.edu/~kriz/{path.name}"
    monkeypatch.setattr(cifar._BUILDERS[name], "url_infos", {url: info})
    return url


def test_a_download_is_verified_and_not_repeated(tmp_path, monkeypatch):
    sha256 = make("cifar100", tmp_path, 30, 10)
    path = tmp_path / "cifar-100-binary.tar.gz"
    url = make_official(monkeypatch, "cifar100", path)
    answer = Answer(path.read_bytes())
    answer_with(monkeypatch, answer)
    assert cifar.prepare("cifar100", tmp_path / "data").splits == {"train": 30, "test": 10}
    assert (answer.url, answer.asked) == (url, 1)
    assert (tmp_path / "data" / "cifar100" / "3.0.2" / "archive.sha256").read_text() == sha256 + "\n"
    shutil.rmtree(tmp_path / "data" / "cifar100")
    cifar.prepare("cifar100", tmp_path / "data")
    assert answer.asked == 1


def test_a_download_of_other_bytes_is_refused(tmp_path, monkeypatch):
    answer = Answer(b"a page of a hotel")
    answer_with(monkeypatch, answer)
    with pytest.raises(ConfigError) as raised:
        cifar.prepare("cifar100", tmp_path)
    url = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    found = hashlib.sha256(answer.content).hexdigest()
    assert str(raised.value) == (
        f"what was downloaded from {url}: its SHA-256 is {found}, not {OFFICIAL['cifar100']}; "
        f"the official archive comes from {url}"
    )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("failure", [404, requests.ConnectionError("no route"), requests.Timeout("late")])
def test_without_a_network_the_archive_may_come_from_a_folder(tmp_path, monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    if isinstance(failure, int):
        answer_with(monkeypatch, Answer(b"not found", failure))
    else:
        monkeypatch.setattr(requests.Session, "get", fail)
    with pytest.raises(ConfigError, match=r"cifar-10-binary.tar.gz cannot be downloaded; without a network.*--archive"):
        cifar.prepare("cifar10", tmp_path)


def test_drawn_images_can_be_told_apart_by_their_class():
    """What other tests train on must be learnable: the nearest mean of a class is nearly always the right one."""
    train, test = draw(10, 400, 0), draw(10, 100, 1)
    means = np.stack([train.images[train.labels == label].mean(axis=0) for label in range(10)])
    distances = ((test.images[:, None] - means[None]) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == test.labels).mean() > 0.9
