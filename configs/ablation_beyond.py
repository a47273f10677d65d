r"""Beyond the paper: gains, shared angles, several prototypes, a dense model as teacher or as start.

Command:   python -m experiments.sweep --config=configs/teachers.py
           python -m experiments.sweep --config=configs/ablation_beyond.py
Hardware:  2 CPU cores
Time:      not yet run
Result:    not yet run
"""

import ml_collections

from configs import studies, teachers

VARIANTS: studies.Alternatives = {
    "base": {},
    "gain": {"model": {"output_gain": "expert"}},
    "2 prototypes": {"model": {"num_prototypes": 2}},
    "4 prototypes": {"model": {"num_prototypes": 4}},
    "4 pairs an angle": {"model": {"angle_group": 4}},
    "16 pairs an angle": {"model": {"angle_group": 16}},
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the study; sections as in `configs.ablation_training`."""
    beds = studies.of("digit_pairs", "photo_patches")
    config = studies.study(VARIANTS, beds, seeds=3)
    for bed, fields in beds.items():
        teacher = teachers.directory(bed)
        with_dense: studies.Alternatives = {
            "half taught": {"loss": {"distillation": 0.5, "teacher": teacher}},
            "starts from dense": {"start_from": teacher, "model": {"angle_init": 0.02}},
        }
        config.cases += studies.cases(bed={bed: fields}, variant=with_dense)
    return config
