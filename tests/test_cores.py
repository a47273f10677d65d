import os
import subprocess
import sys

import pytest

from bvit_jax import cores
from tests.conftest import ROOT


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


def test_threads_may_be_fewer_than_cores(monkeypatch):
    monkeypatch.setenv("NPROC", "16")
    limits: list[int] = []
    monkeypatch.setattr(cores.threadpoolctl, "threadpool_limits", limits.append)
    every = cores.available()
    cores.keep_to(every)
    assert (limits, os.environ["NPROC"]) == ([len(every)], "16")
    cores.keep_to(every, threads=1)
    assert (limits, os.environ["NPROC"]) == ([len(every), 1], "1")


def test_linear_algebra_gets_as_many_threads():
    code = (
        "import scipy.linalg, threadpoolctl; from bvit_jax import cores; cores.keep_to(cores.available()[:1]); "
        "print({pool['num_threads'] for pool in threadpoolctl.threadpool_info()})"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "{1}"
