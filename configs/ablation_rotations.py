"""What rotated experts are made of: form, sides, depth and order of rotations, angles' bits, ternary or not.

Command:   python -m experiments.sweep --config=configs/ablation_rotations.py
Hardware:  2 CPU cores
Time:      48 min of trials in all, two at a time, with other work on the cores
Result:    `tied` loses 3.0 ± 1.3 points, without hidden rotations 3.2 ± 1.9, `reference` 3.6 ± 1.0; the rest cannot be
           told from the base over both beds (docs/accuracy.md)
"""

import ml_collections

from configs import studies

VARIANTS: studies.Alternatives = {
    "base": {},
    "1 stage": {"model": {"num_stages": 1}},
    "4 stages": {"model": {"num_stages": 4}},
    "full depth": {"model": {"num_stages": 7}},
    "ascending": {"model": {"stride_order": "ascending"}},
    "outer": {"model": {"rotations": "outer"}},
    "outer, full depth": {"model": {"rotations": "outer", "num_stages": 6}},
    "tied": {"model": {"form": "tied"}},
    "tied, outer": {"model": {"form": "tied", "rotations": "outer"}},
    "reference": {"model": {"form": "reference"}},
    "8-bit angles": {"model": {"angle_bits": 8}},
    "4-bit angles": {"model": {"angle_bits": 4}},
    "one scale": {"model": {"ternary_scale": "tensor"}},
    "float prototypes": {"model": {"ternary_scale": "none"}},
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the study; sections as in `configs.ablation_training`."""
    return studies.study(VARIANTS, studies.of("digit_pairs", "photo_patches"), seeds=3)
