import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bvit_jax import mixing
from tests.conftest import long_but
from tests.test_randaugment import CONFIG

mix = jax.jit(mixing.mix, static_argnums=3)
MIXUP = dataclasses.replace(CONFIG, mixup=0.8)
CUTMIX = dataclasses.replace(CONFIG, cutmix=1.0)
BOTH = dataclasses.replace(CONFIG, mixup=0.8, cutmix=1.0)


def random_batch(batch: int, size: int = 8, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(batch).uniform(0, 1, (batch, size, size, channels)).astype(np.float32)
    return images, np.arange(batch)


def draws(config: object, count: int, size: int) -> np.ndarray:
    """Weights (count, size, size) of many steps."""
    keys = jax.random.split(jax.random.key(1), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: mixing.draw(key, size, config)))(keys))


@pytest.mark.parametrize(
    ("config", "batch"), [(MIXUP, 2), (CUTMIX, 5), pytest.param(BOTH, 8, marks=pytest.mark.long), (CUTMIX, 1)]
)
def test_neighbours_are_mixed_and_labels_go_with_them(key, config, batch):
    images, labels = random_batch(batch)
    mixed, report = mix(key, images, labels, config)
    partners = [min(r ^ 1, batch - 1) for r in range(batch)]  # 0 and 1, 2 and 3; the last of an odd number is alone
    np.testing.assert_array_equal(report.labels_B, labels[partners])
    weights = np.asarray(mixing.draw(key, 8, config))[:, :, None]
    expected = np.stack([weights * images[r] + (1 - weights) * images[partners[r]] for r in range(batch)])
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    assert mixed.dtype == report.share.dtype == np.float32
    assert report.share.shape == ()


def test_mixup_by_hand(key):
    # Images of 0.2 and 0.6 in all pixels; with a share of s they become 0.2 s + 0.6 (1 - s) and 0.6 s + 0.2 (1 - s):
    # with s = 0.75 that would be 0.3 and 0.5. Their sum is 0.8, and their difference 0.4 (1 - 2 s).
    images = np.stack([np.full((4, 4, 1), value, np.float32) for value in (0.2, 0.6)])
    mixed, report = mix(key, images, np.array([3, 7]), MIXUP)
    share = float(report.share)
    assert 0 < share < 1
    np.testing.assert_allclose(mixed[0], 0.2 * share + 0.6 * (1 - share), atol=1e-6)
    np.testing.assert_allclose(mixed[1], 0.6 * share + 0.2 * (1 - share), atol=1e-6)
    assert list(report.labels_B) == [7, 3]


def test_a_box_by_hand():
    # 1 - 0.75 of 8 x 8 pixels: a side of 8 sqrt(0.25) = 4, two pixels to each side of the middle.
    # About row 3: rows 1 to 4. About column 7: columns 5 to 8, of which there are 5 to 7.
    weights = mixing.outside_box(jnp.float32(0.75), jnp.array([3, 7]), 8)
    expected = np.ones((8, 8))
    expected[1:5, 5:8] = 0
    np.testing.assert_array_equal(weights, expected)
    # 4 x 3 pixels of 64 are another's.
    assert float(weights.mean()) == 1 - 12 / 64
    # A side of 8 sqrt(0.5) = 5.66 is rounded down to 5 and its half to 2: 4 pixels.
    assert mixing.outside_box(jnp.float32(0.5), jnp.array([4, 4]), 8).sum() == 64 - 16
    assert mixing.outside_box(jnp.float32(1.0), jnp.array([4, 4]), 8).sum() == 64
    assert mixing.outside_box(jnp.float32(0.0), jnp.array([4, 4]), 8).sum() == 0


@given(st.floats(0, 1, width=32), st.integers(1, 40), st.data())
@settings(max_examples=25, deadline=None)
def test_a_box_is_timms(share, size, data):
    middle = [data.draw(st.integers(0, size - 1)) for _ in range(2)]
    half = int(np.float32(size) * np.sqrt(np.float32(1) - np.float32(share))) // 2
    expected = np.ones((size, size))
    top, left = (max(place - half, 0) for place in middle)
    expected[top : middle[0] + half, left : middle[1] + half] = 0
    np.testing.assert_array_equal(mixing.outside_box(jnp.float32(share), jnp.array(middle), size), expected)


def test_of_cutmix_the_share_is_the_area_that_is_left(key):
    images = np.stack([np.zeros((10, 10, 3), np.float32), np.ones((10, 10, 3), np.float32)])
    for step in range(20):
        mixed, report = mix(jax.random.fold_in(key, step), images, np.arange(2), CUTMIX)
        assert set(np.unique(mixed)) <= {0, 1}
        assert float(report.share) == pytest.approx(1 - float(np.mean(mixed[0])), abs=1e-6)
        assert float(report.share) == pytest.approx(float(np.mean(mixed[1])), abs=1e-6)
        # No pixel is lost: each place still has one of either image.
        np.testing.assert_array_equal(mixed[0] + mixed[1], 1)


@pytest.mark.parametrize("alpha", long_but([0.8], [0.2, 0.8, 3.0]))
def test_shares_of_mixup_are_beta(alpha):
    weights = draws(dataclasses.replace(CONFIG, mixup=alpha), 2000, 2)
    assert (weights == weights[:, :1, :1]).all()
    assert stats.kstest(weights[:, 0, 0], stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_areas_and_places_of_cutmix():
    weights = draws(CUTMIX, 2000, 64)
    assert set(np.unique(weights)) == {0, 1}
    boxes = 1 - weights
    heights = boxes.max(axis=2).sum(axis=1)
    rows = boxes.max(axis=2).argmax(axis=1)
    # Where nothing is cut off, the side is 64 sqrt(u), u uniform: P(side < 32) = 1/4 of all, before cutting.
    assert heights.max() <= 64
    assert len(np.unique(heights)) > 25
    assert (heights[(rows > 0) & (rows + heights < 64)] % 2 == 0).all()
    # A box of side 2 h about a middle uniform in 0 to 63 has a mean area, as a share, of the square of
    # 2 h / 64 - h^2 / 64^2 = t - t^2 / 4 with t = sqrt(u): E[(t - t^2 / 4)^2] = 1/2 - 1/5 + 1/48 = 0.3208,
    # over u uniform (E t^2 = 1/2, E t^3 = 2/5, E t^4 = 1/3); rounding down takes 1.5 of some 43 pixels a side.
    assert boxes.mean() == pytest.approx(0.3208 * (1 - 2 * 1.5 / 43), abs=0.025)


def test_with_both_each_is_done_in_half_of_the_steps():
    weights = draws(BOTH, 2000, 16)
    cut = (weights == 0) | (weights == 1)
    # 2,000 draws: the deviation of the share is 0.011.
    assert cut.all(axis=(1, 2)).mean() == pytest.approx(0.5, abs=0.045)
    shares = weights[~cut.all(axis=(1, 2)), 0, 0]
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 0.01


def test_without_either_nothing_is_done(key):
    images, labels = random_batch(4)
    mixed, report = mixing.mix(key, images, labels, CONFIG)
    assert mixed is images
    assert report is None


def test_each_step_draws_anew_and_jit_equals_eager(key):
    images, labels = random_batch(4)
    shares = {float(mix(jax.random.fold_in(key, step), images, labels, BOTH)[1].share) for step in range(8)}
    assert len(shares) > 6
    eager, compiled = (apply(key, jnp.asarray(images), jnp.asarray(labels), BOTH) for apply in (mixing.mix, mix))
    np.testing.assert_allclose(eager[0], compiled[0], atol=1e-6)
    np.testing.assert_array_equal(eager[1].labels_B, compiled[1].labels_B)
