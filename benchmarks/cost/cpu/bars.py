"""The bars that speed is held to, and whether a report clears them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.cost.cpu.peers import HOOK, OURS
from benchmarks.cost.cpu.steps import AGAIN, chains_of
from benchmarks.cost.cpu.updates import LAYOUTS, case_name, depth_of

# Operators that reach far.
_WIDE = (
    *("window(0.2, radius=8)", "ema(0.5)", "tikhonov(1.0)"),
    "repeat(window(0.2), 8)",
)


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
    small, large, half = (
        case_name(64, "float32"),
        case_name(512, "float32"),
        case_name(64, "bfloat16"),
    )
    window = "window(0.2)"
    preserving = f"{window}, norm_preserving"
    for case, name, bound in (
        (small, window, 1.6),
        (large, window, 2.1),
        (half, window, 2.3),
        (small, preserving, 3.6),
        (large, preserving, 4.3),
    ):
        yield _operator(case, "stacked", name, bound)
    for case in (small, large):
        yield _operator(case, "unrolled", window, 1.8)
        where = ("operators", case, "unrolled", window, "temporaries")
        yield Bar(f"temporaries of {window}, {case}, unrolled", where, 0.001)
    yield _operator(small, "unrolled", preserving, 3.6)
    yield _operator(large, "unrolled", preserving, 4.3)
    for name in _WIDE:
        for layout in LAYOUTS:
            yield _operator(small, layout, name, 5.0)
    for name, bound in (
        ("window", 1.5),
        ("norm_preserving", 3.0),
        ("directional, per block", 3.0),
    ):
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


def _operator(case: str, layout: str, name: str, bound: float) -> Bar:
    where = ("operators", case, layout, name, "median")
    return Bar(f"{name}, {case}, {layout}", where, bound)


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
