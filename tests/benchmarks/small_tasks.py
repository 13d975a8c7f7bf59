"""Every task of the evidence, built once and small, and what there is to see of it."""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evidence.tasks import TASKS

LAYERS, WIDTH, HEADS, PATCH = 3, 16, 2, (2, 4)
CLIP, KL = 0.2, 0.3
SIZES = {"width": WIDTH, "heads": HEADS}
# The last tenth of a lone file is held out: one half tunes, the other judges.
TEXT, HELD_OUT_TEXT = "abcde fghij " * 75, "UVWXYZ0123" * 5 + "KLMNOPQRST" * 5
LM = SIZES | {"context": 8, "batch": 4, "eval_windows": 3}
REVERSE = {"length": 4, "vocabulary": 5, "batch": 6, "eval_sequences": 6}
DIFFUSION = {"batch": 6, "eval_images": 297, "eval_times": 2, "samples": 20}
GRPO = {"batch": 4, "group": 5, "updates": 2, "clip_ratio": CLIP, "kl": KL}
START = {"start_steps": 20, "start_batch": 8, "start_learning_rate": 1e-2}
OPTIONS = {
    "lm": LM,
    "lm, remat": LM | {"remat": True},
    "reverse": SIZES | REVERSE,
    "vit": SIZES | {"patch": PATCH, "batch": 32, "eval_images": 100},
    "diffusion": SIZES | DIFFUSION | {"sampler_steps": 2},
    "rl": SIZES | GRPO | START | {"eval_problems": 7},
}


class Seen(NamedTuple):
    task: Any
    params: Any  # all of them random, so that nothing is hidden by a 0 or a 1
    drawn: Any  # at key 1 and step 7, key 1 and step 8, key 2 and step 7
    batch: Any  # of the first of these
    look: Any  # (parameters, batch) -> loss, gradient, states, metrics


@functools.cache
def seen(name):
    kind = name.partition(",")[0]
    options = dict(OPTIONS[name])
    if kind == "lm":
        options["corpus"] = [str(Path(folder().name) / "a.txt")]
        Path(*options["corpus"]).write_text(TEXT + HELD_OUT_TEXT)
    task = TASKS[kind].build(LAYERS, **options)

    @jax.jit
    def look(params, batch):
        loss, gradient = jax.value_and_grad(task.loss)(params, batch)
        return loss, gradient, task.states(params, batch), task.evaluate(params)

    params = random_like(jax.eval_shape(task.init, jax.random.key(0)))
    keys = jax.vmap(jax.random.key)(jnp.array([1, 1, 2]))
    draw = jax.jit(jax.vmap(task.draw, in_axes=(None, 0, 0)))
    drawn = draw(task.data, keys, jnp.array([7, 8, 7]))
    batch = jax.tree.map(lambda leaf: leaf[0], drawn)
    if task.rollout is not None:
        batches = jax.jit(task.rollout)(params, batch)
        batch = jax.tree.map(lambda leaf: leaf[0], batches)
    return Seen(task, params, drawn, jax.device_get(batch), look)


@functools.cache
def folder():
    return tempfile.TemporaryDirectory()


def random_like(shapes, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(leaf.dtype), shapes
    )


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
