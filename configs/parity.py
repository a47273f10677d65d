"""Are rotated experts as good as stored ones? All families on the test beds, equal steps and equal tuning.

Every seed deals the images anew, for all kinds alike. The deals overlap with one another, and with those that rates
and recipe were chosen by: no image is new, and intervals are rather too narrow. Rates tuned for 16 experts serve 64,
those of the dense model of d_ff 128 the dense models of equal bytes.

Command:   python -m experiments.sweep --config=configs/parity.py
Hardware:  2 CPU cores
Time:      72 min of trials in all, two at a time, with other work on the cores
Result:    16 rotated experts are 0.6 ± 0.9 points above 16 stored ones at the recipe's rates, 2.8 ± 0.9 above those at
           the tuned ones, and 0.1 ± 0.7 above a dense model of equal bytes (docs/accuracy.md)
"""

from typing import Any

import ml_collections

from configs import studies

TUNED: dict[str, dict[str, float]] = {
    "dense": {"learning_rate": 4.2e-3},
    "standard": {"learning_rate": 3e-3, "expert_multiplier": 3.0},
    "ternary": {"learning_rate": 3e-3, "expert_multiplier": 1.0},
    "butterfly": {"learning_rate": 3e-3, "expert_multiplier": 1.0},
}
"""The best on validation of `configs.parity_tuning`, over all beds and both its seeds."""
EQUAL_BYTES = {16: 64, 64: 231}
"""d_ff of the dense models whose FFNs have the bytes of the butterfly's mixture layers, to 1 %, by its experts."""


def _kind(family: str, **model: Any) -> studies.Fields:
    return {"model": {"family": family, **model}, "optimizer": TUNED[family]}


KINDS: studies.Alternatives = {
    "dense": _kind("dense"),
    **{f"dense, bytes of butterfly {number}": _kind("dense", d_ff=d_ff) for number, d_ff in EQUAL_BYTES.items()},
    **{
        f"{family} {number}": _kind(family, num_experts=number)
        for family in ("standard", "ternary", "butterfly")
        for number in (16, 64)
    },
    "standard 16, x 1": {"model": {"family": "standard"}, "optimizer": {"expert_multiplier": 1.0}},
}
"""The last has the recipe's rates, since the tuning's scores of stored experts are close to each other."""


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.ablation_training`."""
    return of_steps(2000, KINDS)


def of_steps(total_steps: int, kinds: studies.Alternatives) -> ml_collections.ConfigDict:
    """Returns the sweep of these kinds with trials of so many steps."""
    mixtures = ("standard 16", "standard 64", "standard 16, x 1", "butterfly 16")
    baselines = (*mixtures, *(f"dense, bytes of butterfly {number}" for number in EQUAL_BYTES))
    cases, compare = studies.cases(bed=studies.BEDS, kind=kinds), {"label": "kind", "baselines": baselines}
    config = studies.sweep(cases, range(10, 15), compare=compare)
    config.base.total_steps = total_steps
    config.grid.data = studies.SEED_OF_THE_RUN
    return config
