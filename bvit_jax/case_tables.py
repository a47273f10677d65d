"""Tables of a sweep's cases: a row for each case, a column for each place where they are compared, one for all."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bvit_jax import comparison
from bvit_jax.comparison import EVERYWHERE, Comparison
from bvit_jax.sweep import Summary

_MEANS = """
Test accuracy in per cent, mean ± half the 95 % confidence interval over seeds, by {label}. Cosine: of what two experts
of a layer give for the same token, 1 if all are alike. Lost: points of accuracy when all experts of a layer are
replaced by its most used one. Both by place. kB: 1,000 bytes, the FFN or mixture layers with everything stored.
"""
_DIFFERENCES = """
Test accuracy less that of {label} = {baseline}, in points, paired by seed: mean ± half the 95 % confidence interval.
Of twenty without a difference, one is beyond its interval by chance; what is chosen is to be chosen on validation.
"""


def to_markdown(summaries: Sequence[Summary], comparisons: Sequence[Comparison], label: str) -> str:
    """Formats accuracies, and differences to every baseline; places without a finished trial are left out.

    Args:
        summaries: of the finished trials.
        comparisons: of the same.
        label: which tells the cases apart.
    """
    if not summaries:
        return ""
    by_case: dict[str, dict[str, Summary]] = {}
    for summary in summaries:
        of_case = by_case.setdefault(summary.trial.labels[label], {})
        of_case |= dict.fromkeys(comparison.places(summary.trial, label), summary)
    places = list(dict.fromkeys(place for found in by_case.values() for place in found))
    header = [label, *places, "cosine", "lost, one expert", "kB"]
    means = [[case, *_cells(found, places, _mean), *_of_case(found, places)] for case, found in by_case.items()]
    lines = [_MEANS.format(label=label), *_table(header, means)]
    for baseline in dict.fromkeys(row.baseline for row in comparisons):
        cases: dict[str, dict[str, Comparison]] = {}
        for row in comparisons:
            if row.baseline == baseline:
                cases.setdefault(row.case, {})[row.where] = row
        several = any(EVERYWHERE in found for found in cases.values())
        columns = [*places, EVERYWHERE] if several else places
        rows = [[case, *_cells(found, columns, _difference)] for case, found in cases.items()]
        lines += [_DIFFERENCES.format(label=label, baseline=baseline), *_table([label, *columns], rows)]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cell or '-' for cell in line)} |" for line in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _cells(found: Mapping[str, Any], places: Sequence[str], shown: Callable[[Any], str]) -> list[str]:
    return [shown(found[place]) if place in found else "-" for place in places]


def _mean(summary: Summary) -> str:
    half = summary.accuracy_interval
    return f"{100 * summary.accuracy_mean:.2f}" + ("" if math.isnan(half) else f" ± {100 * half:.2f}")


def _difference(row: Comparison) -> str:
    half = row.accuracy_interval
    return f"{100 * row.accuracy:+.2f}" + ("" if half is None else f" ± {100 * half:.2f}")


def _of_case(found: Mapping[str, Summary], places: Sequence[str]) -> list[str]:
    """Returns what has no column of its own by place; bytes once where they are the same."""
    here = [found[place] for place in places if place in found]
    sizes = dict.fromkeys(f"{summary.sample.bytes_full_ffn / 1e3:.1f}" for summary in here)
    cosines = [summary.experts.get("output_cosine", math.nan) for summary in here]
    lost = [100 * summary.experts.get("lost_one", math.nan) for summary in here]
    return [_listed(cosines, 2), _listed(lost, 1), " / ".join(sizes)]


def _listed(values: Sequence[float], digits: int) -> str:
    known = not all(map(math.isnan, values))
    return " / ".join(f"{value:.{digits}f}" for value in values) if known else "-"
