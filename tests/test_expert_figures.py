import numpy as np
import pandas as pd

from bvit_jax import expert_figures
from bvit_jax.diversity import Diversity, diversity_table


def made(layer: int, of: str, apart: float) -> Diversity:
    return Diversity(layer, of, np.arange(3), apart * (1 - np.eye(3)))


FOUND = [made(layer, of, 0.1 * (layer + 1)) for layer in (0, 3) for of in ("up weights", "outputs")]


def test_diversity_is_drawn_kind_by_kind() -> None:
    axes = expert_figures.diversity(diversity_table(FOUND)).figure.axes[0]
    handles, names = axes.get_legend_handles_labels()
    assert names == ["up weights", "outputs"]
    for handle in handles:
        np.testing.assert_allclose(handle.lines[0].get_ydata(orig=False), [0.1, 0.4])
    assert axes.get_ylim()[0] == 0


def test_pairs_are_drawn_by_outputs_alone() -> None:
    figure = expert_figures.diversity_pairs(FOUND).figure
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown, [FOUND[1].values_nxn, FOUND[3].values_nxn])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["layer 0", "layer 3"]


def test_many_layers_are_thinned_out() -> None:
    figure = expert_figures.diversity_pairs([made(layer, "outputs", 0.5) for layer in range(9)]).figure
    assert [axes.get_title() for axes in figure.axes[:4]] == ["layer 0", "layer 3", "layer 5", "layer 8"]


def test_angles_have_a_panel_a_rotation_and_a_line_a_stage() -> None:
    found = {
        (0, "theta", 0): np.array([[-1.0, 1.0]]),
        (0, "theta", 1): np.array([[0.0, 0.5]]),
        (1, "theta", 0): np.array([[1.0, 1.0]]),
        (0, "phi", 0): np.array([[2.0, 0.0]]),
    }
    figure = expert_figures.angles(found).figure
    theta, phi = figure.axes
    assert (theta.get_title(), phi.get_title()) == ("theta", "phi")
    assert [len(axes.patches) for axes in (theta, phi)] == [2, 1]
    # Layers count together: of the four angles of stage 0 three are 1, all in one bin of width 4 / 61.
    values, edges, _ = theta.patches[0].get_data()
    np.testing.assert_allclose(values.max() * (edges[1] - edges[0]), 0.75)
    np.testing.assert_allclose((edges[0], edges[-1]), (-2, 2))


def test_angles_that_are_all_zero_can_be_drawn() -> None:
    [axes] = expert_figures.angles({(0, "theta", 0): np.zeros((2, 3))}).figure.axes
    values, edges, _ = axes.patches[0].get_data()
    np.testing.assert_allclose((values * np.diff(edges)).sum(), 1)


def test_trits_add_up_to_all() -> None:
    rows = [(0, "up_prototype", 0.25, 0.5, 0.25), (1, "down_prototype", 0.0, 1.0, 0.0)]
    axes = expert_figures.trits(pd.DataFrame(rows, columns=["layer", "matrix", "minus", "zero", "plus"])).figure.axes[0]
    widths = np.array([bar.get_width() for bar in axes.patches]).reshape(3, 2)
    np.testing.assert_array_equal(widths, [[25, 0], [50, 100], [25, 0]])
    np.testing.assert_array_equal(widths.sum(axis=0), 100)
    assert [text.get_text() for text in axes.texts] == ["50.0 %", "100.0 %"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["layer 0 up prototype", "layer 1 down prototype"]


def test_outliers_are_drawn_before_and_after() -> None:
    rows = [(layer, where, 1.0 + layer, 2.0, 3.0 + layer) for layer in (0, 1) for where in ("before", "after")]
    table = pd.DataFrame(rows, columns=["layer", "where", "crest", "kurtosis", "channels"])
    table = table.assign(crest_interval=0.25, kurtosis_interval=np.nan)
    crest, _, channels = expert_figures.outliers(table).figure.axes
    for axes, expected in ((crest, [1, 2]), (channels, [3, 4])):
        handles, names = axes.get_legend_handles_labels()
        assert names == ["before rotation", "after rotation"]
        for handle in handles:
            np.testing.assert_array_equal(handle.lines[0].get_ydata(orig=False), expected)
    bars = crest.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 1] for segment in bars], [[0.75, 1.25], [1.75, 2.25]])
