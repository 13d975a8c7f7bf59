"""Measures the sections that are asked for, prints tables and writes the JSON."""

import argparse
import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from benchmarks.cost.cpu.compile_time import (
    compile_times,
    learning_optimizers,
    optimizers,
)
from benchmarks.cost.cpu.options import PRESETS, SECTIONS
from benchmarks.cost.cpu.peers import has_torch, peer_costs
from benchmarks.cost.cpu.report import failures, tables
from benchmarks.cost.cpu.steps import (
    Job,
    chains,
    optimizer_steps,
    training_steps,
)
from benchmarks.cost.cpu.updates import crossover, operator_costs
from benchmarks.json_files import write_json
from benchmarks.provenance import provenance


def sections(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Returns what measures each section of the report."""
    preset = PRESETS[options.preset]
    cases = preset["cases"]
    if options.megabytes is not None:
        cases = [(size, kind) for size in options.megabytes for kind in options.dtypes]
    megabytes, layers = options.of_chains, options.layers
    rounds, most_seconds = options.rounds, preset["most_seconds"]
    return {
        "operators": lambda: operator_costs(cases, layers, rounds, most_seconds),
        "crossover": lambda: crossover(
            megabytes, (max(2, layers // 4), layers, 2 * layers), rounds
        ),
        "chains": lambda: chains(megabytes, layers, rounds, most_seconds),
        "steps": lambda: optimizer_steps(megabytes, layers, rounds, most_seconds),
        "training": lambda: training_steps(Job(), max(30, rounds)),
        "compile": lambda: compile_times(
            options.depths or preset["depths"], options.repetitions, optimizers()
        ),
        "learning": lambda: compile_times((8, 16), 1, learning_optimizers()),
        "peers": lambda: peer_costs(
            tuple(options.of_peers), layers, rounds, most_seconds
        ),
    }


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark and returns the exit status."""
    wanted = options.sections or list(SECTIONS)
    report: dict[str, Any] = {
        "benchmark": "cost cpu",
        "options": {
            name: value for name, value in vars(options).items() if name != "out"
        },
        **provenance(),
        "torch": torch_version(),
        "load_before": os.getloadavg(),
        "seconds": {},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    measure = sections(options)
    for name in wanted:
        began = time.perf_counter()
        report[name] = measure[name]()
        report["seconds"][name] = time.perf_counter() - began
        report["load_after"] = os.getloadavg()
        write_json(report, options.out)  # so that an interruption loses one section
        print(f"{name}: {report['seconds'][name]:.0f} s", flush=True)
    print(f"\n{tables(report)}\n\nwrote {options.out}")
    return 1 if options.check and failures(report) else 0


def torch_version() -> str | None:
    """Returns the version of PyTorch, None where it is not installed."""
    return metadata.version("torch") if has_torch() else None
