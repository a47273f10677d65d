import numpy as np
import pandas as pd
import pytest

from bvit_jax import fits, sweep_figures, sweep_results


def results(prefix: str = "", seeds: int = 3) -> pd.DataFrame:
    """A dense model and mixtures of 4, 16 and 64 experts whose accuracy rises by 0.01 a doubling, in two sweeps."""
    rows = []
    for seed in range(seeds):
        for family, experts in (("dense", 1), *(("standard", 4**power) for power in (1, 2, 3))):
            doublings = np.log2(experts)
            wobble = 0.001 * (seed - 1)
            row = {
                "sweep": prefix or "s",
                "series": prefix + family,
                "family": family,
                "num_experts": experts,
                "seed": seed,
                "test_accuracy": 0.8 + 0.01 * doublings + wobble,
                "test_nll": 0.5 * experts**-0.25,
                "bytes_full": 1e6 * experts,
                "bytes_full_ffn": 5e5 * experts**2,
                "bytes_paper": 4e5 * experts,
                "output_cosine": None if family == "dense" else 0.5,
                "experts_used": None if family == "dense" else experts / 2,
            }
            rows.append(row)
    return pd.DataFrame(rows)


def curves(frame: pd.DataFrame) -> dict[str, object]:
    pictures = sweep_figures.curves(frame, sweep_results.means(frame), fits.series_fits(frame))
    return {picture.name: picture.figure for picture in pictures}


@pytest.fixture(scope="module")
def drawn() -> dict[str, object]:
    return curves(results())


def test_what_is_drawn(drawn) -> None:
    assert list(drawn) == ["quality", "bytes", "accuracy_against_bytes", "experts"]


def test_accuracy_has_means_runs_and_the_law(drawn) -> None:
    axes = drawn["quality"].axes[0]
    handles, names = axes.get_legend_handles_labels()
    assert names == ["dense", "standard"]
    means = handles[1].lines[0]
    np.testing.assert_array_equal(means.get_xdata(orig=False), [4, 16, 64])
    np.testing.assert_allclose(means.get_ydata(orig=False), [82, 84, 86])
    [runs] = [found for found in axes.collections if len(found.get_offsets()) == 9]
    np.testing.assert_allclose(sorted(np.asarray(runs.get_offsets(), float)[:, 1])[0], 81.9)
    law = axes.lines[-1]
    np.testing.assert_allclose(law.get_ydata()[[0, -1]], [82, 86])
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "test accuracy (%)"


def test_bytes_have_their_exponents(drawn) -> None:
    whole, mixtures = drawn["bytes"].axes
    assert [text.get_text() for text in whole.texts] == ["$E^{1.00}$"]
    assert [text.get_text() for text in mixtures.texts] == ["$E^{2.00}$"]
    assert whole.get_yscale() == "log"
    np.testing.assert_allclose(whole.lines[-1].get_ydata(), [4, 16, 64])


def test_points_against_bytes_bear_their_number_of_experts(drawn) -> None:
    axes = drawn["accuracy_against_bytes"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["4", "16", "64"]


def test_experts_are_drawn_where_there_are_some(drawn) -> None:
    diversity, used = drawn["experts"].axes
    for axes in (diversity, used):
        [handle], [name] = axes.get_legend_handles_labels()
        assert name == "standard"
        np.testing.assert_allclose(handle.lines[0].get_ydata(orig=False), 0.5)
    # As in the other pictures, where the dense model comes first.
    assert (
        handle.lines[0].get_color() == drawn["quality"].axes[0].get_legend_handles_labels()[0][1].lines[0].get_color()
    )


def test_one_seed_and_one_number_of_experts_make_pictures_without_laws() -> None:
    frame = results(seeds=1)
    frame = frame[frame["num_experts"].isin((1, 4))]
    drawn = curves(frame)
    assert not drawn["bytes"].axes[0].texts
    level, *means = (line.get_ydata() for line in drawn["quality"].axes[0].lines)
    np.testing.assert_allclose(level, 79.9)
    assert all(len(points) == 1 for points in means)  # a marker and the ends of its bar, no law


def test_dense_models_alone_have_no_picture_of_experts() -> None:
    frame = results()
    assert "experts" not in curves(frame[frame["family"] == "dense"])


def test_several_sweeps_stand_side_by_side() -> None:
    both = pd.concat([results("a: "), results("b: ")], ignore_index=True)
    handles, names = curves(both)["quality"].axes[0].get_legend_handles_labels()
    assert names == ["a: dense", "b: dense", "a: standard", "b: standard"]
    # Bars of equal numbers of experts are beside each other: 20 % apart, around the number.
    one, other = (handle.lines[0].get_xdata(orig=False) for handle in handles[2:])
    np.testing.assert_allclose(other / one, 1.2)
    np.testing.assert_allclose(np.sqrt(one * other), [4, 16, 64])


def test_no_axis_goes_on_beyond_all_images() -> None:
    frame = results()
    frame["test_accuracy"] = np.where(frame["seed"] == 0, 0.9, 1.0)
    drawn = curves(frame)
    # Means of 96.7 %, with intervals of 14.3.
    for name in ("quality", "accuracy_against_bytes"):
        axes = drawn[name].axes[0]
        assert axes.get_ylim()[1] == 100
        ends = [
            end[1] for one in axes.containers for bars in one.lines[2] for bar in bars.get_segments() for end in bar
        ]
        assert (min(ends), max(ends)) == (pytest.approx(82.3, abs=0.05), pytest.approx(100))


def test_nothing_finished_is_no_picture() -> None:
    frame = results()
    frame["test_accuracy"] = np.nan
    assert curves(frame) == {}
