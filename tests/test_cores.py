import os

import pytest

from bvit_jax import cores


def test_cores_are_listed_and_can_be_left_to_others():
    every = cores.available()
    assert every == sorted(set(every))
    assert len(every) == len(os.sched_getaffinity(0))
    try:
        cores.keep_to(every[-1:])
        assert cores.available() == every[-1:]
    finally:
        cores.keep_to(every)
    assert cores.available() == every


def test_where_the_system_does_not_tell_all_are_there(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores.available() == [0, 1, 2]
    cores.keep_to([0])
    assert cores.available() == [0, 1, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: None)
        assert cores.available() == [0]
