"""ImageNet-1k from scratch on slices: ViT-S/16, 90 epochs, dense or with mixtures in every layer.

The recipe is that of "Better plain ViT baselines for ImageNet-1k" (Beyer et al., arXiv 2205.01580; big_vision's
vit_s16_i1k.py), which reports 76.5 % for the dense model: batch 1024, Adam 1e-3 with 10,000 steps of warm-up, weight
decay 0.1 of the learning rate, cuts of 5 to 100 % of the area, mirroring, RandAugment (2 operations, magnitude 10),
Mixup 0.2, 1 % of the training images held out for selection. Not as there: a class token and learned positions; images
are stored with 256 pixels a side, cut to the square in the middle before cuts are drawn from them; RandAugment's
operations are timm's.

Prepare:   where TensorFlow is installed, with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in
           DIR/downloads/manual: tfds build imagenet2012 --data_dir=DIR --file_format=array_record
           python -m experiments.prepare_data --dataset=imagenet2012 --data_dir=DIR, which checks it
Command:   python -m experiments.train --config=configs/imagenet_s16.py:butterfly,64 --workdir=runs/imagenet
           --data_dir=DIR, on every host of a slice
Hardware:  not yet run; compiled for v5e:4x4, training takes of each chip's 16.9 GB at most 5.0 (butterfly separate, 64
           experts), 6.5 (dense), by
           python -m experiments.compile_tpu --config=configs/imagenet_s16.py:butterfly,64 --topology=v5e:4x4
           --experts=64 --families=butterfly,dense --out=runs/tpu
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import cifar100

TRAIN_IMAGES, VALIDATION_IMAGES = 1_268_167, 13_000
EPOCHS, BATCH_SIZE = 90, 1024


def get_config(argument: str = "butterfly,64") -> ml_collections.ConfigDict:
    """Returns the configuration; `argument` is `FAMILY[,EXPERTS[,FORM]]`."""
    config = cifar100.get_config(argument)
    config.total_steps = EPOCHS * TRAIN_IMAGES // BATCH_SIZE
    config.batch_size = BATCH_SIZE
    config.eval_every = 2_500
    config.keep_every = 10
    config.data = ml_collections.ConfigDict(
        {
            "name": "imagenet2012",
            "reading": "stream",
            "test_split": "validation",
            "stored_size": 256,
            "image_size": 224,
            "channels": 3,
            "num_classes": 1000,
            "num_train": TRAIN_IMAGES,
            "num_validation": VALIDATION_IMAGES,
            "num_test": 50_000,
            "seed": 0,
        }
    )
    config.augment.update(
        {
            "min_area": 0.05,
            "randaugment_magnitude": 10.0,
            "randaugment_deviation": 0.0,
            "randaugment_probability": 1.0,
            "erase_probability": 0.0,
            "mixup": 0.2,
            "cutmix": 0.0,
        }
    )
    config.model.update({"variant": "vit_s16", "compute_dtype": "bfloat16"})
    config.model.update({"attention_dropout": 0.0, "stochastic_depth": 0.0})
    config.loss.label_smoothing = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.weight_decay = 0.1
    steps = config.get_ref("total_steps")
    config.optimizer.warmup_steps = steps * 10_000 // config.total_steps  # in proportion, however long the run
    return config
