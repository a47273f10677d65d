"""What lies in a directory of prepared sets is found, and what does not is said with what to run."""

import json

import pytest

from bvit_jax import data_dirs
from bvit_jax.model_config import ConfigError


@pytest.fixture
def place(tmp_path):
    lay(tmp_path, "photos/1.0.0")
    return tmp_path


def lay(place, *versions):
    """Makes directories that look like prepared versions."""
    for version in versions:
        (place / version).mkdir(parents=True)
        for file in ("dataset_info.json", "features.json"):
            (place / version / file).write_text(json.dumps({}))


def test_sets_are_looked_for_where_the_environment_says_or_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert data_dirs.current() == tmp_path
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
    assert str(data_dirs.current()) == "/home/ada/sets"
    for unset in (lambda: monkeypatch.setenv("TFDS_DATA_DIR", ""), lambda: monkeypatch.delenv("TFDS_DATA_DIR")):
        unset()
        assert str(data_dirs.current()) == "/home/ada/tensorflow_datasets"


def test_the_newest_version_is_found_unless_another_is_named(place):
    # Half-prepared, bare of a description, and no directory: none of them is a version.
    lay(place, "photos/1.9.0", "photos/1.10.0", "photos/incomplete.ABCDEF_2.0.0", "photos/4.0.0")
    (place / "photos" / "3.0.0").mkdir()
    (place / "photos" / "4.0.0" / "features.json").unlink()
    (place / "photos" / "5.0.0").write_text("")
    assert sorted(data_dirs.versions(place / "photos")) == ["1.0.0", "1.10.0", "1.9.0"]
    assert data_dirs.versions(place / "no such") == []
    assert data_dirs.find("photos", place) == place / "photos" / "1.10.0"
    assert data_dirs.find("photos:1.9.0", place) == place / "photos" / "1.9.0"
    there = "photos:1.0.0, photos:1.10.0, photos:1.9.0"
    with pytest.raises(ConfigError, match=rf"'photos:2.0.0': not prepared in .* \(there: {there}\)"):
        data_dirs.find("photos:2.0.0", place)


def test_a_configuration_is_part_of_the_name(place):
    lay(place, "drawings/small/1.0.0", "drawings/small/2.0.0")
    assert data_dirs.find("drawings/small", place) == place / "drawings" / "small" / "2.0.0"
    assert data_dirs.find("drawings/small:1.0.0", place) == place / "drawings" / "small" / "1.0.0"
    there = r"drawings/small:1\.0\.0, drawings/small:2\.0\.0, photos:1\.0\.0"
    with pytest.raises(ConfigError, match=rf"'drawings': not prepared.*there: {there}\)"):
        data_dirs.find("drawings", place)


def test_what_is_not_there_is_said_with_what_to_run(place):
    with pytest.raises(ConfigError) as raised:
        data_dirs.find("cifar100", place)
    assert str(raised.value) == (
        f"data.name = 'cifar100': not prepared in {place} (there: photos:1.0.0); "
        f"run: python -m experiments.prepare_data --dataset=cifar100 --data_dir={place}"
    )
    with pytest.raises(ConfigError) as raised:
        data_dirs.find("mnist", place / "no such")
    assert str(raised.value) == (
        f"data.name = 'mnist': there is no directory {place / 'no such'}; where TensorFlow is installed, "
        f"run: tfds build mnist --data_dir='{place / 'no such'}' --file_format=array_record"
    )
    lay(place, *(f"copy{number}/1.0.0" for number in range(12)))
    with pytest.raises(ConfigError, match=r"there: copy0:1\.0\.0, .*copy5:1\.0\.0 and 5 more\)"):
        data_dirs.find("unheard_of", place)


@pytest.mark.parametrize("name", ["imagenet2012", "imagenet2012:5.1.0", "imagenet2012_subset/10pct"])
def test_what_must_be_downloaded_by_hand_is_said_first(place, name):
    told = data_dirs.how_to_prepare(name, place)
    archives = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
    where = f"put its files into manual_dir, which is {place}/downloads/manual"
    assert told.startswith(f"{where} (manual_dir should contain two files: {archives}. ")
    command = f"tfds build {name} --data_dir={place} --file_format=array_record"
    assert told.endswith(f"); then where TensorFlow is installed, run: {command}")
    assert "\n" not in told
    assert "  " not in told
