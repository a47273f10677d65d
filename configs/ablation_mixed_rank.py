"""Mixed-rank compression of dense models, step by step: digits and the three test beds, five seeds.

Command:   python -m experiments.sweep --config=configs/ablation_mixed_rank.py
Hardware:  2 CPU cores
Time:      28 min of trials in all, two at a time, with other work on the cores
Result:    digits with 60 % fewer numbers: 98.05 -> 97.35 %, 0.70 ± 0.40 points lost (docs/rivals.md)
"""

import ml_collections

from bvit_jax import compress_request
from configs import parity, studies

KEPT = (0.8, 0.6, 0.4, 0.25)
BEDS: studies.Alternatives = {
    "digits": {},
    **{bed: studies.merged(fields, {"data": {"seed": -1}}) for bed, fields in studies.BEDS.items()},
}
"""Digits are dealt once; of the others every seed has its own split of the images."""


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep: dense models as in `configs.parity`, each compressed to every budget by every step."""
    steps = tuple({"method": method, "keep": keep} for keep in KEPT for method in compress_request.STEPS)
    cases = studies.cases(bed=BEDS, kind={"dense": parity.KINDS["dense"]})
    return studies.sweep(cases, range(20, 25), compress={"label": "kind", "of": (("dense", steps),)})
