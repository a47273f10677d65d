"""CIFAR-100 from scratch: ViT-Lite-7/4 with d_ff 1024, 300 epochs, dense or with mixtures in every layer.

The recipe is that of Compact Transformers (Hassani et al., arXiv 2104.05704; github.com/SHI-Labs/Compact-Transformers,
configs/datasets/cifar100.yml), which reports 73.94 % for the dense model with d_ff 512: AdamW 6e-4 to 1e-5, decay 0.06,
batch 128, 10 epochs of warm-up, cuts of 80 to 100 % of the area, mirroring, RandAugment (2 operations, magnitude
9), Mixup 0.8 or CutMix 1.0, random erasing 0.25, smoothing 0.1, attention dropout 0.1, stochastic depth 0.1. Not as
there: d_ff is 1024, the norms stand before attention and FFN, all of attention has biases, positions start small;
5,000 of the 50,000 training images are held out for selection; pixels go to -1..1, not by mean and deviation;
interpolation is linear, what comes in at edges grey; warm-up begins at 0; the norm of the gradient is clipped at 1; no
10 epochs at the last learning rate are added.

Prepare:   python -m experiments.prepare_data --dataset=cifar100 --data_dir=DIR
Command:   python -m experiments.train --config=configs/cifar100.py:butterfly,64 --workdir=runs/cifar100 --data_dir=DIR
           families: dense, standard,64, ternary,64, butterfly,64[,separate|tied]; all in configs/sweep_cifar100.py
Hardware:  not yet run; compiled for v5e:2x2, training with 64 experts takes of each chip's 16.9 GB at most 0.55
           (butterfly separate), 2.32 (standard), 2.79 (ternary), 0.64 (dense), by
           python -m experiments.compile_tpu --config=configs/cifar100.py:butterfly,64 --topology=v5e:2x2 --experts=64
           --families=butterfly,standard,ternary,dense --out=runs/tpu
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import digits

TRAIN_IMAGES, VALIDATION_IMAGES = 45_000, 5_000
EPOCHS, BATCH_SIZE = 300, 128


def get_config(argument: str = "butterfly,64") -> ml_collections.ConfigDict:
    """Returns the configuration; `argument` is `FAMILY[,EXPERTS[,FORM]]`."""
    return recipe("cifar100", argument)


def recipe(name: str, argument: str) -> ml_collections.ConfigDict:
    """Returns the configuration for `cifar10` or `cifar100`."""
    config = digits.get_config()
    config.total_steps = EPOCHS * TRAIN_IMAGES // BATCH_SIZE
    config.batch_size = BATCH_SIZE
    config.log_every = 100
    config.eval_every = 5 * TRAIN_IMAGES // BATCH_SIZE
    config.keep_every = 12
    config.data = ml_collections.ConfigDict(
        {
            "name": name,
            "reading": "memory",
            "num_train": TRAIN_IMAGES,
            "num_validation": VALIDATION_IMAGES,
            "num_test": 10_000,
            "seed": 0,
        }
    )
    config.augment.update(
        {
            "crop": "resized",
            "max_shift": 0,
            "shift_probability": 0.0,
            "min_area": 0.8,
            "flip_probability": 0.5,
            "randaugment_ops": 2,
            "randaugment_magnitude": 9.0,
            "randaugment_deviation": 0.5,
            "randaugment_probability": 0.5,
            "erase_probability": 0.25,
            "noise": 0.0,
            "mixup": 0.8,
            "cutmix": 1.0,
        }
    )
    digits.choose(config, argument, ("butterfly", "64", "separate"))
    config.model.update({"variant": "paper", "attention_dropout": 0.1, "stochastic_depth": 0.1})
    config.loss.label_smoothing = 0.1
    config.optimizer.learning_rate = 6e-4
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.weight_decay = 0.06
    config.optimizer.warmup_steps = config.get_ref("total_steps") // 30  # 10 of 300 epochs, however long the run
    return config
