"""How tokens meet rotated experts: how many, with what noise, under which losses.

Command:   python -m experiments.sweep --config=configs/ablation_routing.py
Hardware:  2 CPU cores
Time:      25 min of trials in all, two at a time
Result:    ten times the smoothness loses 1.1 ± 0.9 points, no load balance 0.9 ± 0.4; the rest cannot be told from the
           base (docs/accuracy.md)
"""

import ml_collections

from configs import studies

VARIANTS: studies.Alternatives = {
    "base": {},
    "top 1": {"model": {"top_k": 1}},
    "top 4": {"model": {"top_k": 4}},
    "router noise 0.3": {"model": {"router_noise": 0.3}},
    "router noise 1": {"model": {"router_noise": 1.0}},
    "no load balance": {"loss": {"load_balance": 0.0}},
    "load balance 0.1": {"loss": {"load_balance": 0.1}},
    "no smoothness": {"loss": {"smoothness": 0.0}},
    "smoothness 0.1": {"loss": {"smoothness": 0.1}},
    "router rate x 0.1": {"optimizer": {"router_multiplier": 0.1}},
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the study; sections as in `configs.ablation_training`."""
    return studies.study(VARIANTS, studies.of("digit_pairs", "photo_patches"), seeds=3)
