"""Is it worth starting from a dense model? Against training as long, and against the same start for other families.

A run that starts from a dense one has its 2,000 steps behind it, so each family is trained for twice the steps as well.
All start from the dense run of seed 0: the intervals leave out what another one would change.

Command:   python -m experiments.sweep --config=configs/dense_runs.py
           python -m experiments.sweep --config=configs/ablation_start.py
Hardware:  2 CPU cores
Time:      61 min of trials in all, two at a time, with other work on the cores
Result:    rotated experts are 0.2 ± 1.6 points above twice the steps; for stored ones the interval is too wide to tell
           (docs/accuracy.md)
"""

import ml_collections

from configs import dense_runs, studies

FAMILIES: studies.Alternatives = {
    family: {"model": {"family": family, "angle_init": 0.02}} for family in ("butterfly", "standard", "dense")
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the study; sections as in `configs.ablation_training`."""
    beds = studies.of("digit_pairs", "photo_patches")
    cases: studies.Cases = ()
    for bed, fields in beds.items():
        starts: studies.Alternatives = {
            "": {},
            ", twice the steps": {"total_steps": 4000},
            ", from dense": {"start_from": dense_runs.directory(bed)},
        }
        kinds = {
            family + start: studies.merged(FAMILIES[family], starts[start]) for family in FAMILIES for start in starts
        }
        cases += studies.cases(bed={bed: fields}, variant=kinds)
    baselines = ("butterfly, twice the steps", "dense, from dense")
    return studies.sweep(cases, range(3), compare={"label": "variant", "baselines": baselines})
