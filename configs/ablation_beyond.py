"""Beyond the paper: gains, shared angles, several prototypes.

Command:   python -m experiments.sweep --config=configs/ablation_beyond.py
Hardware:  2 CPU cores
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import studies

VARIANTS: studies.Alternatives = {
    "base": {},
    "gain": {"model": {"output_gain": "expert"}},
    "2 prototypes": {"model": {"num_prototypes": 2}},
    "4 prototypes": {"model": {"num_prototypes": 4}},
    "4 pairs an angle": {"model": {"angle_group": 4}},
    "16 pairs an angle": {"model": {"angle_group": 16}},
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the study; sections as in `configs.ablation_training`."""
    return studies.study(VARIANTS, studies.of("digit_pairs", "photo_patches"), seeds=3)
