"""Pictures of sweeps: curves over the number of experts with the laws fitted to them, of one sweep or of several."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_jax import figures, plots
from bvit_jax.figures import Picture
from bvit_jax.fits import Fit

Fits = dict[tuple[str, str], Fit]


def curves(results: pd.DataFrame, means: pd.DataFrame, fits: Fits) -> list[Picture]:
    """Draws accuracy, NLL and bytes against experts, accuracy against bytes, and what experts do, where there is any.

    Args:
        results: as `sweep_results.read` returns them.
        means: as `sweep_results.means` returns them; pictures of no finished run are none.
        fits: as `fits.series_fits` returns them.
    """
    if not len(means):
        return []
    pictures = [_quality(results, means, fits), _bytes(means, fits), _against_bytes(means)]
    return pictures + ([_experts(means)] if means["output_cosine"].notna().any() else [])


def _quality(results: pd.DataFrame, means: pd.DataFrame, fits: Fits) -> Picture:
    panels = {"test_accuracy": ("accuracy", 100, "test accuracy (%)"), "test_nll": ("nll", 1, "test NLL (nats)")}

    def onto(figure: Figure) -> None:
        for axes, (column, (mean, unit, label)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for style, series, line in _lines(means):
                half = unit * line[f"{mean}_interval"].fillna(0)
                bars = _accuracy_bars(line) if column == "test_accuracy" else half
                if line["family"].iloc[0] == "dense":
                    _level(axes, unit * line[mean].iloc[0], half.iloc[0], style)
                    continue
                dodge = _dodge(means, series)
                experts = dodge * line["num_experts"]
                marks = style | {"capsize": 2, "clip_on": False, "linestyle": ""}
                axes.errorbar(experts, unit * line[mean], bars, **marks)
                runs = results[(results["series"] == series) & results[column].notna()]
                dots: dict[str, Any] = {"s": 4, "color": style["color"], "alpha": 0.4, "clip_on": False}
                axes.scatter(dodge * runs["num_experts"], unit * runs[column], **dots)
                _law(axes, fits.get((series, column)), line["num_experts"], unit, style)
            _expert_axis(axes, means)
            axes.set_ylabel(label)
            if column == "test_accuracy":
                _cap_at_100_percent(axes)
        _legend(figure)

    caption = """Test accuracy and negative log-likelihood against experts. Markers: means over seeds with 95 %
        confidence intervals; dots: single runs; lines: laws fitted to the runs, a + b log2 E for the accuracy and a E^b
        for the NLL, with 95 % bands; level: dense models. Intervals end at 100 %. Markers of equal E are drawn side
        by side."""
    return figures.draw("quality", "Accuracy against experts", caption, _size(2.6, means), onto)


def _bytes(means: pd.DataFrame, fits: Fits) -> Picture:
    panels = {"bytes_full": "whole file (MB)", "bytes_full_ffn": "mixture layers (MB)"}

    def onto(figure: Figure) -> None:
        for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            for style, series, line in _lines(means):
                if line["family"].iloc[0] == "dense":
                    _level(axes, line[column].iloc[0] / 1e6, 0.0, style)
                    continue
                fit = fits.get((series, column))
                axes.plot(line["num_experts"], line[column] / 1e6, **style)
                if fit is not None:
                    end = line.iloc[-1]
                    place = end["num_experts"], end[column] / 1e6
                    text = f"$E^{{{fit.slope:.2f}}}$"
                    axes.annotate(text, place, (4, -2), textcoords="offset points", fontsize=6, color=style["color"])
            _expert_axis(axes, means)
            axes.set_yscale("log")
            axes.set_ylabel(label)
        _legend(figure)

    caption = """Bytes as stored for inference (`full`), 1 MB = 10^6 bytes, counted, with the exponent of the power law
        through each curve."""
    return figures.draw("bytes", "Bytes against experts", caption, _size(2.6, means), onto)


def _against_bytes(means: pd.DataFrame) -> Picture:
    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        for style, _, line in _lines(means):
            megabytes, accuracy = line["bytes_full"] / 1e6, 100 * line["accuracy"]
            axes.errorbar(megabytes, accuracy, _accuracy_bars(line), **style | {"capsize": 2, "clip_on": False})
            if line["family"].iloc[0] != "dense":
                for row in line.itertuples():
                    place = row.bytes_full / 1e6, 100 * row.accuracy
                    axes.annotate(str(row.num_experts), place, (3, 3), textcoords="offset points", fontsize=6)
        axes.set_xscale("log")
        axes.set_xlabel("whole file (MB)")
        axes.set_ylabel("test accuracy (%)")
        _cap_at_100_percent(axes)
        _legend(figure)

    caption = """Test accuracy against bytes as stored for inference; beside each point its number of experts. Bars:
        95 % confidence intervals over seeds, which end at 100 %."""
    width, height = figures.COLUMN, _size(2.6, means)[1] + 0.3
    return figures.draw("accuracy_against_bytes", "Accuracy against bytes", caption, (width, height), onto)


def _experts(means: pd.DataFrame) -> Picture:
    known = means[means["output_cosine"].notna()]

    def onto(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for style, series, _ in _lines(means):
            line = known[known["series"] == series].sort_values("num_experts")
            if len(line):
                experts, dodge = line["num_experts"], _dodge(means, series)
                half, half_used = (line[f"{name}_interval"].fillna(0) for name in ("output_cosine", "experts_used"))
                left.errorbar(dodge * experts, 1 - line["output_cosine"], half, capsize=2, **style)
                right.errorbar(dodge * experts, line["experts_used"] / experts, half_used / experts, capsize=2, **style)
        for axes, label in ((left, "diversity of outputs, 1 - cosine"), (right, "effective share of experts used")):
            _expert_axis(axes, known)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        _legend(figure)

    caption = """Whether experts differ and are used, means over layers and seeds with 95 % confidence intervals over
        seeds: 1 minus the cosine between what two experts give for one token, and the effective number of experts used
        over E. Markers of equal E are drawn side by side."""
    return figures.draw("experts", "Do experts differ, and are they used?", caption, _size(2.6, known), onto)


def _lines(means: pd.DataFrame) -> list[tuple[dict[str, Any], str, pd.DataFrame]]:
    """Returns style, name and rows, by rising experts, of each curve."""
    found = []
    for number, (series, line) in enumerate(means.groupby("series", sort=False)):
        marker = plots.MARKERS[(number + number // 7) % 7]  # with its colour, of 49 series each its own
        style: dict[str, Any] = {"color": plots.COLOURS[number % 7], "marker": marker}
        style |= {"label": str(series), "linestyle": ("-", "--", ":")[number // 7 % 3]}
        found.append((style, str(series), line.sort_values("num_experts")))
    return found


def _accuracy_bars(line: pd.DataFrame) -> np.ndarray:
    """Returns the halves of the intervals of the accuracy below and above, in per cent, (2, points)."""
    half, room = 100 * line["accuracy_interval"].fillna(0), 100 - 100 * line["accuracy"]
    return np.stack([half, np.minimum(half, room)])


def _dodge(means: pd.DataFrame, series: str) -> float:
    """Returns the factor, around 1, that keeps the bars of a curve beside those of the others."""
    mixtures = list(means.loc[means["family"] != "dense", "series"].unique())
    share = mixtures.index(series) / (len(mixtures) - 1) if len(mixtures) > 1 else 0.5
    return float(1.2 ** (share - 0.5))


def _cap_at_100_percent(axes: Axes) -> None:
    """Ends an axis of accuracies there; markers on the line are whole if they are drawn without clipping."""
    axes.set_ylim(top=min(axes.get_ylim()[1], 100))


def _level(axes: Axes, value: float, half: float, style: dict[str, Any]) -> None:
    axes.axhline(value, color=style["color"], linestyle="--", label=style["label"])
    if half > 0:
        axes.axhspan(value - half, value + half, color=style["color"], alpha=0.1, linewidth=0)


def _law(axes: Axes, fit: Fit | None, experts: pd.Series, unit: float, style: dict[str, Any]) -> None:
    if fit is None:
        return
    along = np.geomspace(experts.min(), experts.max(), 50)
    axes.plot(along, unit * fit.at(along), color=style["color"], linestyle=style["linestyle"])
    low, high = fit.band(along)
    if np.isfinite(low).all():
        axes.fill_between(along, unit * low, unit * high, color=style["color"], alpha=0.12, linewidth=0)


def _expert_axis(axes: Axes, means: pd.DataFrame) -> None:
    counts = sorted(set(means.loc[means["family"] != "dense", "num_experts"])) or [1]
    axes.set_xscale("log", base=2)
    shown = [counts[index] for index in figures.some(len(counts), 7)]
    axes.set_xticks(shown, [str(count) for count in shown])
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.5)
    axes.set_xlabel("experts E")


def _legend(figure: Figure) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    width = figure.get_figwidth()
    figure.legend(handles, names, loc="outside lower center", ncols=2 if width > figures.COLUMN else 1)


def _size(height: float, means: pd.DataFrame) -> tuple[float, float]:
    """Makes room for the legend."""
    return figures.PAGE, height + 0.16 * -(-means["series"].nunique() // 2)
