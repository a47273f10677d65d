"""Which of several settings is best, by accuracy on validation: the choice that a sweep with cases is made for.

The rule: for each kind, the setting with the highest accuracy on validation, its mean over all places and seeds; of
equal ones the first. Test images have no part in it.
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
        trials, finished: of this setting; a kind is chosen for once all are finished.
        val_accuracy: mean over the finished ones; nan if there are none.
        chosen: whether it is the best of its kind.
    """

    kind: str
    setting: str
    trials: int
    finished: int
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
    found: dict[str, dict[str, list[float | None]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        accuracy = row.val_accuracy if row.status == "ok" else None
        found.setdefault(trial.labels[kind], {}).setdefault(trial.labels[setting], []).append(accuracy)
    return [score for name, settings in found.items() for score in _scored(name, settings)]


def _scored(kind: str, settings: dict[str, list[float | None]]) -> list[Score]:
    scores = []
    for setting, accuracies in settings.items():
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        mean = float(np.mean(known)) if known else math.nan
        scores.append(Score(kind, setting, len(accuracies), len(known), mean))
    if any(score.finished < score.trials for score in scores):
        return scores
    best = max(scores, key=lambda score: score.val_accuracy)
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
        finished = f"{score.finished} of {score.trials}"
        lines.append(f"| {score.kind} | {score.setting} | {finished} | {accuracy} | {mark} |")
    return "\n".join(lines) + "\n"
