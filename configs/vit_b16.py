"""A ViT-B/16 of mixtures at the size of ImageNet: 12 layers, d_model 768, d_ff 3072, 224 x 224 pixels, 1,000 classes.

For slices; the images are procedural, 0.8 GB of them on each host, to run the shape end to end. What it takes on slices
is in docs/tpu.md.

Command:   python -m experiments.train --config=configs/vit_b16.py --workdir=runs/vit_b16
Hardware:  not yet run
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import digits, paper


def get_config(argument: str = "butterfly,64,separate") -> ml_collections.ConfigDict:
    """Returns the configuration; `argument` is `FAMILY[,EXPERTS[,FORM]]`."""
    config = paper.get_config()
    config.batch_size = 4096
    config.total_steps = 90_000
    config.data.image_size = 224
    config.data.num_classes = 1000
    config.augment.max_shift = 16
    config.data.num_train = 4096
    config.data.num_validation = 512
    config.data.num_test = 512
    digits.choose(config, argument, ("butterfly", "64", "separate"))
    config.model.variant = "vit_b16"
    config.model.compute_dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10_000
    return config
