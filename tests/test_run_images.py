import dataclasses
import json
from pathlib import Path

import pytest

from bvit_jax import run_images
from bvit_jax.model_config import ConfigError
from bvit_jax.prepared import PreparedSet

FOUND = PreparedSet("birds", Path("/data/birds/1.0.0"), "1.0.0", {"train": 3}, 2, ("wren", "owl"), 3, "a" * 16)
OTHER = dataclasses.replace(FOUND, digest="b" * 16)


def test_the_first_claim_is_recorded_and_the_same_images_pass(tmp_path):
    run_images.check(tmp_path, "birds", FOUND)
    assert not (tmp_path / run_images.FILE).exists()
    for _ in range(2):
        run_images.claim(tmp_path, "birds", FOUND)
        run_images.check(tmp_path, "birds", FOUND)
        recorded = json.loads((tmp_path / run_images.FILE).read_text())
        assert recorded == {"birds": {"digest": "a" * 16, "version": "1.0.0", "classes": ["wren", "owl"]}}


def test_other_images_are_refused_and_nothing_is_changed(tmp_path):
    run_images.claim(tmp_path, "birds", FOUND)
    before = (tmp_path / run_images.FILE).read_bytes()
    for refuse in (run_images.claim, run_images.check):
        with pytest.raises(ConfigError, match="of other images of birds, digest a{16}, not b{16} as in /data/birds"):
            refuse(tmp_path, "birds", OTHER)
    assert (tmp_path / run_images.FILE).read_bytes() == before


def test_a_sweep_may_be_of_several_sets(tmp_path):
    run_images.claim(tmp_path, "birds", FOUND)
    run_images.claim(tmp_path, "fish", OTHER)
    assert {name: held["digest"][0] for name, held in json.loads((tmp_path / "images.json").read_text()).items()} == {
        "birds": "a",
        "fish": "b",
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"birds": 3}'])
def test_a_record_that_cannot_be_read_is_left_alone_and_told_of(tmp_path, content):
    path = tmp_path / run_images.FILE
    path.write_text(content)
    with pytest.raises(
        ConfigError, match=r"images\.json cannot be read .*; restore it, or remove it if the images are"
    ):
        run_images.claim(tmp_path, "birds", FOUND)
    assert path.read_text() == content


def test_images_that_need_no_file_leave_no_record(tmp_path):
    run_images.claim(tmp_path, "digits", None)
    run_images.check(tmp_path, "digits", None)
    assert not (tmp_path / run_images.FILE).exists()
