"""Tables of a sweep's cases: a row for each case, a column for each place where they are compared, one for all."""

import math
from collections.abc import Mapping, Sequence

from bvit_jax import comparison, markdown
from bvit_jax.comparison import EVERYWHERE, Comparison
from bvit_jax.sweep import Summary

_MEANS = """
Test accuracy in per cent, mean ± half the 95 % confidence interval over {seeds} seeds, in brackets if over fewer, by
{label}. Cosine: of what two experts of a layer give for the same token, 1 if all are alike. Lost: points of accuracy
when all experts of a layer are replaced by its most used one. Both by place. kB: 1,000 bytes, the FFN or mixture layers
with everything stored.
"""
_DIFFERENCES = """
Test accuracy less that of {label} = {baseline}, in points, paired by seed: mean ± half the 95 % confidence interval,
in brackets the seeds where they are fewer. All places: each seed's mean over them. Of twenty without a difference, one
is beyond its interval by chance; what is chosen is to be chosen on validation.
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
    seeds = max(summary.seeds for summary in summaries)
    header = [label, *places, "cosine", "lost, one expert", "kB"]
    means = [[case, *_cells(found, places, seeds), *_of_case(found, places)] for case, found in by_case.items()]
    lines = [_MEANS.format(label=label, seeds=seeds), *markdown.table(header, means)]
    for baseline in dict.fromkeys(row.baseline for row in comparisons):
        cases: dict[str, dict[str, Comparison]] = {}
        for row in comparisons:
            if row.baseline == baseline:
                cases.setdefault(row.case, {})[row.where] = row
        several = any(EVERYWHERE in found for found in cases.values())
        columns = [*places, EVERYWHERE] if several else places
        differences = [[case, *_cells(found, columns, seeds)] for case, found in cases.items()]
        lines += [_DIFFERENCES.format(label=label, baseline=baseline), *markdown.table([label, *columns], differences)]
    return "\n".join(lines) + "\n"


def _cells(found: Mapping[str, Summary | Comparison], places: Sequence[str], seeds: int) -> list[str]:
    """Returns a cell for each place; where there are fewer than so many seeds, their number is in it."""
    return ["-" if one is None else _cell(one, seeds) for one in map(found.get, places)]


def _cell(one: Summary | Comparison, seeds: int) -> str:
    mean = f"{100 * one.accuracy_mean:.2f}" if isinstance(one, Summary) else f"{100 * one.accuracy:+.2f}"
    half = one.accuracy_interval
    interval = "" if half is None or math.isnan(half) else f" ± {100 * half:.2f}"
    return mean + interval + (f" ({one.seeds})" if one.seeds < seeds else "")


def _of_case(found: Mapping[str, Summary], places: Sequence[str]) -> list[str]:
    """Returns what has no column of its own by place; bytes once where they are all the same."""
    here = [found.get(place) for place in places]
    sizes = [math.nan if one is None else one.sample.bytes_full_ffn / 1e3 for one in here]
    known = {size for size in sizes if not math.isnan(size)}
    cosines = [math.nan if one is None else one.experts.get("output_cosine", math.nan) for one in here]
    lost = [math.nan if one is None else 100 * one.experts.get("lost_one", math.nan) for one in here]
    return [_listed(cosines, 2), _listed(lost, 1), _listed([*known] if len(known) == 1 else sizes, 1)]


def _listed(values: Sequence[float], digits: int) -> str:
    if all(map(math.isnan, values)):
        return "-"
    return " / ".join("-" if math.isnan(value) else f"{value:.{digits}f}" for value in values)
