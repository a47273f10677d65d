"""CIFAR-10 from scratch, by the recipe of `configs.cifar100`, whose source reports 93.57 % for the dense model.

Prepare:   python -m experiments.prepare_data --dataset=cifar10 --data_dir=DIR
Command:   python -m experiments.train --config=configs/cifar10.py:butterfly,64 --workdir=runs/cifar10 --data_dir=DIR
Hardware:  not yet run
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import cifar100


def get_config(argument: str = "butterfly,64") -> ml_collections.ConfigDict:
    """Returns the configuration; `argument` is `FAMILY[,EXPERTS[,FORM]]`."""
    return cifar100.recipe("cifar10", argument)
