import pytest

from bvit_jax import timing


@pytest.fixture
def at(monkeypatch):
    """Sets the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_windows_by_hand(at):
    clock = timing.Clock(batch_size=16)
    clock.skip(3)  # the run goes on from step 3
    at(110.0)
    assert clock.lap(5) == {"wall_seconds": 10.0}  # it holds the compilation
    assert clock.rate != clock.rate
    at(112.0)
    assert clock.lap(9) == {"wall_seconds": 2.0, "images_per_second": 4 * 16 / 2}
    at(112.5)
    assert clock.lap(10) == {"wall_seconds": 0.5, "images_per_second": 32.0}
    assert clock.rate == 32.0


def test_what_is_skipped_counts_as_wall_time_alone(at):
    clock = timing.Clock(batch_size=2)
    clock.lap(1)
    at(103.0)
    clock.skip(4)  # an evaluation after step 4 ended here
    at(104.0)
    assert clock.lap(6) == {"wall_seconds": 4.0, "images_per_second": 2 * 2 / 1}
    at(107.0)
    clock.skip(7)
    assert clock.lap(7) == {"wall_seconds": 3.0}  # no step was timed since
    assert clock.rate == 4.0


def test_timing_is_summed_over_all_rows_and_the_rate_is_a_median():
    rows = [{"wall_seconds": 10.0}, *({"wall_seconds": 1.0, "images_per_second": rate} for rate in (5.0, 90.0, 6.0))]
    assert timing.total(rows) == {"images_per_second": 6.0, "wall_seconds": 13.0}
    assert timing.total(rows[:1]) == {"images_per_second": None, "wall_seconds": 10.0}
    assert timing.total([]) == {"images_per_second": None, "wall_seconds": 0}


def test_rows_that_hold_no_times_are_left_out():
    good = {"step": 2, "wall_seconds": 1.5}
    bad = [{"stdp": 1}, {"step": "3", "wall_seconds": 1.0}, {"step": 3}, {"step": 3, "wall_seconds": None}]
    assert timing.valid([*bad, good]) == [good]
