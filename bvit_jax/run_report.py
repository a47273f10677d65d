"""One run, or one packed file, in pictures and tables: what `experiments.report` and the notebooks show of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from bvit_jax import (
    diversity,
    expert_figures,
    favourites,
    memory,
    opened,
    outliers,
    routing_figures,
    run_figures,
    run_state,
    seen_routing,
    spatial,
    weight_tables,
)
from bvit_jax.config import Config
from bvit_jax.data import SplitName
from bvit_jax.diversity import Diversity
from bvit_jax.model_config import ConfigError
from bvit_jax.opened import Images, Opened
from bvit_jax.page import Part, Section, Table
from bvit_jax.run_state import RunState


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What is to be shown.

    Attributes:
        title: of the page.
        lead: its first words.
        sections: its parts.
    """

    title: str
    lead: str
    sections: list[Section]


def of_run(workdir: Path, split: SplitName, count: int) -> Report:
    """Reports on a run, as far as it has got: without a checkpoint, on its training alone.

    Args:
        workdir: of the run.
        split, count: of the images that it is looked at with, as in `Opened.images`.

    Raises:
        ConfigError: if the directory is no run's.
    """
    state = run_state.read(workdir)
    sections = [Section("The run", _state(state))]
    try:
        model = opened.load(workdir)
    except ConfigError as error:
        sections.append(Section("The model", (f"Nothing can be said of the model: {error}.",)))
    else:
        sections += of_model(model, split, count)
    return Report(f"Run {workdir.resolve().name}", _describe(state), sections)


def of_file(path: Path, split: SplitName, count: int) -> Report:
    """Reports on a packed file; arguments and errors as of `of_run` and `opened.load`."""
    model = opened.load(path)
    lead = f"{_kind(model.config)}; a packed file of {path.stat().st_size:,} bytes."
    return Report(f"Model {path.name}", lead, of_model(model, split, count))


def of_model(model: Opened, split: SplitName, count: int) -> list[Section]:
    """Looks into a model with images of its data, if it routes and they are there."""
    if not model.mixtures:
        return [Section("Experts", ("A dense model: it has no experts.",))]
    try:
        images = model.images(split, count)
    except ConfigError as error:
        missing = Section("Routing", (f"Not shown, as images are missing: {error}.",))
        return [missing, _experts(diversity.weight_diversity(model)), *_weights(model)]
    return [*_routing(model, images), *_weights(model)]


def _state(state: RunState) -> tuple[Part, ...]:
    parts: list[Part] = []
    if state.result is not None:
        names = {"test_accuracy": "test accuracy", "test_nll": "test NLL", "validation_accuracy": "validation accuracy"}
        known = {label: [state.result.get(name)] for name, label in names.items()}
        ledger = memory.ledger(state.config)
        known |= {
            "best step": [state.result.get("best_step")],
            "parameters": [ledger.params],
            "bytes": [ledger.bytes_full],
        }
        parts.append(Table("The best checkpoint on validation; bytes as stored for inference.", pd.DataFrame(known)))
        parts += [str(warning) for warning in state.result.get("warnings", ())]
    picture = run_figures.training(state)
    parts.append(picture if picture is not None else "No step has been recorded.")
    if state.incidents:
        told = pd.DataFrame(state.incidents).reindex(columns=["utc", "kind", "step", "text"])
        parts.append(Table("What interrupted it.", told))
    return tuple(parts)


def _routing(model: Opened, images: Images) -> list[Section]:
    seen = seen_routing.route(model, images)
    loads = seen_routing.load_table(seen)
    last = favourites.favourites(seen)[-1]
    routing: list[Part] = [
        f"Looked at with {len(images)} images, spread evenly over a split.",
        routing_figures.routing_maps(seen, images),
        routing_figures.load(seen, loads),
        Table("Each mixture layer.", seen_routing.layer_table(seen)),
        routing_figures.labels(seen, seen_routing.label_shares(seen)),
        routing_figures.favourites(last, images, model.model.patch_size),
    ]
    near = spatial.agreement_table(seen)
    smooth: list[Part] = ["An image is a single patch: there are no neighbours."]
    if len(near):
        smooth = [routing_figures.agreement(near), Table("Neighbours beside shuffled patches.", near)]
    found = [*diversity.weight_diversity(model), *diversity.output_diversity(model, seen)]
    sections = [Section("Routing", tuple(routing)), Section("In space", tuple(smooth)), _experts(found)]
    spread = outliers.outlier_table(model, seen)
    if len(spread):
        sections.append(Section("Outliers", (expert_figures.outliers(spread),)))
    return sections


def _experts(found: list[Diversity]) -> Section:
    table = diversity.diversity_table(found)
    if not len(table):
        return Section("Experts", ("One expert a layer: there is nothing to compare.",))
    parts: list[Part] = [expert_figures.diversity(table)]
    if any(one.of == "outputs" for one in found):
        parts.append(expert_figures.diversity_pairs(found))
    return Section("Experts", (*parts, Table("1 - cosine over all pairs of experts.", table)))


def _weights(model: Opened) -> list[Section]:
    parts: list[Part] = []
    turned = weight_tables.angles(model)
    if turned and any(np.size(values) for values in turned.values()):
        parts += [expert_figures.angles(turned), Table("Angles, radians.", weight_tables.angle_table(model))]
    trits = weight_tables.trit_table(model)
    if len(trits):
        parts += [expert_figures.trits(trits), Table("Ternary matrices.", trits)]
    return [Section("Weights", tuple(parts))] if parts else []


def _describe(state: RunState) -> str:
    return f"{_kind(state.config)}, seed {state.config.seed}; {state.progress}."


def _kind(config: Config) -> str:
    """Says in words what model it is and of which images."""
    model = config.model
    form = f" {model.form}" if model.family == "butterfly" else ""
    experts = "" if model.family == "dense" else f", {model.num_experts} experts, {model.top_k} a token"
    layers = f"{model.num_layers} layer" + "s" * (model.num_layers > 1)
    return f"{model.family}{form}{experts}; {layers} of {model.d_model} channels, on {config.data.name}"
