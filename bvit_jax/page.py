"""A page of HTML that holds all it shows: text, tables, pictures."""

import base64
import dataclasses
from pathlib import Path

import jinja2
import pandas as pd

from bvit_jax.figures import Picture


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table under a caption; figures are rounded for reading.

    Attributes:
        caption: what it holds.
        frame: the content, without its index.
    """

    caption: str
    frame: pd.DataFrame


@dataclasses.dataclass(frozen=True)
class File:
    """A PNG that is there already.

    Attributes:
        path: where.
        title: in a few words.
    """

    path: Path
    title: str


_REM_AN_INCH = 8.2
"""How wide pictures are shown: one of two columns fills the page."""

Part = str | Table | Picture | File
"""Of a section: a paragraph, a table, a picture drawn for it, or one that is there already."""


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
    """A heading and what stands under it."""

    heading: str
    parts: tuple[Part, ...]


def to_html(title: str, lead: str, sections: list[Section]) -> str:
    """Returns the page, complete and on its own: nothing in it is read from elsewhere.

    Raises:
        OSError: if a file cannot be read.
    """
    shown = [(section.heading, [_shown(part) for part in section.parts]) for section in sections]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(title=title, lead=lead, sections=shown)


def _shown(part: Part) -> dict[str, str]:
    if isinstance(part, str):
        return {"kind": "text", "text": part}
    if isinstance(part, Table):
        content = part.frame.map(_cell).to_html(index=False, border=0)
        return {"kind": "table", "caption": part.caption, "content": content}
    if isinstance(part, File):
        caption, width, content = "", "auto", part.path.read_bytes()
    else:
        width = f"{part.figure.get_figwidth() * _REM_AN_INCH:.4g}rem"  # alike for all, so that their letters are
        caption, content = part.caption, part.png
    return {"kind": "picture", "title": part.title, "caption": caption, "width": width, "source": _data(content)}


def _cell(value: object) -> str:
    if pd.isna(value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: 0.9rem; color: #444; max-width: 46rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.6rem; text-align: right; white-space: nowrap; }
thead { border-bottom: 1px solid #888; }
tbody tr:nth-child(even) { background: #f4f4f4; }
nav { font-size: 0.9rem; margin-top: 1rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
<nav>
{% for heading, _ in sections %}
<a href="#part{{ loop.index }}">{{ heading }}</a>{{ "" if loop.last else " · " }}
{% endfor %}
</nav>
{% for heading, parts in sections %}
<h2 id="part{{ loop.index }}">{{ heading }}</h2>
{% for part in parts %}
{% if part.kind == "text" %}
<p>{{ part.text }}</p>
{% elif part.kind == "table" %}
<figure>
<figcaption>{{ part.caption }}</figcaption>
<div class="table">{{ part.content | safe }}</div>
</figure>
{% else %}
<figure>
<img src="{{ part.source }}" alt="{{ part.title }}" style="width: {{ part.width }}">
<figcaption><b>{{ part.title }}{{ "" if part.title.endswith("?") else "." }}</b> {{ part.caption }}</figcaption>
</figure>
{% endif %}
{% endfor %}
{% endfor %}
</body>
</html>
"""
