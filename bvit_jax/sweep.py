"""A grid of training runs: one directory a trial, named by the digest of its configuration, and one table of them all.

A sweep's directory:

    sweep.json         the base configuration, the same for all   results.csv   one row a trial of the grid (.json too)
    trials/DIGEST/     one run each (`bvit_jax.train`)            summary.md    means over seeds
    errors/DIGEST.txt  why a trial failed (`bvit_jax.failures`)

Every trial runs in a process of its own: what it does to its memory or its devices stays its own affair.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bvit_jax import compressed, expert_use, intervals, memory, metrics, trained
from bvit_jax.compress_request import Request
from bvit_jax.config import Config

Status = Literal["ok", "failed", "unfinished"]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        config: what to run.
        directory: where.
        settings: the labels of its case, and `field=value` of the grid's fields other than family, form, experts and
            seeds.
        labels: those of its case.
        chosen: the grid's values by dotted name.
        also: others of them that mean the same run.
        compressions: of the trained model, that belong to the trial.
    """

    config: Config
    directory: Path
    settings: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    also: tuple[Mapping[str, Any], ...] = ()
    compressions: tuple[Request, ...] = ()

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of `result.json`; None if it is not there yet, or cannot be read."""
        return trained.result_of(self.directory)

    def compressed(self, request: Request) -> compressed.Result | None:
        """The result of one of its compressions; None if it is not there yet."""
        return compressed.read_result(self.directory, request)

    @property
    def is_done(self) -> bool:
        """Whether it is trained, and compressed in all the ways that are wanted."""
        return self.result is not None and all(self.compressed(request) is not None for request in self.compressions)

    def status(self, cause: str | None) -> Status:
        """Says how far the trial is; `cause` is why it failed, None if it did not. What is done outweighs a failure."""
        if self.is_done:
            return "ok"
        return "unfinished" if cause is None else "failed"

    @property
    def label(self) -> str:
        """A short name for people: family, form, experts, settings, seed, and the seed of the images if another's."""
        model = self.config.model
        form = f" {model.form}" if model.family == "butterfly" else ""
        experts = "" if model.family == "dense" else f" {model.num_experts} experts"
        settings = f" {self.settings}" if self.settings else ""
        of_images = self.config.data.seed
        images = f" data.seed={of_images}" if "data.seed" in self.chosen and of_images != self.config.seed else ""
        return f"{model.family}{form}{experts}{settings} seed {self.config.seed}{images}"

    @property
    def group(self) -> str:
        """Digest of the configuration but for its seeds: equal for runs of one kind."""
        return self.config.without_seeds().digest()

    @property
    def kind(self) -> tuple[str, ...]:
        """Its case and group: equal for the trials that a mean is taken over."""
        return (*self.labels.values(), self.group)

    @property
    def steps_done(self) -> int:
        """Steps of the newest row of metrics."""
        rows = self.rows("metrics.jsonl")
        return int(rows[-1].get("step", 0)) if rows else 0

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Reads JSON lines of the trial's directory; what cannot be read has none."""
        try:
            return metrics.read_rows(self.directory / name)
        except OSError:
            return []


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One line of `results.csv`; None where a trial has not got that far.

    Attributes:
        form: of the butterfly experts, `-` for the other families.
        params: trained parameters.
        bytes_paper, bytes_full: in the two accountings of `bvit_jax.memory`: the expert matrices by the paper's
            formula, and every tensor of the model.
        compression_paper, compression_full: bytes of the standard mixture of the same shape and experts, over these.
        images_per_second: training throughput, with the trials that ran at the same time beside it.
        status: `ok`, `failed` or `unfinished`.
        bytes_full_ffn, compression_full_ffn: the `full` accounting of the mixture layers alone.
        output_cosine, experts_used, lost_shuffled, lost_one: as in `expert_use.Means`.
        data_seed: of the images.
        settings: as in `Trial`.
        trial: digest of the configuration, the name of the trial's directory.
        error: last line of a failed trial's cause.
    """

    family: str
    num_experts: int
    seed: int
    form: str
    test_accuracy: float | None
    val_accuracy: float | None
    params: int
    bytes_paper: float
    bytes_full: int
    compression_paper: float
    compression_full: float
    images_per_second: float | None
    steps: int
    wall_seconds: float | None
    status: str
    test_nll: float | None
    bytes_full_ffn: int
    compression_full_ffn: float
    output_cosine: float | None
    experts_used: float | None
    lost_shuffled: float | None
    lost_one: float | None
    data_seed: int
    settings: str
    trial: str
    error: str


def result_row(trial: Trial, cause: str | None = None) -> ResultRow:
    """Collects what is known of a trial; sizes come from the ledger whether or not it has run.

    Args:
        trial: of the sweep.
        cause: why it failed; None if it did not.
    """
    config = trial.config
    own, standard = memory.ledger(config), memory.standard_ledger(config)
    result = trial.result or {}
    timing = result.get("timing", {})
    status = trial.status(cause)
    return ResultRow(
        family=config.model.family,
        num_experts=config.model.num_experts,
        seed=config.seed,
        form=config.model.form if config.model.family == "butterfly" else "-",
        test_accuracy=result.get("test_accuracy"),
        val_accuracy=result.get("validation_accuracy"),
        params=own.params,
        bytes_paper=own.bytes_paper,
        bytes_full=own.bytes_full,
        compression_paper=standard.bytes_paper / own.bytes_paper,
        compression_full=standard.bytes_full / own.bytes_full,
        images_per_second=timing.get("images_per_second"),
        steps=config.total_steps,
        wall_seconds=timing.get("wall_seconds"),
        status=status,
        test_nll=result.get("test_nll"),
        bytes_full_ffn=own.bytes_full_ffn,
        compression_full_ffn=standard.bytes_full_ffn / own.bytes_full_ffn,
        **dataclasses.asdict(expert_use.means(result.get("experts"))),
        data_seed=config.data.seed,
        settings=trial.settings,
        trial=config.digest(),
        error=_last_line(cause or "") if status == "failed" else "",
    )


def series(family: str, form: str, settings: str) -> str:
    """Names in words what a curve over the number of experts is of, by the columns of its rows."""
    return " ".join(part for part in (family, form.strip("-"), settings) if part)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the finished trials of one group say together; means and sample standard deviations over seeds.

    Attributes:
        sample: the row of one of its trials; sizes are the same for all.
        trial: that trial; labels and the grid's values are the same for all, but for the seed.
        seeds: finished trials.
        accuracies: their test accuracies.
        accuracy_mean, accuracy_std: of the test accuracy; the deviation is nan for a single seed.
        accuracy_interval: half the width of the mean's 95 % confidence interval (`bvit_jax.intervals`); nan likewise.
        val_accuracy_mean, nll_mean, images_per_second: means, the last a median.
        experts: means of `expert_use.Means`, nan where not known.
    """

    sample: ResultRow
    trial: Trial
    seeds: int
    accuracies: tuple[float, ...]
    accuracy_mean: float
    accuracy_std: float
    accuracy_interval: float
    val_accuracy_mean: float
    nll_mean: float
    images_per_second: float
    experts: dict[str, float]


def summarise(trials: Sequence[Trial], rows: Sequence[ResultRow]) -> list[Summary]:
    """Groups the trained trials by everything but the seed, in the order of the grid."""
    groups: dict[tuple[str, ...], list[tuple[Trial, ResultRow]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        if row.test_accuracy is not None:
            groups.setdefault(trial.kind, []).append((trial, row))
    return [_summary(group[0][0], [row for _, row in group]) for group in groups.values()]


def _summary(trial: Trial, group: list[ResultRow]) -> Summary:
    def values(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in group], np.float64)  # None becomes nan

    accuracy = values("test_accuracy")
    return Summary(
        sample=group[0],
        trial=trial,
        seeds=len(group),
        accuracies=tuple(accuracy.tolist()),
        accuracy_mean=float(accuracy.mean()),
        accuracy_std=float(accuracy.std(ddof=1)) if len(group) > 1 else float("nan"),
        accuracy_interval=intervals.half_interval(accuracy),
        val_accuracy_mean=float(values("val_accuracy").mean()),
        nll_mean=float(values("test_nll").mean()),
        images_per_second=float(np.median(values("images_per_second"))),
        experts={field.name: float(values(field.name).mean()) for field in dataclasses.fields(expert_use.Means)},
    )


def to_markdown(summaries: Sequence[Summary], rows: Sequence[ResultRow]) -> str:
    """Formats the summary table, and lists the trials that failed or are unfinished."""
    lines = [
        "Test accuracy in per cent, mean ± standard deviation over seeds, of the best checkpoint on validation; 95 %: "
        "half the confidence interval of the mean; validation: mean accuracy there, of the same checkpoints. "
        "MB: 10^6 bytes. `paper` counts the expert matrices by the paper's formula, `full` every tensor as "
        "stored for inference. x: bytes of the standard mixture of equal shape and experts, over these. images/s: "
        "training, with the sweep's other trials running beside it. Output cosine: of what two experts of a layer give "
        "for the same token, 1 if all are alike. Experts used: their effective number by the load. Lost: points of "
        "accuracy, when the experts of each layer change places (shuffled), or are all replaced by one.",
        "",
        "| family | form | experts | settings | seeds | test accuracy | 95 % | validation | test NLL "
        "| output cosine | experts used | lost shuffled | lost one | params | MB paper | MB full "
        "| x paper | x full | x full, FFN | images/s |",
        "|" + "---|" * 20,
    ]
    for summary in summaries:
        row = summary.sample
        several = not np.isnan(summary.accuracy_std)
        spread = f" ± {100 * summary.accuracy_std:.2f}" if several else ""
        interval = f"± {100 * summary.accuracy_interval:.2f}" if several else "-"
        lines.append(
            f"| {row.family} | {row.form} | {row.num_experts} | {row.settings or '-'} | {summary.seeds} "
            f"| {100 * summary.accuracy_mean:.2f}{spread} | {interval} | {100 * summary.val_accuracy_mean:.2f} "
            f"| {summary.nll_mean:.3f} | {_of_experts(summary.experts)} | {row.params:,} "
            f"| {row.bytes_paper / 1e6:.4f} | {row.bytes_full / 1e6:.4f} | {row.compression_paper:.1f} "
            f"| {row.compression_full:.2f} | {row.compression_full_ffn:.2f} | {summary.images_per_second:.0f} |"
        )
    for row in rows:
        if row.status != "ok":
            lines.append(
                f"\n{row.status}: {row.trial} ({row.family}, {row.num_experts} experts, seed {row.seed}) {row.error}"
            )
    return "\n".join(lines) + "\n"


def _of_experts(found: Mapping[str, float]) -> str:
    """Formats what is known of experts as cells, what is lost in points of accuracy."""
    figures = (
        f"{found['output_cosine']:.3f}",
        f"{found['experts_used']:.2f}",
        f"{100 * found['lost_shuffled']:.2f}",
        f"{100 * found['lost_one']:.2f}",
    )
    return " | ".join("-" if figure == "nan" else figure for figure in figures)
