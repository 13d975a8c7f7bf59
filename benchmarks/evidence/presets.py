"""How large every task is trained: in minutes, for the committed results, on a TPU.

The options of a run are one flat dictionary, which is also the `config` of its result
file: those of the task's `build`, those of `Job`, and

    depths          numbers of layers
    learning_rate   where the search begins
    screen_seeds    how many seeds the screen has
    confirm_seeds   how many others the confirmation has
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.data.arithmetic import split_problems
from benchmarks.data.digits import CLASSES, IMAGES, SIZE
from benchmarks.evidence.training import Job

Options = Mapping[str, Any]

_LM = {
    **{"depths": [6, 12, 24], "width": 32, "heads": 2, "context": 32, "batch": 4},
    **{"eval_windows": 128, "dtype": "float32", "remat": False, "corpus": None},
    **{"steps": 200, "warmup": 20, "b2": 0.95, "clip": 1.0, "micro_batches": 4},
    **{"lanes": 4, "screen_seeds": 4, "confirm_seeds": 16},
}
# The paper's sizes: 1.2 billion parameters in 24 blocks and 2.4 billion in 30.
_LM_ON_TPU = _LM | {
    **{"context": 2048, "batch": 256, "eval_windows": 512, "dtype": "bfloat16"},
    **{"remat": True, "steps": 20_000, "warmup": 500, "lanes": 1},
}
_REVERSE = {
    **{"depths": [24], "width": 32, "heads": 4, "length": 12, "vocabulary": 32},
    **{"batch": 8, "eval_sequences": 1024},
    **{"steps": 200, "warmup": None, "b2": 0.999, "clip": None, "micro_batches": 4},
    **{"lanes": 4, "screen_seeds": 4, "confirm_seeds": 16},
}
_VIT = {
    **{"depths": [12], "width": 24, "heads": 2, "patch": [2, 4], "batch": 32},
    **{"eval_images": 500},
    **{"steps": 200, "warmup": 20, "b2": 0.95, "clip": 1.0, "micro_batches": 4},
    **{"lanes": 4, "screen_seeds": 4, "confirm_seeds": 16},
}
_DIFFUSION = {
    **{"depths": [9], "width": 24, "heads": 2, "patch": 2, "batch": 8},
    **{"eval_images": 297, "eval_times": 2, "samples": 128, "sampler_steps": 10},
    **{"steps": 240, "warmup": 24, "b2": 0.95, "clip": 1.0, "micro_batches": 4},
    **{"lanes": 4, "screen_seeds": 4, "confirm_seeds": 16},
}
_RL = {
    **{"depths": [6], "width": 32, "heads": 4, "batch": 16, "group": 8, "updates": 2},
    **{"clip_ratio": 0.2, "kl": 0.01, "eval_problems": 500},
    **{"start_steps": 1000, "start_batch": 64, "start_learning_rate": 6e-3},
    **{"steps": 40, "warmup": None, "b2": 0.95, "clip": 1.0, "micro_batches": 4},
    **{"lanes": 4, "screen_seeds": 4, "confirm_seeds": 16},
}
_QUICK = {"steps": 40, "lanes": 2, "screen_seeds": 2, "confirm_seeds": 4}

_PRESETS: dict[str, dict[str, Options]] = {
    "lm": {
        "full": _LM,
        "quick": _LM | _QUICK | {"depths": [4], "width": 16, "warmup": 4},
        # Where coupling might help: noisier gradients, longer training, more layers.
        "small-batch": _LM | {"depths": [12], "batch": 2, "micro_batches": 2},
        "long": _LM | {"depths": [12], "steps": 600, "warmup": 60},
        "deep": _LM | {"depths": [48]},
        "tpu": _LM_ON_TPU | {"depths": [24], "width": 2048, "heads": 16},
        "tpu-deep": _LM_ON_TPU | {"depths": [30], "width": 2560, "heads": 20},
    },
    "reverse": {
        "full": _REVERSE,
        "quick": _REVERSE | _QUICK | {"depths": [6]},
        "tpu": _REVERSE
        | {"depths": [96], "width": 1024, "heads": 16, "length": 512, "batch": 256}
        | {"steps": 20_000, "lanes": 1},
    },
    "vit": {
        "full": _VIT,
        "quick": _VIT | _QUICK | {"depths": [4], "warmup": 4},
        # As deep and wide as the paper's ViT-B, on the same images.
        "tpu": _VIT
        | {"width": 768, "heads": 12, "patch": [1, 1], "batch": 1024, "lanes": 1}
        | {"steps": 20_000, "warmup": 500},
    },
    "diffusion": {
        "full": _DIFFUSION,
        # In stacks of fewer than four layers shuffling leaves neighbors.
        "quick": _DIFFUSION | _QUICK | {"warmup": 4, "samples": 32},
        "tpu": _DIFFUSION
        | {"depths": [17], "width": 512, "heads": 8, "batch": 1024, "lanes": 1}
        | {"steps": 20_000, "warmup": 500, "samples": 10_000, "sampler_steps": 50},
    },
    "rl": {
        "full": _RL,
        "quick": _RL | _QUICK | {"steps": 10},
        # The start is part of the compiled programs, which bounds its size.
        "tpu": _RL
        | {"depths": [12], "width": 256, "heads": 8, "batch": 512, "lanes": 1}
        | {"steps": 2_000, "start_steps": 5_000},
    },
}
_BY_OPTIMIZER: dict[str, dict[str, Options]] = {
    "lm": {
        "adamw": {"learning_rate": 8e-3, "weight_decay": 0.1},
        "sgd": {"learning_rate": 1.0, "weight_decay": 0.0},
        "muon": {"learning_rate": 1.6e-2, "weight_decay": 0.1},
    },
    "reverse": {
        "adamw": {"learning_rate": 1e-3, "weight_decay": 0.01},
        "sgd": {"learning_rate": 0.1, "weight_decay": 0.0},
        "muon": {"learning_rate": 1e-3, "weight_decay": 0.01},
    },
    "vit": {
        "adamw": {"learning_rate": 8e-3, "weight_decay": 0.05},
        "sgd": {"learning_rate": 0.125, "weight_decay": 0.0},
        "muon": {"learning_rate": 8e-3, "weight_decay": 0.05},
    },
    "diffusion": {
        "adamw": {"learning_rate": 1.6e-2, "weight_decay": 0.01},
        "sgd": {"learning_rate": 0.25, "weight_decay": 0.0},
        "muon": {"learning_rate": 1.6e-2, "weight_decay": 0.01},
    },
    "rl": {
        "adamw": {"learning_rate": 5e-4, "weight_decay": 0.0},
        "sgd": {"learning_rate": 5e-3, "weight_decay": 0.0},
        "muon": {"learning_rate": 1e-3, "weight_decay": 0.0},
    },
}

# Billions of parameters train at lower rates; those of `rl` are low anyway.
_ON_TPU: dict[str, Options] = {
    "adamw": {"learning_rate": 6e-4},
    "sgd": {"learning_rate": 0.1},
    "muon": {"learning_rate": 2e-3},
}
_ON_TPU_PRESETS = ("tpu", "tpu-deep")

NAMES = tuple(dict.fromkeys(name for of_task in _PRESETS.values() for name in of_task))
# Those whose results are no evidence, and so are not committed.
NOT_COMMITTED = ("quick", *_ON_TPU_PRESETS)


class OptionError(ValueError):
    """There is no such preset or option, or its value is wrong; the message says so."""


def options_of(
    task: str, optimizer: str, preset: str, changes: Options | None = None
) -> dict[str, Any]:
    """Returns the options of a run.

    Args:
      task: its name.
      optimizer: the base's name.
      preset: its name.
      changes: options that differ from the preset's.

    Raises:
      OptionError: for a preset that the task does not have, or an unknown option.
    """
    if preset not in _PRESETS[task]:
        raise OptionError(
            f"there is no preset {preset!r} of {task!r}; there are "
            f"{', '.join(_PRESETS[task])}"
        )
    options = {
        **_BY_OPTIMIZER[task][optimizer],
        **_PRESETS[task][preset],
        **(_ON_TPU[optimizer] if preset in _ON_TPU_PRESETS and task != "rl" else {}),
    }
    for name, value in (changes or {}).items():
        if name not in options:
            raise OptionError(
                f"there is no option {name!r} of {task!r}; there are "
                f"{', '.join(sorted(options))}"
            )
        _check_kind(name, value, options[name])
    options = {**options, **(changes or {})}
    for problem in (*_problems(options), *_problems_of_task(task, options)):
        raise OptionError(problem)
    return options


# Of options that may be null.
_KINDS = {"corpus": [""], "warmup": 0, "clip": 1.0}


def _check_kind(name: str, value: Any, old: Any) -> None:
    """Raises where a value is not of the kind that an option has."""
    if value is None and name in _KINDS:
        return
    like = _KINDS.get(name, old)
    kinds = (int, float) if isinstance(like, float) else (type(like),)
    is_right = type(value) in kinds
    if is_right and isinstance(like, list):
        is_right = bool(value) and all(type(item) is type(like[0]) for item in value)
    if not is_right:
        example = json.dumps(like if like != [""] else ["FILE"])
        raise OptionError(
            f"the option {name} is {json.dumps(value)}, but should be of the kind of "
            f"{example}; write --option '{name}={example}'"
        )


def _problems(options: Options) -> Iterator[str]:
    """What is wrong with options that are of the right kind."""
    for name, value in options.items():
        least = 2 if name == "depths" else 1
        numbers = value if isinstance(value, list) else [value]
        if any(type(n) is int and n < least for n in numbers) and name != "warmup":
            yield f"{name}={value} must be at least {least}"
            return
    if options["width"] % options["heads"]:
        yield f"heads={options['heads']} do not divide width={options['width']}"
    for name in ("screen_seeds", "confirm_seeds"):
        if options[name] % options["lanes"]:
            yield (
                f"{name}={options[name]} is no multiple of lanes={options['lanes']}, "
                "the seeds that train at once"
            )
    updates = options.get("updates", 1)
    of_update = options["batch"] // updates
    if options["batch"] % updates:
        yield f"updates={updates} of a step do not divide batch={options['batch']}"
    elif of_update % options["micro_batches"] or options["micro_batches"] < 2:
        yield (
            f"micro_batches={options['micro_batches']} must be at least 2 and divide "
            f"the {of_update} examples of an update: their gradients show the noise"
        )
    if updates > 1 and options["warmup"] is not None:
        yield (
            f"warmup={options['warmup']} would count updates, of which a step here has "
            f"{updates}; write --option warmup=null, for a constant learning rate"
        )
    if options["warmup"] is not None and options["warmup"] >= options["steps"]:
        yield (
            f"warmup={options['warmup']} leaves nothing of steps={options['steps']}; "
            f"use at most warmup={options['steps'] - 1}"
        )


def _problems_of_task(task: str, options: Options) -> Iterator[str]:
    """What is wrong with the options that only some tasks have."""
    if task == "vit" and len(options["patch"]) != 2:
        yield f"patch={options['patch']} must be a height and a width"
    if task in ("vit", "diffusion"):
        sides = options["patch"] if task == "vit" else [options["patch"]]
        if any(SIZE % side for side in sides):
            yield f"patch={options['patch']} does not divide images of {SIZE} pixels"
        if not CLASSES <= options["eval_images"] <= IMAGES - CLASSES:
            yield (
                f"eval_images={options['eval_images']} must be between {CLASSES} and "
                f"{IMAGES - CLASSES}: every class needs an image in both sets"
            )
    if task == "diffusion":
        if options["width"] % 2:
            yield f"width={options['width']} must be even"
        even = [layers for layers in options["depths"] if layers % 2 == 0]
        if even or min(options["depths"]) < 3:
            yield (
                f"depths={options['depths']} must be odd and at least 3: as many "
                "in_blocks as out_blocks, and one between them"
            )
    if task == "rl":
        held_out = len(split_problems().test.prompts)
        if options["eval_problems"] > held_out:
            yield (
                f"eval_problems={options['eval_problems']} are more than the "
                f"{held_out} problems held out"
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
