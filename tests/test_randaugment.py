import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from bvit_jax import randaugment
from bvit_jax.data_config import AugmentConfig
from bvit_jax.randaugment import Operation, Plan
from tests.conftest import long_but

CONFIG = AugmentConfig(
    crop="resized",
    max_shift=0,
    shift_probability=0.0,
    min_area=1.0,
    flip_probability=0.0,
    randaugment_ops=2,
    randaugment_magnitude=9.0,
    randaugment_deviation=0.5,
    randaugment_probability=0.5,
    erase_probability=0.0,
    noise=0.0,
    mixup=0.0,
    cutmix=0.0,
)
apply = jax.jit(randaugment.apply)
ENHANCERS = {
    Operation.COLOR: ImageEnhance.Color,
    Operation.CONTRAST: ImageEnhance.Contrast,
    Operation.BRIGHTNESS: ImageEnhance.Brightness,
    Operation.SHARPNESS: ImageEnhance.Sharpness,
}


def levels_image(size: int, channels: int, low: int = 20, high: int = 231) -> np.ndarray:
    """An image of 8-bit levels (S, S, c): a slope in each channel, with noise that leaves no level alone."""
    y, x = np.mgrid[:size, :size]
    slopes = np.stack([(x + 2 * y) / (3 * size), 1 - y / size, (x / size) ** 2][:channels], axis=-1)
    noise = np.random.default_rng(size).normal(0, 0.15, slopes.shape)
    levels = low + (high - low) * np.clip(slopes + noise, 0, 1)
    return levels.round().astype(np.uint8)


def pillow(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def plans(steps: list[tuple[Operation, float]]) -> Plan:
    """A plan for one image."""
    operations, arguments = zip(*steps, strict=True)
    return Plan(jnp.asarray([operations], jnp.int32), jnp.asarray([arguments], jnp.float32))


def done(levels: np.ndarray, *steps: tuple[Operation, float]) -> np.ndarray:
    """Does operations to an image of levels and returns levels (S, S, c), not rounded."""
    images = jnp.asarray(levels, jnp.float32)[None].transpose(0, 3, 1, 2) / 255
    return 255 * np.asarray(apply(images, plans(list(steps))))[0].transpose(1, 2, 0)


def solarized_more(image: Image.Image, added: int) -> Image.Image:
    table = [min(255, level + added) if level < 128 else level for level in range(256)]
    return image.point(table * len(image.getbands()))


def oracle(image: Image.Image, operation: Operation, argument: float) -> np.ndarray:
    """What Pillow makes of an image, as timm calls it; levels (S, S, c)."""
    if operation in ENHANCERS:
        result = ENHANCERS[operation](image).enhance(argument)
    else:
        result = {
            Operation.AUTO_CONTRAST: lambda: ImageOps.autocontrast(image),
            Operation.EQUALIZE: lambda: ImageOps.equalize(image),
            Operation.INVERT: lambda: ImageOps.invert(image),
            # Pillow takes 1 bit or more; none are black.
            Operation.POSTERIZE: lambda: image.point(lambda level: level & (256 - 2 ** (8 - int(argument)))),
            Operation.SOLARIZE: lambda: ImageOps.solarize(image, argument),
            Operation.SOLARIZE_ADD: lambda: solarized_more(image, int(argument)),
        }[operation]()
    return np.asarray(result, np.float64).reshape(*image.size[::-1], -1)


CASES = [
    *[(operation, 0.0) for operation in (Operation.AUTO_CONTRAST, Operation.EQUALIZE, Operation.INVERT)],
    *[(Operation.POSTERIZE, bits) for bits in (0.0, 1.0, 2.0, 4.0)],
    *[(Operation.SOLARIZE, threshold) for threshold in (0.0, 26.0, 128.0, 256.0)],
    *[(Operation.SOLARIZE_ADD, added) for added in (0.0, 11.0, 99.0, 110.0)],
    *[(operation, factor) for operation in ENHANCERS for factor in (0.1, 0.64, 1.0, 1.5, 1.9)],
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", long_but([45], [8, 32, 45]))
def test_what_needs_no_interpolation_is_pillows(channels, size):
    levels = levels_image(size, channels)
    for operation, argument in CASES:
        expected = oracle(pillow(levels), operation, argument)
        # Pillow rounds the image without, by which at most 0.9 of the half of a level comes in, and cuts off the
        # fraction of the result: 1.45 levels.
        exact = operation not in (Operation.AUTO_CONTRAST, *ENHANCERS)
        difference = np.abs(done(levels, (operation, argument)) - expected)
        assert difference.max() < (0.01 if exact else 1.46), (operation.name, argument)


@pytest.mark.parametrize("channels", [1, 3])
def test_movements_are_pillows(channels):
    size, levels = 33, levels_image(33, channels)
    y, x = np.mgrid[:size, :size].astype(float)
    cases = {
        (Operation.SHEAR_X, 0.27): ((1, 0.27, 0, 0, 1, 0), x + 0.27 * (y + 0.5), y),
        (Operation.SHEAR_Y, -0.3): ((1, 0, 0, -0.3, 1, 0), x, y - 0.3 * (x + 0.5)),
        (Operation.TRANSLATE_X, 0.4): ((1, 0, 0.4 * size, 0, 1, 0), x + 0.4 * size, y),
        (Operation.TRANSLATE_Y, -0.45): ((1, 0, 0, 0, 1, -0.45 * size), x, y - 0.45 * size),
    }
    for (operation, argument), (affine, from_x, from_y) in cases.items():
        moved = pillow(levels).transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        # Pillow does not blend with what is outside, so that the last pixel differs; it also rounds.
        inside = (from_x >= 0) & (from_x <= size - 1) & (from_y >= 0) & (from_y <= size - 1)
        outside = (from_x <= -1) | (from_x >= size) | (from_y <= -1) | (from_y >= size)
        result = done(levels, (operation, argument))
        difference = np.abs(result - np.asarray(moved, np.float64).reshape(size, size, channels))
        assert difference[inside].max() < 1.01, operation.name
        np.testing.assert_array_equal(result[outside], 127.5)


def test_a_rotation_is_pillows_where_the_image_is_smooth():
    y, x = np.mgrid[:48, :48] / 48
    levels = np.stack([255 * x, 255 * y, 127 + 100 * np.sin(4 * x + 3 * y)], axis=-1).round().astype(np.uint8)
    for degrees in (-27.0, 5.0, 30.0):
        expected = np.asarray(pillow(levels).rotate(degrees, Image.Resampling.BILINEAR), np.float64)
        inside = np.asarray(Image.new("L", (44, 44), 255).rotate(degrees)) == 255
        difference = np.abs(done(levels, (Operation.ROTATE, degrees)) - expected)[2:-2, 2:-2][inside]
        assert np.quantile(difference, 0.99) < 1.5
        assert difference.mean() < 0.55  # Pillow cuts off the fraction


def test_every_operation_changes_an_image_and_nothing_does_not():
    levels = levels_image(32, 3)
    for operation in Operation:
        argument = float(randaugment.argument(jnp.int32(operation), jnp.float32(9), jnp.float32(1)))
        changed = np.abs(done(levels, (operation, argument)) - levels).mean()
        assert (changed < 1e-4) if operation == Operation.NOTHING else (changed > 1), operation.name


def test_nothing_is_exactly_nothing(key):
    images = jax.random.uniform(key, (3, 3, 20, 20))
    nothing = Plan(jnp.full((3, 2), Operation.NOTHING), jnp.full((3, 2), 0.3))
    np.testing.assert_array_equal(apply(images, nothing), images)


@pytest.mark.parametrize("operation", Operation)
def test_values_stay_from_0_to_1_and_odd_images_are_taken(operation):
    images = [
        np.zeros((4, 4, 3)),
        np.full((4, 4, 3), 255),
        np.full((1, 1, 1), 7),
        levels_image(2, 3),
        np.eye(5)[..., None] * 255,
    ]
    for levels in images:
        for level in (0.0, 10.0):
            for sign in (-1.0, 1.0):
                argument = float(randaugment.argument(jnp.int32(operation), jnp.float32(level), jnp.float32(sign)))
                result = done(np.asarray(levels, np.uint8), (operation, argument))
                assert np.isfinite(result).all()
                assert result.min() >= 0
                assert result.max() <= 255.001


def test_flat_channels_are_left_alone_by_auto_contrast_and_equalize():
    levels = levels_image(32, 3)
    levels[..., 1] = 77
    for operation in (Operation.AUTO_CONTRAST, Operation.EQUALIZE):
        result = done(levels, (operation, 0.0))
        np.testing.assert_allclose(result[..., 1], 77, atol=1e-4)
        assert np.abs(result[..., 0] - levels[..., 0]).max() > 5


def test_few_pixels_are_too_few_to_equalize():
    # 64 pixels on 255 steps: the step is rounded down to 0, in Pillow too.
    levels = levels_image(8, 1)
    np.testing.assert_allclose(done(levels, (Operation.EQUALIZE, 0.0)), levels, atol=1e-4)


def test_equalize_by_hand():
    # 16 x 16 pixels: 0 to 84, each three times, and one of 200, which is the highest and does not count: 255 pixels
    # on 255 steps, one a step. Under level v lie 3 v pixels, and under 200 all 255.
    levels = np.append(np.arange(255) // 3, 200).astype(np.uint8).reshape(16, 16, 1)
    expected = np.append(np.arange(255) // 3 * 3, 255).reshape(16, 16, 1)
    np.testing.assert_allclose(done(levels, (Operation.EQUALIZE, 0.0)), expected, atol=1e-3)
    np.testing.assert_array_equal(oracle(pillow(levels), Operation.EQUALIZE, 0.0), expected)


@pytest.mark.parametrize("concentrated", [0, 255, 100])
def test_equalize_counts_like_pillow_with_most_pixels_at_one_level(concentrated):
    levels = levels_image(40, 3)
    levels[:30] = concentrated
    expected = oracle(pillow(levels), Operation.EQUALIZE, 0.0)
    np.testing.assert_allclose(done(levels, (Operation.EQUALIZE, 0.0)), expected, atol=0.01)


def test_operations_are_done_in_order():
    levels = levels_image(16, 3)
    # Inverted and then brightened by half: not the same as brightened and then inverted.
    both = done(levels, (Operation.INVERT, 0.0), (Operation.BRIGHTNESS, 0.5))
    np.testing.assert_allclose(both, 0.5 * (255.0 - levels), atol=0.01)
    both = done(levels, (Operation.BRIGHTNESS, 0.5), (Operation.INVERT, 0.0))
    np.testing.assert_allclose(both, 255 - 0.5 * levels, atol=0.01)


def test_each_image_gets_its_own_operation():
    levels = [levels_image(16, 3, low=low) for low in range(0, len(Operation))]
    images = jnp.stack([jnp.asarray(each, jnp.float32).transpose(2, 0, 1) / 255 for each in levels])
    arguments = [float(randaugment.argument(jnp.int32(o), jnp.float32(8), jnp.float32(-1))) for o in Operation]
    batch = apply(images, Plan(jnp.asarray(list(Operation))[:, None], jnp.asarray(arguments)[:, None]))
    for result, each, operation, argument in zip(batch, levels, Operation, arguments, strict=True):
        alone = done(each, (operation, argument))
        np.testing.assert_allclose(255 * np.asarray(result).transpose(1, 2, 0), alone, atol=1e-3)


# Levels and what timm makes of them, by hand: rotation 30 l / 10, shear 0.3 l / 10, translation 0.45 l / 10,
# factor 1 +- 0.9 l / 10, bits 4 - int(4 l / 10), threshold 256 - int(256 l / 10), added int(110 l / 10).
@pytest.mark.parametrize(
    ("level", "rotate", "shear", "translate", "factors", "bits", "threshold", "added"),
    [
        (0.0, 0.0, 0.0, 0.0, (1.0, 1.0), 4, 256, 0),
        (4.9, 14.7, 0.147, 0.2205, (1.441, 0.559), 3, 131, 53),  # int(1.96) = 1, int(125.44) = 125, int(53.9) = 53
        (9.0, 27.0, 0.27, 0.405, (1.81, 0.19), 1, 26, 99),  # int(3.6) = 3, int(230.4) = 230
        (10.0, 30.0, 0.3, 0.45, (1.9, 0.1), 0, 0, 110),
    ],
)
def test_arguments_grow_with_the_level_as_in_timm(level, rotate, shear, translate, factors, bits, threshold, added):
    expected = {
        Operation.ROTATE: (rotate, -rotate),
        Operation.SHEAR_X: (shear, -shear),
        Operation.SHEAR_Y: (shear, -shear),
        Operation.TRANSLATE_X: (translate, -translate),
        Operation.TRANSLATE_Y: (translate, -translate),
        **dict.fromkeys(ENHANCERS, factors),
        Operation.POSTERIZE: (bits, bits),
        Operation.SOLARIZE: (threshold, threshold),
        Operation.SOLARIZE_ADD: (added, added),
    }
    for operation in Operation:
        for sign, wanted in zip((1.0, -1.0), expected.get(operation, (0.0, 0.0)), strict=True):
            argument = randaugment.argument(jnp.int32(operation), jnp.float32(level), jnp.float32(sign))
            assert float(argument) == pytest.approx(wanted, abs=1e-5), operation.name


def drawn(key: jax.Array, count: int, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    config = dataclasses.replace(CONFIG, **changes)
    plan = jax.jit(jax.vmap(lambda key: randaugment.draw(key, config)))(jax.random.split(key, count))
    return np.asarray(plan.operations_N), np.asarray(plan.arguments_N)


def test_operations_are_drawn_evenly_and_done_with_their_probability(key):
    operations, arguments = drawn(key, 6000, randaugment_ops=2, randaugment_probability=0.6)
    # 12,000 draws: 0.4 nothing (deviation 0.0045), each of 15 operations 0.04 (deviation 0.0018).
    counts = np.bincount(operations.reshape(-1), minlength=16) / operations.size
    assert counts[Operation.NOTHING] == pytest.approx(0.4, abs=0.018)
    assert np.abs(counts[:15] - 0.04).max() < 0.0075
    # What is done has either sign: about 2,400 of the movements' 12,000 x 0.2, deviation 0.01.
    movements = arguments[np.isin(operations, (Operation.ROTATE, *range(Operation.SHEAR_X, Operation.NOTHING)))]
    assert np.mean(movements > 0) == pytest.approx(0.5, abs=0.045)
    # Drawn with replacement, and apart: of those both done, 1 in 15 are twice the same.
    both = operations[(operations != Operation.NOTHING).all(axis=1)]
    assert len(both) / len(operations) == pytest.approx(0.36, abs=0.025)
    assert np.mean(both[:, 0] == both[:, 1]) == pytest.approx(1 / 15, abs=0.02)


def test_levels_are_normal_about_the_magnitude_and_cut_off(key):
    operations, arguments = drawn(key, 20_000, randaugment_probability=1.0, randaugment_ops=1)
    turned = arguments[operations == Operation.ROTATE]
    # Level 9, deviation 0.5, cut at 10, two deviations up: about 20,000 / 15 rotations of 27 +- 1.5 degrees.
    assert len(turned) > 1000
    assert np.mean(turned > 0) == pytest.approx(0.5, abs=0.06)
    assert np.abs(turned).mean() == pytest.approx(27, abs=0.2)
    assert np.abs(turned).std() == pytest.approx(1.5, abs=0.15)
    assert np.abs(turned).max() == 30
    assert np.mean(np.abs(turned) == 30) == pytest.approx(0.0228, abs=0.015)
    exact = drawn(key, 500, randaugment_deviation=0.0, randaugment_probability=1.0)
    assert set(np.abs(exact[1][exact[0] == Operation.SHEAR_X])) == {np.float32(0.27)}
    lowest = drawn(key, 500, randaugment_magnitude=0.0, randaugment_deviation=1.0, randaugment_probability=1.0)
    assert (lowest[1][lowest[0] == Operation.SOLARIZE_ADD] >= 0).all()


def test_of_other_channels_brightness_is_the_mean(key):
    levels = np.random.default_rng(0).integers(0, 255, (6, 6, 2)).astype(np.uint8)
    expected = 0.5 * levels + 0.5 * levels.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(done(levels, (Operation.COLOR, 0.5)), expected, atol=0.01)
