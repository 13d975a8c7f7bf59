"""Measures the sections that are asked for, prints tables and writes the JSON."""

import argparse
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cost.cpu.compile_time import (
    compile_times,
    learning_optimizers,
    optimizers,
)
from benchmarks.cost.cpu.peers import has_torch, peer_costs
from benchmarks.cost.cpu.report import failures, tables
from benchmarks.cost.cpu.steps import Job, chains, optimizer_steps, training_steps
from benchmarks.cost.cpu.updates import crossover, operator_costs
from benchmarks.json_files import COST, write_json
from benchmarks.provenance import provenance


class Plan(NamedTuple):
    """Sizes of a run.

    Attributes:
      cases: megabytes and dtypes of the updates of `operators`,
      megabytes: of those of chains, steps and crossover,
      peers: and of those of peers.
      layers: of all of them.
      depths: of the compile times,
      learning: and of those of operators that are learned.
      rounds: of every comparison,
      training_rounds: and of training steps,
      most_seconds: and about the longest that a comparison may take.
      job: the GPT of steps and training steps.
    """

    cases: tuple[tuple[float, str], ...]
    megabytes: float
    peers: tuple[float, ...]
    layers: int
    depths: tuple[int, ...]
    learning: tuple[int, ...]
    rounds: int
    training_rounds: int
    most_seconds: float
    job: Job


FULL = Plan(
    cases=((64, "float32"), (64, "bfloat16"), (512, "float32")),
    megabytes=64,
    peers=(64, 225),
    layers=48,
    depths=(12, 48, 96),
    learning=(8, 16),
    rounds=15,
    training_rounds=30,
    most_seconds=15,
    job=Job(),
)
TINY = Plan(
    cases=((0.0625, "float32"),),
    megabytes=0.0625,
    peers=(0.0625,),
    layers=4,
    depths=(2,),
    learning=(2,),
    rounds=1,
    training_rounds=1,
    most_seconds=1,
    job=Job(layers=2, width=8, context=8, seeds=1, batch=1),
)


def sections(plan: Plan) -> dict[str, Callable[[], Any]]:
    """Returns what measures each section of the report."""
    layers = plan.layers
    how = layers, plan.rounds, plan.most_seconds
    return {
        "operators": lambda: operator_costs(plan.cases, *how),
        "crossover": lambda: crossover(
            plan.megabytes, (max(2, layers // 4), layers, 2 * layers), plan.rounds
        ),
        "chains": lambda: chains(plan.megabytes, *how),
        "steps": lambda: optimizer_steps(plan.job, plan.megabytes, *how),
        "training": lambda: training_steps(plan.job, plan.training_rounds),
        "compile": lambda: compile_times(plan.depths, optimizers()),
        "learning": lambda: compile_times(plan.learning, learning_optimizers()),
        "peers": lambda: peer_costs(plan.peers, *how),
    }


def run(given: argparse.Namespace) -> int:
    """Runs the benchmark and returns the exit status."""
    plan = TINY if given.quick else FULL
    is_whole = not given.quick and not given.only
    out = given.out or (COST if is_whole else Path("build")) / "cpu.json"
    report: dict[str, Any] = {
        "benchmark": "cost cpu",
        "plan": plan._asdict(),
        **provenance(),
        "torch": metadata.version("torch") if has_torch() else None,
        "load_before": os.getloadavg(),
        "seconds": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    measure = sections(plan)
    for name in given.only or measure:
        began = time.perf_counter()
        report[name] = measure[name]()
        report["seconds"][name] = time.perf_counter() - began
        report["load_after"] = os.getloadavg()
        write_json(report, out)  # so that an interruption loses one section
        print(f"{name}: {report['seconds'][name]:.0f} s", flush=True)
    print(f"\n{tables(report)}\n\nwrote {out}")
    return 1 if given.check and failures(report) else 0
