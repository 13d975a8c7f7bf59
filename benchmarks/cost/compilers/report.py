"""Compiles the cases, holds what came out against the bars, and reports both."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from benchmarks.comparison import format_table
from benchmarks.compilers.cases import Case, cases
from benchmarks.json_files import RESULTS, write_json
from benchmarks.provenance import provenance

Measures = Mapping[str, float]

# What a case is also measured in relative to its base.
_RELATIVE = ("bytes", "traffic", "cycles", "collectives")

# Enough to see a regression, in seconds.
QUICK = (
    "window, axis 0, float32",
    "norm_preserving, float32",
    "window, layers sharded",
    "window, layers sharded, shard_map",
    "step, Adam: base",
    "step, Adam",
    "step, Adam, small: base",
    "step, Adam, small",
)


def build_parser(
    name: str, description: str | None, topologies: Sequence[str]
) -> argparse.ArgumentParser:
    """Returns the options of the benchmark called `name`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--topology",
        action="append",
        help=f"to compile for; may be repeated (default: {' '.join(topologies)})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="only: " + "; ".join(QUICK)
    )
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="cases, such as 'step, Adam*'"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"JSON (default of a whole run: benchmarks/results/{name}.json)",
    )
    return parser


def run(
    name: str,
    compiler: Literal["tpu", "gpu"],
    options: argparse.Namespace,
    topologies: Sequence[str],
    devices_of: Callable[[str], Sequence[Any]],
    measure: Callable[[Any, Case], Measures],
) -> int:
    """Compiles, prints a table per topology, writes the JSON, returns the exit status.

    Args:
        name: of the benchmark.
        compiler: whose bars hold.
        options: as parsed by `build_parser`.
        topologies: to compile for unless `options` say so.
        devices_of: from a topology to its devices; raises if it is not offered.
        measure: from a compiled program and its case to what is measured of it.
    """
    compiled_for: set[str] = set()
    report: dict[str, Any] = {"benchmark": name, **provenance(), "topologies": {}}
    for topology in options.topology or topologies:
        try:
            devices = devices_of(topology)
        except Exception as error:  # each compiler has its own
            print(f"{topology} is not offered: {_message(error)}\n", flush=True)
            if options.topology:
                return 1
            continue
        kind = devices[0].device_kind
        # On one device a larger topology of the same chip is nothing new.
        least_devices = 2 if kind in compiled_for else 1
        compiled_for.add(kind)
        chosen = [
            case
            for case in cases(devices)
            if _is_chosen(case, options) and case.num_devices >= least_devices
        ]
        of_topology = {
            "device": kind,
            "devices": len(devices),
            "cases": results(chosen, compiler, measure),
        }
        report["topologies"][topology] = of_topology
        print(f"{topology}: {len(devices)} × {kind}\n")
        print(f"{table(of_topology['cases'])}\n", flush=True)

    is_whole = not options.quick and options.only == "*" and not options.topology
    out = options.out or (RESULTS / f"{name}.json" if is_whole else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(report, out)
        print(f"wrote {out}")
    broken = [
        f"{topology}, {case}: {what}"
        for topology, of_topology in report["topologies"].items()
        for case, result in of_topology["cases"].items()
        for what in broken_bars(result)
    ]
    print("\n".join([f"{len(broken)} broken bars", *broken]))
    measured = any(each["cases"] for each in report["topologies"].values())
    return 0 if measured and not broken else 1


def _is_chosen(case: Case, options: argparse.Namespace) -> bool:
    if options.quick and case.name not in QUICK:
        return False
    # A case comes with its base.
    names = (case.name, case.name.removesuffix(": base"))
    return any(fnmatch(name, options.only) for name in names)


def results(
    chosen: Sequence[Case],
    compiler: Literal["tpu", "gpu"],
    measure: Callable[[Any, Case], Measures],
) -> dict[str, Any]:
    """Returns what was measured of every case, or why the compiler refused it."""
    found: dict[str, Any] = {}
    for case in chosen:
        began = time.perf_counter()
        print(f"  {case.name}", end="", file=sys.stderr, flush=True)
        refused, measures = None, {}
        try:
            compiled = case.function.lower(*case.arguments).compile()
            measures = dict(measure(compiled, case))
        except Exception as error:  # a refusal is a result
            refused = f"{type(error).__name__}: {_message(error)}"
        if case.base in found:
            measures |= _ratios(measures, found[case.base]["measures"])
        found[case.name] = {
            "measures": measures,
            "bars": getattr(case.bars, compiler),
            "refused": refused,
        }
        seconds = time.perf_counter() - began
        print(f" ({seconds:.1f} s)", file=sys.stderr, flush=True)
    return found


def _ratios(measures: Measures, base: Measures) -> dict[str, float]:
    return {
        f"{name} / base": value / base[name]
        for name, value in measures.items()
        if name in _RELATIVE and base.get(name)
    }


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


def _message(error: Exception) -> str:
    """The first line that says something, which may be followed by pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[
        :300
    ]
