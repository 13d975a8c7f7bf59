"""The tables of times on the CPU, also of a report read back from JSON."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.comparison import format_table
from benchmarks.cost.cpu.bars import bars, figure, holds


def tables(report: Mapping[str, Any]) -> str:
    """Returns a page of tables of the sections that the report has, and the bars."""
    return "\n\n".join(_tables(report))


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


def _tables(report: Mapping[str, Any]) -> Iterator[str]:
    if "operators" in report:
        yield _operators(report["operators"])
    if "crossover" in report:
        columns = {f"{layers} layers": of for layers, of in report["crossover"].items()}
        yield _table("stacked window", columns)
    if "chains" in report:
        yield _table("chain / its base", report["chains"])
    if "steps" in report:
        columns = {
            f"{tree}, {name}": of
            for tree, of_names in report["steps"].items()
            for name, of in of_names.items()
        }
        yield _table("optimizer step / base", columns, digits=2)
    if "training" in report:
        yield _table("training step / base", {"default GPT": report["training"]}, 3)
    for section in ("compile", "learning"):
        if section in report:
            columns = {f"{layers} layers": of for layers, of in report[section].items()}
            yield _table("trace and compile / AdamW", columns)
    if "peers" in report:
        columns = {
            f"{size}, {layout}": of
            for size, of_layout in report["peers"].items()
            for layout, of in of_layout.items()
        }
        yield _table("peers / 0.9 u", columns)
    yield bars_table(report)


def _operators(of_cases: Mapping[str, Any]) -> str:
    columns = {
        f"{case}, {layout}": of
        for case, of_layout in of_cases.items()
        for layout, of in of_layout.items()
    }
    return "\n\n".join(
        [
            _table("operator / 0.9 u", columns),
            _table("temporaries / updates", columns, figure="temporaries"),
        ]
    )


def _table(
    title: str,
    columns: Mapping[str, Mapping[str, Any]],
    digits: int = 1,
    figure: str = "median",
) -> str:
    """One row for each name in any column."""
    names = dict.fromkeys(name for column in columns.values() for name in column)

    def cell(found: Mapping[str, Any] | None) -> str:
        return "" if found is None else f"{found[figure]:.{digits}f}×"

    rows = [
        [name, *(cell(column.get(name)) for column in columns.values())]
        for name in names
    ]
    return format_table([title, *columns], rows)
