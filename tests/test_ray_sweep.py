"""Whole sweeps on a real Ray cluster of two nodes, which are the hosts of a slice of TPUs as far as Ray knows."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bvit_jax import metrics, sweep, train
from tests.conftest import ROOT
from tests.ray_cluster import SLICE, Cluster, ancestors, kill, started, variables_of_all
from tests.test_sweep_process import ENDLESS, TIMING, command, rows, trials_of, wait_until

STEPS, EVERY = 1200, 100
"""Of a trial, enough for it to be found in the middle, and from one checkpoint to the next."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Cluster, list[subprocess.Popen[bytes]]]]:
    with started(nodes=2) as found:
        yield found


def on_ray(cluster: Cluster, workdir: Path, seeds: tuple[int, ...], *flags: str, steps: int = STEPS) -> list[str]:
    return command(workdir, steps, seeds, "--executor=ray", f"--ray_address={cluster.address}", *flags, every=EVERY)


def run(program: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(program, cwd=ROOT, env=variables_of_all(), capture_output=True, text=True, timeout=500)


def start(program: list[str]) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, cwd=ROOT, env=variables_of_all(), **pipes)


def but_for_times(workdir: Path) -> list[dict[str, str]]:
    found = rows(workdir)
    for row in found:
        assert all(row.pop(name) for name in TIMING)
    return found


def kinds(trial: sweep.Trial) -> list[str]:
    """Of its incidents, in order."""
    return [row["kind"] for row in metrics.read_rows(trial.directory / "incidents.jsonl")]


def runs_on(trial: sweep.Trial, node: subprocess.Popen[bytes]) -> bool:
    """Whether the process that holds a trial's directory is one of a node's."""
    try:
        holder = json.loads((trial.directory / ".lock").read_text())["process"]
        return node.pid in ancestors(holder)
    except (OSError, ValueError):
        return False


def test_hosts_of_a_slice_train_a_trial_together_to_the_losses_of_one_process(cluster, tmp_path):
    [trial] = trials_of(tmp_path / "slice", 6, (0,), EVERY)
    found = run(on_ray(cluster[0], tmp_path / "slice", (0,), f"--topology={SLICE}", steps=6))
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"on Ray, each with {SLICE};" in found.stdout
    assert [(trial.directory / name).exists() for name in ("output.txt", "output_1.txt")] == [True, True]
    assert not (tmp_path / "slice" / "ray").exists()
    train.run(trial.config, tmp_path / "alone", show_progress=False)
    wanted = metrics.read_rows(tmp_path / "alone" / "metrics.jsonl")
    together = trial.rows("metrics.jsonl")
    assert [row["step"] for row in together] == [row["step"] for row in wanted]
    for name in ("loss", "nll"):
        losses = [[row[name] for row in every if name in row] for every in (together, wanted)]
        assert losses[1]
        np.testing.assert_allclose(*losses, rtol=1e-5)


def test_what_the_cluster_does_not_have_is_refused_at_once(cluster, tmp_path):
    """Beside each other, for most of the time goes into imports."""
    refused = {
        '--resources_per_trial={"CPU": 64}': (
            "resources_per_trial = '64 CPU': it must be what a node has; the nodes have ",
            "1 CPU, 4 TPU, 1 TPU-v4-16-head, 1 drawn",
        ),
        "--topology=v6e:4x4": (
            "topology = 'v6e:4x4': it must be that of a slice of the cluster, which has v4-16 of shape 2x2x2",
            "",
        ),
    }
    runs = [start(on_ray(cluster[0], tmp_path, (0,), flag)) for flag in refused]
    for process, (start_of, part) in zip(runs, refused.values(), strict=True):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2
        assert errors.splitlines()[-1].startswith(f"error: {start_of}"), errors
        assert part in errors
    assert not any(tmp_path.iterdir())


@pytest.mark.long
def test_a_sweep_that_is_told_to_stop_saves_its_trials(cluster, tmp_path):
    trials = trials_of(tmp_path, ENDLESS, (0, 1, 2), EVERY)
    told = start(on_ray(cluster[0], tmp_path, (0, 1, 2), steps=ENDLESS))
    wait_until(lambda: sum(trial.steps_done > 2 for trial in trials) == 2)
    told.send_signal(signal.SIGTERM)
    output, errors = told.communicate(timeout=300)
    assert told.returncode == 75, errors
    assert "Traceback" not in output + errors
    assert sorted(map(kinds, trials)) == [[], ["preempted"], ["preempted"]]
    assert output.count(" unfinished ") == 2


def test_killed_and_robbed_of_a_node_a_sweep_ends_with_every_trial_done_once(cluster, tmp_path):
    ray, (_, second_node) = cluster
    workdir, seeds = tmp_path / "ray", (0, 1, 2)
    trials = trials_of(workdir, STEPS, seeds, EVERY)
    program = on_ray(ray, workdir, seeds)

    killed = start(program)
    wait_until(lambda: all(trial.steps_done > 2 * EVERY for trial in trials[:2]))
    killed.kill()
    killed.communicate()

    robbed = start(program)
    on_second: list[sweep.Trial] = []

    def one_has_got_on() -> bool:
        again = [trial for trial in trials if kinds(trial) == ["resumed"]]
        on_second[:] = [trial for trial in again if runs_on(trial, second_node)]
        return any(4 < trial.steps_done % EVERY < EVERY / 2 for trial in on_second)

    wait_until(one_has_got_on)
    kill(second_node)
    [lost] = on_second
    output, errors = robbed.communicate(timeout=500)
    assert robbed.returncode == 0, output + errors
    assert "Traceback" not in output + errors
    assert output.count(" lost ") == 1, output
    assert f"{lost.label:<40} lost       at step " in output
    assert [output.count(f"{trial.label:<40} ok ") for trial in trials] == [1, 1, 1]
    assert kinds(lost) == ["resumed", "resumed"]
    assert not (workdir / "errors").exists()

    local = run(command(tmp_path / "local", STEPS, seeds, "--jobs=2", every=EVERY))
    assert local.returncode == 0, local.stderr
    assert but_for_times(workdir) == but_for_times(tmp_path / "local")
    for trial, alone in zip(trials, trials_of(tmp_path / "local", STEPS, seeds, EVERY), strict=True):
        assert trial.rows("metrics.jsonl") == alone.rows("metrics.jsonl")
