"""How large every task is trained: for the committed results, and in minutes.

The options of a run are one flat dictionary: those of the task's `build`, those of
`Job`, and

    depths          numbers of layers
    learning_rate   where the search begins
    screen_seeds    how many seeds the screen has
    confirm_seeds   how many others the confirmation has
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.evidence.training import Job

Options = Mapping[str, Any]

# Of every task; a chip with room for one large model has one lane.
_ALL = {"clip": 1.0, "b2": 0.95, "micro_batches": 4, "lanes": 4}
_ALL |= {"screen_seeds": 4, "confirm_seeds": 16}
_FULL: dict[str, Options] = {
    "lm": {
        **{"depths": [6, 12, 24], "width": 32, "heads": 2, "context": 32, "batch": 4},
        **{"eval_windows": 128, "dtype": "float32", "remat": False, "corpus": None},
        **{"steps": 200, "warmup": 20},
    },
    "reverse": {
        **{"depths": [24], "width": 32, "heads": 4, "length": 12, "vocabulary": 32},
        **{"batch": 8, "eval_sequences": 1024},
        **{"steps": 200, "warmup": None, "b2": 0.999, "clip": None},
    },
    "vit": {
        **{"depths": [12], "width": 24, "heads": 2, "patch": [2, 4], "batch": 32},
        **{"eval_images": 300, "steps": 200, "warmup": 20},
    },
    "diffusion": {
        **{"depths": [9], "width": 24, "heads": 2, "patch": 2, "batch": 8},
        **{"eval_images": 297, "eval_times": 2, "samples": 128, "sampler_steps": 10},
        **{"steps": 240, "warmup": 24},
    },
    "rl": {
        **{"depths": [6], "width": 32, "heads": 4, "batch": 16},
        **{"group": 8, "updates": 2, "clip_ratio": 0.2, "kl": 0.01},
        **{"start_steps": 1000, "start_batch": 64, "start_learning_rate": 6e-3},
        **{"eval_problems": 500, "steps": 40, "warmup": None},
    },
}
_ALL_QUICK = {"steps": 40, "lanes": 2, "screen_seeds": 2, "confirm_seeds": 4}
_QUICK: dict[str, Options] = {
    "lm": {"depths": [4], "width": 16, "warmup": 4},
    "reverse": {"depths": [6]},
    "vit": {"depths": [4], "warmup": 4},
    # In stacks of fewer than four layers shuffling leaves neighbors.
    "diffusion": {"warmup": 4, "samples": 32},
    "rl": {"steps": 10},
}
# Of `lm` alone, where coupling might help: noisier gradients, longer training, more
# layers.
_OF_LM: dict[str, Options] = {
    "small-batch": {"depths": [12], "batch": 2, "micro_batches": 2},
    "long": {"depths": [12], "steps": 600, "warmup": 60},
    "deep": {"depths": [48]},
}
# {base: (where the search for its learning rate begins, weight decay)}.
_BY_OPTIMIZER: dict[str, dict[str, tuple[float, float]]] = {
    "lm": {"adamw": (8e-3, 0.1), "sgd": (1.0, 0.0), "muon": (1.6e-2, 0.1)},
    "reverse": {"adamw": (1e-3, 0.01), "sgd": (0.1, 0.0), "muon": (1e-3, 0.01)},
    "vit": {"adamw": (8e-3, 0.05), "sgd": (0.125, 0.0), "muon": (8e-3, 0.05)},
    "diffusion": {"adamw": (1.6e-2, 0.01), "sgd": (0.25, 0.0), "muon": (1.6e-2, 0.01)},
    "rl": {"adamw": (5e-4, 0.0), "sgd": (5e-3, 0.0), "muon": (1e-3, 0.0)},
}

NAMES = ("full", "quick", *_OF_LM)


class OptionError(ValueError):
    """There is no such option, or its value is wrong; the message says so."""


def options_of(
    task: str, optimizer: str, preset: str = "full", changes: Options | None = None
) -> dict[str, Any]:
    """Returns the options of a run.

    Args:
      task: its name.
      optimizer: the base's name.
      preset: one of `NAMES`.
      changes: options that differ from the preset's.

    Raises:
      OptionError: for an unknown option, or one that does not fit, and for a preset of
        another task.
    """
    rate, decay = _BY_OPTIMIZER[task][optimizer]
    options = {"learning_rate": rate, "weight_decay": decay, **_ALL, **_FULL[task]}
    if preset == "quick":
        options |= {**_ALL_QUICK, **_QUICK[task]}
    elif preset != "full":
        if task != "lm":
            raise OptionError(f"the preset {preset!r} is of the task 'lm' alone")
        options |= _OF_LM[preset]
    for name, value in (changes or {}).items():
        if name not in options:
            raise OptionError(
                f"there is no option {name!r} of {task!r}; there are "
                f"{', '.join(sorted(options))}"
            )
        _check_kind(name, value, options[name])
    options |= changes or {}
    for problem in _problems(options):
        raise OptionError(problem)
    return options


# Of options that may be null.
_KINDS = {"corpus": ["FILE"], "warmup": 0, "clip": 1.0}


def _check_kind(name: str, value: Any, old: Any) -> None:
    """Raises where a value is not of the kind that an option has."""
    like = _KINDS.get(name, old)
    kinds = (int, float) if isinstance(like, float) else (type(like),)
    if type(value) not in kinds and not (value is None and name in _KINDS):
        example = json.dumps(like)
        raise OptionError(
            f"the option {name} is {json.dumps(value)}, but should be of the kind of "
            f"{example}; write --option '{name}={example}'"
        )


def _problems(options: Options) -> Iterator[str]:
    """What is wrong with options that are of the right kind."""
    if options["width"] % options["heads"]:
        yield f"heads={options['heads']} do not divide width={options['width']}"
    for name in ("screen_seeds", "confirm_seeds"):
        if options[name] % options["lanes"]:
            yield (
                f"{name}={options[name]} is no multiple of lanes={options['lanes']}, "
                "the seeds that train at once"
            )
    of_update, left = divmod(options["batch"], options.get("updates", 1))
    if left:
        yield (
            f"updates={options['updates']} of a step do not divide "
            f"batch={options['batch']}"
        )
    elif of_update % options["micro_batches"] or options["micro_batches"] < 2:
        yield (
            f"micro_batches={options['micro_batches']} must be at least 2 and divide "
            f"the {of_update} examples of an update: their gradients show the noise"
        )
    if options["warmup"] is not None and options.get("updates", 1) > 1:
        yield (
            f"warmup={options['warmup']} would count updates, of which a step here has "
            f"{options['updates']}; write --option warmup=null, for a constant rate"
        )
    if options["warmup"] is not None and options["warmup"] >= options["steps"]:
        yield (
            f"warmup={options['warmup']} leaves nothing of steps={options['steps']}; "
            f"use at most warmup={options['steps'] - 1}"
        )


def job_of(optimizer: str, options: Options) -> Job:
    """Returns how a task is trained."""
    names = {field.name for field in dataclasses.fields(Job)} - {"optimizer"}
    return Job(optimizer, **{name: options[name] for name in names})


def task_options(options: Options) -> dict[str, Any]:
    """Returns the options that are the task's own."""
    others = {field.name for field in dataclasses.fields(Job)}
    others |= {"depths", "learning_rate", "screen_seeds", "confirm_seeds"}
    return {name: value for name, value in options.items() if name not in others}
