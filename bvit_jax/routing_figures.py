"""Pictures of how a model routes images: maps, load, agreement of neighbours, what experts like."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from bvit_jax import figures, plots
from bvit_jax.favourites import Favourites
from bvit_jax.figures import Picture
from bvit_jax.opened import Images
from bvit_jax.seen_routing import SeenRouting

MOST_IMAGES, MOST_LAYERS, MOST_EXPERTS, MOST_PATCHES, MOST_CLASSES = 6, 4, 16, 10, 40
"""That one picture shows."""
COLOURS = (*plots.COLOURS, "#F0E442")
"""Of the experts of a map: Okabe and Ito's eight."""
_REST = "0.85"
"""Colour of the experts that have none of their own."""
_NUMBERED = 100
"""Patches of an image, and experts, up to which each patch bears the number of its expert."""
_IN_ORDER = 128
"""Experts up to which they stand in order; of more the order of the load shows extremes that a pixel would hide."""
_TINY = 1e-9


def routing_maps(seen: SeenRouting, images: Images) -> Picture:
    """Draws images, and beneath each the first choice of every patch, layer by layer."""
    maps = seen.maps()
    columns = figures.some(len(images), MOST_IMAGES)
    rows = figures.some(len(seen.layers), MOST_LAYERS)

    def onto(figure: Figure) -> None:
        grid = figure.subplots(len(rows) + 1, len(columns) + 1, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.set_frame_on(False)
        for place, image in enumerate(columns):
            show_image(grid[0, place], images.pixels[image])
            grid[0, place].set_title(f"class {images.labels[image]}", fontsize=7)
        for line, index in zip(grid[1:], rows, strict=True):
            used = _by_use(maps[index])
            colour_E = _colours(used, seen.num_experts)
            for axes, image in zip(line, columns, strict=False):
                _map(axes, maps[index, image], colour_E)
            line[0].set_ylabel(f"layer {seen.layers[index]}")
            _legend(line[-1], used, colour_E)

    caption = f"""Images, and the most probable expert of every patch in {len(rows)} of {len(seen.layers)} mixture
        layers. In each layer the eight experts that are the first choice of most patches have colours; the others are
        light grey."""
    size = (figures.PAGE, 0.35 + 1.02 * (len(rows) + 1))
    return figures.draw("routing_maps", "Where patches go", caption, size, onto)


def show_image(axes: Axes, pixels_HxWxc: np.ndarray) -> None:
    """Shows bytes as an image, in grey if there is one channel."""
    grey = pixels_HxWxc.shape[-1] == 1
    axes.imshow(pixels_HxWxc[..., 0] if grey else pixels_HxWxc, cmap="gray" if grey else None, vmin=0, vmax=255)


def _by_use(map_BxHxW: np.ndarray) -> list[int]:
    """Lists the experts that are any patch's first choice, most used first."""
    counts = np.bincount(map_BxHxW.reshape(-1))
    return [int(expert) for expert in np.argsort(-counts, kind="stable") if counts[expert]]


def _colours(used: list[int], num_experts: int) -> list[str]:
    own = dict(zip(used, COLOURS, strict=False))
    return [own.get(expert, _REST) for expert in range(num_experts)]


def _map(axes: Axes, map_hxw: np.ndarray, colour_E: list[str]) -> None:
    axes.imshow(map_hxw, cmap=ListedColormap(colour_E), vmin=-0.5, vmax=len(colour_E) - 0.5, interpolation="nearest")
    if max(map_hxw.size, len(colour_E)) <= _NUMBERED:
        for (row, column), expert in np.ndenumerate(map_hxw):
            dark = colour_E[expert] in ("#000000", "#0072B2", "#D55E00")
            size = 7 if max(map_hxw.shape) <= 5 else 4.5
            colour = "white" if dark else "black"
            axes.text(column, row, str(expert), ha="center", va="center", fontsize=size, color=colour)


def _legend(axes: Axes, used: list[int], colour_E: list[str]) -> None:
    handles = [Patch(color=colour_E[expert], label=str(expert)) for expert in used[: len(COLOURS)]]
    if len(used) > len(COLOURS):
        handles.append(Patch(color=_REST, label="others"))
    ends: dict[str, Any] = {
        "loc": "center left",
        "fontsize": 6,
        "title_fontsize": 6,
        "frameon": False,
        "handlelength": 1.0,
    }
    axes.legend(handles=handles, title="expert", ncols=2, columnspacing=0.8, labelspacing=0.2, **ends)


def load(seen: SeenRouting, table: pd.DataFrame) -> Picture:
    """Draws load, entropy and labels of every expert of every layer; `table` as of `seen_routing.load_table`."""
    shape = (len(seen.layers), seen.num_experts)
    of_labels = np.unique(seen.labels_B, return_counts=True)[1] / len(seen.labels_B)
    all_labels = -float((of_labels * np.log(of_labels)).sum())
    share, entropy, label = (table[name].to_numpy().reshape(shape) for name in ("share", "entropy", "labels"))
    by_load = shape[1] > _IN_ORDER
    order_MxE = np.argsort(-share, axis=1, kind="stable") if by_load else np.tile(np.arange(shape[1]), (shape[0], 1))
    panels: dict[str, tuple[np.ndarray, float | None]] = {
        "load over balance": (share * seen.num_experts, None),
        "routing entropy over log E": (entropy / max(np.log(seen.num_experts), _TINY), 1.0),
        "label entropy over all images'": (label / max(all_labels, _TINY), 1.0),
    }

    def onto(figure: Figure) -> None:
        for axes, (title, (values, high)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            shown = figures.heatmap(axes, np.take_along_axis(values, order_MxE, axis=1), 0.0, high)
            axes.set_title(title)
            axes.set_xlabel("expert, by falling load" if by_load else "expert")
            axes.set_yticks(range(shape[0]), [str(layer) for layer in seen.layers])
            figure.colorbar(shown, ax=axes, location="bottom", shrink=0.9)
        figure.axes[0].set_ylabel("layer")

    caption = """Load: share of all (token, choice) pairs times E, 1 in balance. Routing entropy: of the probabilities
        of the tokens whose first choice the expert is; 0 if the router is sure, 1 if it does not care. Label entropy:
        of the classes of those tokens, over that of the images; 0 if they are all of one class, 1 if they are as mixed
        as the images or more, less by chance where its tokens are few. Light grey: nobody's first choice."""
    return figures.draw("load", "What each expert gets", caption, (figures.PAGE, 1.9 + 0.16 * shape[0]), onto)


def agreement(table: pd.DataFrame) -> Picture:
    """Draws the agreement of neighbours beside that of shuffled patches; `table` as of `spatial.agreement_table`."""
    layers = tuple(sorted(set(table["layer"])))

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        for number, direction in enumerate(("across", "down")):
            of = table[table["direction"] == direction]
            style: dict[str, Any] = {"color": plots.COLOURS[number], "marker": plots.MARKERS[number], "capsize": 2}
            beside = of["layer"] + 0.08 * (number - 0.5)
            axes.errorbar(
                beside, of["agreement"], of["excess_interval"].fillna(0), label=f"neighbours {direction}", **style
            )
        both = table[table["direction"] == "both"]
        axes.plot(both["layer"], both["shuffled"], color="0.4", linestyle="--", marker="x", label="shuffled patches")
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of experts in common")
        figures.layer_axis(axes, layers)
        figure.legend(loc="outside lower center", ncols=2)

    caption = """Share of their selected experts that two patches of an image have in common, neighbours beside patches
        taken from anywhere in it (the mean over all shuffles, worked out). Bars: 95 % confidence interval of the
        difference of the two over images. Smooth routing lies above the dashed line."""
    return figures.draw("agreement", "Is routing smooth in space?", caption, (figures.COLUMN, 2.7), onto)


def labels(seen: SeenRouting, shares_MxCxE: np.ndarray) -> Picture:
    """Draws how the tokens of each class spread over the experts; `shares_MxCxE` as of `seen_routing.label_shares`."""
    rows = figures.some(len(seen.layers), 3)
    every = np.unique(seen.labels_B)
    classes = every[figures.some(len(every), MOST_CLASSES)]

    def onto(figure: Figure) -> None:
        panels = figure.subplots(1, len(rows), squeeze=False)[0]
        high = float(shares_MxCxE[rows][:, classes].max())
        ticks = figures.some(len(classes), 10)
        for axes, index in zip(panels, rows, strict=True):
            shown = figures.heatmap(axes, shares_MxCxE[index, classes], 0.0, high)
            axes.set_title(f"layer {seen.layers[index]}")
            axes.set_xlabel("expert")
            axes.set_yticks(ticks, [str(classes[tick]) for tick in ticks])
        panels[0].set_ylabel("class")
        figure.colorbar(shown, ax=list(panels), label="share of the class's tokens", shrink=0.9)

    caption = f"""Of the tokens of each class, the share whose first choice each expert is; {len(classes)} of the
        {len(every)} classes seen. Columns that stand out in some rows only are experts for some classes; equal rows
        mean that experts do not look at the class."""
    width = figures.COLUMN if len(rows) == 1 else figures.PAGE
    return figures.draw("labels", "Classes and experts", caption, (width, 2.5), onto)


def favourites(found: Favourites, images: Images, patch_size: int) -> Picture:
    """Draws the patches that each expert of one layer is most probable for."""
    experts = figures.some(len(found.probs_Exn), MOST_EXPERTS)
    patches = found.cut(images, patch_size)[experts, :MOST_PATCHES]

    def onto(figure: Figure) -> None:
        halves = figure.subfigures(1, 2, squeeze=False)[0]
        middle = -(-len(experts) // 2)
        for half, part in zip(halves, (slice(middle), slice(middle, None)), strict=True):
            if len(experts[part]):
                _patches(half, middle, experts[part], patches[part], found.probs_Exn[experts[part]])

    caption = f"""Layer {found.layer}: the patches that the router is surest to send to each of {len(experts)} experts
        of {len(found.probs_Exn)}, at most one of an image, the surest first; with the probability of the first and the
        last that are shown."""
    size = (figures.PAGE, 0.2 + 0.4 * -(-len(experts) // 2))
    return figures.draw("favourites", "What each expert likes", caption, size, onto)


def _patches(part: SubFigure, lines: int, experts: list[int], patches: np.ndarray, probs: np.ndarray) -> None:
    grid = part.subplots(lines, patches.shape[1], squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
        axes.grid(False)
    for line, expert, own, prob in zip(grid, experts, patches, probs, strict=False):
        for axes, patch in zip(line, own, strict=True):
            show_image(axes, patch)
            axes.set_frame_on(True)
            for side in axes.spines.values():
                side.set(visible=True, color="0.8", linewidth=0.5)
        text = f"expert {expert}\n{prob[0]:.2f}-{prob[: len(own)][-1]:.2f}"
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=6)
