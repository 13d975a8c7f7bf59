"""The tables of times on the CPU, also of a report read back from JSON."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.comparison import format_table
from benchmarks.cost.cpu.bars import bars, figure, holds


def tables(report: Mapping[str, Any]) -> str:
    """Returns a page of tables of the sections that the report has, and the bars."""
    return "\n\n".join([*_tables(report), bars_table(report)])


def bars_table(report: Mapping[str, Any]) -> str:
    """Returns the table of bars whose figures the report has."""
    rows = []
    for bar in bars():
        measured = figure(report, bar)
        if measured is not None:
            sign = "≥" if bar.is_least else "≤"
            verdict = "holds" if holds(bar, measured) else "FAILS"
            rows.append([bar.what, f"{measured:.2f}", f"{sign} {bar.bound:g}", verdict])
    return format_table(["bar", "measured", "bound", ""], rows)


def failures(report: Mapping[str, Any]) -> list[str]:
    """Returns what does not clear its bar; a figure that is missing does not count."""
    return [
        bar.what
        for bar in bars()
        if (measured := figure(report, bar)) is not None and not holds(bar, measured)
    ]


# {section: (title, digits)}.
_SECTIONS = {
    "operators": ("operator / 0.9 u", 1),
    "crossover": ("stacked window, by layers", 1),
    "chains": ("chain / its base", 1),
    "steps": ("optimizer step / base", 2),
    "training": ("training step / base", 3),
    "compile": ("trace and compile / AdamW, by layers", 1),
    "learning": ("trace and compile / AdamW, by layers", 1),
    "peers": ("peers / 0.9 u", 1),
}


def _tables(report: Mapping[str, Any]) -> Iterator[str]:
    for section, (title, digits) in _SECTIONS.items():
        if section not in report:
            continue
        columns = report[section]
        if section == "training":
            columns = {"default GPT": columns}
        if section in ("operators", "steps", "peers"):
            columns = {
                f"{one}, {other}": found
                for one, of in columns.items()
                for other, found in of.items()
            }
        yield _table(title, columns, digits, "median")
        if section == "operators":
            yield _table("temporaries / updates", columns, digits, "temporaries")


def _table(title: str, columns: Mapping[str, Any], digits: int, figure: str) -> str:
    """One row for each name in any column."""
    rows = [
        [
            name,
            *(
                f"{of[name][figure]:.{digits}f}×" if name in of else ""
                for of in columns.values()
            ),
        ]
        for name in dict.fromkeys(name for of in columns.values() for name in of)
    ]
    return format_table([title, *columns], rows)
