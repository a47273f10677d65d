"""Rotated experts beside their rivals: accuracy against the bytes of the file, on two test beds.

Trained rivals are stored experts, stored ternary experts, low-rank experts and dense models, one of them with the bytes
of the butterfly's mixture layers as trained; dense models and stored experts are also compressed after training.
Methods that round give every family the same formats for what all have: attention, embedding, head, router; low-rank
matrices are rounded to nearest. Rates are those of an equal tuning (`configs.parity_tuning`), but for low-rank experts,
of rank 4, which take those of stored ones.

Command:   python -m experiments.sweep --config=configs/rivals.py
Hardware:  2 CPU cores
Time:      59 min, two trials at a time, with other work on the cores
Result:    docs/rivals.md
"""

from typing import Any

import ml_collections

from bvit_jax import compress_request
from configs import parity, studies

SEEDS = tuple(range(20, 25))
KINDS: studies.Alternatives = {
    "dense": parity.KINDS["dense"],
    "dense, bytes of butterfly 16": parity.KINDS["dense, bytes of butterfly 16"],
    **{f"{family} 16": parity.KINDS[f"{family} 16"] for family in ("standard", "ternary", "butterfly")},
    "low_rank 16": {"model": {"family": "low_rank", "rank": 4}, "optimizer": parity.TUNED["standard"]},
}
ROUNDED: tuple[dict[str, Any], ...] = tuple(
    {"method": method, "bits": bits} for bits in (8, 4, 2) for method in ("rounding", "quantise")
)
KEPT = (0.6, 0.4, 0.25)
_STEPS: tuple[dict[str, Any], ...] = tuple({"method": method} for method in compress_request.STEPS)
FACTORS: tuple[dict[str, Any], ...] = tuple(
    {"keep": keep, **how} for keep in KEPT for how in (*_STEPS, {"method": "mixed_rank", "bits": 8})
)
"""The last of each budget is rounded besides."""
PRUNED: tuple[dict[str, Any], ...] = tuple({"method": "prune", "keep": keep} for keep in KEPT)
MERGED: tuple[dict[str, Any], ...] = tuple({"method": "merge", "keep": keep} for keep in KEPT)
CALIBRATED = ROUNDED[1::2]


def get_config() -> ml_collections.ConfigDict:
    """Returns the sweep: as in `configs.parity`, with the compressions of each kind."""
    of = (
        ("dense", (*ROUNDED, *PRUNED, *FACTORS)),
        ("dense, bytes of butterfly 16", CALIBRATED),
        ("standard 16", (*ROUNDED, *PRUNED, *FACTORS, *MERGED)),
        ("ternary 16", CALIBRATED),
        ("butterfly 16", CALIBRATED),
        ("low_rank 16", CALIBRATED),
    )
    beds = studies.of("few_digits", "digit_pairs")
    cases = studies.cases(bed=beds, kind=KINDS)
    config = studies.sweep(cases, SEEDS, compress={"label": "kind", "of": of})
    config.grid.data = studies.SEED_OF_THE_RUN
    return config
