"""The memory report of one model: tables and a picture of bytes against experts, devices, energy.

- `memory.csv`: a row per variant, number of experts and component.
- `memory_totals.csv`: a row per variant and number of experts.
- `memory.json`: both, nested, and the growth; `plots/memory_vs_experts.png`: the picture.
- `devices.csv`, `devices.json`: a row per device and variant, the experts that fit.
- `energy.csv`, `energy.json`: a row per variant and number of images, a model of the energy of a step.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bvit_jax import devices, energy, files, plots, scaling
from bvit_jax.config import Config
from bvit_jax.devices import Fit
from bvit_jax.energy import Comparison
from bvit_jax.model_config import Form, require
from bvit_jax.precision import Precision
from bvit_jax.scaling import Growth, Point, Variant
from bvit_jax.storage import Storage

STANDARD_FORMATS: tuple[Precision, ...] = ("float32", "int8", "ternary")
FORMS: tuple[Form, ...] = ("separate", "tied")
OUTPUTS = ("memory.csv", "memory_totals.csv", "memory.json", "plots")
"""What `write` writes; `write_devices` and `write_energy` add a CSV and a JSON file each."""


def write(config: Config, rest: Storage, experts: Sequence[int], directory: Path) -> list[Point]:
    """Counts every variant of a model at each number of experts and writes the report into an existing directory.

    Args:
        config: the model; its family, form and number of experts are varied.
        rest: the number formats that the variants do not vary: router, backbone, packing of trits.
        experts: numbers of experts.
        directory: where to.

    Raises:
        ConfigError: if the model is no butterfly: the other families have not the fields that butterflies need.
    """
    require(config.model.family == "butterfly", "model.family", config.model.family, "butterfly, to count all families")
    bar = tqdm(scaling.all_variants(rest), unit="variant", disable=None, leave=False)
    points = [point for variant in bar for point in scaling.points(config, [variant], experts)]
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


def write_devices(config: Config, rest: Storage, directory: Path) -> list[Fit]:
    """Counts the experts that fit into each device; arguments as in `write`."""
    bar = tqdm(devices.DEVICES, unit="device", disable=None, leave=False)
    rows = [row for device in bar for row in devices.fits(config, _few_variants(rest), [device])]
    sources = {device.name: {"source": device.source, "note": device.note} for device in devices.DEVICES}
    files.write_rows(directory / "devices.csv", [dataclasses.asdict(row) | sources[row.device] for row in rows])
    return rows


def write_energy(config: Config, rest: Storage, images: Sequence[int], directory: Path) -> list[Comparison]:
    """Models the energy of steps of so many images; arguments as in `write`."""
    rows = [row for number in images for row in energy.compare(config, _few_variants(rest), number)]
    files.write_rows(directory / "energy.csv", [dataclasses.asdict(row) for row in rows])
    return rows


def _few_variants(rest: Storage) -> list[Variant]:
    """Lists standard mixtures and butterflies in the formats that are likely to be deployed."""
    standard = [scaling.standard(rest, experts) for experts in STANDARD_FORMATS]
    return standard + [Variant("butterfly", form, dataclasses.replace(rest, angle_bits=8)) for form in FORMS]


def describe(config: Config) -> str:
    """Says in a line what is counted."""
    m = config.model
    layers = sum(dataclasses.replace(m, family="butterfly").is_moe_by_layer)
    return f"{layers} mixture layer{'s' * (layers > 1)}, d_model {m.d_model}, d_ff {m.d_ff}, {m.num_stages} stages"


def _growth_row(found: Growth) -> dict[str, Any]:
    return found.variant.key() | {
        "exponent": found.exponent,
        "last": found.last,
        "bytes_per_expert": found.bytes_per_expert,
    }
