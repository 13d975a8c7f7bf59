"""The bars that speed is held to, and whether a report clears them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.cost.cpu.peers import HOOK, OURS
from benchmarks.cost.cpu.steps import AGAIN, chains_of
from benchmarks.cost.cpu.updates import LAYOUTS, case_name, depth_of

_WINDOW, _PRESERVING = "window(0.2)", "window(0.2), norm_preserving"
_SMALL, _LARGE = case_name(64, "float32"), case_name(512, "float32")
# (case, layout, operator, the most that it may take in units of `0.9 u`).
_OPERATORS = (
    (_SMALL, "stacked", _WINDOW, 1.6),
    (_LARGE, "stacked", _WINDOW, 2.1),
    (case_name(64, "bfloat16"), "stacked", _WINDOW, 2.3),
    (_SMALL, "stacked", _PRESERVING, 3.6),
    (_LARGE, "stacked", _PRESERVING, 4.3),
    (_SMALL, "unrolled", _WINDOW, 1.8),
    (_LARGE, "unrolled", _WINDOW, 1.8),
    (_SMALL, "unrolled", _PRESERVING, 3.6),
    (_LARGE, "unrolled", _PRESERVING, 4.3),
    # Operators that reach far.
    *(
        (_SMALL, layout, name, 5.0)
        for name in ("window(0.2, radius=8)", "ema(0.5)", "tikhonov(1.0)")
        for layout in LAYOUTS
    ),
    *((_SMALL, layout, "repeat(window(0.2), 8)", 5.0) for layout in LAYOUTS),
)
_COMPILE = {"window": 1.5, "norm_preserving": 3.0, "directional, per block": 3.0}


class Bar(NamedTuple):
    """A bound of one figure of a report.

    Attributes:
      what: is measured, for people.
      where: the keys that lead to the figure in the report.
      bound: the most that it may be,
      is_least: or the least.
      over: the keys of a figure to divide by.
    """

    what: str
    where: tuple[str, ...]
    bound: float
    is_least: bool = False
    over: tuple[str, ...] = ()


def bars() -> Iterator[Bar]:
    """Yields every bar. Times are in units of what the section compares with."""
    for case, layout, name, bound in _OPERATORS:
        where = ("operators", case, layout, name, "median")
        yield Bar(f"{name}, {case}, {layout}", where, bound)
    for case in (_SMALL, _LARGE):
        where = ("operators", case, "unrolled", _WINDOW, "temporaries")
        yield Bar(f"temporaries of {_WINDOW}, {case}, unrolled", where, 0.001)
    for name, bound in _COMPILE.items():
        where = ("compile", "96", name, "median")
        yield Bar(f"compile of 96 layers, {name}", where, bound)
    for layout in LAYOUTS:
        for name in chains_of(depth_of(layout)):
            where = ("chains", layout, name, "median")
            yield Bar(f"chain {name}, {layout}", where, 2.5)
    yield Bar(
        "training step, window / base again",
        ("training", "window", "median"),
        1.03,
        over=("training", AGAIN, "median"),
    )
    for size in ("64 MB", "225 MB"):
        for variant in ("window", "norm_preserving"):
            hook, ours = (
                ("peers", size, "unrolled", f"{who}: {variant}", "median")
                for who in (HOOK, OURS)
            )
            what = f"PyTorch hook / ours, {size}, {variant}"
            yield Bar(what, hook, 2.0, is_least=True, over=ours)


def figure(report: Mapping[str, Any], bar: Bar) -> float | None:
    """Returns the measured figure, None where the report does not have it."""
    found = _at(report, bar.where)
    if not bar.over or found is None:
        return found
    unit = _at(report, bar.over)
    return None if unit is None else found / unit


def _at(report: Any, where: tuple[str, ...]) -> float | None:
    for key in where:
        if key not in report:
            return None
        report = report[key]
    return report


def holds(bar: Bar, measured: float) -> bool:
    """Returns whether the figure clears the bar."""
    return measured >= bar.bound if bar.is_least else measured <= bar.bound
