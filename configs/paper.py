"""The shape in which the ButterflyViT paper reports its memory: 7 mixture layers, d_model 256, d_ff 1024, 64 experts.

Angles and router are trained through the rounding of the exported file, 8 bits each. The images are procedural, of the
size and number of classes of CIFAR-100, to run the shape end to end; the memory figures need none
(`python -m experiments.memory --config=configs/paper.py --out=runs/memory`).

Command:   python -m experiments.train --config=configs/paper.py --workdir=runs/paper
Hardware:  not yet run
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import digits


def get_config(argument: str = "butterfly,64,tied") -> ml_collections.ConfigDict:
    """Returns the configuration; `argument` is `FAMILY[,EXPERTS[,FORM]]`. `tied` is the form of the paper's formula."""
    config = digits.get_config()
    config.total_steps = 20_000
    config.batch_size = 128
    config.log_every = 100
    config.eval_every = 1000
    config.keep_every = 5
    config.data = ml_collections.ConfigDict(
        {
            "name": "procedural",
            "image_size": 32,
            "channels": 3,
            "num_classes": 100,
            "num_train": 10_000,
            "num_validation": 1_000,
            "num_test": 2_000,
            "seed": 0,
        }
    )
    config.augment.max_shift = 4
    config.augment.shift_probability = 1.0
    config.augment.noise = 0.0
    config.model.variant = "paper"
    digits.choose(config, argument, ("butterfly", "64", "tied"))
    config.model.angle_bits = 8
    config.model.router_precision = "int8"
    config.optimizer.learning_rate = 6e-4
    config.optimizer.weight_decay = 0.06
    config.optimizer.warmup_steps = 1000
    return config
