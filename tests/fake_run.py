"""Stands in for a training process, without JAX: a run of 40 steps in a fraction of a second, for the test of faults.

    python fake_run.py WORKDIR [HOLD] [MISTAKE]

It leaves what a run leaves, and goes on exactly where it was. HOLD: where it waits to be killed; `start`,
`end`, `save` (then its only one) or `exit`. MISTAKE: what it does wrong, a name that is looked for below.
"""

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bvit_jax import files, seals

STEPS = 40
EVAL_EVERY = 4
BEST_STEP = 12
STEP_SECONDS = 0.004
HOLD_AT = 38
"""The step after which it holds for `end`."""


class FakeRun:
    def __init__(self, workdir: Path, hold: str, mistake: str) -> None:
        self.workdir = workdir
        self.hold = hold
        self.mistake = mistake
        self.directory = workdir / "checkpoints"
        self.directory.mkdir(exist_ok=True)
        self.log = ""
        self.told = False

    def to_the_end(self) -> int:
        if (self.workdir / "result.json").exists():
            return 0
        if self.mistake != "deaf":
            signal.signal(signal.SIGTERM, self.tell)
        for path in self.directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(path)
        self.wait_to_be_killed("start")
        step, state = self.start()
        (self.workdir / "metrics.jsonl").write_text(self.log)
        with (self.workdir / "metrics.jsonl").open("a") as file:
            while step < STEPS:
                step, state = step + 1, advanced(state, step + 1)
                rows = [{"step": step, "split": "train", "loss": state}]
                if step % EVAL_EVERY == 0:
                    rows.append({"step": step, "split": "validation", "accuracy": float(step == BEST_STEP), "nll": 1.0})
                text = "".join(json.dumps(row) + "\n" for row in rows)
                self.log += text
                file.write(text)
                file.flush()
                if step == STEPS or (step % EVAL_EVERY == 0 and self.hold != "save"):
                    self.save(step, state)
                time.sleep(STEP_SECONDS)
                if step == HOLD_AT:
                    self.wait_to_be_killed("end")
                if self.told and step < STEPS:
                    return self.stop(step, state)
        self.report(state)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.wait_to_be_killed("exit")
        return 0

    def tell(self, *_: object) -> None:
        self.told = True

    def wait_to_be_killed(self, where: str) -> None:
        while self.hold == where and not self.told:
            time.sleep(0.001)

    def stop(self, step: int, state: int) -> int:
        self.save(step, state)
        self.incident("preempted", step, f"told to stop; step {step} is saved")
        return 1 if self.mistake == "wrong status" else 75

    def start(self) -> tuple[int, int]:
        """Returns what to go on from: the newest good checkpoint, or nothing."""
        steps = sorted((int(path.name) for path in self.directory.iterdir()), reverse=True)
        if steps and self.mistake == "crashes":
            raise RuntimeError("no way to go on")
        if steps and self.mistake == "hangs":
            time.sleep(60)
        if self.mistake == "starts over":
            return 0, 0
        if self.mistake == "goes on from an older one":
            steps = steps[1:]
        if self.mistake == "moves a good one" and steps:
            self.move(steps.pop())
        for step in steps:
            if self.is_good(step):
                return self.resume(step)
        return 0, 0

    def resume(self, step: int) -> tuple[int, int]:
        record = json.loads((self.directory / str(step) / "record" / "metadata").read_text())
        self.incident("resumed", step, f"going on from step {step}")
        path = self.workdir / "metrics.jsonl"
        if self.mistake != "keeps quiet" and not path.read_text().startswith(record["metrics"]):
            self.incident("damaged", step, f"metrics.jsonl is damaged: taken from the checkpoint of step {step}")
        self.log = record["metrics"]
        return step, int(record["digests"]["x"]) + (self.mistake == "is not exact")

    def is_good(self, step: int) -> bool:
        """Says whether a checkpoint is good; one that is not is told of and moved away."""
        try:
            seals.check(self.directory / str(step))
        except seals.BrokenSealError as error:
            if self.mistake != "keeps quiet":
                self.incident("damaged", step, f"the checkpoint of step {step} is damaged: {error}")
            self.move(step)
            return False
        return True

    def move(self, step: int) -> None:
        (self.workdir / "damaged").mkdir(exist_ok=True)
        (self.directory / str(step)).rename(self.workdir / "damaged" / str(step))

    def save(self, step: int, state: int) -> None:
        if (self.directory / str(step)).exists():
            return
        folder = self.directory / f"{step}.orbax-checkpoint-tmp"
        (folder / "record").mkdir(parents=True)
        (folder / "state").mkdir()
        record = {"config": {}, "metrics": self.log, "layout": [], "digests": {"x": str(state)}}
        (folder / "record" / "metadata").write_text(json.dumps(record))
        for name in "xy":
            (folder / "state" / name).write_text(f"{state:0100d}")
        if step == STEPS:
            self.wait_to_be_killed("save")
        seals.seal(folder)
        folder.rename(self.directory / str(step))

    def report(self, state: int) -> None:
        if not (self.directory / str(BEST_STEP)).exists() or not self.is_good(BEST_STEP):
            remade, before = 0, self.log
            for step in range(1, BEST_STEP + 1):
                remade = advanced(remade, step)
            lines = self.log.splitlines(keepends=True)
            self.log = "".join(line for line in lines if json.loads(line)["step"] <= BEST_STEP)
            self.save(BEST_STEP, remade)
            self.log = before
        if self.mistake == "leaves the last one damaged":
            (self.directory / str(STEPS) / "state" / "x").write_text("")
        result: dict[str, Any] = {"steps": STEPS, "best_step": BEST_STEP, "test_accuracy": state % 10}
        if self.mistake != "leaves no result":
            files.write_json(self.workdir / "result.json", result | {"timing": {"wall_seconds": time.time()}})

    def incident(self, kind: str, step: int, text: str) -> None:
        with (self.workdir / "incidents.jsonl").open("a") as file:
            file.write(json.dumps({"utc": "", "kind": kind, "step": step, "text": text}) + "\n")


def advanced(state: int, step: int) -> int:
    return (31 * state + step) % 2**32


if __name__ == "__main__":
    hold, mistake = [*sys.argv[2:], "", ""][:2]
    sys.exit(FakeRun(Path(sys.argv[1]), hold, mistake).to_the_end())
