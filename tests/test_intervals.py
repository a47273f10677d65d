import math

import pytest

from bvit_jax.intervals import half_interval


@pytest.mark.parametrize(
    ("values", "half"),
    [
        # Mean 2, deviation sqrt((1 + 1) / 1) = 1.414, over sqrt(2) = 1; t(0.975, 1) = tan(0.475 pi) = 12.7062.
        ((1.0, 3.0), 12.7062),
        # Deviation sqrt((1 + 0 + 1) / 2) = 1 over sqrt(3); t(0.975, 2) = 4.30265.
        ((4.0, 5.0, 6.0), 4.30265 / math.sqrt(3)),
        # Deviation sqrt(4 x 1 / 4) = 1 over sqrt(5), one value in the middle; t(0.975, 4) = 2.77645.
        ((1.0, 1.0, 2.0, 3.0, 3.0), 2.77645 / math.sqrt(5)),
        ((0.7, 0.7, 0.7), 0.0),
    ],
)
def test_half_an_interval_by_hand(values: tuple[float, ...], half: float) -> None:
    assert half_interval(values) == pytest.approx(half, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("values", [(), (0.5,)])
def test_fewer_than_two_values_have_none(values: tuple[float, ...]) -> None:
    assert math.isnan(half_interval(values))
