from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from bvit_jax import figures, page
from tests import chromium


@pytest.fixture(scope="module")
def picture() -> figures.Picture:
    return figures.draw("line", "A <line>", "1 < 2 & so on.", (3.5, 2.0), lambda figure: figure.subplots().plot([1, 2]))


@pytest.fixture(scope="module")
def html(picture: figures.Picture, tmp_path_factory: pytest.TempPathFactory) -> str:
    drawn, _ = picture.save(tmp_path_factory.mktemp("drawn"))
    frame = pd.DataFrame({"name": ["<b>", "b"], "value": [1 / 3, None]})
    sections = [
        page.Section("First & last", ("Text <i>as it is</i>.", page.Table("A table.", frame))),
        page.Section("Pictures", (picture, page.File(drawn, "one of a sweep"))),
    ]
    return page.to_html("Run <x>", "What it is.", sections)


class References(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name in ("src", "href")]


def test_a_page_refers_to_nothing_outside_itself(html: str) -> None:
    parser = References()
    parser.feed(html)
    assert [found[:5] for found in parser.found] == ["#part", "#part", "data:", "data:"]
    assert "url(" not in html
    assert "<script" not in html


def test_text_is_shown_as_it_is(html: str) -> None:
    assert "Text &lt;i&gt;as it is&lt;/i&gt;." in html
    assert "&lt;b&gt;" in html
    assert "<title>Run &lt;x&gt;</title>" in html
    assert "0.3333" in html
    assert "<td>-</td>" in html


def test_a_picture_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        page.to_html("", "", [page.Section("", (page.File(tmp_path / "gone.png", "gone"),))])


@chromium.needs_chromium
def test_a_browser_shows_all_of_it(html: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html)
    seen = chromium.look(tmp_path / "page.html", tmp_path)
    assert seen["pictures"] == [["A <line>", 700], ["one of a sweep", 700]]
    assert seen["headings"] == ["First & last", "Pictures"]
    assert "Text <i>as it is</i>." in seen["text"]
    assert "A <line>. 1 < 2 & so on." in seen["text"]
