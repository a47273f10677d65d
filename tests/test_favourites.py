import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvit_jax.favourites import favourites
from bvit_jax.opened import Images
from bvit_jax.seen_routing import SeenRouting
from tests.test_seen_routing import made_of, routings


def of_two(prob_of_first: list[list[float]], grid: tuple[int, int]) -> SeenRouting:
    """Layer 2 of two experts; for each image the probabilities of the first, class token first."""
    first = np.array(prob_of_first)
    return made_of(np.stack([first, 1 - first], axis=-1)[None], grid, layers=(2,))


def test_favourites_by_hand() -> None:
    # Two rows of three patches after the class token, which nobody may like best.
    seen = of_two(
        [
            [1.0, 0.50, 0.50, 0.50, 0.50, 0.75, 0.25],
            [0.0, 0.50, 0.50, 0.875, 0.50, 0.50, 0.125],
            [1.0, 0.75, 0.75, 0.625, 0.625, 0.75, 0.625],
        ],
        (2, 3),
    )
    [found] = favourites(seen, 2)
    assert found.layer == 2
    # Of the first expert image 1's third patch, then, of two images that are as probable, image 0's fifth.
    np.testing.assert_array_equal(found.places_Exnx3[0], [[1, 0, 2], [0, 1, 1]])
    np.testing.assert_array_equal(found.probs_Exn[0], [0.875, 0.75])
    # Of the second the sixth patches of images 1 and 0: 1 - 1/8 and 1 - 1/4.
    np.testing.assert_array_equal(found.places_Exnx3[1], [[1, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(found.probs_Exn[1], [0.875, 0.75])
    # With a third, image 2: its first patch of three that are as probable, and its third for the second expert.
    [three] = favourites(seen, 3)
    np.testing.assert_array_equal(three.places_Exnx3[:, 2], [[2, 0, 0], [2, 0, 2]])
    np.testing.assert_array_equal(three.probs_Exn[:, 2], [0.75, 0.375])


def test_dtypes_and_fewer_images_than_are_asked_for() -> None:
    found = favourites(made_of(np.full((3, 2, 5, 4), 0.25), (2, 2)))
    assert [one.layer for one in found] == [0, 1, 2]
    for one in found:
        assert (one.places_Exnx3.shape, one.places_Exnx3.dtype) == ((4, 2, 3), np.int64)
        assert (one.probs_Exn.shape, one.probs_Exn.dtype) == ((4, 2), np.float32)


def test_eight_patches_are_found_if_nothing_else_is_said() -> None:
    [found] = favourites(made_of(np.full((1, 9, 2, 1), 1.0), (1, 1)))
    np.testing.assert_array_equal(found.places_Exnx3, [[[image, 0, 0] for image in range(8)]])


def test_an_expert_that_gets_nothing_has_favourites_too() -> None:
    seen = of_two([[1.0, 1.0, 0.75], [1.0, 1.0, 1.0]], (1, 2))
    assert not (seen.experts_MxBxTxK == 1).any()
    [found] = favourites(seen, 1)
    np.testing.assert_array_equal(found.places_Exnx3[1], [[0, 0, 1]])
    np.testing.assert_array_equal(found.probs_Exn[1], [0.25])


@given(routings(most_images=6), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_favourites_equal_a_sort_of_all_patches(seen: SeenRouting, count: int) -> None:
    rows, columns = seen.grid
    found = favourites(seen, count)
    assert [one.layer for one in found] == list(seen.layers)
    for index, one in enumerate(found):
        for expert in range(seen.num_experts):
            best = []
            for image, probs_TxE in enumerate(seen.probs_MxBxTxE[index].tolist()):
                patches = [(-token[expert], patch) for patch, token in enumerate(probs_TxE[1:])]
                best.append((min(patches)[0], image, min(patches)[1]))
            expected = sorted(best)[:count]
            places = [[image, patch // columns, patch % columns] for _, image, patch in expected]
            np.testing.assert_array_equal(one.places_Exnx3[expert], places)
            np.testing.assert_array_equal(one.probs_Exn[expert], [-prob for prob, _, _ in expected])
            assert one.places_Exnx3[expert, :, 1].max() < rows


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_cut_out_of_their_images(channels: int) -> None:
    grid, patch = (2, 3), 4
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2 * patch, 3 * patch, channels), np.uint8)
    probs = np.random.default_rng(1).dirichlet(np.ones(4), (1, 5, 7))
    [found] = favourites(made_of(probs, grid), 3)
    cut = found.cut(Images(pixels, np.zeros(5, np.int64)), patch)
    assert (cut.shape, cut.dtype) == ((4, 3, patch, patch, channels), np.uint8)
    assert len(np.unique(found.places_Exnx3[..., 1:].reshape(-1, 2), axis=0)) > 3  # patches of many places
    for expert, place in np.ndindex(4, 3):
        image, row, column = found.places_Exnx3[expert, place]
        for y, x in np.ndindex(patch, patch):
            expected = pixels[image, row * patch + y, column * patch + x]
            np.testing.assert_array_equal(cut[expert, place, y, x], expected)


def test_the_one_patch_of_one_image_is_the_image() -> None:
    pixels = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    [found] = favourites(made_of([[[[1.0], [1.0]]]], (1, 1)))
    np.testing.assert_array_equal(found.places_Exnx3, [[[0, 0, 0]]])
    np.testing.assert_array_equal(found.cut(Images(pixels, np.zeros(1, np.int64)), 2), pixels[None])
