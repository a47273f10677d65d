"""Tables on the terminal."""

import resource
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Column, Table

from bvit_jax.packed import MemoryUse
from bvit_jax.scaling import Growth, Point


def table(*headers: str) -> Table:
    """Makes a table of a column of names and right-aligned ones of numbers."""
    made = Table(Column("", no_wrap=True), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for header in headers:
        made.add_column(header, justify="right", no_wrap=True)
    return made


def show(made: Table) -> None:
    """Prints a table at the width that it needs, however narrow the terminal: nothing is left out."""
    needed = Console(width=10_000).measure(made).maximum
    Console(width=max(Console().width, needed)).print(made)


def memory_table(points: Sequence[Point], found: Sequence[Growth] = ()) -> Table:
    """Shows bytes in MB and compression of each variant at one number of experts, and the exponent of its growth."""
    exponents = {g.variant: f"{g.exponent:.2f}" for g in found}
    made = table("paper", "x", "FFN", "x", "file", "x", *(["E^"] if found else []))
    for point in points:
        row = point.totals()
        cells = []
        for accounting in ("paper", "full_ffn", "full"):
            cells += [megabytes(row[f"bytes_{accounting}"]), f"{row[f'compression_{accounting}']:.1f}"]
        made.add_row(point.variant.name, *cells, exponents.get(point.variant, ""))
    return made


def memory_line(use: MemoryUse) -> str:
    """Says what a call took by the compiler's account, and the whole process by the system's."""
    unit = 1024 if sys.platform == "linux" else 1  # of ru_maxrss, in bytes
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    parts = {"model": use.packed, "working": use.working, "images": use.images}
    listed = ", ".join(f"{name} {megabytes(number)}" for name, number in parts.items())
    return f"peak memory {megabytes(use.peak)} MB: {listed}; the process with Python and JAX: {megabytes(process)} MB"


def megabytes(number: float) -> str:
    """Formats bytes as decimal MB to four figures, two decimals at most for large ones."""
    figure = number / 1e6
    return f"{figure:.2f}" if figure >= 100 else f"{figure:.3f}"


def show_figures(figures: Mapping[str, float], columns: Mapping[str, str]) -> None:
    """Prints figures, a line each with what it is."""
    made = table("", "")
    made.show_header = False
    made.columns[-1].justify = "left"
    for name, meaning in columns.items():
        value = figures[name]
        made.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}", meaning)
    show(made)
