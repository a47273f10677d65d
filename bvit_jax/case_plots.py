"""Pictures of a sweep's cases, a panel for each place where they are compared. kB are decimal, 1,000 bytes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_jax import comparison, plots
from bvit_jax.model_config import Family
from bvit_jax.sweep import Summary

_STYLES: dict[str, dict[str, Any]] = {
    family: {"color": plots.COLOURS[index], "marker": plots.MARKERS[index], "linestyle": ""}
    for index, family in enumerate(get_args(Family))
}
Panels = Mapping[str, Sequence[Summary]]


def draw(summaries: Sequence[Summary], label: str, baselines: Sequence[str], directory: Path) -> list[Path]:
    """Draws accuracy by case, and accuracy against bytes; returns the paths, none if nothing has finished.

    Args:
        summaries: of a sweep with cases.
        label: which tells the cases of a panel apart.
        baselines: cases whose means are drawn as lines.
        directory: where to; made if absent.
    """
    if not summaries:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    panels: dict[str, list[Summary]] = {}
    for summary in summaries:
        for place in comparison.places(summary.trial, label):
            panels.setdefault(place, []).append(summary)
    most = max(map(len, panels.values()))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    return [
        plots.draw_to(
            directory / "cases.png",
            partial(_by_case, panels=panels, label=label, baselines=baselines, shape=(down, across)),
            size=(1.6 + 2.8 * across, 1.2 + (0.6 + 0.22 * most) * down),
            legend=False,
        ),
        plots.draw_to(
            directory / "cases_vs_bytes.png",
            partial(_against_bytes, panels=panels, label=label, shape=(down, across)),
            size=(0.8 + 3.2 * across, 1.0 + 3.2 * down),
            legend=False,
        ),
    ]


def _by_case(figure: Figure, panels: Panels, label: str, baselines: Sequence[str], shape: tuple[int, int]) -> None:
    cases = list(dict.fromkeys(s.trial.labels[label] for line in panels.values() for s in line))
    for index, (place, line) in enumerate(panels.items()):
        axes = figure.add_subplot(*shape, index + 1)
        for summary in line:
            row, style = cases.index(summary.trial.labels[label]), _STYLES[summary.sample.family]
            axes.plot(100 * np.array(summary.accuracies), [row] * summary.seeds, **style | {"marker": "."}, alpha=0.35)
            axes.errorbar([100 * summary.accuracy_mean], [row], xerr=_spread(summary), capsize=3, markersize=5, **style)
            if summary.trial.labels[label] in baselines:
                axes.axvline(100 * summary.accuracy_mean, color=style["color"], linestyle="--", linewidth=0.8)
        axes.set_yticks(range(len(cases)), cases if index % shape[1] == 0 else [""] * len(cases), fontsize=8)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_xlabel("test accuracy (%)")
        axes.set_title(place, fontsize=9)
    figure.suptitle("Mean and 95 % confidence interval over seeds; dots: seeds; dashed: baselines", fontsize=9)


def _against_bytes(figure: Figure, panels: Panels, label: str, shape: tuple[int, int]) -> None:
    for index, (place, line) in enumerate(panels.items()):
        axes = figure.add_subplot(*shape, index + 1)
        for summary in line:
            _point(axes, summary, summary.trial.labels[label])
        axes.set_xscale("log")
        axes.margins(x=0.25)  # room for the names
        plots.spell_out(axes.xaxis)
        axes.set_xlabel("FFN or mixture layers, all bytes (kB)")
        if index % shape[1] == 0:
            axes.set_ylabel("test accuracy (%)")
        axes.set_title(place, fontsize=9)
    figure.suptitle("Accuracy against bytes, mean and 95 % confidence interval over seeds", fontsize=9)


def _point(axes: Axes, summary: Summary, name: str) -> None:
    x, y = summary.sample.bytes_full_ffn / 1e3, 100 * summary.accuracy_mean
    axes.errorbar([x], [y], yerr=_spread(summary), capsize=3, markersize=5, **_STYLES[summary.sample.family])
    axes.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=6)


def _spread(summary: Summary) -> list[float] | None:
    """Half an interval in points; a single seed has none."""
    return [100 * summary.accuracy_interval] if summary.seeds > 1 else None
