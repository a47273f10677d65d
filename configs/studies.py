"""What the studies of accuracy share: three test beds, and how cases are made of alternatives.

Every bed is 16 patches and a class token to a ViT of two layers, d_model 64 and d_ff 128, trained for 2,000 steps of 32
images: half a minute on a CPU core. `bvit_jax.beds` says what is in them.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import digits

Fields = Mapping[str, Any]
Alternatives = Mapping[str, Fields]
"""Fields that are not as in the base, nested, by the name of the alternative."""
BEDS: Alternatives = {
    "few_digits": {"data": {"name": "few_digits"}, "model": {"patch_size": 2}},
    "digit_pairs": {"data": {"name": "digit_pairs"}, "model": {"patch_size": 8}},
    "photo_patches": {"data": {"name": "photo_patches"}, "model": {"patch_size": 4}},
}


def of(*names: str) -> Alternatives:
    """Returns these beds."""
    return {name: BEDS[name] for name in names}


def base() -> ml_collections.ConfigDict:
    """Returns the run that the studies vary."""
    config = digits.get_config("butterfly,16")
    config.eval_every = 500
    config.keep_every = 0
    config.log_every = 100
    return config


def cases(**labels: Alternatives) -> tuple[tuple[dict[str, str], dict[str, Any]], ...]:
    """Returns every combination of the alternatives of some labels, the last label's outweighing the first's."""
    found = []
    for names in itertools.product(*labels.values()):
        fields: dict[str, Any] = {}
        for alternatives, name in zip(labels.values(), names, strict=True):
            fields = merged(fields, alternatives[name])
        found.append((dict(zip(labels, names, strict=True)), fields))
    return tuple(found)


def merged(first: Fields, second: Fields) -> dict[str, Any]:
    """Returns nested fields of both, the second's where both have one."""
    result = dict(first)
    for name, value in second.items():
        inner = result.get(name)
        result[name] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def study(variants: Alternatives, beds: Alternatives, seeds: int) -> ml_collections.ConfigDict:
    """Returns a sweep of variants on test beds, all compared with the first.

    Args:
        variants: the first is the base.
        beds: of `BEDS`.
        seeds: how many, from 0.
    """
    config = ml_collections.ConfigDict()
    config.base = base()
    config.grid = ml_collections.ConfigDict({"seed": tuple(range(seeds))})
    config.cases = cases(bed=beds, variant=variants)
    config.compare = ml_collections.ConfigDict({"label": "variant", "baselines": (next(iter(variants)),)})
    return config
