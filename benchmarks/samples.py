"""Draws the images that models of the task `diffusion` make, below real ones.

    python -m benchmarks.samples --optimizer adamw

Trains the base and window(0.2) at their best learning rates in
`benchmarks/results/diffusion/<optimizer>.json` once more, with the first seed that
confirmed them, and writes `figures/diffusion-<optimizer>-samples.png` beside it. All
models begin at the same noise: images in one column can be compared.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import gradsmooth_optax as gs
from benchmarks.evidence import presets
from benchmarks.evidence.tasks import diffusion
from benchmarks.evidence.tasks.digits import split_digits
from benchmarks.evidence.training import optimizer_of
from benchmarks.json_files import RESULTS
from benchmarks.optimizers import DEFAULT_LEARNING_RATES
from benchmarks.report.comparisons import base_of, best_pair, window_of
from benchmarks.report.records import read_source
from benchmarks.training import TrainState, init_params, train_steps

COLUMNS = 20
ALPHA = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.samples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--optimizer", choices=[*DEFAULT_LEARNING_RATES], default="adamw"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    given = parser.parse_args(argv)
    path = given.results / "diffusion" / f"{given.optimizer}.json"
    if not path.exists():
        parser.error(f"there is no {path}: name another directory with --results")
    try:
        images = images_of(path, given.optimizer)
    except Unfinished as error:
        parser.error(str(error))
    picture = given.results / "figures" / f"diffusion-{given.optimizer}-samples.png"
    picture.parent.mkdir(exist_ok=True)
    grid(images).savefig(picture, dpi=100, metadata={"Software": None})
    print(f"{picture} is written")
    return 0


class Unfinished(ValueError):
    """Results have no best rate yet; the message says which."""


def images_of(path: Path, optimizer: str) -> dict[str, np.ndarray]:
    """Returns `COLUMNS` real images, and as many of every arm, by what they are.

    Args:
      path: a result file of the task.
      optimizer: its base.
    """
    *_, setting = read_source(path).settings
    found_of_window, found_of_base = best_pair(
        setting, window_of(setting, ALPHA), base_of(setting)
    )
    arms = {"base": found_of_base, f"window({ALPHA:g})": found_of_window}
    config = json.loads(path.read_text("utf-8"))["config"]
    _, held_out = split_digits(config["eval_images"])
    images = {"held out": 2 * held_out.images[:COLUMNS] - 1}
    for name, found in arms.items():
        if found is None:
            raise Unfinished(f"{path} has not confirmed {name}: take another file")
        alpha = 0.0 if name == "base" else ALPHA
        images[f"{name}, rate {found.learning_rate:g}"] = generated(
            optimizer, config, alpha, found.learning_rate, found.seeds[0]
        )
    return images


def generated(
    optimizer: str,
    config: presets.Options,
    alpha: float,
    learning_rate: float,
    seed: int,
) -> np.ndarray:
    """Returns images by a model that is trained for it, `(COLUMNS, 8, 8)`."""
    job, options = presets.job_of(optimizer, config), presets.task_options(config)
    layers = max(config["depths"])
    task = diffusion.build(layers, **options)
    smoothing = gs.smooth_over_depth(task.depth, alpha)
    tx = optimizer_of(job, task)(smoothing, learning_rate).whole
    seeds = jnp.array([seed])
    params = init_params(task.init, seeds)
    state = TrainState(params, jax.vmap(tx.init)(params))
    train = train_steps(task.loss, tx, task.draw, job.steps)
    state, _ = train(state, seeds, task.data, np.int32(0), np.int32(job.steps))
    of_sampler = ("width", "heads", "sampler_steps", "patch")
    sampler = diffusion.build_sampler(layers, **{k: options[k] for k in of_sampler})
    one = jax.tree.map(lambda leaf: leaf[0], state.params)
    return np.asarray(jax.jit(sampler, static_argnums=1)(one, COLUMNS))


def grid(images: Mapping[str, np.ndarray]) -> Figure:
    """Draws a row of images in [-1, 1] for each name."""
    size, left, gap = 0.42, 1.9, 0.04
    figure = Figure(figsize=(left + COLUMNS * (size + gap), len(images) * (size + gap)))
    width, height = figure.get_size_inches()
    for row, (name, of_row) in enumerate(images.items()):
        bottom = height - (row + 1) * (size + gap)
        figure.text(0.05 / width, (bottom + size / 2) / height, name, va="center")
        for column, image in enumerate(of_row):
            x = left + column * (size + gap)
            ax = figure.add_axes(
                (x / width, bottom / height, size / width, size / height)
            )
            ax.imshow(image, cmap="gray", vmin=-1, vmax=1)
            ax.axis("off")
    return figure


if __name__ == "__main__":
    sys.exit(main())
