import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax import factors
from bvit_jax.factors import Spectrum

SEED = st.integers(0, 2**16)
SIZE = st.integers(1, 16)
QUICK = settings(max_examples=40, deadline=None)


def made_map(seed: int, inputs: int, outputs: int, rank: int | None = None) -> np.ndarray:
    """Returns a random map (I, O), of a rank if one is named."""
    rng = np.random.default_rng(seed)
    if rank is None:
        return rng.normal(size=(inputs, outputs))
    return rng.normal(size=(inputs, rank)) @ rng.normal(size=(rank, outputs))


def made_inputs(seed: int, rows: int, inputs: int) -> np.ndarray:
    """Returns inputs (N, I) whose channels are correlated and of unequal size."""
    rng = np.random.default_rng(seed + 1)
    return rng.normal(size=(rows, inputs)) * np.logspace(0, -2, inputs) @ rng.normal(size=(inputs, inputs))


def made_spectrum(inputs: int, outputs: int, energies: list[float]) -> Spectrum:
    """Returns a map whose squared singular values are given, in the directions of the axes."""
    values = np.sqrt(np.array([*energies, *[0.0] * (min(inputs, outputs) - len(energies))]))
    w_IxO = np.zeros((inputs, outputs))
    np.fill_diagonal(w_IxO, values)
    return Spectrum(w_IxO, values, np.eye(outputs, len(values)))


def some_spectra(seed: int, shapes: list[tuple[int, int]]) -> list[Spectrum]:
    """Returns maps of these shapes with energies that fall at random rates."""
    rng = np.random.default_rng(seed)
    return [
        made_spectrum(*shape, sorted(rng.gamma(rng.uniform(0.1, 2), size=min(shape)), reverse=True)) for shape in shapes
    ]


def relative_error(x_NxI: np.ndarray, w_IxO: np.ndarray, approx_IxO: np.ndarray) -> float:
    exact = np.linalg.norm(x_NxI @ w_IxO)
    wrong = np.linalg.norm(x_NxI @ w_IxO - x_NxI @ approx_IxO)
    return float(wrong / exact) if exact else 0.0


def kept(spectra: list[Spectrum], ranks: tuple[int, ...]) -> float:
    return sum(spectrum.energy_kept(rank) for spectrum, rank in zip(spectra, ranks, strict=True))


# Factors


@given(SEED, SIZE, SIZE, st.integers(1, 24), st.none() | st.integers(0, 16), st.sampled_from([0.0, 1e-6, 0.1]))
@QUICK
def test_formula_is_the_measured_error(
    seed: int, inputs: int, outputs: int, rows: int, rank: int | None, ridge: float
) -> None:
    w, x = made_map(seed, inputs, outputs, rank), made_inputs(seed, rows, inputs)
    spectrum = factors.activation_aware(w, x.T @ x, ridge)
    # A ridge is a row more for every channel.
    x = np.concatenate([x, math.sqrt(ridge * (x**2).sum() / inputs) * np.eye(inputs)])
    for kept_rank in range(spectrum.whole + 1):
        approx = spectrum.matrix(kept_rank)
        measured = relative_error(x, w, approx)
        assert spectrum.output_error(kept_rank) == pytest.approx(measured, abs=1e-6)
        assert factors.output_error(w, approx, x.T @ x) == pytest.approx(measured, abs=1e-6)
        assert spectrum.energy_kept(kept_rank) == pytest.approx(1 - measured**2, abs=1e-6)
        assert spectrum.energy_lost(kept_rank) == pytest.approx(measured**2, abs=1e-6)


@given(SEED, SIZE, SIZE, st.integers(1, 24))
@QUICK
def test_is_the_eigendecomposition(seed: int, inputs: int, outputs: int, rows: int) -> None:
    w, x = made_map(seed, inputs, outputs), made_inputs(seed, rows, inputs)
    spectrum = factors.activation_aware(w, x.T @ x, ridge=0.0)
    eigenvalues = np.linalg.eigvalsh(w.T @ x.T @ x @ w)[::-1][: spectrum.whole]
    np.testing.assert_allclose(spectrum.values**2, eigenvalues, rtol=1e-9, atol=1e-10 * eigenvalues[0])
    np.testing.assert_allclose(spectrum.right_OxM.T @ spectrum.right_OxM, np.eye(spectrum.whole), atol=1e-12)
    for rank in range(spectrum.break_even + 1):
        a, b = spectrum.factors(rank)
        assert (a.shape, b.shape) == ((inputs, rank), (rank, outputs))
        np.testing.assert_array_equal(spectrum.matrix(rank), a @ b)


@given(SEED, SIZE, SIZE, st.integers(1, 24))
@QUICK
def test_inputs_make_outputs_no_worse(seed: int, inputs: int, outputs: int, rows: int) -> None:
    w, x = made_map(seed, inputs, outputs), made_inputs(seed, rows, inputs)
    plain, aware = factors.plain(w), factors.activation_aware(w, x.T @ x, ridge=0.0)
    for rank in range(plain.whole + 1):
        at_most = relative_error(x, w, plain.matrix(rank))
        assert relative_error(x, w, aware.matrix(rank)) <= at_most + 1e-9
        # And of W itself no rank keeps more than its own.
        assert np.linalg.norm(w - aware.matrix(rank)) >= np.linalg.norm(w - plain.matrix(rank)) - 1e-9


@given(SEED, SIZE, SIZE)
@QUICK
def test_inputs_all_alike_make_no_difference(seed: int, inputs: int, outputs: int) -> None:
    w = made_map(seed, inputs, outputs)
    plain, aware = factors.plain(w), factors.activation_aware(w, 3 * np.eye(inputs), ridge=0.5)
    np.testing.assert_allclose(aware.values, math.sqrt(3 + 1.5) * plain.values, rtol=1e-9)
    for rank in range(plain.whole + 1):
        np.testing.assert_allclose(aware.matrix(rank), plain.matrix(rank), atol=1e-8)
        assert aware.output_error(rank) == pytest.approx(plain.output_error(rank), abs=1e-9)


def test_small_values_are_kept() -> None:
    # sqrt(1e-20 x 1) would be lost beside 1 in W^T C W, as 1e-20 is below 1e-16.
    spectrum = factors.activation_aware(np.diag([1.0, 1e-10]), np.eye(2), ridge=0.0)
    np.testing.assert_allclose(spectrum.values, [1.0, 1e-10], rtol=1e-12)


def test_a_ridge_orders_what_no_input_reaches() -> None:
    # Inputs reach the first channel only; of the two others W sends more through the last.
    w = np.diag([1.0, 2.0, 3.0])
    spectrum = factors.activation_aware(w, np.diag([1.0, 0.0, 0.0]), ridge=1e-6)
    np.testing.assert_allclose(np.abs(spectrum.right_OxM), np.eye(3)[:, [0, 2, 1]], atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 6), (6, 4)])
def test_map_without_energy(shape: tuple[int, int]) -> None:
    w, c = np.zeros(shape), np.eye(shape[0])
    for spectrum in (factors.plain(w), factors.activation_aware(w, c), factors.activation_aware(w + 1, 0 * c)):
        for rank in range(spectrum.whole + 1):
            assert (spectrum.output_error(rank), spectrum.energy_kept(rank)) == (0.0, 1.0)
            assert factors.output_error(w, 0 * spectrum.matrix(rank), c) == 0.0
    assert factors.output_error(w, w + 1, c) == math.inf


def test_hand_computed_factors() -> None:
    # Channels of variance 1, 4 and 1 through diag(3, 2, 1): energies 9, 16 and 1 of 26 in all.
    w, c = np.diag([3.0, 2.0, 1.0]), np.diag([1.0, 4.0, 1.0])
    spectrum = factors.activation_aware(w, c, ridge=0.0)
    np.testing.assert_allclose(spectrum.values, [4.0, 3.0, 1.0], rtol=1e-12)
    # Rank 1 is 3 + 3 = 6 numbers and keeps the second channel; rank 2 would be 12, more than 9, so it is W itself.
    np.testing.assert_allclose(spectrum.matrix(1), np.diag([0.0, 2.0, 0.0]), atol=1e-12)
    assert spectrum.matrix(2) is spectrum.w_IxO
    assert [spectrum.cost(rank) for rank in range(4)] == [0, 6, 9, 9]
    assert [spectrum.energy_lost(rank) for rank in range(4)] == pytest.approx([1.0, 10 / 26, 0.0, 0.0])
    assert spectrum.output_error(1) == pytest.approx(math.sqrt(10 / 26))
    assert (spectrum.shape, spectrum.break_even, spectrum.whole) == ((3, 3), 1, 3)
    # Without inputs the first channel is largest: 9 of 9 + 4 + 1 = 14.
    np.testing.assert_allclose(factors.plain(w).matrix(1), np.diag([3.0, 0.0, 0.0]), atol=1e-12)
    assert factors.plain(w).energy_kept(1) == pytest.approx(9 / 14)


@given(SIZE, SIZE)
@QUICK
def test_break_even_is_the_last_rank_that_saves(inputs: int, outputs: int) -> None:
    saving = [rank for rank in range(min(inputs, outputs) + 1) if rank * (inputs + outputs) < inputs * outputs]
    assert factors.break_even(inputs, outputs) == saving[-1]
    spectrum = made_spectrum(inputs, outputs, [1.0])
    for rank in range(min(inputs, outputs) + 1):
        is_whole = rank > saving[-1]
        assert spectrum.cost(rank) == (inputs * outputs if is_whole else rank * (inputs + outputs))
        assert (spectrum.matrix(rank) is spectrum.w_IxO) == is_whole


# Ranks


def brute_force(spectra: list[Spectrum], budget: int) -> float:
    """Returns the most energy that ranks from 1 to break-even keep in a budget."""
    choices = itertools.product(*(range(1, spectrum.break_even + 1) for spectrum in spectra))
    return max(kept(spectra, ranks) for ranks in choices if factors.numbers(spectra, ranks) <= budget)


def step_costs(spectra: list[Spectrum], ranks: tuple[int, ...]) -> list[int]:
    """Lists how many numbers the next rank of each map costs that is not whole yet."""
    higher = [rank + 1 if rank < each.break_even else each.whole for each, rank in zip(spectra, ranks, strict=True)]
    costs = [each.cost(new) - each.cost(old) for each, new, old in zip(spectra, higher, ranks, strict=True)]
    return [cost for cost in costs if cost]


@given(SEED, st.sampled_from([(8, 8), (4, 12), (12, 4), (12, 12)]), st.integers(1, 3), st.integers(0, 120))
@QUICK
def test_mixed_ranks_are_the_best_of_all(seed: int, shape: tuple[int, int], maps: int, more: int) -> None:
    spectra = some_spectra(seed, [shape] * maps)
    # Steps of maps of one of these shapes all cost the same, that from break-even to whole included.
    most = factors.numbers(spectra, [spectrum.break_even for spectrum in spectra]) - 1
    budget = max(min(factors.least(spectra) + more, most), factors.least(spectra))
    ranks = factors.mixed_ranks(spectra, budget)
    assert kept(spectra, ranks) == pytest.approx(brute_force(spectra, budget), abs=1e-12)


@given(SEED, st.lists(st.tuples(st.integers(5, 9), st.integers(5, 9)), min_size=2, max_size=3), st.integers(0, 60))
@QUICK
def test_mixed_ranks_are_the_best_for_what_they_store(seed: int, shapes: list[tuple[int, int]], more: int) -> None:
    """With maps of several shapes: before what is left over goes where it fits, and so at the budgets met exactly."""
    spectra = some_spectra(seed, shapes)
    ranks = [spectrum.break_even for spectrum in spectra]
    while True:
        budget = factors.numbers(spectra, ranks)
        assert factors.mixed_ranks(spectra, budget) == tuple(ranks)
        assert kept(spectra, tuple(ranks)) == pytest.approx(brute_force(spectra, budget), abs=1e-12)
        losses = [
            ((each.energy_lost(rank - 1) - each.energy_lost(rank)) / sum(each.shape), index)
            for index, (each, rank) in enumerate(zip(spectra, ranks, strict=True))
            if rank > 1
        ]
        if not losses or more < 0:
            break
        ranks[min(losses)[1]] -= 1
        more -= 1


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
CHOICES = pytest.mark.parametrize("choose", [factors.equal_ranks, factors.mixed_ranks])


@CHOICES
@given(seed=SEED, shapes=SHAPES, share=st.floats(0, 1.2))
@QUICK
def test_budget_is_held_and_used(choose, seed: int, shapes: list[tuple[int, int]], share: float) -> None:
    spectra = some_spectra(seed, shapes)
    least, whole = factors.least(spectra), sum(math.prod(shape) for shape in shapes)
    budget = max(least, round(share * whole))
    ranks = choose(spectra, budget)
    spare = budget - factors.numbers(spectra, ranks)
    assert spare >= 0
    assert all(spare < cost for cost in step_costs(spectra, ranks))
    for each, rank in zip(spectra, ranks, strict=True):
        assert 1 <= rank <= each.break_even or rank == each.whole
    if budget >= whole:
        assert ranks == tuple(each.whole for each in spectra)
    if budget == least:
        assert factors.numbers(spectra, ranks) == least


@given(SEED, SHAPES)
@settings(max_examples=10, deadline=None)
def test_mixed_ranks_keep_more_of_more(seed: int, shapes: list[tuple[int, int]]) -> None:
    spectra = some_spectra(seed, shapes)
    before = None
    for budget in range(factors.least(spectra), factors.least(spectra) + 60):
        ranks = factors.mixed_ranks(spectra, budget)
        if before is not None:
            assert kept(spectra, ranks) >= kept(spectra, before) - 1e-12
        # Left-over numbers may make a map whole whose like were cut by the budget: one number more may then undo it.
        is_whole = (rank > each.break_even > 0 for each, rank in zip(spectra, ranks, strict=True))
        before = None if any(is_whole) else ranks


@given(SEED, SHAPES)
@settings(max_examples=10, deadline=None)
def test_equal_ranks_share_alike(seed: int, shapes: list[tuple[int, int]]) -> None:
    spectra, others = some_spectra(seed, shapes), some_spectra(seed + 1, shapes)
    least, whole = factors.least(spectra), sum(math.prod(shape) for shape in shapes)
    for budget in range(least, whole, max(1, (whole - least) // 8)):
        ranks = factors.equal_ranks(spectra, budget)
        assert factors.equal_ranks(others, budget) == ranks
        # Slow: the largest share of a fine grid that fits.
        at_least = (1,) * len(spectra)
        for share in np.linspace(0, 1, 400, endpoint=False):
            tried = [max(1, math.floor(share * math.prod(shape) / sum(shape))) for shape in shapes]
            if factors.numbers(spectra, tried) <= budget:
                at_least = tuple(min(rank, each.whole) for rank, each in zip(tried, spectra, strict=True))
        assert all(rank >= low for rank, low in zip(ranks, at_least, strict=True))


def test_hand_computed_ranks() -> None:
    # Two maps (8, 8): a rank is 16 numbers, break-even is 3 (48 < 64), whole is 64.
    steep = made_spectrum(8, 8, [90.0, 6.0, 3.0, 1.0])
    flat = made_spectrum(8, 8, [30.0, 25.0, 20.0, 15.0, 10.0])
    spectra = [steep, flat]
    assert factors.least(spectra) == 16 + 16
    # From (3, 3), 96 numbers, to hold 64: the steep map loses 0.03, then 0.06; the flat one would have lost 0.20.
    assert factors.mixed_ranks(spectra, 64) == (1, 3)
    # A share s gives floor(4 s) ranks each: 2 and 2 from s = 0.5.
    assert factors.equal_ranks(spectra, 64) == (2, 2)
    # 79: 15 numbers are left over and fit nothing. 80: the first map in order; the one that gains most, 0.06.
    assert factors.equal_ranks(spectra, 79) == (2, 2)
    assert factors.equal_ranks(spectra, 80) == (3, 2)
    assert factors.mixed_ranks(spectra, 79) == (1, 3)
    assert factors.mixed_ranks(spectra, 80) == (2, 3)
    # From (3, 3) either is whole for 16 more: the flat map gains 0.25, the steep one 0.01.
    assert factors.mixed_ranks(spectra, 112) == (3, 8)
    assert factors.equal_ranks(spectra, 112) == (8, 3)
    assert factors.mixed_ranks(spectra, 128) == factors.equal_ranks(spectra, 128) == (8, 8)


def test_left_over_numbers_make_a_map_whole() -> None:
    # (3, 4): a rank is 7 numbers, break-even is 1, whole 12. (12, 12): a rank is 24, break-even is 5, whole 144.
    small = made_spectrum(3, 4, [2.0, 1.0, 1.0])
    large = made_spectrum(12, 12, [50.0, 20.0, 10.0, 9.0, 6.0, 5.0])
    # At (1, 1), 31 numbers, 10 are left over: no rank of the large map, but 5 make the small one whole.
    assert factors.mixed_ranks([small, large], 41) == (3, 1)
    assert factors.mixed_ranks([small, large], 35) == (1, 1)
    # From (1, 5), 127 numbers, 24 make the large map whole, 0.05 / 24 a number, and 5 the small, 0.5 / 5: that first.
    assert factors.mixed_ranks([small, large], 127 + 24) == (3, 5)
    assert factors.mixed_ranks([small, large], 127 + 29) == (3, 12)


def test_maps_that_factors_never_shrink() -> None:
    spectra = [made_spectrum(*shape, [1.0]) for shape in [(2, 2), (1, 7), (7, 1), (1, 1)]]
    assert factors.least(spectra) == 4 + 7 + 7 + 1
    assert factors.mixed_ranks(spectra, 19) == factors.equal_ranks(spectra, 19) == (2, 1, 1, 1)
    assert factors.mixed_ranks([], 0) == factors.equal_ranks([], 0) == ()


# Errors


@CHOICES
def test_too_small_a_budget(choose) -> None:
    with pytest.raises(ValueError, match=r"a budget of 31 numbers is too small; 32 or more is right, for rank 1"):
        choose([made_spectrum(8, 8, [1.0])] * 2, 31)


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_that_no_map_has(rank: int) -> None:
    spectrum = made_spectrum(3, 7, [1.0])
    for method in (spectrum.cost, spectrum.energy_kept, spectrum.output_error, spectrum.factors, spectrum.matrix):
        with pytest.raises(ValueError, match=rf"rank {rank} of a map \(3, 7\); from 0 to 3 is right"):
            method(rank)


def test_no_factors_of_a_map_kept_whole() -> None:
    with pytest.raises(ValueError, match=r"rank 3 keeps the map whole, without factors; 2 at most is right"):
        made_spectrum(3, 7, [1.0]).factors(3)


def test_bad_maps_and_moments() -> None:
    good, c = np.ones((2, 3)), np.eye(2)
    calls = (factors.plain, lambda w: factors.activation_aware(w, c), lambda w: factors.output_error(w, good, c))
    for call in calls:
        for bad in (np.ones(3), np.ones((0, 3)), np.ones((2, 3, 1))):
            with pytest.raises(
                ValueError, match=r"a map has the shape \(.*\); \(inputs, outputs\) is right, 1 of each"
            ):
                call(bad)
        with pytest.raises(ValueError, match=r"a map holds values that are not finite; finite ones are right"):
            call(np.array([[1.0, math.nan, 0.0], [0.0, 0.0, 0.0]]))
    for moments_call in (factors.activation_aware, lambda w, c: factors.output_error(w, w, c)):
        with pytest.raises(ValueError, match=r"second moments have the shape \(3, 3\); \(2, 2\) is right, for the map"):
            moments_call(good, np.eye(3))
        with pytest.raises(ValueError, match=r"second moments hold values that are not finite; finite ones are right"):
            moments_call(good, np.full((2, 2), math.inf))
    with pytest.raises(ValueError, match=r"the approximation is \(3, 2\); \(2, 3\) is right, as the map"):
        factors.output_error(good, good.T, c)
    for ridge in (-1.0, math.nan):
        with pytest.raises(ValueError, match=rf"ridge is {ridge}; 0 or more is right"):
            factors.activation_aware(good, c, ridge)
