"""Which of several settings is best, by accuracy on validation: the choice that a sweep with cases is made for.

The rule: for each kind, the setting with the highest accuracy on validation, its mean over all places and seeds; of
equal ones the first. A setting with a trial that failed is not chosen. Test images have no part in it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bvit_jax.model_config import require
from bvit_jax.sweep import ResultRow, Trial


@dataclasses.dataclass(frozen=True)
class Score:
    """One setting of one kind.

    Attributes:
        kind, setting: values of the labels.
        trials, finished, failed: of this setting; a kind is chosen for once all of its trials have ended.
        val_accuracy: mean over the finished ones; nan if there are none.
        chosen: whether it is the best of its kind.
    """

    kind: str
    setting: str
    trials: int
    finished: int
    failed: int
    val_accuracy: float
    chosen: bool = False


def check(kind: str, setting: str, trials: Sequence[Trial]) -> None:
    """Raises ConfigError unless all trials have both labels."""
    named = sorted(set.intersection(*(set(trial.labels) for trial in trials)))
    for field, label in (("kind", kind), ("setting", setting)):
        require(label in named, f"choose.{field}", label, " or ".join(named) or "absent, as there are no cases")


def choose(trials: Sequence[Trial], rows: Sequence[ResultRow], kind: str, setting: str) -> list[Score]:
    """Scores settings and chooses the best of each kind that is finished.

    Args:
        trials: of a sweep.
        rows: their results.
        kind, setting: labels; settings are compared within a kind, over all other labels and seeds.

    Returns:
        A score for each setting of each kind, in the order of the trials.
    """
    found: dict[str, dict[str, list[ResultRow]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        found.setdefault(trial.labels[kind], {}).setdefault(trial.labels[setting], []).append(row)
    return [score for name, settings in found.items() for score in _scored(name, settings)]


def _scored(kind: str, settings: dict[str, list[ResultRow]]) -> list[Score]:
    scores = []
    for setting, rows in settings.items():
        known = [row.val_accuracy for row in rows if row.val_accuracy is not None]
        failed = sum(row.status == "failed" for row in rows)
        mean = float(np.mean(known)) if known else math.nan
        scores.append(Score(kind, setting, len(rows), len(known), failed, mean))
    whole = [score for score in scores if score.finished == score.trials]
    if not whole or any(score.finished + score.failed < score.trials for score in scores):
        return scores
    best = max(whole, key=lambda score: score.val_accuracy)
    return [dataclasses.replace(score, chosen=score is best) for score in scores]


def to_markdown(scores: Sequence[Score]) -> str:
    """Formats the scores as a table."""
    lines = [
        "",
        "Best by accuracy on validation, mean over all places and seeds; test images have no part in the choice.",
        "",
        "| kind | setting | finished | validation accuracy | |",
        "|---|---|---|---|---|",
    ]
    for score in scores:
        accuracy = "-" if math.isnan(score.val_accuracy) else f"{100 * score.val_accuracy:.2f}"
        mark = "best" if score.chosen else ""
        finished = f"{score.finished} of {score.trials}" + (f", {score.failed} failed" if score.failed else "")
        lines.append(f"| {score.kind} | {score.setting} | {finished} | {accuracy} | {mark} |")
    return "\n".join(lines) + "\n"
