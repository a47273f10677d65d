"""The memory report of one model: tables and a picture of bytes against experts.

memory.csv          a row per variant, number of experts and component   plots/memory_vs_experts.png
memory_totals.csv   a row per variant and number of experts              memory.json  both, nested, and the growth
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvit_jax import files, plots, scaling
from bvit_jax.config import Config
from bvit_jax.scaling import Growth, Point
from bvit_jax.storage import Storage

OUTPUTS = ("memory.csv", "memory_totals.csv", "memory.json", "plots")


def write(config: Config, rest: Storage, experts: Sequence[int], directory: Path) -> list[Point]:
    """Counts every variant of a model at each number of experts and writes the report into an existing directory.

    Args:
        config: the model; its family, form and number of experts are varied.
        rest: the number formats that the variants do not vary: router, backbone, packing of trits.
        experts: numbers of experts.
        directory: where to.
    """
    points = scaling.points(config, scaling.all_variants(rest), experts)
    files.write_text(directory / "memory.csv", files.to_csv([row for point in points for row in point.components()]))
    files.write_text(directory / "memory_totals.csv", files.to_csv([point.totals() for point in points]))
    content = {
        "model": dataclasses.asdict(config.model),
        "storage": dataclasses.asdict(rest),
        "points": [point.totals() | point.ledger.to_dict() for point in points],
        "growth": [_growth_row(found) for found in scaling.growth(points)],
    }
    files.write_json(directory / "memory.json", content)
    plots.memory_plot(points, describe(config), directory / "plots" / "memory_vs_experts.png")
    return points


def describe(config: Config) -> str:
    """Says in a line what is counted."""
    m = config.model
    layers = sum(dataclasses.replace(m, family="butterfly").is_moe_by_layer)
    return f"{layers} mixture layers, d_model {m.d_model}, d_ff {m.d_ff}, {m.num_stages} stages"


def _growth_row(found: Growth) -> dict[str, Any]:
    variant = found.variant
    key = {"family": variant.family, "form": variant.form_name, "numbers": variant.numbers}
    return key | {"exponent": found.exponent, "last": found.last, "bytes_per_expert": found.bytes_per_expert}
