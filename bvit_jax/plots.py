"""Pictures of a sweep: accuracy, bytes and experts against each other, one file each. MB are decimal, 10^6 bytes."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bvit_jax import bench_cases
from bvit_jax.compiled import Row
from bvit_jax.scaling import Point, by_variant, growth
from bvit_jax.sweep import Summary, series

# Okabe and Ito's colours, told apart with any colour vision; markers tell the series apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_SIZE = (5.6, 4.4)


def sweep_plots(summaries: Sequence[Summary], directory: Path) -> list[Path]:
    """Draws the three pictures of a sweep into `directory` and returns their paths; none if nothing has finished."""
    if not summaries:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[..., None]] = {
        "accuracy_vs_experts.png": _accuracy_against_experts,
        "bytes_vs_experts.png": _bytes_against_experts,
        "accuracy_vs_bytes.png": _accuracy_against_bytes,
    }
    return [draw_to(directory / name, partial(draw, summaries=summaries)) for name, draw in pictures.items()]


def memory_plot(points: Sequence[Point], title: str, path: Path) -> Path:
    """Draws bytes against experts, a panel a family and form, a line a number format, in both accountings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return draw_to(path, partial(_memory, points=points, title=title), size=(10.4, 7.0), legend=False)


def compile_plot(rows: Sequence[Row], title: str, path: Path) -> Path:
    """Draws bytes a chip and bytes between chips against experts, a row of panels a topology.

    Args:
        rows: of any topologies, families and steps.
        title: of the picture.
        path: where to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height = 1.0 + 3.0 * len({row.case.topology for row in rows})
    return draw_to(path, partial(_compiled, rows=rows, title=title), size=(8.0, height))


def bench_plot(rows: Sequence[bench_cases.Row], title: str, path: Path) -> Path:
    """Draws time relative to a dense layer against experts, a panel a job and size, at the largest top-k of each.

    Args:
        rows: of any groups.
        title: of the picture.
        path: where to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = {row.case.group[:2]: row.case.group for row in sorted(rows, key=lambda row: row.case.top_k)}
    panels = [[row for row in rows if row.case.group == group] for group in groups.values()]
    size = (4.0 * min(len(panels), 3), 1.6 + 3.0 * -(-len(panels) // 3))
    return draw_to(path, partial(_timed, panels=panels, title=title), size=size, legend=False)


def draw_to(path: Path, draw: Callable[[Figure], None], size: tuple[float, float] = _SIZE, legend: bool = True) -> Path:
    """Draws and saves one picture, with a legend below it if the panels have none of their own."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        if legend:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
        figure.savefig(path, dpi=150)
    return path


def spell_out(axis: Axis) -> None:
    """Has 1, 2 and 5 of every power of ten along a logarithmic axis, in figures."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _series(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Groups summaries into lines: equal but for the number of experts, which rises along each."""
    lines: dict[str, list[Summary]] = {}
    for summary in sorted(summaries, key=lambda s: s.sample.num_experts):
        row = summary.sample
        name = series(row.family, row.form, row.settings)
        lines.setdefault(name, []).append(summary)
    return dict(sorted(lines.items()))


def _accuracy_against_experts(figure: Figure, summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    for index, (name, line) in enumerate(_series(summaries).items()):
        mean, spread = _accuracy(line)
        style: dict[str, Any] = {"color": COLOURS[index % 7], "label": name}
        if line[0].sample.family == "dense":
            axes.axhline(mean[0], linestyle="--", **style)
            if spread[0] > 0:
                axes.axhspan(mean[0] - spread[0], mean[0] + spread[0], color=COLOURS[index % 7], alpha=0.1)
        else:
            beside = 1.03 ** (index - 1)  # keeps the error bars of equal numbers of experts apart
            experts = [beside * number for number in _experts(line)]
            axes.errorbar(experts, mean, spread, marker=MARKERS[index % 7], capsize=3, **style)
    _expert_axis(axes, (s.sample.num_experts for s in summaries if s.sample.family != "dense"))
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Accuracy against experts, mean ± standard deviation over seeds", fontsize=10)


def _bytes_against_experts(figure: Figure, summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    for index, (name, line) in enumerate(_series(summaries).items()):
        for accounting, linestyle in (("bytes_full", "-"), ("bytes_paper", ":")):
            megabytes = [getattr(s.sample, accounting) / 1e6 for s in line]
            label = f"{name}, {accounting.removeprefix('bytes_')}"
            style: dict[str, Any] = {"color": COLOURS[index % 7], "linestyle": linestyle, "label": label}
            if line[0].sample.family == "dense":
                axes.axhline(megabytes[0], **style)
            else:
                axes.plot(_experts(line), megabytes, marker=MARKERS[index % 7], **style)
    _expert_axis(axes, (s.sample.num_experts for s in summaries if s.sample.family != "dense"))
    axes.set_yscale("log")
    axes.set_ylabel("MB")
    axes.set_title("Bytes against experts (full: every tensor; paper: expert matrices)", fontsize=10)


def _accuracy_against_bytes(figure: Figure, summaries: Sequence[Summary]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    meanings = {"bytes_full": "full: every tensor (MB)", "bytes_paper": "paper: expert matrices (MB)"}
    for axes, (accounting, meaning) in zip(panels, meanings.items(), strict=True):
        for index, (name, line) in enumerate(_series(summaries).items()):
            mean, spread = _accuracy(line)
            megabytes = [getattr(s.sample, accounting) / 1e6 for s in line]
            style: dict[str, Any] = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7], "label": name}
            axes.errorbar(megabytes, mean, spread, capsize=3, **style)
            if line[0].sample.family != "dense":
                for x, y, summary in zip(megabytes, mean, line, strict=True):
                    axes.annotate(
                        f"{summary.sample.num_experts}", (x, y), (4, 4), textcoords="offset points", fontsize=7
                    )
        axes.set_xscale("log")
        axes.set_xlabel(meaning)
    panels[0].set_ylabel("test accuracy (%)")
    figure.suptitle("Accuracy against bytes (number of experts beside each point)", fontsize=10)


def _memory(figure: Figure, points: Sequence[Point], title: str) -> None:
    kinds = list(dict.fromkeys(p.variant.kind for p in points if p.variant.family != "dense"))
    exponents = {g.variant: g.exponent for g in growth(points)}
    panels = list(figure.subplots(-(-len(kinds) // 3), 3, sharex=True, sharey=True, squeeze=False).flat)
    for index in range(len(kinds), len(panels)):
        panels[index].set_axis_off()
        panels[index - 3].tick_params(labelbottom=True)  # of the panel above, now the lowest
    for axes, kind in zip(panels, kinds, strict=False):
        lines = by_variant(p for p in points if p.variant.kind == kind)
        for index, (variant, line) in enumerate(lines.items()):
            experts = [p.num_experts for p in line]
            slope = f", fit E^{exponents[variant]:.2f}" if variant in exponents else ""
            style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 3}
            axes.plot(
                experts, [p.ledger.bytes_full_ffn / 1e6 for p in line], label=f"{variant.numbers}{slope}", **style
            )
            axes.plot(experts, [p.ledger.bytes_paper / 1e6 for p in line], linestyle=":", **style)
        baseline = [p.standard.bytes_full_ffn / 1e6 for p in next(iter(lines.values()))]
        if kind != "standard":
            axes.plot(experts, baseline, color="0.5", linestyle="--", label="standard float32")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(kind, fontsize=9)
        axes.legend(fontsize=7)
    figure.supxlabel("experts E", fontsize=9)
    figure.supylabel("mixture layers (MB); solid: full, dotted: paper", fontsize=9)
    figure.suptitle(title, fontsize=10)


def _accuracy(line: Sequence[Summary]) -> tuple[np.ndarray, np.ndarray]:
    mean = np.array([s.accuracy_mean for s in line])
    return 100 * mean, 100 * np.nan_to_num(np.array([s.accuracy_std for s in line]))


def _experts(line: Sequence[Summary]) -> list[int]:
    return [s.sample.num_experts for s in line]


def _expert_axis(axes: Axes, numbers: Iterable[int]) -> None:
    counts = sorted(set(numbers)) or [1]
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
    axes.set_xlabel("experts")


def _compiled(figure: Figure, rows: Sequence[Row], title: str) -> None:
    names = list(dict.fromkeys(row.case.topology for row in rows))
    families = list(dict.fromkeys(row.case.family for row in rows))
    panels = figure.subplots(len(names), 2, sharex=True, squeeze=False)
    for name, (memory, traffic) in zip(names, panels, strict=True):
        here = [row for row in rows if row.case.topology == name]
        for index, family in enumerate(families):
            for step, linestyle in (("train", "-"), ("eval", ":")):
                line = [row for row in here if (row.case.family, row.case.step) == (family, step)]
                style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": linestyle}
                style |= {"markersize": 4, "label": f"{family}, {step}"}
                _compiled_line(memory, line, lambda row: row.compiled.peak_bytes, 1e9, style)
                if step == "train":
                    _compiled_line(traffic, line, lambda row: row.compiled.collective_bytes, 1e6, style)
        limit = here[0].compiled.hbm_bytes / 1e9
        memory.axhline(limit, color="0.3", linestyle="--", linewidth=1)
        memory.annotate("HBM", (0.01, limit), (2, 2), ("axes fraction", "data"), "offset points", fontsize=7)
        memory.set_ylabel(f"{name}\npeak of a device (GB)")
        traffic.set_ylabel("collectives of a training step (MB)")
    for axes in panels.flat:
        _expert_axis(axes, (row.case.num_experts for row in rows if row.case.family != "dense"))
        axes.set_yscale("log")
    figure.suptitle(f"{title}\nof one device, by the TPU compiler; hollow: does not fit", fontsize=9)


def _compiled_line(
    axes: Axes, line: Sequence[Row], value: Callable[[Row], int | None], unit: float, style: dict[str, Any]
) -> None:
    """Draws one family and step; a dense model, which has no experts, as a level."""
    known = [(row.case.num_experts, (value(row) or 0) / unit, row.compiled.status) for row in line if value(row)]
    if not known:
        return
    if line[0].case.family == "dense":
        axes.axhline(known[0][1], **{name: style[name] for name in ("color", "linestyle", "label")})
        return
    experts, values, _ = zip(*known, strict=True)
    axes.plot(experts, values, **style)
    hollow = [(number, y) for number, y, status in known if status != "fits"]
    if hollow:
        numbers, tops = zip(*hollow, strict=True)
        axes.plot(numbers, tops, marker=style["marker"], color=style["color"], mfc="white", linestyle="", zorder=3)


def _timed(figure: Figure, panels: Sequence[Sequence[bench_cases.Row]], title: str) -> None:
    across = min(len(panels), 3)
    for index, rows in enumerate(panels):
        _timed_panel(figure.add_subplot(-(-len(panels) // across), across, index + 1), rows)
    every = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {label: handle for handles, labels in every for handle, label in zip(handles, labels, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=across + 1, fontsize=8)
    figure.supylabel("time over that of the dense layer", fontsize=9)
    figure.suptitle(f"{title}; bars: quartiles", fontsize=9)


def _timed_panel(axes: Axes, rows: Sequence[bench_cases.Row]) -> None:
    """Draws one group: a line a variant, and dense layers as levels."""
    colours = {dispatch: COLOURS[index + 1] for index, dispatch in enumerate((None, *bench_cases.DISPATCHES))}
    for name, by_experts in bench_cases.lines(rows).items():
        line = [row for row in by_experts.values() if row.relative is not None]
        if not line or name.endswith(bench_cases.FULL_DEPTH):
            continue
        case = line[0].case
        if case.family == "dense":
            label = name if case.copies == 1 else f"{name} (floor)"
            axes.axhline(line[0].relative or 0, color="0.3", linestyle="--" if case.copies == 1 else ":", label=label)
            continue
        marks, linestyle = ("^", ":") if case.form == "tied" else ("o", "-")
        style: dict[str, Any] = {"color": colours[case.dispatch], "marker": marks, "linestyle": linestyle}
        middle, lower, upper = (
            np.array([getattr(row, f"{at}_ms") for row in line]) for at in ("median", "lower", "upper")
        )
        scale = np.array([row.relative for row in line]) / middle
        bars = np.stack([middle - lower, upper - middle]) * scale
        experts = [row.case.num_experts for row in line]
        axes.errorbar(experts, middle * scale, bars, markersize=4, capsize=2, label=name, **style)
    _expert_axis(axes, (row.case.num_experts for row in rows if row.case.family != "dense"))
    axes.set_ylim(bottom=0)
    axes.set_title(bench_cases.title(rows[0].case.group), fontsize=9)
