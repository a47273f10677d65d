import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from bvit_jax import routing_figures
from bvit_jax.favourites import Favourites, favourites
from bvit_jax.opened import Images
from bvit_jax.seen_routing import SeenRouting, label_shares, load_table

LAYERS, IMAGES, EXPERTS, GRID = (0, 2), 3, 12, (2, 3)


@pytest.fixture(scope="module")
def images() -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 6, 1), np.uint8)
    return Images(pixels, np.array([5, 1, 5]))


@pytest.fixture(scope="module")
def seen(images: Images) -> SeenRouting:
    """Each token is sure of one expert; of layer 0 the experts 3, 1 and 0 get 9, 7 and 2 patches."""
    rng = np.random.default_rng(1)
    first = np.stack([np.array([3] * 9 + [1] * 7 + [0] * 2), rng.permutation(18) % EXPERTS]).reshape(2, IMAGES, 6)
    first = np.concatenate([np.zeros((2, IMAGES, 1), int), first], axis=2)
    probs = 0.9 * np.eye(EXPERTS)[first] + 0.1 / EXPERTS
    experts = first[..., None].astype(np.int32)
    x = np.zeros((2, IMAGES, 7, 4), np.float32)
    return SeenRouting(
        LAYERS, GRID, x, probs.astype(np.float32), np.ones_like(experts, np.float32), experts, images.labels
    )


def test_maps_show_every_patch_with_the_number_and_the_colour_of_its_expert(seen: SeenRouting, images: Images) -> None:
    figure = routing_figures.routing_maps(seen, images).figure
    panels = np.array(figure.axes).reshape(3, IMAGES + 1)
    assert [axes.get_title() for axes in panels[0, :IMAGES]] == ["class 5", "class 1", "class 5"]
    np.testing.assert_array_equal(panels[0, 1].images[0].get_array(), images.pixels[1, ..., 0])
    for line, map_BxHxW, layer in zip(panels[1:], seen.maps(), LAYERS, strict=True):
        assert line[0].get_ylabel() == f"layer {layer}"
        for axes, map_HxW in zip(line, map_BxHxW, strict=False):
            shown = axes.images[0]
            np.testing.assert_array_equal(shown.get_array(), map_HxW)
            assert [text.get_text() for text in axes.texts] == [str(expert) for expert in map_HxW.reshape(-1)]
    # The eight colours in the order of use; experts that are seldom chosen, or never, share light grey.
    colours = [to_hex(colour) for colour in panels[1, 0].images[0].cmap.colors]
    assert [colours[3], colours[1], colours[0]] == [colour.lower() for colour in routing_figures.COLOURS[:3]]
    legend = panels[1, -1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["3", "1", "0"]
    last = panels[2, -1].get_legend()
    assert len(last.get_texts()) == 9
    assert last.get_texts()[-1].get_text() == "others"


def test_large_maps_have_no_numbers(images: Images) -> None:
    experts = np.zeros((1, IMAGES, 1 + 11 * 10, 1), np.int32)
    probs = np.ones((*experts.shape[:3], 2), np.float32) / 2
    large = SeenRouting((0,), (11, 10), probs, probs, experts.astype(np.float32), experts, images.labels)
    figure = routing_figures.routing_maps(large, images).figure
    assert not any(axes.texts for axes in figure.axes)


def test_load_shows_the_table(seen: SeenRouting) -> None:
    table = load_table(seen)
    share, entropy, labels = (axes.images[0].get_array() for axes in routing_figures.load(seen, table).figure.axes[:3])
    np.testing.assert_allclose(share, table["share"].to_numpy().reshape(2, EXPERTS) * EXPERTS)
    # Expert 5 is nobody's first choice in layer 0.
    assert np.ma.getmaskarray(entropy)[0, 5]
    assert 0 < entropy[0, 3] < 1
    # Two images of three are of one class.
    np.testing.assert_allclose(labels[0, 3], table["labels"][3] / (np.log(3) - 2 / 3 * np.log(2)))


def test_agreement_shows_the_table() -> None:
    rows = [
        (0, "across", 0.5, 0.25, 0.1),
        (0, "both", 0.4, 0.25, 0.1),
        (4, "across", 1.0, 0.5, np.nan),
        (4, "both", 1, 0.5, 0),
    ]
    table = pd.DataFrame(rows, columns=["layer", "direction", "agreement", "shuffled", "excess_interval"])
    axes = routing_figures.agreement(table).figure.axes[0]
    across, down = (container.lines[0] for container in axes.containers)
    [shuffled] = [line for line in axes.lines if line.get_label() == "shuffled patches"]
    np.testing.assert_array_equal(across.get_ydata(), [0.5, 1.0])
    assert not len(down.get_ydata())
    np.testing.assert_array_equal(shuffled.get_ydata(), [0.25, 0.5])
    assert axes.get_ylim() == (0, 1)


def test_labels_show_shares_of_each_class(seen: SeenRouting) -> None:
    shares = label_shares(seen)
    figure = routing_figures.labels(seen, shares).figure
    for axes, expected in zip(figure.axes, shares, strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), expected[[1, 5]])
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "5"]


def test_favourites_show_the_patches(seen: SeenRouting, images: Images) -> None:
    found = favourites(seen, 2)[0]
    axes = routing_figures.favourites(found, images, 2).figure.axes
    pictures = [each.images[0].get_array() for each in axes if each.images]
    patches = found.cut(images, 2)
    assert len(pictures) == EXPERTS * 2
    np.testing.assert_array_equal(pictures, patches.reshape(-1, 2, 2))
    assert axes[0].get_ylabel() == f"expert 0\n{found.probs_Exn[0, 0]:.2f}-{found.probs_Exn[0, 1]:.2f}"


def test_a_single_expert_has_favourites_too(images: Images) -> None:
    found = Favourites(0, np.zeros((1, 1, 3), int), np.ones((1, 1), np.float32))
    axes = routing_figures.favourites(found, images, 2).figure.axes
    assert sum(bool(each.images) for each in axes) == 1


def test_many_classes_are_thinned_out_to_those_seen() -> None:
    labels = np.arange(0, 1000, 10)
    experts = np.zeros((1, 100, 2, 1), np.int32)
    probs = np.ones((1, 100, 2, 2), np.float32) / 2
    many = SeenRouting((0,), (1, 1), probs, probs, experts.astype(np.float32), experts, labels)
    axes = routing_figures.labels(many, label_shares(many)).figure.axes[0]
    assert axes.images[0].get_array().shape == (routing_figures.MOST_CLASSES, 2)
    assert not np.ma.getmaskarray(axes.images[0].get_array()).any()
    assert [axes.get_yticklabels()[place].get_text() for place in (0, -1)] == ["0", "990"]


def test_very_many_experts_stand_in_the_order_of_their_load() -> None:
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 150, (1, 40, 3, 1)).astype(np.int32)
    probs = np.eye(150, dtype=np.float32)[experts[..., 0]]
    many = SeenRouting((0,), (1, 2), probs, probs, experts.astype(np.float32), experts, np.zeros(40, int))
    share = routing_figures.load(many, load_table(many)).figure.axes[0].images[0].get_array()[0]
    assert (np.diff(share) <= 0).all()
    assert share[0] > 1
