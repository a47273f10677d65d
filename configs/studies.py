"""What the studies of accuracy share: three test beds, and how cases are made of alternatives.

Every bed is 16 patches and a class token to a ViT of two layers, d_model 64 and d_ff 128, trained for 2,000 steps of 32
images: half a minute on a CPU core. `bvit_jax.beds` says what is in them.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from configs import digits

Fields = Mapping[str, Any]
Alternatives = Mapping[str, Fields]
"""Fields that are not as in the base, nested, by the name of the alternative."""
Cases = tuple[tuple[dict[str, str], dict[str, Any]], ...]
"""Labels and such fields (`bvit_jax.grid.Case`)."""
BEDS: Alternatives = {
    "few_digits": {"data": {"name": "few_digits"}, "model": {"patch_size": 2}},
    "digit_pairs": {"data": {"name": "digit_pairs"}, "model": {"patch_size": 8}},
    "photo_patches": {"data": {"name": "photo_patches"}, "model": {"patch_size": 4}},
}

SEED_OF_THE_RUN = {"seed": (-1,)}
"""Section `data` of a grid in which every seed has its own split of the images."""


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


def cases(**labels: Alternatives) -> Cases:
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


def sweep(cases: Cases, seeds: Sequence[int], **sections: Fields) -> ml_collections.ConfigDict:
    """Returns a sweep of cases of `base`.

    Args:
        cases: as `cases` makes them.
        seeds: of the runs.
        sections: others of the sweep, such as `compare`.
    """
    fields = {"grid": {"seed": tuple(seeds)}, **sections}
    config = ml_collections.ConfigDict({name: ml_collections.ConfigDict(dict(value)) for name, value in fields.items()})
    config.base = base()
    config.cases = cases
    return config


def study(variants: Alternatives, beds: Alternatives, seeds: int) -> ml_collections.ConfigDict:
    """Returns a sweep of variants on test beds, all compared with the first.

    Args:
        variants: the first is the base.
        beds: of `BEDS`.
        seeds: how many, from 0.
    """
    compare = {"label": "variant", "baselines": (next(iter(variants)),)}
    return sweep(cases(bed=beds, variant=variants), range(seeds), compare=compare)
