import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bvit_jax import plots, rival_report
from bvit_jax.compress_request import ROUNDS, Method, Request
from bvit_jax.rivals import AS_TRAINED, Rival, Step
from tests.test_plots import check_picture, has_colour

TEXT = """
Test accuracy in per cent, mean ± half the 95 % confidence interval over 5 seeds, in brackets if over fewer; what
compressing took from it, in points, paired by seed; the bytes of the file, header and all, in kB of 1,000. **Bold**: no
other of the place has as few bytes and as high a mean.

| rival | few % | few lost | few kB | pairs % | pairs lost | pairs kB |
|---|---|---|---|---|---|---|
| dense, as trained | **90.00 ± 2.00** | - | 277.3 | 91.25 (1) | - | 300.0 |
| dense, svd_0.5 | 80.00 ± 2.00 | 10.00 ± 1.00 | 140.0 | - | - | - |
| stored 16, quantise_8bit | - | - | - | **91.00 ± 2.00 (4)** | -0.50 | 80.1 |

What each step of the mixed-rank method gains in test accuracy over the one before it, in points, at equal numbers,
paired by seed: mean ± half the 95 % confidence interval, in brackets the seeds where they are fewer.

| place | case | keep | bits | step | over | points |
|---|---|---|---|---|---|---|
| few | dense | 0.5 | 32 | mixed | activation_aware | +1.25 ± 0.50 |
| pairs | stored 16 | 0.25 | 8 | mixed_rank | mixed | -0.50 (1) |
| pairs | stored 16 | 0.25 | 4 | mixed_rank | mixed | +0.00 ± 1.00 (2) |
"""


def rival(where: str, case: str, request: Request | None, mean: float, kilobytes: float, **changes: object) -> Rival:
    named = (AS_TRAINED, "-", 32) if request is None else (request.name, request.method, request.bits)
    fields = {"seeds": 5, "bytes_full_ffn": 1.0, "accuracy_interval": 0.02, "lost_mean": 0.0, "lost_interval": 0.0}
    fields |= {"bytes_full": 1000 * kilobytes, "accuracy_mean": mean, **changes}
    return Rival(where, case, *named, **fields)


def test_the_tables_to_the_letter() -> None:
    one = {"seeds": 1, "accuracy_interval": math.nan, "lost_interval": math.nan}
    four = {"seeds": 4, "lost_mean": -0.005, "lost_interval": math.nan, "best": True}
    rivals = [
        rival("few", "dense", None, 0.9, 277.349, best=True),
        rival("few", "dense", Request("svd", 0.5), 0.8, 139.96, lost_mean=0.1, lost_interval=0.01),
        rival("pairs", "dense", None, 0.9125, 300, **one),
        rival("pairs", "stored 16", Request("quantise", bits=8), 0.91, 80.06, **four),
    ]
    steps = [
        Step("few", "dense", 0.5, 32, "mixed", "activation_aware", 5, 0.0125, 0.005),
        Step("pairs", "stored 16", 0.25, 8, "mixed_rank", "mixed", 1, -0.005, None),
        Step("pairs", "stored 16", 0.25, 4, "mixed_rank", "mixed", 2, 0.0, 0.01),
    ]
    assert rival_report.to_markdown(rivals, steps) == TEXT
    assert rival_report.to_markdown(rivals, []) == TEXT.partition("\nWhat each step")[0]


def test_where_the_label_is_all_there_is_columns_have_no_place() -> None:
    text = rival_report.to_markdown([rival("", "dense", None, 0.9, 1)], [Step("", "a", 0.5, 8, "x", "y", 1, 0.1, None)])
    assert "| rival | % | lost | kB |" in text
    assert "| - | a | 0.5 | 8 | x | y | +10.00 (1) |" in text


def test_nothing_finished_is_no_table_and_no_picture(tmp_path: Path) -> None:
    assert rival_report.to_markdown([], []) == ""
    assert rival_report.draw([], tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


CASES = ["dense", "stored 16", "ternary 16", "rotated 16"]


def test_the_picture_has_a_colour_for_every_case(tmp_path: Path) -> None:
    requests = [
        None,
        Request("svd", 0.5),
        Request("svd", 0.25),
        Request("mixed_rank", 0.5, 8),
        Request("quantise", 1, 8),
    ]
    rivals = [
        rival(where, case, request, 0.95 - 0.05 * index - 0.01 * shift, 100 - 10 * index + shift, best=index == 4)
        for where in ("few", "pairs")
        for shift, case in enumerate(CASES)
        for index, request in enumerate(requests)
    ]
    [path] = rival_report.draw(rivals, tmp_path / "deep" / "plots")
    assert path == tmp_path / "deep" / "plots" / "rivals.png"
    picture = check_picture(path)
    assert all(has_colour(picture, colour) for colour in plots.COLOURS[:4])


@pytest.mark.parametrize("places", [1, 2, 3])
def test_panels_are_two_abreast(places: int) -> None:
    figure = Figure()
    rivals = [rival(f"{place}", "dense", None, 0.9, 1.0) for place in range(places)]
    rival_report._draw(figure, rivals, (-(-places // 2), min(places, 2)))
    assert [axes.get_title() for axes in figure.axes] == [f"{place}" for place in range(places)]
    assert [bool(axes.get_ylabel()) for axes in figure.axes] == [True, False, True][:places]


def panel(rivals: list[Rival]) -> Figure:
    figure = Figure()
    rival_report._draw(figure, rivals, (1, 1))
    return figure


def test_errors_bytes_and_intervals_stand_where_they_belong() -> None:
    rivals = [
        rival("few", "dense", None, 0.9, 277.0, accuracy_interval=0.02),
        rival("few", "dense", Request("svd", 0.6), 0.8, 150.0, accuracy_interval=0.05),
        rival("few", "dense", Request("svd", 0.4), 0.7, 100.0, accuracy_interval=math.nan),
        rival("few", "stored 16", None, 1.0, 900.0, accuracy_interval=0.3),  # no error at all; its interval has some
    ]
    [axes] = panel(rivals).axes
    lines = {to_hex(bars.lines[0].get_color()): bars for bars in axes.containers if len(bars.lines[0].get_xdata()) == 1}
    svd = next(bars for bars in axes.containers if len(bars.lines[0].get_xdata()) == 2)
    np.testing.assert_allclose(svd.lines[0].get_xydata(), [[100, 30], [150, 20]])
    spans = [np.ptp(segment[:, 1]) for segment in svd.lines[2][0].get_segments()]
    assert spans == pytest.approx([0, 10])  # a single seed has none
    dense, stored = (lines[colour.lower()].lines[0].get_xydata() for colour in plots.COLOURS[:2])
    np.testing.assert_allclose([dense, stored], [[[277, 10]], [[900, rival_report._LEAST_ERROR]]])
    bottom, top = axes.get_ylim()
    assert bottom > 30 > rival_report._LEAST_ERROR > top > 0
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("file, all bytes (kB)", "test accuracy (%)")


def test_those_beaten_by_none_are_joined_numbered_and_named() -> None:
    rivals = [
        rival("few", "stored 16", None, 0.95, 900.0, best=True),
        rival("few", "dense", None, 0.9, 277.0),
        rival("few", "dense", Request("quantise", bits=8), 0.92, 70.0, best=True),
    ]
    [axes] = panel(rivals).axes
    [front] = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    np.testing.assert_allclose(front.get_xydata(), [[70, 8], [900, 5]])
    assert [(note.get_text(), note.xy) for note in axes.texts] == [
        ("1", pytest.approx((70, 8))),
        ("2", pytest.approx((900, 5))),
    ]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["1  dense, quantise_8bit", "2  stored 16, as trained"]


def test_colours_are_cases_and_markers_are_methods() -> None:
    requests = [None, Request("rounding", bits=8), Request("rounding", bits=4), Request("svd", 0.5)]
    requests += [Request("svd", 0.5, 8), Request("svd", 0.4, 8)]
    rivals = [rival("few", case, request, 0.9, 1 + i) for case in CASES[:2] for i, request in enumerate(requests)]
    figure = panel(rivals)
    cases, methods = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert cases == CASES[:2]
    assert methods == ["as trained", "rounding", "svd", "svd, 8 bits", "beaten by none, numbered"]
    drawn = [bars.lines[0] for bars in figure.axes[0].containers]
    for colour in plots.COLOURS[:2]:
        lines = [line for line in drawn if to_hex(line.get_color()) == colour.lower()]
        found = [(line.get_marker(), line.get_fillstyle(), len(line.get_xdata())) for line in lines]
        assert found == [("*", "full", 1), ("s", "none", 2), ("v", "none", 1), ("v", "right", 2)]


def test_every_method_has_a_marker_of_its_own_and_so_has_what_is_rounded_besides() -> None:
    plain = [Request(method, 1.0, 8) if method in ROUNDS else Request(method, 0.5) for method in get_args(Method)]
    besides: list[Request] = []
    for method in set(get_args(Method)) - {*ROUNDS, "prune"}:
        besides += [Request(method, 0.5, bits) for bits in (8, 4, 2)]
    found = [rival("few", "dense", request, 0.9, 1.0) for request in (None, *plain, *besides)]
    styles = {rival_report._series(one): tuple(rival_report._style(one).values()) for one in found}
    assert len(styles) == len(found)
    assert len(set(styles.values())) == len(found)
