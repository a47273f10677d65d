import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bvit_jax import checkpoints, damage
from tests.test_checkpoints import accuracies, contents, log_of, save_all

SEEDS = range(12)
SCORES = accuracies(s4=0.5, s8=0.75)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two checkpoints, of steps 4 and 8, whose metrics are ahead of them; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("run")
    save_all(workdir / checkpoints.DIRECTORY, SCORES)
    (workdir / "metrics.jsonl").write_text(log_of(SCORES | accuracies(s12=0.25)))
    return workdir


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def newest(run: Path) -> Path:
    return run / checkpoints.DIRECTORY / "8"


Told = tuple[str, dict[str, bytes], dict[str, bytes]]


def harmed(whole: Path, copy: Path, kind: str, seed: int) -> Told:
    """Damages the newest checkpoint of a copy; returns what was told, and its content before and after."""
    shutil.copytree(whole, copy)
    told = damage.KINDS[kind](newest(copy), random.Random(seed))
    return told, contents(newest(whole)), contents(newest(copy))


def one_changed(before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """Returns the name of the only file that differs or is gone; nothing else may be new or differ."""
    assert after.keys() <= before.keys()
    (changed,) = (name for name in before if after.get(name) != before[name])
    return changed


def check_flipped(told: str, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    name = one_changed(before, after)
    assert name.startswith(("state/", "record/"))
    assert len(after[name]) == len(before[name])
    differing = [(n, a ^ b) for n, (a, b) in enumerate(zip(before[name], after[name], strict=True)) if a != b]
    ((place, bits),) = differing
    assert bits.bit_count() == 1
    assert told == f"a bit of byte {place} of {name} flipped"


def check_truncated(told: str, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    name = one_changed(before, after)
    assert name.startswith("state/")
    assert len(after[name]) < len(before[name])
    assert before[name].startswith(after[name])
    assert told == f"{name} cut to {len(after[name])} bytes"


def check_removed(told: str, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    name = one_changed(before, after)
    assert name.startswith("state/")
    assert name not in after
    assert told == f"{name} removed"


def check_emptied(told: str, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    assert before
    assert after == {}
    assert told == "emptied"


def check_spoilt(told: str, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    name = one_changed(before, after)
    assert name == "record/metadata"
    assert before[name].startswith(after[name][:-1])
    assert 1 < len(after[name]) < len(before[name])
    with pytest.raises(json.JSONDecodeError):
        json.loads(after[name])
    assert told == "the record's JSON spoilt"


CHECKS: dict[str, Callable[[str, dict[str, bytes], dict[str, bytes]], None]] = {
    "flipped byte": check_flipped,
    "truncated file": check_truncated,
    "missing file": check_removed,
    "empty step": check_emptied,
    "bad JSON": check_spoilt,
}


def test_every_kind_is_checked_here():
    assert CHECKS.keys() == damage.KINDS.keys()


@pytest.mark.parametrize("kind", damage.KINDS)
def test_what_is_told_is_what_is_changed_and_it_is_found(whole, tmp_path, kind):
    for seed in SEEDS:
        copy = tmp_path / str(seed)
        told, before, after = harmed(whole, copy, kind, seed)
        CHECKS[kind](told, before, after)
        assert newest(copy).is_dir()
        with pytest.raises(checkpoints.DamagedError, match="^the checkpoint of step 8 is damaged: "):
            checkpoints.read_record(copy / checkpoints.DIRECTORY, 8)
        shutil.rmtree(newest(copy))
        others = {name: content for name, content in contents(whole).items() if not name.startswith("checkpoints/8/")}
        assert contents(copy) == others


@pytest.mark.parametrize("kind", damage.KINDS)
def test_the_seed_alone_decides(whole, tmp_path, kind):
    outcomes = []
    for seed in SEEDS:
        first, second = (harmed(whole, tmp_path / f"{seed} {turn}", kind, seed) for turn in (1, 2))
        assert first == second
        outcomes.append(tuple(sorted(first[2].items())))
    if kind != "empty step":
        assert len(set(outcomes)) > 2


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("flipped byte", {"state", "record"}), ("truncated file", {"state"}), ("missing file", {"state"})],
)
def test_any_file_may_be_hit(whole, tmp_path, kind, parts):
    hit = set()
    for seed in range(60):
        _, before, after = harmed(whole, tmp_path / str(seed), kind, seed)
        hit.add(one_changed(before, after))
    files = {name: content for name, content in contents(newest(whole)).items() if name.split("/")[0] in parts}
    assert len(files) >= 4
    assert hit == {name for name, content in files.items() if content or kind == "missing file"}


def test_metrics_are_cut_within_what_the_newest_checkpoint_knows(whole, run):
    path = run / "metrics.jsonl"
    text, known = path.read_bytes(), len(log_of(SCORES))
    assert len(text) > known
    others = {name: content for name, content in contents(whole).items() if name != path.name}
    lengths = []
    for seed in range(60):
        path.write_bytes(text)
        told = damage.cut_metrics(run, random.Random(seed))
        left = path.read_bytes()
        assert text.startswith(left)
        assert len(left) < known
        assert told == f"metrics.jsonl cut to {len(left)} bytes"
        assert contents(run) == others | {path.name: left}
        path.write_bytes(text)
        assert damage.cut_metrics(run, random.Random(seed)) == told
        lengths.append(len(left))
    assert min(lengths) < known / 10  # it may lose nearly everything, or what the newest checkpoint alone knows
    assert max(lengths) > len(log_of(accuracies(s4=0.5)))
