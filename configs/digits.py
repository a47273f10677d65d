"""Vision Transformers on scikit-learn's handwritten digits: 1,200 training, 197 validation, 400 test images of 8x8.

Command:   python -m experiments.train --config=configs/digits.py --workdir=runs/digits
           python -m experiments.train --config=configs/digits.py:standard,16 --workdir=runs/digits_standard
Hardware:  2 CPU cores
Time:      30 s for the first command
Result:    first command, seed 0: 97.00 % test accuracy; other families and seeds in configs/sweep_digits.py
"""

import ml_collections
from ml_collections import config_dict

SHAPE = ("image_size", "patch_size", "num_layers", "d_model", "d_ff", "num_heads")


def parse(argument: str, defaults: tuple[str, str, str]) -> tuple[str, int, str]:
    """Reads `FAMILY[,EXPERTS[,FORM]]`; what it leaves out comes from `defaults`. Names are checked by `resolve`."""
    given = tuple(part.strip() for part in argument.split(","))
    family, experts, form = given[:3] + defaults[len(given) :]
    if len(given) > 3 or not experts.isdigit():
        raise SystemExit(
            f"error: config argument {argument!r}: it must be FAMILY[,EXPERTS[,FORM]] such as butterfly,16"
        )
    return family, int(experts), form


def choose(config: ml_collections.ConfigDict, argument: str, defaults: tuple[str, str, str]) -> None:
    """Sets kind and number of experts as `parse` reads them; each token gets two of them, or the only one."""
    family, experts, form = parse(argument, defaults)
    config.model.update({"family": family, "num_experts": experts, "form": form, "top_k": min(2, max(experts, 1))})


def get_config(argument: str = "butterfly,8") -> ml_collections.ConfigDict:
    """Returns the configuration; `argument` is `FAMILY[,EXPERTS[,FORM]]`."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.total_steps = 2000
    config.batch_size = 32
    config.log_every = 50
    config.eval_every = 250
    config.keep_every = 4
    config.max_skipped_steps = 0
    config.start_from = ""

    config.data = ml_collections.ConfigDict(
        {
            "name": "digits",
            # Of a set that leaves them free, such as the test beds.
            "num_train": config_dict.placeholder(int),
            "seed": config_dict.placeholder(int),
        }
    )
    config.augment = ml_collections.ConfigDict(
        {
            "crop": "shift",
            "max_shift": 1,
            "shift_probability": 0.25,
            "min_area": 1.0,
            "flip_probability": 0.0,
            "randaugment_ops": 0,
            "randaugment_magnitude": 0.0,
            "randaugment_deviation": 0.0,
            "randaugment_probability": 0.0,
            "erase_probability": 0.0,
            "noise": 0.05,
            "mixup": 0.0,
            "cutmix": 0.0,
        }
    )
    config.model = ml_collections.ConfigDict(
        {
            "variant": "tiny",
            "family": "butterfly",
            "form": "separate",
            "num_experts": 8,
            "top_k": 2,
            "moe_layers": "every",
            "rank": 4,
            "rotations": "all",
            "num_stages": 2,
            "stride_order": "descending",
            "ternary_scale": "row",
            "angle_bits": 32,
            "router_precision": "float32",
            "angle_init": 0.1,
            "router_noise": 0.0,
            "attention_dropout": 0.0,
            "stochastic_depth": 0.0,
            "dispatch": "auto",
            "compute_dtype": "float32",
            # Each of these replaces the variant's own where it is set.
            **{name: config_dict.placeholder(int) for name in SHAPE},
        }
    )
    config.loss = ml_collections.ConfigDict(
        {"label_smoothing": 0.1, "load_balance": 0.01, "router_z": 0.001, "smoothness": 0.01}
    )
    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 3e-3,
            "final_learning_rate": 0.0,
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "ema_decay": 0.0,
            "expert_multiplier": config_dict.placeholder(float),  # the family's own where it is not set
            "angle_multiplier": 1.0,
            "router_multiplier": 1.0,
        }
    )
    choose(config, argument, ("butterfly", "8", "separate"))
    return config
