"""`configs.parity` with twice the steps, at the same rates: what takes longer to learn must not lose by it.

Without ternary stored experts, which are the slowest and not those that are asked about.

Command:   python -m experiments.sweep --config=configs/parity_longer.py
Hardware:  2 CPU cores
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import parity


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.ablation_training`."""
    return parity.of_steps(4000, {name: kind for name, kind in parity.KINDS.items() if not name.startswith("ternary")})
