"""Equal tuning for all families before `configs.parity`: six settings each, by accuracy on validation.

Dense models have six learning rates, the others three, with two multipliers for the experts' matrices. The seeds
are not those that are compared.

Command:   python -m experiments.sweep --config=configs/parity_tuning.py
Hardware:  2 CPU cores
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import studies

RATES = (1.5e-3, 3e-3, 6e-3)
MORE_RATES = (7.5e-4, 1.5e-3, 2.1e-3, 3e-3, 4.2e-3, 6e-3)


def settings() -> studies.Alternatives:
    """Returns the settings by name."""
    found = {f"dense, {rate:g}": _setting("dense", rate) for rate in MORE_RATES}
    for family in ("standard", "ternary", "butterfly"):
        for rate in RATES:
            for multiplier in (1.0, 3.0):
                found[f"{family}, {rate:g} x {multiplier:g}"] = _setting(family, rate, expert_multiplier=multiplier)
    return found


def _setting(family: str, rate: float, **optimizer: float) -> studies.Fields:
    return {"model": {"family": family}, "optimizer": {"learning_rate": rate, **optimizer}}


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.ablation_training`."""
    config = ml_collections.ConfigDict()
    config.base = studies.base()
    config.grid = ml_collections.ConfigDict({"seed": (100, 101)})
    config.cases = studies.cases(bed=studies.BEDS, setting=settings())
    return config
