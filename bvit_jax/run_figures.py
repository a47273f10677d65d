"""Pictures of how a run went."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bvit_jax import figures, plots
from bvit_jax.figures import Picture
from bvit_jax.run_state import RunState


def training(state: RunState) -> Picture | None:
    """Draws loss and accuracy by step, as far as the run has got; None if it has recorded nothing."""
    rows = state.metrics
    if not len(rows) or "split" not in rows:
        return None
    panels = {"loss": ("loss", "nll"), "accuracy": ("accuracy", "accuracy")}

    def onto(figure: Figure) -> None:
        for axes, (title, columns) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for number, (split, column) in enumerate(zip(("train", "validation"), columns, strict=True)):
                part = _known(rows, split, column)
                scale = 100 if title == "accuracy" else 1
                style: dict[str, Any] = {"color": plots.COLOURS[number], "linewidth": 0.8 if split == "train" else 1.4}
                marker = "" if split == "train" else "o"
                label = {"train": "training batches", "validation": "validation"}[split]
                axes.plot(part["step"], scale * part[column], marker=marker, markersize=3, label=label, **style)
            axes.set_xlim(0, state.config.total_steps)
            axes.set_xlabel("step")
            axes.set_ylabel("accuracy (%)" if title == "accuracy" else "loss; NLL on validation (nats)")
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)

    caption = f"""Training and validation, {state.progress}. The training loss holds the router's losses and label
        smoothing too, and is of augmented images."""
    return figures.draw("training", "Training", caption, (figures.PAGE, 2.4), onto)


def _known(rows: pd.DataFrame, split: str, column: str) -> pd.DataFrame:
    """Returns the rows of one split that have a column; none if there is no such column."""
    if column not in rows:
        return pd.DataFrame({"step": [], column: []})
    return rows[(rows["split"] == split) & rows[column].notna()]
