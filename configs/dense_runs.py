"""Dense models of the test beds, for `configs.ablation_start`, whose runs start from them.

Command:   python -m experiments.sweep --config=configs/dense_runs.py
Hardware:  2 CPU cores
Time:      2 min
Result:    test accuracy, seed 0: few_digits 95.33 %, digit_pairs 96.60 %, photo_patches 71.91 %
"""

import ml_collections

from bvit_jax import config as configuration
from configs import studies

DENSE = {"model": {"family": "dense"}}


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep; sections as in `configs.ablation_training`."""
    return studies.sweep(studies.cases(bed=studies.BEDS, kind={"dense": DENSE}), (0,))


def directory(bed: str) -> str:
    """Returns where the sweep leaves the run of a bed, from the root of the repository."""
    fields = studies.merged(studies.BEDS[bed], DENSE)
    run = configuration.resolve(studies.merged(studies.base().to_dict(), fields))
    return f"runs/dense_runs/trials/{run.digest()}"
