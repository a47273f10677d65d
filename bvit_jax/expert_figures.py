"""Pictures of what a mixture's experts are: how far they differ, their angles and trits, what rotations do."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bvit_jax import figures, plots
from bvit_jax.diversity import Diversity
from bvit_jax.figures import Picture

MOST_LAYERS = 4
"""That one picture of matrices shows."""
_BINS = 61


def diversity(table: pd.DataFrame) -> Picture:
    """Draws the diversity of each layer's experts; `table` as of `diversity.diversity_table`."""
    layers = tuple(sorted(set(table["layer"])))

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (of, part) in enumerate(table.groupby("of", sort=False)):
            colour = plots.COLOURS[number]
            beside = part["layer"] + 0.1 * (number - 1)
            spread = [(part["mean"] - part["least"]).clip(lower=0), (part["most"] - part["mean"]).clip(lower=0)]
            axes.errorbar(beside, part["mean"], spread, color=colour, marker=plots.MARKERS[number], capsize=2, label=of)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("diversity, 1 - cosine")
        figures.layer_axis(axes, layers)
        figure.legend(loc="outside lower center", ncols=2)

    caption = """Diversity of each two experts of a layer, mean over all pairs; bars reach from the least different
        pair to the most different. 0: alike but for scale; about 1: nothing to do with each other. Weights: the
        matrices that the experts amount to. Outputs: for the same tokens, whatever the router says."""
    return figures.draw("diversity", "Do the experts differ?", caption, (figures.COLUMN, 2.7), onto)


def diversity_pairs(found: Sequence[Diversity]) -> Picture:
    """Draws the diversity of each two experts, by their outputs, layer by layer."""
    every = [one for one in found if one.of == "outputs"]
    shown = [every[index] for index in figures.some(len(every), MOST_LAYERS)]

    def onto(figure: Figure) -> None:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        high = max(float(one.values_nxn.max()) for one in shown)
        for axes, one in zip(panels, shown, strict=True):
            picture = figures.heatmap(axes, one.values_nxn, 0.0, max(high, 1e-6))
            axes.set_aspect("equal")
            axes.set_title(f"layer {one.layer}")
            ticks = figures.some(len(one.experts_n), 8)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks(ticks, [str(one.experts_n[tick]) for tick in ticks])
            axes.set_xlabel("expert")
        panels[0].set_ylabel("expert")
        figure.colorbar(picture, ax=list(panels), label="1 - cosine", shrink=0.8)

    compared = len(shown[0].experts_n)
    caption = f"""Diversity of each two experts by their outputs for the same tokens, of {compared} experts a layer.
        Dark blocks are groups of experts that do alike."""
    width = figures.COLUMN if len(shown) == 1 else figures.PAGE
    return figures.draw("diversity_pairs", "Which experts are alike", caption, (width, 2.3), onto)


def angles(found: Mapping[tuple[int, str, int], np.ndarray]) -> Picture:
    """Draws the distribution of the angles, a panel a rotation, a line a stage; `found` as `weight_tables.angles`."""
    rotations = list(dict.fromkeys(rotation for _, rotation, _ in found))
    widest = max(float(np.abs(values).max()) for values in found.values())
    edges = np.linspace(-max(widest, 1e-3), max(widest, 1e-3), _BINS + 1)

    def onto(figure: Figure) -> None:
        panels = figure.subplots(1, len(rotations), sharex=True, sharey=True, squeeze=False)[0]
        for axes, rotation in zip(panels, rotations, strict=True):
            stages = sorted({stage for _, name, stage in found if name == rotation})
            for stage in stages:
                of = [values.reshape(-1) for (_, *key), values in found.items() if key == [rotation, stage]]
                density, _ = np.histogram(np.concatenate(of), edges, density=True)
                style = {"color": plots.COLOURS[stage % 7], "linestyle": ("-", "--", ":")[stage // 7 % 3]}
                axes.stairs(density, edges, label=f"stage {stage}", **style)
            axes.set_title(rotation)
            axes.set_xlabel("angle (radians)")
        panels[0].set_ylabel("density (1/radian)")
        handles, names = max((axes.get_legend_handles_labels() for axes in panels), key=lambda pair: len(pair[1]))
        figure.legend(handles, names, loc="outside lower center", ncols=2 if len(rotations) == 1 else 6)

    caption = """Angles of the rotations, of all experts and mixture layers together, stage by stage. A peak at 0 is of
        pairs of channels that are hardly turned; angles rounded to few bits stand in spikes."""
    width = figures.COLUMN if len(rotations) == 1 else figures.PAGE
    return figures.draw("angles", "Rotation angles", caption, (width, 2.3), onto)


def trits(table: pd.DataFrame) -> Picture:
    """Draws the shares of -1, 0 and 1; `table` as of `weight_tables.trit_table`."""
    names = [f"layer {row.layer} {row.matrix.replace('_', ' ')}" for row in table.itertuples()]

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(False)
        places, start = np.arange(len(names)), np.zeros(len(names))
        middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6}
        for column, label, colour in (("minus", "-1", "#0072B2"), ("zero", "0", "0.85"), ("plus", "1", "#E69F00")):
            share = 100 * table[column].to_numpy()
            axes.barh(places, share, left=start, color=colour, label=label, height=0.75)
            if column == "zero":
                for place, left, width in zip(places, start, share, strict=True):
                    axes.text(float(left + width / 2), float(place), f"{width:.1f} %", **middle)
            start += share
        axes.set_yticks(places, names, fontsize=6)
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="weights (%)")
        figure.legend(loc="outside lower center", ncols=3)

    caption = "Ternary weights of each matrix, of stored experts all experts together; the share of zeros in figures."
    return figures.draw("trits", "Ternary weights", caption, (figures.COLUMN, 1.0 + 0.16 * len(names)), onto)


def outliers(table: pd.DataFrame) -> Picture:
    """Draws the outliers among inputs before and after rotation; `table` as of `outliers.outlier_table`."""
    meanings = {
        "crest": "crest factor of tokens",
        "kurtosis": "excess kurtosis of tokens",
        "channels": "max / median channel RMS",
    }
    layers = tuple(sorted(set(table["layer"])))

    def onto(figure: Figure) -> None:
        for axes, (measure, meaning) in zip(figure.subplots(1, 3), meanings.items(), strict=True):
            for number, where in enumerate(("before", "after")):
                part = table[table["where"] == where]
                style: dict[str, Any] = {"color": plots.COLOURS[number], "marker": plots.MARKERS[number], "capsize": 2}
                half = part[f"{measure}_interval"].fillna(0) if f"{measure}_interval" in part else None
                beside = part["layer"] + 0.08 * (number - 0.5)
                axes.errorbar(beside, part[measure], half, label=f"{where} rotation", **style)
            axes.set_ylabel(meaning)
            figures.layer_axis(axes, layers)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)

    caption = """Outliers among the channels of what experts are given, before and after each turns it. Crest factor:
        the largest channel of a token over their RMS. Kurtosis: over a token's channels, 0 if these are Gaussian. On
        the right, the RMS over all tokens of the largest channel over that of the median one. Lower is more even. Means
        over tokens, and over the experts of each, with 95 % confidence intervals over images, but for channels. Points
        are drawn side by side."""
    return figures.draw("outliers", "Do rotations spread outliers?", caption, (figures.PAGE, 2.3), onto)
