"""The table of what was measured of the cases, and the bars that are broken."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.comparison import format_table


def broken_bars(result: Mapping[str, Any]) -> list[str]:
    """Returns what of a case's result, also as read back from JSON, is not as asked.

    A bar of something that was not measured is broken.
    """
    if result["refused"]:
        return [f"refused: {result['refused']}"]
    measures = result["measures"]
    return [
        f"{name} {_number(measures.get(name, math.nan))}, asked: {_asked(bar)}"
        for name, bar in _broken(result).items()
    ]


def _broken(result: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    return {
        name: bar
        for name, bar in result["bars"].items()
        if not bar[0] <= result["measures"].get(name, math.nan) <= bar[1]
    }


def table(of_case: Mapping[str, Any]) -> str:
    """Returns the table of `results`, also as read back from JSON."""
    columns: dict[str, None] = {}
    for result in of_case.values():
        columns |= dict.fromkeys([*result["measures"], *result["bars"]])
    rows = [
        [name, *(_cell(result, column) for column in columns), _verdict(result)]
        for name, result in of_case.items()
    ]
    notes = [
        f"refused: {name}: {result['refused']}"
        for name, result in of_case.items()
        if result["refused"]
    ]
    return "\n".join([format_table(["case", *columns, "holds"], rows), *notes])


def _verdict(result: Mapping[str, Any]) -> str:
    if result["refused"]:
        return "refused"
    if broken_bars(result):
        return "NO"
    return "yes" if result["bars"] else ""


def _cell(result: Mapping[str, Any], column: str) -> str:
    if column not in result["measures"]:
        return ""
    number = _number(result["measures"][column])
    if column not in result["bars"]:
        return number
    sign = "!" if column in _broken(result) else ""
    return f"{sign}{number} ({_asked(result['bars'][column])})"


def _asked(bar: Sequence[float]) -> str:
    low, high = bar
    if low == high:
        return f"= {low:g}"
    if not low:
        return f"≤ {high:g}"
    return f"{low:g} to {high:g}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"
