"""How rotated experts are best trained: start and learning rates of angles and prototypes, decay.

Command:   python -m experiments.sweep --config=configs/ablation_training.py
Hardware:  2 CPU cores
Time:      28 min of trials in all, two at a time, with other work on the cores
Result:    angles spread over the circle lose 1.8 ± 1.3 points, prototypes at 10 times the rate 4.9 ± 3.7; the rest
           cannot be told from the base over both beds (docs/accuracy.md)
"""

import math

import ml_collections

from configs import studies

VARIANTS: studies.Alternatives = {
    "base": {},
    "angles start at 0": {"model": {"angle_init": 0.0}},
    "angles start in 0.02": {"model": {"angle_init": 0.02}},
    "angles start in 0.5": {"model": {"angle_init": 0.5}},
    "angles start in pi": {"model": {"angle_init": math.pi}},
    "angle rate x 0.01": {"optimizer": {"angle_multiplier": 0.01}},
    "angle rate x 0.1": {"optimizer": {"angle_multiplier": 0.1}},
    "angle rate x 3": {"optimizer": {"angle_multiplier": 3.0}},
    "prototype rate x 1": {"optimizer": {"expert_multiplier": 1.0}},
    "prototype rate x 10": {"optimizer": {"expert_multiplier": 10.0}},
    "no weight decay": {"optimizer": {"weight_decay": 0.0}},
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the study; sections as in `configs.sweep_digits`, and `cases`, `compare`."""
    return studies.study(VARIANTS, studies.of("digit_pairs", "photo_patches"), seeds=3)
