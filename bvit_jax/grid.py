"""The trials of a sweep: every combination of a grid's values, in every case.

A grid varies fields one by one, all with all. A case is a name and whatever fields are another's in it: a data set with
the shape of model that fits it, a family with the learning rate that suits it.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bvit_jax.config import Config, resolve
from bvit_jax.model_config import require
from bvit_jax.sweep import Trial

Case = tuple[Mapping[str, str], Mapping[str, Any]]
"""Labels, such as {"bed": "digit_pairs", "kind": "dense"}, and the fields that are not as in the base, nested."""
USUAL_FIELDS = ("model.family", "model.form", "model.num_experts", "seed", "data.seed")
"""Fields of a grid that have columns of their own in the tables."""


def expand(
    base: Mapping[str, Any], grid: Mapping[str, Any], workdir: Path, cases: Sequence[Case] = (({}, {}),)
) -> list[Trial]:
    """Lists the trials of a grid, each configuration once.

    Combinations that mean the same model (a dense model at 4 and at 16 experts) are one trial, which has the places of
    all. Where there are fewer experts than `base` selects, all are selected, unless the grid says how many. All
    configurations are resolved before anything runs, so a bad one is reported at once.

    Args:
        base: a configuration as in `configs/`, nested mappings.
        grid: nested as `base`, each leaf a sequence of values for that field; all combinations are run, seed by seed.
        workdir: the sweep's directory.
        cases: each with the same labels; the grid is run in every one.

    Raises:
        ConfigError: for a leaf that is no sequence, an empty one, a field that `base` lacks, cases that are not as they
            should be, two cases that are the same run, or a bad configuration.
    """
    axes = list(_leaves(grid))
    for name, values in axes:
        valid = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
        require(valid, f"grid.{name}", values, "a non-empty sequence of values")
    _check_cases(cases)
    trials: dict[str, Trial] = {}
    for (labels, fields), values in itertools.product(cases, itertools.product(*(values for _, values in axes))):
        chosen = dict(zip((name for name, _ in axes), values, strict=True))
        started = _with_values(base, dict(_leaves(fields)), "cases")
        config = resolve(_selecting_few(_with_values(started, chosen, "grid"), chosen))
        digest = config.digest()
        settings = " ".join(part for part in (*labels.values(), _settings(config, chosen)) if part)
        new = Trial(config, workdir / "trials" / digest, settings, dict(labels), chosen)
        first = trials.setdefault(digest, new)
        if first is not new:
            require(first.labels == new.labels, "cases", new.labels, f"another run than {first.labels}, not the same")
            trials[digest] = dataclasses.replace(first, also=(*first.also, chosen))
    # One seed of everything before the next: comparable early, and later seeds find their programs compiled.
    return sorted(trials.values(), key=lambda trial: trial.config.seed)


def _check_cases(cases: Sequence[Case]) -> None:
    require(len(cases) > 0, "cases", cases, "pairs of labels and fields")
    seen: list[dict[str, str]] = []
    for case in cases:
        paired = isinstance(case, Sequence) and len(case) == 2 and all(isinstance(part, Mapping) for part in case)
        require(paired, "cases", case, "pairs of labels and fields")
        labels = dict(case[0])
        require(labels not in seen, "cases", labels, "of labels that no other case has")
        named = not seen or labels.keys() == seen[0].keys()
        require(named, "cases", labels, f"with the labels of the others, {', '.join(seen[0] if seen else ())}")
        seen.append(labels)


def _leaves(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of nested mappings, in order."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _with_values(base: Mapping[str, Any], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Copies nested mappings with the fields of these dotted names replaced."""
    result: dict[str, Any] = copy.deepcopy(dict(base))
    for name, value in values.items():
        *sections, field = name.split(".")
        place = result
        for section in sections:
            require(isinstance(place.get(section), dict), f"{source}.{name}", value, "of a section that the base has")
            place = place[section]
        # Fields of data depend on its name, so that a case may add some.
        known = field in place or (source == "cases" and sections == ["data"])
        require(known, f"{source}.{name}", value, "of a field that the base has")
        place[field] = value
    return result


def _selecting_few(raw: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Lowers `top_k` to the number of experts if the grid varies that alone."""
    experts = chosen.get("model.num_experts")
    top_k = raw.get("model", {}).get("top_k")
    if "model.top_k" not in chosen and isinstance(experts, int) and isinstance(top_k, int) and 1 <= experts < top_k:
        raw["model"]["top_k"] = experts
    return raw


def _settings(config: Config, chosen: Mapping[str, Any]) -> str:
    """Says what the grid set beyond the usual; a field that the family ignores reads as its neutral value."""
    resolved = dict(_leaves(config.to_dict()))
    extra = {name: resolved.get(name, value) for name, value in chosen.items() if name not in USUAL_FIELDS}
    return " ".join(f"{name}={value}" for name, value in extra.items())
