"""Compiles the cases, prints what came out next to its bars, and writes the JSON."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, Literal

from benchmarks.cost.__main__ import QUICK
from benchmarks.cost.compilers import gpu, tpu
from benchmarks.cost.compilers.cases import Case, cases
from benchmarks.cost.compilers.report import broken_bars, table
from benchmarks.json_files import COST, write_json
from benchmarks.provenance import provenance

Compiler = Literal["tpu", "gpu"]
Measures = Mapping[str, float]

# What a case is also measured in relative to its base.
_RELATIVE = ("bytes", "traffic", "cycles", "collectives")


def run(given: argparse.Namespace) -> int:
    """Compiles, prints a table per topology, writes the JSON, returns the exit status.

    Args:
      given: the options, with the compiler as `device`.
    """
    compiler: Compiler = given.device
    chips: Any = {"tpu": tpu, "gpu": gpu}[compiler]
    compiled_for: set[str] = set()
    report: dict[str, Any] = {
        "benchmark": f"cost {compiler}",
        **provenance(),
        "topologies": {},
    }
    for topology in given.topology or chips.TOPOLOGIES:
        try:
            devices = chips.devices_of(topology)
        except Exception as error:  # each compiler has its own
            print(f"{topology} is not offered: {_message(error)}\n", flush=True)
            if given.topology:
                return 1
            continue
        kind = devices[0].device_kind
        # On one device a larger topology of the same chip is nothing new.
        least_devices = 2 if kind in compiled_for else 1
        compiled_for.add(kind)
        chosen = [
            case
            for case in cases(devices)
            if _is_chosen(case, given) and case.num_devices >= least_devices
        ]
        of_topology = {
            "device": kind,
            "devices": len(devices),
            "cases": results(chosen, compiler, chips.measure),
        }
        report["topologies"][topology] = of_topology
        print(f"{topology}: {len(devices)} × {kind}\n")
        print(f"{table(of_topology['cases'])}\n", flush=True)

    is_whole = not given.quick and given.only == "*" and not given.topology
    out = given.out or (COST / f"{compiler}.json" if is_whole else None)
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


def _is_chosen(case: Case, given: argparse.Namespace) -> bool:
    if given.quick and case.name not in QUICK:
        return False
    # A case comes with its base.
    names = (case.name, case.name.removesuffix(": base"))
    return any(fnmatch(name, given.only) for name in names)


def results(
    chosen: Sequence[Case],
    compiler: Compiler,
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


def _message(error: Exception) -> str:
    """The first line that says something, which may be followed by pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[
        :300
    ]
