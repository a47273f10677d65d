"""How few bits do angles and router need? Digits, 64 experts, trained through the same rounding as the exported file.

Command:   python -m experiments.sweep --config=configs/sweep_bits.py
Hardware:  2 CPU cores
Time:      62 min of trials, two at a time with other work on the cores, run in two parts
Result:    test accuracy over ten seeds, all 18 settings: 96.4 to 97.7 %; the table is in README.md
"""

import ml_collections

from configs import digits, sweep_digits


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.sweep_digits`."""
    config = sweep_digits.get_config()
    config.base = digits.get_config("butterfly,64")
    config.grid = ml_collections.ConfigDict(
        {
            "seed": tuple(range(10)),
            "model": {
                "family": ("standard", "butterfly"),
                "form": ("separate", "tied"),
                "angle_bits": (32, 8, 6, 4),
                "router_precision": ("float32", "int8"),
            },
        }
    )
    return config
