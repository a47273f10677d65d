"""Tables and a picture of rivals: accuracy against the bytes of the file. kB are decimal, 1,000 bytes."""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bvit_jax import markdown, plots
from bvit_jax.compress_request import ROUNDS
from bvit_jax.rivals import AS_TRAINED, Rival, Step

_RIVALS = """
Test accuracy in per cent, mean ± half the 95 % confidence interval over {seeds} seeds, in brackets if over fewer; what
compressing took from it, in points, paired by seed; the bytes of the file, header and all, in kB of 1,000. **Bold**: no
other of the place has as few bytes and as high a mean.
"""
_STEPS = """
What each step of the mixed-rank method gains in test accuracy over the one before it, in points, at equal numbers,
paired by seed: mean ± half the 95 % confidence interval, in brackets the seeds where they are fewer.
"""
_MARKERS: dict[str, tuple[str, str]] = {
    "-": ("*", "full"),
    "rounding": ("s", "none"),
    "quantise": ("s", "full"),
    "prune": ("X", "full"),
    "svd": ("v", "none"),
    "activation_aware": ("^", "none"),
    "mixed": ("d", "none"),
    "mixed_rank": ("D", "full"),
    "merge": ("p", "full"),
}
"""Shape of a method's markers, and how they are filled."""
_HALVES = {8: "right", 4: "bottom", 2: "top"}
"""What is full of markers of factors and merged experts that are rounded besides, by their bits."""
_LEAST_ERROR = 0.1
"""In per cent; a logarithmic axis has no 0."""


def to_markdown(rivals: Sequence[Rival], steps: Sequence[Step]) -> str:
    """Formats rivals, a line each with its columns at every place, and the steps of the mixed-rank method."""
    if not rivals:
        return ""
    places = list(dict.fromkeys(rival.where for rival in rivals))
    seeds = max(rival.seeds for rival in rivals)
    header = ["rival", *(f"{place} {column}".strip() for place in places for column in ("%", "lost", "kB"))]
    by_name: dict[str, dict[str, Rival]] = {}
    for rival in rivals:
        by_name.setdefault(f"{rival.case}, {rival.compression}", {})[rival.where] = rival
    lines = [[name, *(cell for at in places for cell in _cells(of.get(at), seeds))] for name, of in by_name.items()]
    text = [_RIVALS.format(seeds=seeds), *markdown.table(header, lines)]
    if steps:
        columns = ["place", "case", "keep", "bits", "step", "over", "points"]
        text += [_STEPS, *markdown.table(columns, [_step(step, seeds) for step in steps])]
    return "\n".join(text) + "\n"


def _cells(rival: Rival | None, seeds: int) -> list[str]:
    if rival is None:
        return ["-", "-", "-"]
    accuracy = _points(rival.accuracy_mean, rival.accuracy_interval)
    accuracy += f" ({rival.seeds})" if rival.seeds < seeds else ""
    lost = "" if rival.compression == AS_TRAINED else _points(rival.lost_mean, rival.lost_interval)
    return [f"**{accuracy}**" if rival.best else accuracy, lost or "-", f"{rival.bytes_full / 1e3:.1f}"]


def _points(mean: float, half: float | None) -> str:
    interval = "" if half is None or math.isnan(half) else f" ± {100 * half:.2f}"
    return f"{round(100 * mean, 2) + 0.0:.2f}{interval}"  # never -0.00


def _step(step: Step, seeds: int) -> list[str]:
    gained = ("+" if step.gained >= 0 else "") + _points(step.gained, step.interval)
    gained += f" ({step.seeds})" if step.seeds < seeds else ""
    return [step.where, step.case, f"{step.keep:g}", str(step.bits), step.method, step.before, gained]


def draw(rivals: Sequence[Rival], directory: Path) -> list[Path]:
    """Draws accuracy against the bytes of the file, a panel a place; returns the path, none if nothing has finished.

    Colours are cases, markers methods; a line joins the budgets of one method. Those that are beaten by none are
    joined by a broad line, numbered and named. The scale of the accuracy is logarithmic in the error; an error under
    0.1 % stands at 0.1 %.
    """
    if not rivals:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    places = len({rival.where for rival in rivals})
    across = min(places, 2)
    down = -(-places // across)
    size = (max(0.4 + 5.0 * across, 8.0), 1.4 + 5.4 * down)  # in one row the legends need 8
    return [plots.draw_to(directory / "rivals.png", partial(_draw, rivals=rivals, shape=(down, across)), size, False)]


def _draw(figure: Figure, rivals: Sequence[Rival], shape: tuple[int, int]) -> None:
    colours = dict(zip(dict.fromkeys(rival.case for rival in rivals), itertools.cycle(plots.COLOURS), strict=False))
    for index, place in enumerate(dict.fromkeys(rival.where for rival in rivals)):
        axes = figure.add_subplot(*shape, index + 1)
        here = sorted((rival for rival in rivals if rival.where == place), key=lambda rival: rival.bytes_full)
        _front(axes, [rival for rival in here if rival.best])
        lines: dict[tuple[str, str], list[Rival]] = {}
        for rival in here:
            lines.setdefault((rival.case, _series(rival)), []).append(rival)
        for (case, _), line in lines.items():
            _line(axes, line, colours[case])
        _scale(axes, [_error(rival) for rival in here])
        axes.set_xlabel("file, all bytes (kB)")
        if index % shape[1] == 0:
            axes.set_ylabel("test accuracy (%)")
        axes.set_title(place, fontsize=9)
    figure.suptitle("Accuracy against bytes, mean and 95 % confidence interval over seeds", fontsize=9)
    _legends(figure, rivals, colours)


def _scale(axes: Axes, errors: Sequence[float]) -> None:
    """Makes both axes logarithmic, the accuracies' in what is missing to 100 %."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1.25 * max(errors), min(errors) / 1.25)
    for axis in (axes.xaxis, axes.yaxis):
        plots.spell_out(axis)
    axes.yaxis.set_major_formatter(lambda error, _: f"{100 - error:g}")


def _error(rival: Rival) -> float:
    return max(100 * (1 - rival.accuracy_mean), _LEAST_ERROR)


def _series(rival: Rival) -> str:
    """Names a line: those of rounding go through all their bits, others through all that is kept, at equal bits."""
    if rival.compression == AS_TRAINED:
        return AS_TRAINED
    return f"{rival.method}, {rival.bits} bits" if _is_rounded_besides(rival) else rival.method


def _is_rounded_besides(rival: Rival) -> bool:
    return rival.bits != 32 and rival.method not in ROUNDS


def _style(rival: Rival) -> dict[str, Any]:
    marker, full = _MARKERS[rival.method]
    filled = _HALVES[rival.bits] if _is_rounded_besides(rival) else full
    size = 9 if marker == "*" else 5
    return {"marker": marker, "fillstyle": filled, "markersize": size, "markeredgewidth": 0.8}


def _line(axes: Axes, line: Sequence[Rival], colour: str) -> None:
    x, y = [rival.bytes_full / 1e3 for rival in line], [_error(rival) for rival in line]
    spread = [0.0 if math.isnan(rival.accuracy_interval) else 100 * rival.accuracy_interval for rival in line]
    axes.errorbar(x, y, spread, color=colour, linewidth=0.6, elinewidth=0.6, **_style(line[0]))


def _front(axes: Axes, best: Sequence[Rival]) -> None:
    """Joins those that none beats, numbers them, and names them below."""
    x, y = [rival.bytes_full / 1e3 for rival in best], [_error(rival) for rival in best]
    axes.step(x, y, where="post", color="0.8", linewidth=4, zorder=1)
    for number, place in enumerate(zip(x, y, strict=True), 1):
        axes.annotate(str(number), place, (-4, 4), textcoords="offset points", fontsize=7, ha="right")
    names = [f"{number}  {rival.case}, {rival.compression}" for number, rival in enumerate(best, 1)]
    axes.legend(
        [Line2D([], [], linestyle="")] * len(names),
        names,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.11),
        ncols=2,
        fontsize=7,
        handlelength=0,
        frameon=False,
    )


def _legends(figure: Figure, rivals: Sequence[Rival], colours: Mapping[str, str]) -> None:
    """Says which colour is which case, and which marker which method."""
    cases = [Line2D([], [], color=colour, linewidth=4, label=case) for case, colour in colours.items()]
    styles = {_series(rival): _style(rival) for rival in rivals}
    methods = [Line2D([], [], color="0.2", linestyle="", label=name, **style) for name, style in styles.items()]
    front = Line2D([], [], color="0.8", linewidth=4, label="beaten by none, numbered")
    figure.legend(handles=cases, loc="outside lower left", ncols=2, fontsize=8)
    figure.legend(handles=[*methods, front], loc="outside lower right", ncols=2, fontsize=8)
