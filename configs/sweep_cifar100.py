"""CIFAR-100: dense, standard, ternary and butterfly mixtures of 1 to 256 experts, three seeds each.

Prepare:   python -m experiments.prepare_data --dataset=cifar100 --data_dir=DIR
Command:   python -m experiments.sweep --config=configs/sweep_cifar100.py --workdir=runs/sweep_cifar100 --data_dir=DIR
Hardware:  not yet run
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import cifar100, paper


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.sweep_digits`."""
    config = ml_collections.ConfigDict()
    config.base = cifar100.get_config()
    config.grid = ml_collections.ConfigDict(
        {
            "seed": (0, 1, 2),
            "model": {
                "family": ("dense", "standard", "ternary", "butterfly"),
                "form": ("separate", "tied"),
                "num_experts": (1, 4, 16, 64, 256),
            },
        }
    )
    config.memory_base = paper.get_config()
    return config
