import json
import subprocess
import sys
from pathlib import Path

import pytest

from bvit_jax import workdir
from bvit_jax.model_config import ConfigError

IDENTITY = {"seed": 0, "grid": (1, 2)}
OUTPUTS = ("results.csv", "trials")


def claim(directory: Path, identity: dict[str, object] = IDENTITY) -> None:
    workdir.claim(directory, "identity.json", identity, OUTPUTS)


def visible(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file() and path.name[0] != "."}


def test_a_new_directory_is_made_and_can_be_claimed_again_by_the_same(tmp_path):
    claim(tmp_path / "a" / "b")
    assert json.loads((tmp_path / "a" / "b" / "identity.json").read_text()) == {"seed": 0, "grid": [1, 2]}
    claim(tmp_path / "a" / "b")


def test_another_identity_is_refused_and_changes_nothing(tmp_path):
    claim(tmp_path)
    before = visible(tmp_path)
    with pytest.raises(ConfigError, match=r"another configuration.*seed: 0 != 5"):
        claim(tmp_path, IDENTITY | {"seed": 5})
    assert visible(tmp_path) == before


@pytest.mark.parametrize("output", OUTPUTS)
def test_somebody_elses_output_is_left_alone(tmp_path, output):
    (tmp_path / output).write_text("precious")
    with pytest.raises(ConfigError, match=rf"it holds {output} but no identity\.json"):
        claim(tmp_path)
    assert visible(tmp_path) == {output: "precious"}


def test_other_files_do_not_stand_in_the_way(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path)
    assert visible(tmp_path)["notes.txt"] == "mine"


@pytest.mark.parametrize("content", [b"", b'{"seed": {', b"[]", b"null", b"3", b"\xff\xfe"])
def test_a_damaged_identity_is_named_and_kept(tmp_path, content):
    (tmp_path / "identity.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"identity\.json is damaged .*restore it or choose another workdir"):
        claim(tmp_path)
    assert (tmp_path / "identity.json").read_bytes() == content


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can be written to"):
        claim(tmp_path / "file" / "run")


HOLDER = """
import sys
from pathlib import Path
from bvit_jax import workdir
with workdir.locked(Path(sys.argv[1]), 0):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path):
    claim(tmp_path)
    root = Path(__file__).parent.parent
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(ConfigError, match=f"in use by another process .*process {holder.pid}"):
        with workdir.locked(tmp_path, 0.2):
            pytest.fail("two processes in one directory")
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    for _ in range(2):  # it can be taken again after it was let go
        with workdir.locked(tmp_path, 5.0):
            assert "process" in (tmp_path / workdir.LOCK_FILE).read_text()


def test_differences_lists_every_field_that_differs():
    stored = {"a": 1, "b": {"c": 2, "d": 3}, "gone": 0}
    asked = {"a": 1, "b": {"c": 2, "d": 4}, "new": 0}
    assert workdir.differences(stored, asked) == ["b.d: 3 != 4", "gone: 0 != None", "new: None != 0"]
