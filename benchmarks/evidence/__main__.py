"""Does coupling over depth help? One task by `gradsmooth_optax.trial`.

    python -m benchmarks.evidence --task lm --optimizer adamw
    python -m benchmarks.evidence --task reverse --preset quick
    timeout 3h python -m benchmarks.evidence --task lm --optimizer muon
    python -m benchmarks.evidence --task vit --scope mlp
    python -m benchmarks.evidence --task lm --option depths=[48] --out deep

For every depth of the preset a comparison with all arms and controls of `trial`, in a
file of its own. Whatever ends it, the same command goes on after the last finished run.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli
from benchmarks.evidence import placement, presets
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.training import TUNING, optimizer_of, train_of
from benchmarks.json_files import TRIALS
from benchmarks.optimizers import OPTIMIZERS
from gradsmooth_optax import trial

# What a shell reports for a program that Ctrl-C ended.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    parser = cli.parser("evidence", __doc__)
    parser.add_argument("--task", choices=[*TASKS], required=True)
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="the base"
    )
    about = "full: for the committed results; quick: minutes; the others of lm alone"
    parser.add_argument("--preset", choices=presets.NAMES, default="full", help=about)
    about = 'what is coupled: "full", "proj", or one of the task, such as "mlp"'
    parser.add_argument("--scope", default="full", help=about)
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="changes an option of the preset, such as depths=[12] or width=64; the "
        "value is JSON or a word; may be repeated",
    )
    about = "directory (default: benchmarks/results/trials, of quick runs/evidence)"
    parser.add_argument("--out", type=Path, help=about)
    given = parser.parse_args(argv)
    changes = dict(given.option)
    try:
        options = presets.options_of(given.task, given.optimizer, given.preset, changes)
        if given.out is None and changes.keys() - {"depths"}:
            raise presets.OptionError(
                "the default files are of the presets as they are: name another "
                "directory with --out"
            )
        for layers in options["depths"]:
            result = compared(given, layers, options)
            print(f"\n{given.task}, {given.optimizer}, {layers} layers\n\n{result}\n")
            if not result.is_complete:
                return _INTERRUPTED
    except (presets.OptionError, trial.OtherSettings) as error:
        parser.error(str(error))
    except KeyboardInterrupt:  # before a comparison began; within, it returns
        return _INTERRUPTED
    return 0


def file_of(given: argparse.Namespace, layers: int) -> Path:
    """Returns the path of the result of a comparison."""
    quick = given.preset == "quick"
    parts = [given.task, given.optimizer, str(layers)]
    parts += [given.preset] if given.preset != "full" else []
    parts += [given.scope] if given.scope != "full" else []
    folder = given.out or (Path("runs/evidence") if quick else TRIALS)
    return folder / f"{'-'.join(parts)}.json"


def compared(
    given: argparse.Namespace, layers: int, options: presets.Options
) -> trial.Result:
    """Returns the comparison of a task at one depth, as far as it comes."""
    module, job = TASKS[given.task], presets.job_of(given.optimizer, options)
    try:
        task = module.build(layers, **presets.task_options(options))
    except ValueError as error:  # what it cannot be built with
        raise presets.OptionError(str(error)) from error
    task = placement.with_split_batches(task)
    metric, rate = module.METRICS[0], options["learning_rate"]
    return trial.compare(
        trial.many_seeds(train_of(job, task), at_once=job.lanes),
        optimizer_of(job, task),
        scope_of(task, given.scope),
        rates=[rate / 2, rate, 2 * rate],
        seeds=options["confirm_seeds"],
        screen_seeds=options["screen_seeds"],
        metric=metric.name,
        tune_metric=TUNING,
        better="lower" if metric.lower_is_better else "higher",
        path=str(file_of(given, layers)),
    )


def scope_of(task: Task, scope: str) -> Any:
    """Returns the depth spec of what is coupled.

    Raises:
      OptionError: for a scope that the task does not have.
    """
    scopes = {"full": task.depth, "proj": task.depth.only_projections(), **task.scopes}
    if scope not in scopes:
        raise presets.OptionError(
            f"there is no scope {scope!r} of this task; there are {', '.join(scopes)}"
        )
    return scopes[scope]


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
