"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table; an empty cell reads `-`."""
    lines = [f"| {' | '.join(cell or '-' for cell in line)} |" for line in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]
