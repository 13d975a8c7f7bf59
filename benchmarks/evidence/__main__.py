"""Does smoothing over depth help? Tuned arms, paired seeds and controls, one task.

    python -m benchmarks.evidence --task lm --optimizer adamw
    python -m benchmarks.evidence --task reverse --preset quick
    python -m benchmarks.evidence --task lm --optimizer muon --minutes 10
    python -m benchmarks.evidence --task lm --option depths=[48] --out deep.json

First a screen: every arm on a few seeds, over learning rates by factors of two until
the best of them has a worse one on both sides. Then what the screen chose is confirmed
on other seeds: the base, the main arms, the best arm and the controls, at every rate
that is the best of one of them. All arms share initialization and data, seed by seed.
Every finished trial is in the result file at once, and the same command goes on after
the last of them. `python -m benchmarks.report` makes tables and figures of the files.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.corpus import CorpusError
from benchmarks.evidence import placement, presets
from benchmarks.evidence.arms import Arm
from benchmarks.evidence.results import (
    ResultsMismatch,
    arm_result,
    locked,
    read_finished,
    write_results,
)
from benchmarks.evidence.search import NoOptimum, Stage, Trial, next_trial
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.trials import (
    Measures,
    RunTrial,
    build_measures,
    build_trial,
)
from benchmarks.json_files import RESULTS
from benchmarks.optimizers import DEFAULT_LEARNING_RATES
from benchmarks.provenance import provenance

# What a shell reports for a program that Ctrl-C ended.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with the options `argv` and returns the exit status."""
    parser = build_parser()
    given = parser.parse_args(argv)
    cell = given.task, given.optimizer, given.preset
    try:
        options = presets.options_of(*cell, dict(given.option))
        if given.out is None and dict(given.option).keys() - {"depths"}:
            raise presets.OptionError(
                "the default result files are of the presets as they are: name another "
                "one with --out"
            )
        path = given.out or result_path(*cell)
        with locked(path):
            run(cell, options, path, given.minutes)
    except (presets.OptionError, ResultsMismatch, CorpusError, NoOptimum) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted: finished trials are kept, the same command goes on")
        return _INTERRUPTED
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=[*TASKS], required=True)
    parser.add_argument(
        "--optimizer",
        choices=[*DEFAULT_LEARNING_RATES],
        default="adamw",
        help="the base (default: %(default)s)",
    )
    parser.add_argument(
        "--preset",
        choices=presets.NAMES,
        default="full",
        help="how large: quick takes minutes, full makes the committed results, tpu "
        "has the sizes of the paper (default: %(default)s)",
    )
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="changes an option of the preset, such as depths=[12] or width=64; the "
        "value is JSON or a word; may be repeated",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no trial after this time (default: all are run)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="result file (default: benchmarks/results/TASK/OPTIMIZER.json, of presets "
        "but full OPTIMIZER-PRESET.json, of quick and tpu under runs/evidence)",
    )
    return parser


def result_path(task: str, optimizer: str, preset: str) -> Path:
    """Returns where the results of a task, an optimizer and a preset belong."""
    root = Path("runs/evidence") if preset in presets.NOT_COMMITTED else RESULTS
    name = optimizer if preset == "full" else f"{optimizer}-{preset}"
    return root / task / f"{name}.json"


def run(
    cell: tuple[str, str, str], options: presets.Options, path: Path, minutes: float
) -> None:
    """Runs all trials that are not in the result file yet, and adds them to it.

    Args:
      cell: names of task, optimizer and preset.
      options: of the run.
      path: of the result file.
      minutes: after which no trial is begun.
    """
    name, optimizer, preset = cell
    job, module = presets.job_of(optimizer, options), TASKS[name]
    metric, *others = module.METRICS
    seeds = seeds_of(options)
    header = {
        "task": name,
        "optimizer": optimizer,
        "preset": preset,
        "metric": metric._asdict(),
        "other_metrics": [other._asdict() for other in others],
        "config": options,
        **(sitting := provenance()),
    }
    arms, sittings = read_finished(path, header)
    sitting = {key: sitting[key] for key in ("date", "commit", "versions")}
    header["sittings"] = [*sittings, {**sitting, "first_trial": len(arms)}]
    depths = {*options["depths"], *(arm["layers"] for arm in arms)}
    header["config"] = {**options, "depths": sorted(depths)}

    @functools.cache
    def at_depth(layers: int) -> tuple[Task, Measures]:
        task = module.build(layers, **presets.task_options(options))
        task = placement.with_split_batches(task)
        return task, build_measures(job, task)

    @functools.cache
    def trainer(layers: int, arm: Arm) -> RunTrial:
        task, measures = at_depth(layers)
        return build_trial(job, task, arm, measures)

    def following() -> Trial | None:
        return next_trial(
            arms,
            options["depths"],
            options["learning_rate"],
            metric.lower_is_better,
            presets.confirmed_anyway(*cell),
            presets.plan_of(name, preset),
        )

    began = time.perf_counter()
    if arms:
        print(f"{path} has {len(arms)} trials")
    while trial := following():
        if time.perf_counter() - began > 60 * minutes:
            print(f"{minutes:g} minutes are over: the same command goes on")
            return
        of_stage = seeds[trial.stage]
        about = (
            f"{trial.stage} {trial.layers} layers, {trial.arm.name} at "
            f"{trial.learning_rate:g}"
        )
        total = job.steps * len(of_stage) // job.lanes
        with tqdm(total=total, desc=about, unit="step", leave=False) as bar:
            measured = trainer(trial.layers, trial.arm)(
                trial.learning_rate, of_stage, bar.update
            )
        names = [of.name for of in module.METRICS]
        arms.append(arm_result(trial, of_stage, job, measured, names))
        write_results(header, arms, path)
        means = (f"{of} {np.mean(measured.metrics[of]):.4f}" for of in names)
        print(f"{about}: {', '.join(means)}", flush=True)
    print(f"all {len(arms)} trials are in {path}")


def seeds_of(options: presets.Options) -> dict[Stage, list[int]]:
    """Returns the seeds of every stage: others to confirm than to screen."""
    first, others = options["screen_seeds"], options["confirm_seeds"]
    return {"screen": [*range(first)], "confirm": [*range(first, first + others)]}


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
