"""Are rotated experts as good as stored ones? All families on the test beds, equal steps and equal tuning.

Every seed has its own split of the images, the same for all kinds; no study before has used these seeds.

Command:   python -m experiments.sweep --config=configs/parity.py
Hardware:  2 CPU cores
Time:      not yet run
Result:    not yet run
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
STEPS: studies.Alternatives = {f"{steps} steps": {"total_steps": steps} for steps in (2000, 4000)}
"""Of the tuning, and twice as many: what takes longer to learn must not lose by it."""
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
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.ablation_training`."""
    baselines = ("standard 16", "standard 64", *(f"dense, bytes of butterfly {number}" for number in EQUAL_BYTES))
    cases, compare = studies.cases(bed=studies.BEDS, steps=STEPS, kind=KINDS), {"label": "kind", "baselines": baselines}
    config = studies.sweep(cases, range(10, 15), compare=compare)
    config.grid.data = studies.SEED_OF_THE_RUN
    return config
