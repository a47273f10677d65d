"""Pictures of a run, a packed file or sweeps, and a page of HTML with all of them, for people without a notebook.

    python -m experiments.report --workdir=runs/digits --out=runs/report
    python -m experiments.report --workdir=runs/sweep_digits --out=runs/report
    python -m experiments.report --workdir=runs/sweep_a,runs/sweep_b --out=runs/report

A run, finished or not: training, where patches go, load, whether routing is smooth in space, whether experts differ,
and what they are made of. A sweep, with whatever of it is there: accuracy, NLL and bytes against experts, with the laws
of scaling fitted to them. --out receives report.html, which holds all its pictures, and figures/NAME.png and .svg.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import jax
from absl import flags

from bvit_jax import data, files, opened, page, run_report, sweep_report, sweep_results, trained
from bvit_jax.figures import Picture
from bvit_jax.model_config import require
from bvit_jax.run_report import Report
from experiments import data_flags, entry

_WORKDIR = flags.DEFINE_list("workdir", [], "A run or a sweep, or a packed file; of sweeps several, comma between.")
_OUT = flags.DEFINE_string("out", None, "The directory to write; made if absent, else empty or an earlier report's.")
_SPLIT = flags.DEFINE_enum("split", "test", get_args(data.SplitName), "Images that a run is looked at with.")
_IMAGES = flags.DEFINE_integer("images", 64, "How many of them.", lower_bound=1)
flags.adopt_module_key_flags(data_flags)


def main(argv: Sequence[str]) -> None:
    """Draws what the flags name, and writes the page."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # an accelerator is for those that train
    data_flags.apply()
    paths = [Path(name) for name in _WORKDIR.value if name]
    _check(paths)
    out = _directory(str(_OUT.value))
    report, folder = _report(paths), out / "figures"
    folder.mkdir(exist_ok=True)
    for earlier in (*folder.glob("*.png"), *folder.glob("*.svg")):
        earlier.unlink()
    pictures = [part for section in report.sections for part in section.parts if isinstance(part, Picture)]
    for picture in pictures:
        picture.save(folder)
    files.write_text(out / "report.html", page.to_html(report.title, report.lead, report.sections))
    print(f"{report.title}: {report.lead}")
    print(f"{out / 'report.html'}; {len(pictures)} figures, each as PNG and SVG, in {folder}")


def _report(paths: list[Path]) -> Report:
    if all(sweep_results.is_sweep(path) for path in paths):
        return sweep_report.of_sweeps(paths)
    split = cast(data.SplitName, _SPLIT.value)
    packed = opened.packed_at(paths[0])
    if packed is not None:
        return run_report.of_file(packed, split, _IMAGES.value)
    return run_report.of_run(paths[0], split, _IMAGES.value)


def _check(paths: list[Path]) -> None:
    """Says what is wrong with the paths before any work begins."""
    require(bool(paths), "workdir", _WORKDIR.value, "given: a run, a packed file, or one sweep or more")
    if not all(sweep_results.is_sweep(path) for path in paths):
        require(len(paths) == 1, "workdir", [str(path) for path in paths], "sweeps alone, if there are several")
        if opened.packed_at(paths[0]) is None:
            trained.config_of(paths[0], f"workdir = {str(paths[0])!r}")


def _directory(value: str) -> Path:
    """Makes the directory of a report, or checks that what it holds is an earlier one."""
    out = entry.make_directory("out", value)
    found = {path.name for path in out.iterdir()}
    others = sorted(found - ({"report.html", "figures"} if "report.html" in found else set()))
    require(not others, "out", value, f"a directory of its own; this one holds {', '.join(others[:3])}")
    return out


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    entry.run(main)
