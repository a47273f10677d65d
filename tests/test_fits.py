import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import fits

LINEAR: fits.Law = "linear in log2 E"
POWER: fits.Law = "power of E"
LAWS = [LINEAR, POWER]
T_1 = 12.7062
"""t(0.975, 1) = tan(0.475 pi)."""


@given(
    st.floats(0.1, 3),
    st.floats(-1, 1),
    st.lists(st.integers(1, 256), min_size=3, max_size=8).filter(lambda experts: len(set(experts)) > 1),
)
@settings(max_examples=25, deadline=None)
def test_exact_laws_are_found_again(constant: float, slope: float, experts: list[int]) -> None:
    for law in LAWS:
        values = [constant + slope * math.log2(e) if law == LINEAR else constant * e**slope for e in experts]
        found = fits.fit(experts, values, law)
        assert (found.law, found.runs) == (law, len(experts))
        assert (found.constant, found.slope) == pytest.approx((constant, slope), rel=1e-7, abs=1e-7)
        assert found.spread == pytest.approx(0, abs=1e-7)
        np.testing.assert_allclose(found.at(np.array(experts)), values, rtol=1e-6, atol=1e-6)


def test_powers_of_experts_in_between() -> None:
    # 3 sqrt(E): 6 of 4 experts, 12 of 16; the law has 9 of 9 and 3 of 1.
    found = fits.fit([4, 16], [6, 12], POWER)
    assert (found.constant, found.slope) == pytest.approx((3, 0.5))
    np.testing.assert_allclose(found.at(np.array([1, 9, 16])), [3, 9, 12])
    # 0.5 + 0.1 log2 E.
    found = fits.fit([4, 16], [0.7, 0.9], LINEAR)
    assert (found.constant, found.slope) == pytest.approx((0.5, 0.1))
    np.testing.assert_allclose(found.at(np.array([1, 2, 16])), [0.5, 0.6, 0.9])


def by_hand(law: fits.Law) -> fits.Fit:
    """1, 2 and 4 at log2 E = 1, 2 and 3, or their exponentials.

    Means 2 and 7/3; sum of squares of log2 E 1 + 0 + 1 = 2, of products 4/3 + 0 + 5/3 = 3: slope 3/2, constant
    7/3 - 3 = -2/3. Residuals 1/6, -1/3, 1/6, whose squares have the sum 1/6, of one degree of freedom.
    """
    values = np.array([1.0, 2.0, 4.0])
    return fits.fit([2, 4, 8], np.exp(values) if law == POWER else values, law)


def test_a_line_by_hand() -> None:
    found = by_hand(LINEAR)
    assert (found.constant, found.slope) == pytest.approx((-2 / 3, 3 / 2))
    assert found.spread == pytest.approx(math.sqrt(1 / 6))
    assert (found.centre, found.square_sum) == pytest.approx((2, 2))
    # Standard error of the slope: spread / sqrt(2).
    assert found.interval == pytest.approx(T_1 * math.sqrt(1 / 6) / math.sqrt(2), rel=1e-5)


def test_a_power_by_hand() -> None:
    # exp(-2/3 + 3/2 log2 E) = exp(-2/3) E^(3/2 / log 2).
    found, line = by_hand(POWER), by_hand(LINEAR)
    assert (found.constant, found.slope) == pytest.approx((math.exp(-2 / 3), 1.5 / math.log(2)))
    assert found.interval == pytest.approx(line.interval / math.log(2))
    assert (found.spread, found.centre, found.square_sum) == pytest.approx((line.spread, 2, 2))


def test_bands_by_hand() -> None:
    experts = np.array([2, 4, 8, 16])
    # At the mean, log2 E = 2: t s / sqrt(3). Further off: t s sqrt(1/3 + (log2 E - 2)^2 / 2).
    half = T_1 * math.sqrt(1 / 6) * np.sqrt([1 / 3 + 1 / 2, 1 / 3, 1 / 3 + 1 / 2, 1 / 3 + 4 / 2])
    middle = np.array([5 / 6, 7 / 3, 23 / 6, 16 / 3])
    np.testing.assert_allclose(by_hand(LINEAR).at(experts), middle)
    np.testing.assert_allclose(by_hand(LINEAR).band(experts), (middle - half, middle + half), rtol=1e-5)
    np.testing.assert_allclose(by_hand(POWER).at(experts), np.exp(middle))
    np.testing.assert_allclose(by_hand(POWER).band(experts), np.exp((middle - half, middle + half)), rtol=1e-4)


def slow_line(x: list[float], y: list[float]) -> tuple[float, float, float, float]:
    """Constant, slope, standard error of the slope and residual deviation, as textbooks write them."""
    n, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    squares = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / squares
    constant = mean_y - slope * mean_x
    spread = math.sqrt(sum((b - constant - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (n - 2))
    return constant, slope, spread / math.sqrt(squares), spread


@pytest.mark.parametrize("law", LAWS)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_intervals_are_those_of_textbooks(law: fits.Law, seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = [4, 4, 4, 8, 8, 16, 64, 64, *(rng.integers(1, 100, 2).tolist())]
    values = rng.uniform(0.5, 2, 10)
    found = fits.fit(experts, values, law)
    targets = [math.log(value) if law == POWER else float(value) for value in values]
    constant, slope, error, spread = slow_line([math.log2(e) for e in experts], targets)
    unit = math.log(2) if law == POWER else 1
    assert (found.runs, found.spread) == (10, pytest.approx(spread))
    assert found.constant == pytest.approx(math.exp(constant) if law == POWER else constant)
    assert found.slope == pytest.approx(slope / unit)
    assert found.interval == pytest.approx(2.306004 * error / unit, rel=1e-6)  # t(0.975, 8)


@pytest.mark.parametrize("law", LAWS)
def test_two_runs_have_a_law_but_no_interval(law: fits.Law) -> None:
    found = fits.fit([2, 8], [1.0, 2.0], law)
    np.testing.assert_allclose(found.at(np.array([2, 8])), [1, 2])
    assert (found.runs, math.isnan(found.interval), math.isnan(found.spread)) == (2, True, True)
    assert np.isnan(found.band(np.array([2, 4]))).all()


@pytest.mark.parametrize("law", LAWS)
def test_runs_that_are_all_alike_have_no_slope_for_certain(law: fits.Law) -> None:
    found = fits.fit([2, 4, 8, 8], [0.5] * 4, law)
    assert (found.constant, found.slope, found.spread) == pytest.approx((0.5, 0, 0), abs=1e-12)
    np.testing.assert_allclose(found.band(np.array([2, 16])), 0.5)
    assert found.interval == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_plain_numbers_come_back(law: fits.Law) -> None:
    found = dataclasses.asdict(fits.fit(np.array([2, 4, 8]), np.array([1.0, 2.0, 2.5]), law))
    for name in ("constant", "slope", "interval", "spread", "centre", "square_sum"):
        assert isinstance(found[name], float), name


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("experts", "count"), [([], 0), ([4], 1), ([4, 4, 4], 1)])
def test_one_number_of_experts_has_no_law(law: fits.Law, experts: list[int], count: int) -> None:
    with pytest.raises(ValueError, match=f"^the runs have {count} number of experts; a law needs two at least$"):
        fits.fit(experts, [0.5] * len(experts), law)


@pytest.mark.parametrize("least", [0.0, -0.25])
def test_a_power_law_needs_positive_values(least: float) -> None:
    with pytest.raises(ValueError, match=f"^a power law needs positive values; the least is {least}$"):
        fits.fit([2, 4, 8], [1.0, least, 2.0], POWER)
    assert fits.fit([2, 4, 8], [1.0, least, 2.0], LINEAR).slope == pytest.approx(0.5)


@pytest.mark.parametrize("law", LAWS)
def test_intervals_and_bands_hold_the_truth_95_times_in_100(law: fits.Law) -> None:
    experts = np.repeat([2, 4, 16], 2)
    rng, draws, at = np.random.default_rng(0), 300, np.array([8])
    slope = 0.03 if law == LINEAR else -0.2
    held, in_band = 0, 0
    for _ in range(draws):
        noise = 0.05 * rng.normal(size=6)
        if law == LINEAR:
            values, truth = 0.6 + slope * np.log2(experts) + noise, 0.6 + slope * 3
        else:
            values, truth = 1.5 * experts**slope * np.exp(noise), 1.5 * 8**slope
        found = fits.fit(experts, values, law)
        low, high = found.band(at)
        held += abs(found.slope - slope) < found.interval
        in_band += low[0] < truth < high[0]
    assert 0.92 < held / draws < 0.98
    assert 0.92 < in_band / draws < 0.98


def run(series: str, experts: int, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    """A row of results, of which the NLL is 2 E^(-1/2) and bytes are 100 E and 50 E."""
    usual = {"test_nll": None if accuracy is None else 2 * experts**-0.5, "bytes_full": 100 * experts}
    family = {"family": series.split()[0], "bytes_full_ffn": 50 * experts}
    return {"series": series, "num_experts": experts, "test_accuracy": accuracy, **usual, **family} | changes


def test_each_curve_of_two_numbers_of_experts_has_its_laws() -> None:
    results = pd.DataFrame(
        [
            *(run("standard", e, 0.5 + 0.1 * math.log2(e)) for e in (1, 2, 4)),
            run("butterfly tied", 4, 0.5),
            run("butterfly tied", 8, 0.75),
            run("butterfly tied", 16, None, bytes_full=10**9),  # has no result
            run("ternary", 4, 0.5),  # has no curve yet, whether or not another run is there
            run("ternary", 4, 0.75),
            run("ternary", 8, None),
            *(run("dense", e, 0.5) for e in (1, 2)),
        ]
    )
    found = fits.series_fits(results)
    columns = ["test_accuracy", "test_nll", "bytes_full", "bytes_full_ffn"]
    assert list(found) == [(series, column) for series in ("standard", "butterfly tied") for column in columns]
    for (series, column), one in found.items():
        assert one.runs == (3 if series == "standard" else 2)
        assert one.law == (LINEAR if column == "test_accuracy" else POWER)
    laws = {key: (one.constant, one.slope) for key, one in found.items()}
    assert laws["standard", "test_accuracy"] == pytest.approx((0.5, 0.1))
    assert laws["butterfly tied", "test_accuracy"] == pytest.approx((0, 0.25))
    assert laws["butterfly tied", "test_nll"] == pytest.approx((2, -0.5))
    assert laws["butterfly tied", "bytes_full"] == pytest.approx((100, 1))
    assert laws["butterfly tied", "bytes_full_ffn"] == pytest.approx((50, 1))


@pytest.mark.parametrize("nll", [0.0, None, math.inf])
def test_values_that_no_power_law_fits_have_none(nll: float | None) -> None:
    results = pd.DataFrame([run("standard", 2, 0.5), run("standard", 4, 1.0, test_nll=nll)])
    assert [column for _, column in fits.series_fits(results)] == ["test_accuracy", "bytes_full", "bytes_full_ffn"]


def test_where_nothing_has_finished_nothing_is_fitted() -> None:
    assert fits.series_fits(pd.DataFrame([run("standard", e, None) for e in (2, 4)])) == {}


def test_the_table_of_fits_has_a_row_each() -> None:
    found = {("standard", "test_nll"): by_hand(POWER), ("low_rank", "test_accuracy"): by_hand(LINEAR)}
    table = fits.fit_table(found)
    assert list(table) == ["series", "of", "law", "constant", "slope", "interval", "runs"]
    expected = [[*key, one.law, one.constant, one.slope, one.interval, one.runs] for key, one in found.items()]
    assert table.to_numpy().tolist() == expected
    empty = fits.fit_table({})
    assert (len(empty), list(empty)) == (0, list(table))


def test_bytes_count_once_for_each_number_of_experts():
    rows = [
        {"series": "s", "family": "standard", "num_experts": e, "test_accuracy": 0.5, "test_nll": 1.0 + seed}
        | {"bytes_full": 1000 + 50 * e, "bytes_full_ffn": 50 * e}
        for e in (2, 4, 8)
        for seed in range(5)
    ]
    found = fits.series_fits(pd.DataFrame(rows))
    assert found["s", "bytes_full"].runs == 3
    assert found["s", "bytes_full"] == fits.fit([2, 4, 8], [1100, 1200, 1400], "power of E")
    assert found["s", "test_nll"].runs == 15


@pytest.mark.parametrize("law", ["linear in log2 E", "power of E"])
def test_values_that_are_not_finite_are_an_error(law):
    with pytest.raises(ValueError, match="values of a law must be finite; there is nan"):
        fits.fit([1, 2, 4], [1.0, np.nan, 2.0], law)
