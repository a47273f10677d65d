"""CIFAR-100: dense, standard, ternary and butterfly mixtures of 1 to 256 experts, three seeds each.

63 runs of 300 epochs, for accelerators. The largest, `standard` and `ternary` with 256 experts, hold 3.8 GB of
parameters, and as much in each of two moments and the gradient: too much for one chip of a v5e. A slice shares them
out: compiled for v5e:2x2, a training step takes 5.35 of each chip's 16.9 GB (`standard`; butterfly 0.70).

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
