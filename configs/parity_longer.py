"""`configs.parity` with twice the steps, at the same rates: what takes longer to learn must not lose by it.

Without ternary stored experts, which take as long as stored floats and are not those that are asked about.

Command:   python -m experiments.sweep --config=configs/parity_longer.py
Hardware:  2 CPU cores
Time:      82 min of trials in all, two at a time, with other work on the cores
Result:    16 rotated experts are 0.1 ± 1.3 points below 16 stored ones at the recipe's rates, 0.8 ± 1.4 above those at
           the tuned ones, and 0.1 ± 0.9 below a dense model of equal bytes (docs/accuracy.md)
"""

import ml_collections

from configs import parity


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.ablation_training`."""
    return parity.of_steps(4000, {name: kind for name, kind in parity.KINDS.items() if not name.startswith("ternary")})
