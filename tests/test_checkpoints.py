import contextlib
import dataclasses
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import bundles, checkpoints, digests, seals, sharding, train_step
from bvit_jax.checkpoints import Checkpoints, DamagedError, SaveError, steps_in
from bvit_jax.config import Config, from_dict
from bvit_jax.model_config import ConfigError
from bvit_jax.sentinels import Sentinel
from bvit_jax.train_step import TrainState
from tests.conftest import make_config

CONFIG = make_config()


def make_state(step: int) -> TrainState:
    """A small state, no two of them alike."""
    rng = np.random.default_rng(step)
    params = {"head": {"kernel": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}}
    moments = ({"mean": jnp.asarray(rng.standard_normal(4), jnp.bfloat16)}, jnp.int32(step * 10))
    sentinel = Sentinel(jnp.int32(1), jnp.int32(step), jnp.float32("nan"), {"head": jnp.float32("inf")})
    return TrainState(jnp.int32(step), params, None, moments, sentinel)


def drawn_state(config: Config) -> TrainState:
    """A whole training state of a configuration, drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: train_step.init_state(config))
    drawn = jax.tree.map(lambda leaf: jnp.asarray(100 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    return drawn.replace(step=jnp.int32(0))


def log_of(scores: dict[int, tuple[float, float]]) -> str:
    rows = [
        {"step": step, "split": "validation", "accuracy": accuracy, "nll": nll}
        for step, (accuracy, nll) in scores.items()
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def accuracies(**by_step: float) -> dict[int, tuple[float, float]]:
    return {int(step[1:]): (accuracy, 1.0) for step, accuracy in by_step.items()}


def save_all(
    directory: Path, scores: dict[int, tuple[float, float]], known: dict[int, tuple[float, float]] | None = None
) -> None:
    """Saves a checkpoint for each score; `known` are those that went before."""
    known = dict(known or {})
    with Checkpoints(directory, log=log_of(known)) as writer:
        for step, score in scores.items():
            known[step] = score
            writer.save(make_state(step), CONFIG, log_of(known))


def restore(directory: Path, step: int) -> tuple[TrainState, checkpoints.Record]:
    place = sharding.place(CONFIG.model, 16).replicated
    return checkpoints.restore(directory, step, CONFIG, train_step.abstract_state(make_state(0), place))


def restore_newest(directory: Path, before: int | None = None) -> tuple[int | None, list[tuple[int, str]]]:
    """Returns the step that was read, and what was told of damaged ones."""
    told: list[tuple[int, str]] = []
    abstract = train_step.abstract_state(make_state(0), sharding.place(CONFIG.model, 16).replicated)
    found = checkpoints.restore_newest(directory, CONFIG, abstract, lambda *what: told.append(what), before)
    if found is None:
        return None, told
    assert_equal(found[0], make_state(int(found[0].step)))
    return int(found[0].step), told


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good checkpoints of steps 1 (the best), 2 and 3; copy it before changing it."""
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    save_all(directory, accuracies(s1=0.9, s2=0.1, s3=0.2))
    assert steps_in(directory) == [1, 2, 3]
    return directory


@pytest.fixture
def copied(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "run" / "checkpoints"))


def test_a_state_comes_back_exactly_with_its_record(copied):
    state, record = restore(copied, 3)
    assert_equal(state, make_state(3))
    assert record.metrics == log_of(accuracies(s1=0.9, s2=0.1, s3=0.2))
    assert record.digests == digests.of_tree(bundles.bundle(make_state(3)))
    assert from_dict(record.config) == CONFIG
    assert checkpoints.read_record(copied, 3) == record


def test_a_state_may_be_given_away_as_soon_as_it_is_saved(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as writer:
        for step in (1, 2):
            state = make_state(step)
            writer.save(state, CONFIG, "")
            spoil(state)
            jax.tree.map(lambda leaf: leaf.delete(), state)
    for step in (1, 2):
        assert_equal(restore(tmp_path, step)[0], make_state(step))


def test_a_whole_training_state_comes_back_exactly_where_it_belongs(tmp_path):
    shardings = train_step.state_shardings(CONFIG, sharding.place(CONFIG.model, CONFIG.batch_size))
    state = jax.device_put(drawn_state(CONFIG), shardings)
    with Checkpoints(tmp_path) as writer:
        writer.save(state, CONFIG, "")
    found, _ = checkpoints.restore(tmp_path, 0, CONFIG, train_step.abstract_state(state, shardings))
    assert_equal(found, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings


def test_an_absent_or_empty_directory_has_no_checkpoint(tmp_path):
    assert steps_in(tmp_path / "new") == []
    assert restore_newest(tmp_path / "new") == (None, [])
    Checkpoints(tmp_path / "new").wait()
    assert (tmp_path / "new").is_dir()
    assert steps_in(tmp_path / "new") == []


def test_steps_are_those_of_finished_checkpoints_in_order_of_number(tmp_path):
    for name in ("10", "9", "100", "11.deleted", "12.orbax-checkpoint-tmp", "-3", "1.5", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("a file")
    assert steps_in(tmp_path) == [9, 10, 100]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({1: (0.2, 2.0), 2: (0.9, 1.0), 3: (0.3, 0.5), 4: (0.4, 0.4), 5: (0.1, 0.1)}, [2, 4, 5]),  # by accuracy first
        ({1: (0.5, 2.0), 2: (0.5, 1.0), 3: (0.5, 3.0), 4: (0.1, 0.1), 5: (0.1, 0.1)}, [2, 4, 5]),  # then by likelihood
        ({1: (0.5, 1.0), 2: (0.5, 1.0), 3: (0.1, 1.0), 4: (0.1, 1.0)}, [2, 3, 4]),  # then the later
        ({1: (0.9, 1.0), 2: (0.1, 1.0), 3: (0.1, 1.0), 10: (0.2, 1.0)}, [1, 3, 10]),
        ({1: (0.5, 1.0), 2: (0.5, 1.0)}, [1, 2]),
        ({5: (0.0, 2.0)}, [5]),
    ],
)
def test_the_newest_two_and_the_best_are_kept(tmp_path, scores, kept):
    save_all(tmp_path, scores)
    assert names_in(tmp_path) == {str(step) for step in kept}
    for step in kept:
        assert_equal(restore(tmp_path, step)[0], make_state(step))


# Step, accuracy, and what is kept after it: the newest two, the best as each of these knew it, every fifth.
HISTORY = [
    (1, 0.5, [1]),
    (2, 0.4, [1, 2]),
    (3, 0.3, [1, 2, 3]),
    (4, 0.6, [1, 3, 4]),  # 3 knew 1 as the best: should 4 prove damaged, it is needed again
    (5, 0.6, [4, 5]),
    (6, 0.1, [5, 6]),
    (7, 0.1, [5, 6, 7]),
    (8, 0.9, [5, 7, 8]),
    (9, 0.1, [5, 8, 9]),
    (10, 0.1, [5, 8, 9, 10]),
    (11, 0.1, [5, 8, 10, 11]),
    (12, 0.1, [5, 8, 10, 11, 12]),
]


@pytest.mark.parametrize("restarts", [(), range(1, 13), (4, 8)])
def test_what_is_kept_is_right_after_every_save_and_every_restart(tmp_path, restarts):
    known: dict[int, tuple[float, float]] = {}
    writer = Checkpoints(tmp_path, keep_every=5)
    for step, accuracy, kept in HISTORY:
        if step in restarts:
            writer.__exit__(None, None, None)
            writer = Checkpoints(tmp_path, keep_every=5, log=log_of(known))
        known[step] = (accuracy, 1.0)
        writer.save(make_state(step), CONFIG, log_of(known))
        writer.wait()
        assert steps_in(tmp_path) == kept
    writer.__exit__(None, None, None)
    assert steps_in(tmp_path) == HISTORY[-1][2]


def test_without_an_evaluation_the_newest_two_are_kept(tmp_path):
    with Checkpoints(tmp_path) as writer:
        for step in range(1, 5):
            writer.save(make_state(step), CONFIG, '{"step": 1, "split": "train"}\n')
    assert steps_in(tmp_path) == [3, 4]


def hold_the_disk(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Path], None]) -> None:
    """Calls `meanwhile` with what is being written, in the background, before it gets its name."""
    true_seal = seals.seal

    def held(folder: Path) -> None:
        meanwhile(folder)
        true_seal(folder)

    monkeypatch.setattr(seals, "seal", held)


def test_the_best_of_the_newest_stays_until_its_successor_is_on_disk(tmp_path, monkeypatch):
    save_all(tmp_path, accuracies(s1=0.9, s2=0.1, s3=0.2))
    seen: list[list[int]] = []
    hold_the_disk(monkeypatch, lambda folder: seen.append(steps_in(folder.parent)))
    known = accuracies(s1=0.9, s2=0.1, s3=0.2, s4=1.0, s5=1.0)
    with Checkpoints(tmp_path, log=log_of(accuracies(s1=0.9, s2=0.1, s3=0.2))) as writer:
        for step in (4, 5):
            writer.save(make_state(step), CONFIG, log_of({n: known[n] for n in range(1, step + 1)}))
    # With 4, the best of all, only half written, 1 is needed still; with 4 there and 5 half written, 3 knows 1.
    assert seen == [[1, 2, 3], [1, 3, 4]]
    assert steps_in(tmp_path) == [4, 5]


def test_a_checkpoint_is_sealed_before_it_has_its_name(tmp_path, monkeypatch):
    names: list[str] = []
    hold_the_disk(monkeypatch, lambda folder: names.append(folder.name))
    save_all(tmp_path, accuracies(s1=0.5))
    assert names == ["1.orbax-checkpoint-tmp"]
    seals.check(tmp_path / "1")


def full_disk(_: Path) -> None:
    raise OSError(28, "No space left on device")


def gone_meanwhile(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("trouble", [full_disk, gone_meanwhile])
def test_a_save_that_fails_in_the_background_is_told_and_harms_no_other(copied, monkeypatch, trouble):
    known = accuracies(s1=0.9, s2=0.1, s3=0.2, s4=1.0)
    before = contents(copied)
    writer = Checkpoints(copied, log=log_of(accuracies(s1=0.9, s2=0.1, s3=0.2)))
    with monkeypatch.context() as patch:
        hold_the_disk(patch, trouble)
        writer.save(make_state(4), CONFIG, log_of(known))
        with pytest.raises(
            SaveError, match="the checkpoint of step 4 could not be written: .*(No space left|No such file)"
        ):
            writer.wait()
    assert steps_in(copied) == [1, 2, 3]
    assert {name: content for name, content in contents(copied).items() if name in before} == before
    # The next run clears the rest away and goes on.
    save_all(copied, accuracies(s4=1.0), accuracies(s1=0.9, s2=0.1, s3=0.2))
    assert names_in(copied) == {"1", "3", "4"}
    assert restore_newest(copied) == (4, [])


def test_leaving_the_context_tells_of_a_failed_save(tmp_path, monkeypatch):
    hold_the_disk(monkeypatch, full_disk)
    with pytest.raises(SaveError, match="No space left"):
        save_all(tmp_path, accuracies(s1=0.5))
    assert steps_in(tmp_path) == []


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore's threads
@pytest.mark.parametrize("size", [100, 5000])  # too small for any file, and for the arrays alone
def test_a_disk_that_takes_no_more_is_told_of_and_harms_no_other(copied, size):
    before = contents(copied)
    told: list[SaveError] = []
    vector = jnp.asarray(np.random.default_rng(0).standard_normal(10_000), jnp.float32)
    large = make_state(4).replace(params={"head": {"kernel": vector}})
    with Checkpoints(copied, log=log_of(accuracies(s1=0.9)), on_failure=told.append) as writer:
        with files_of_at_most(size):
            with contextlib.suppress(SaveError):  # where even the first file, in the foreground, finds no room
                writer.save(large, CONFIG, "")
            with contextlib.suppress(Exception):
                writer._writer.wait_until_finished()
        assert {name: content for name, content in contents(copied).items() if name in before} == before
        writer.save(make_state(5), CONFIG, "")  # there is room again
    assert [error.step for error in told] in ([4], [])
    assert 4 not in steps_in(copied)
    assert restore_newest(copied) == (5, [])


def test_after_a_save_that_failed_the_next_is_tried_and_a_second_failure_raised(tmp_path, monkeypatch):
    told: list[SaveError] = []

    def full_at_some(folder: Path) -> None:
        if int(folder.name.split(".")[0]) in (2, 4, 5):
            full_disk(folder)

    hold_the_disk(monkeypatch, full_at_some)
    writer = Checkpoints(tmp_path, on_failure=told.append)
    for step in (1, 2, 3, 4, 5):
        writer.save(make_state(step), CONFIG, "")
    with pytest.raises(SaveError, match="the checkpoint of step 5 could not be written: .*No space left"):
        writer.save(make_state(6), CONFIG, "")
    assert [error.step for error in told] == [2, 4]
    assert steps_in(tmp_path) == [1, 3]
    assert_equal(restore(tmp_path, 3)[0], make_state(3))


def test_what_interrupted_saves_and_deletions_left_is_ignored_and_cleared_away(copied):
    for name in ("4.orbax-checkpoint-tmp", "0.deleted"):
        (copied / name / "state").mkdir(parents=True)
        (copied / name / "state" / "manifest.ocdbt").write_bytes(b"half")
    assert steps_in(copied) == [1, 2, 3]
    assert restore_newest(copied) == (3, [])
    assert {"4.orbax-checkpoint-tmp", "0.deleted"} < names_in(copied)  # reading changes nothing
    save_all(copied, accuracies(s4=0.1), accuracies(s1=0.9, s2=0.1, s3=0.2))
    assert names_in(copied) == {"1", "3", "4"}
    assert_equal(restore(copied, 4)[0], make_state(4))


def test_a_relative_directory_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_all(Path("here"), accuracies(s1=0.5))
    assert names_in(tmp_path / "here") == {"1"}
    assert restore_newest(Path("here")) == (1, [])


def sealed_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/**/*") if path.is_file())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "how"),
    [
        (flip, "holds other bytes than were written"),
        (shorten, r"has \d+ bytes instead of \d+"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_to_any_file_is_named(copied, harm, how):
    files_there = sealed_files(copied / "3")
    assert len(files_there) >= 4
    assert {path.relative_to(copied / "3").parts[0] for path in files_there} == {"record", "state"}
    for path in files_there:
        whole = path.read_bytes()
        if not whole and harm is not Path.unlink:
            continue
        harm(path)
        name = path.relative_to(copied / "3").as_posix()
        with pytest.raises(DamagedError, match=f"^the checkpoint of step 3 is damaged: {name} {how}$"):
            restore(copied, 3)
        path.write_bytes(whole)
    assert_equal(restore(copied, 3)[0], make_state(3))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def lose_the_state(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def lose_the_seal(folder: Path) -> None:
    (folder / "seal.json").unlink()


def seal_without_record(folder: Path) -> None:
    shutil.rmtree(folder / "record")
    seals.seal(folder)


def seal_with_half_a_record(folder: Path) -> None:
    for path in (folder / "record").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    seals.seal(folder)


def seal_with_another_record(folder: Path) -> None:
    (folder / "record" / "metadata").write_text('{"configuration": {}}')
    seals.seal(folder)


def seal_without_state(folder: Path) -> None:
    shutil.rmtree(folder / "state")
    seals.seal(folder)


def seal_with_flipped_state(folder: Path) -> None:
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.stat().st_size:
            flip(path)
    seals.seal(folder)


HARMS: list[tuple[Callable[[Path], None], str]] = [
    (empty, "it is empty"),
    (lose_the_state, "state/.* is missing"),
    (lose_the_seal, "seal.json is missing"),
    (seal_without_record, ""),
    (seal_with_half_a_record, ""),
]


@pytest.mark.parametrize(("harm", "how"), HARMS)
def test_a_damaged_checkpoint_is_told_of_and_put_aside_and_the_one_before_is_read(copied, harm, how):
    others = {step: contents(copied / str(step)) for step in (1, 2)}
    harm(copied / "3")
    harmed = contents(copied / "3")
    with pytest.raises(DamagedError, match=f"^the checkpoint of step 3 is damaged: .*{how}") as caught:
        restore(copied, 3)
    assert "\n" not in str(caught.value)
    aside = copied.parent / "damaged" / "3"
    assert restore_newest(copied) == (2, [(3, f"{caught.value}; moved to {aside}")])
    assert contents(aside) == harmed
    assert names_in(copied) == {"1", "2"}
    assert {step: contents(copied / str(step)) for step in (1, 2)} == others
    assert restore_newest(copied) == (2, [])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (seal_with_another_record, "it must be a checkpoint of this version, not of another"),
        (seal_without_state, "it cannot be read now, and is left as it is"),
        (seal_with_flipped_state, "it cannot be read now, and is left as it is"),
    ],
)
def test_what_is_as_it_was_sealed_and_yet_cannot_be_read_is_no_damage(copied, harm, message):
    harm(copied / "3")
    before = contents(copied)
    for read in (lambda: restore(copied, 3), lambda: restore_newest(copied)):
        with pytest.raises(ConfigError, match=f"{copied / '3'}: {message}"):
            read()
    assert contents(copied) == before


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), OSError(116, "Stale file handle")])
def test_files_that_cannot_be_read_for_a_moment_are_no_damage(copied, monkeypatch, error):
    before = contents(copied)

    def fails(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(seals, "_measure", fails)
        with pytest.raises(ConfigError, match=f"3: it cannot be read now, and is left as it is .*{error.strerror}"):
            restore_newest(copied)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp.StandardCheckpointHandler, "restore", fails)
        with pytest.raises(ConfigError, match=f"3: it cannot be read now, and is left as it is .*{error.strerror}"):
            restore_newest(copied)
    assert contents(copied) == before
    assert restore_newest(copied) == (3, [])


def test_a_checkpoint_of_other_arrays_is_refused_and_left_alone(copied, monkeypatch):
    before = contents(copied)
    place = sharding.place(CONFIG.model, 16).replicated
    state = make_state(0)
    renamed = state.replace(params={"head": {"matrix": state.params["head"]["kernel"]}})
    abstract = train_step.abstract_state(renamed, place)
    for described in (abstract, None):
        if described is None:
            monkeypatch.setattr(bundles, "SMALL_BYTES", 20)
            described = train_step.abstract_state(state, place)
        with pytest.raises(
            ConfigError, match=r"3: written by another version: it holds \['params/head/kernel', .*this"
        ):
            checkpoints.restore_newest(copied, CONFIG, described, lambda *_: None)
    assert contents(copied) == before


def test_all_damaged_leave_none(copied):
    for step in (1, 2, 3):
        lose_the_seal(copied / str(step))
    found, told = restore_newest(copied)
    assert (found, [step for step, _ in told]) == (None, [3, 2, 1])
    assert names_in(copied.parent / "damaged") == {"1", "2", "3"}
    assert steps_in(copied) == []


def test_those_after_the_newest_good_one_are_not_touched_where_only_earlier_are_asked_for(copied):
    lose_the_seal(copied / "3")
    lose_the_seal(copied / "1")
    assert restore_newest(copied, before=3) == (2, [])
    assert restore_newest(copied, before=2) == (None, [(1, told_of_seal(copied, 1))])
    assert steps_in(copied) == [2, 3]


def told_of_seal(directory: Path, step: int) -> str:
    aside = directory.parent / "damaged" / str(step)
    return f"the checkpoint of step {step} is damaged: seal.json is missing; moved to {aside}"


def test_damaged_ones_of_the_same_step_do_not_replace_each_other(copied):
    (copied / "55").mkdir()
    checkpoints.set_aside(copied, 55)
    for number in range(3):
        (copied / "5").mkdir()
        (copied / "5" / f"of round {number}").write_text("")
        checkpoints.set_aside(copied, 5)
    aside = copied.parent / "damaged"
    assert {path.name: sorted(names_in(path)) for path in aside.iterdir()} == {
        "5": ["of round 0"],
        "5-1": ["of round 1"],
        "5-2": ["of round 2"],
        "55": [],
    }
    assert "nothing is left of it" in checkpoints.set_aside(copied, 5)


@pytest.mark.parametrize(
    ("part", "spoil"),
    [("float32", lambda vector: vector.at[-1].multiply(-1)), ("int32", lambda vector: vector.at[0].add(1))],
)
def test_values_that_changed_before_they_were_sealed_are_found(copied, monkeypatch, part, spoil):
    true = digests.of_tree
    with monkeypatch.context() as patch:
        patch.setattr(digests, "of_tree", lambda stored: true(stored | {part: spoil(stored[part])}))
        save_all(copied, accuracies(s4=0.1), accuracies(s1=0.9, s2=0.1, s3=0.2))
    seals.check(copied / "4")
    gist = f"the checkpoint of step 4 is damaged: 1 of 3 arrays differ from their digests, such as {part}"
    with pytest.raises(DamagedError, match=f"^{gist}$"):
        restore(copied, 4)
    assert restore_newest(copied)[0] == 3


def test_another_configuration_is_refused_and_nothing_is_put_aside(copied):
    place = sharding.place(CONFIG.model, 16).replicated
    other = dataclasses.replace(CONFIG, seed=5)
    told: list[Any] = []
    with pytest.raises(ConfigError, match="the checkpoint of step 3 is of another configuration: seed: 0 != 5$"):
        checkpoints.restore_newest(
            copied, other, train_step.abstract_state(make_state(0), place), lambda *what: told.append(what)
        )
    assert told == []
    assert steps_in(copied) == [1, 2, 3]


def test_a_described_state_has_the_shapes_and_the_place():
    placement = sharding.place(CONFIG.model, 16).replicated
    abstract = train_step.abstract_state(make_state(1), placement)
    assert jax.tree.structure(abstract) == jax.tree.structure(make_state(1))
    for found, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(make_state(1)), strict=True):
        assert isinstance(found, jax.ShapeDtypeStruct)
        assert (found.shape, found.dtype, found.sharding) == (leaf.shape, leaf.dtype, placement)
