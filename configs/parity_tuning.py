"""Equal tuning for all families before `configs.parity`: six settings each; the best on validation is chosen.

Dense models have six learning rates, the others three, with two multipliers for the experts' matrices. The seeds
are not those that are compared.

Command:   python -m experiments.sweep --config=configs/parity_tuning.py
Hardware:  2 CPU cores
Time:      54 min of trials in all, two at a time, with other work on the cores
Result:    dense 0.0042, standard 0.003 x 3, ternary 0.003 x 1, butterfly 0.003 x 1; the next best settings are 0.3 to
           0.9 points behind (docs/accuracy/parity_tuning.csv)
"""

import ml_collections

from configs import studies

RATES = (1.5e-3, 3e-3, 6e-3)
MORE_RATES = (7.5e-4, 1.5e-3, 2.1e-3, 3e-3, 4.2e-3, 6e-3)


def _setting(rate: float, **optimizer: float) -> studies.Fields:
    return {"optimizer": {"learning_rate": rate, **optimizer}}


OF_DENSE: studies.Alternatives = {f"{rate:g}": _setting(rate) for rate in MORE_RATES}
OF_MIXTURES: studies.Alternatives = {
    f"{rate:g} x {multiplier:g}": _setting(rate, expert_multiplier=multiplier)
    for rate in RATES
    for multiplier in (1.0, 3.0)
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.ablation_training`, and `choose`."""
    cases: studies.Cases = ()
    for family in ("dense", "standard", "ternary", "butterfly"):
        kind = {family: {"model": {"family": family}}}
        settings = OF_DENSE if family == "dense" else OF_MIXTURES
        cases += studies.cases(bed=studies.BEDS, family=kind, setting=settings)
    config = studies.sweep(cases, (100, 101), choose={"kind": "family", "setting": "setting"})
    config.grid.data = studies.SEED_OF_THE_RUN
    return config
