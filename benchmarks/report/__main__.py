"""Writes the report of the results of before `benchmarks.evidence` used `trial`.

    python -m benchmarks.report
    python -m benchmarks.report --check

Reads benchmarks/results/<task>/*.json and signals.json, and writes README.md and
figures/*.svg there. With `--check` nothing is written, and the exit status is 1 if
README.md is not what would be written, or a figure is missing, left over or, where the
same version of matplotlib made it, different.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import cli, signals
from benchmarks.json_files import RESULTS
from benchmarks.report.figures import drawings, made_by_this_version
from benchmarks.report.page import page
from benchmarks.report.records import read_sources


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    parser = cli.parser("report", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(argv)
    sources = read_sources(RESULTS)
    figures = {name: draw() for name, draw in drawings(sources).items()}
    measured = json.loads((RESULTS / "signals.json").read_text("utf-8"))
    text = page(sources, figures, signals.table(measured)) + "\n"
    if given.check:
        stale = differences(RESULTS, text, figures)
        print("\n".join(stale) or "the report is what the results say")
        return 1 if stale else 0
    write(RESULTS, text, figures)
    print(f"{RESULTS / 'README.md'} and {len(figures)} figures are written")
    return 0


def write(results: Path, text: str, figures: Mapping[str, str]) -> None:
    """Writes the report, and removes the figures of one before it."""
    directory = results / "figures"
    directory.mkdir(exist_ok=True)
    for name in _left_over(results, figures):
        (directory / name).unlink()
    (results / "README.md").write_text(text, "utf-8")
    for name, figure in figures.items():
        (directory / name).write_text(figure, "utf-8")


def differences(results: Path, text: str, figures: Mapping[str, str]) -> list[str]:
    """Returns what the report in `results` has other than this one, in words."""
    found = [f"figures/{name} is left over" for name in _left_over(results, figures)]
    readme = results / "README.md"
    if not readme.exists() or readme.read_text("utf-8") != text:
        found.append("README.md differs from the results")
    for name, figure in figures.items():
        path = results / "figures" / name
        there = path.read_text("utf-8") if path.exists() else ""
        if not there:
            found.append(f"figures/{name} is missing")
        elif made_by_this_version(there) and there != figure:
            found.append(f"figures/{name} differs from the results")
    return found


def _left_over(results: Path, figures: Mapping[str, str]) -> list[str]:
    there = sorted(path.name for path in (results / "figures").glob("*.svg"))
    return [name for name in there if name not in figures]


if __name__ == "__main__":
    sys.exit(main())
