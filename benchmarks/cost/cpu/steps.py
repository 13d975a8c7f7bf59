"""What smoothing adds to an optimizer: to its chain, its step, and a training step.

All times are ratios to the base without smoothing; that of `base again`, a second
compiled copy, is the noise.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradsmooth_optax as gs
from benchmarks.cost.cpu.timing import compiled, in_turns, relative_to, temporaries
from benchmarks.cost.cpu.updates import LAYOUTS, depth_of, updates_of
from benchmarks.data.corpus import VOCABULARY, sample_windows
from benchmarks.models.gpt import GPT, init_gpt, next_token_loss
from benchmarks.optimizers import OPTIMIZERS, smoothed_optimizer
from benchmarks.training import init_params, init_state, train_steps

BASE, AGAIN = "base", "base again"
_RATE = 1e-3


class Job(NamedTuple):
    """The GPT of a training step, and what it is trained on."""

    layers: int = 12
    width: int = 48
    heads: int = 2
    context: int = 64
    seeds: int = 4
    batch: int = 4

    @property
    def model(self) -> GPT:
        return GPT(VOCABULARY, self.layers, self.width, self.heads, self.context)


def _smoothings() -> dict[str, optax.GradientTransformation | None]:
    """What stands in each arm of a step."""
    smooth = partial(gs.smooth_over_depth, gs.scanned("blocks/"), 0.2)
    preserving = smooth(variant="norm_preserving")
    return {BASE: None, AGAIN: None, "window": smooth(), "norm_preserving": preserving}


def chains(
    megabytes: float, layers: int, rounds: int, most_seconds: float
) -> dict[str, Any]:
    """Returns {layout: {chain: time, temporaries}}: smoothing in and after optimizers.

    Each in units of its base. Temporaries in units of the updates' size.
    """
    costs: dict[str, Any] = {layout: {} for layout in LAYOUTS}
    for layout, found in costs.items():
        updates = updates_of(megabytes, layers, layout)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(updates))
        for name, pair in chains_of(depth_of(layout)).items():
            calls, runs = {}, {}
            for which, tx in zip((BASE, name), pair, strict=True):
                state = tx.init(updates)
                runs[which] = compiled(tx.update, updates, state, updates)
                calls[which] = partial(runs[which], updates, state, updates)
            label = f"chains, {layout}: {name}"
            found |= relative_to(BASE, in_turns(calls, rounds, label, most_seconds))
            found[name]["temporaries"] = temporaries(runs[name]) / size
    return costs


def chains_of(depth: Any) -> dict[str, tuple[Any, Any]]:
    """Returns optimizers with smoothing S in or after them, and before that the base.

    Args:
      depth: where depth is.
    """
    smooth, lr = gs.smooth_over_depth(depth, 0.2), optax.scale(-_RATE)
    adam = optax.scale_by_adam()
    bases = {
        "adamw": optax.adamw(_RATE),
        "lion": optax.lion(_RATE),
        "rmsprop": optax.rmsprop(_RATE),
        "momentum": optax.sgd(_RATE, momentum=0.9),
    }
    base = optax.chain(adam, lr)
    return {
        "scale_by_adam(), S, lr": (base, optax.chain(adam, smooth, lr)),
        "scale_by_adam(), S, S, lr": (base, optax.chain(adam, smooth, smooth, lr)),
        **{
            f"{name}(), S": (base, optax.chain(base, smooth))
            for name, base in bases.items()
        },
    }


def optimizer_steps(
    job: Job, megabytes: float, layers: int, rounds: int, most_seconds: float
) -> dict[str, Any]:
    """Returns {tree: {optimizer: {arm: time}}} of one update, applied.

    The trees are the parameters of the GPT, and one stacked leaf of this size.
    """
    of_gpt = init_params(init_gpt(job.model), jnp.arange(1))
    trees = {
        "default GPT": jax.tree.map(lambda leaf: leaf[0], of_gpt),
        f"{megabytes:g} MB": updates_of(megabytes, layers, "stacked"),
    }
    found: dict[str, Any] = {tree: {} for tree in trees}
    for tree, params in trees.items():
        for name in OPTIMIZERS:
            calls = {
                arm: _step(smoothed_optimizer(name, _RATE, smoothing), params)
                for arm, smoothing in _smoothings().items()
            }
            seconds = in_turns(calls, rounds, f"{tree}, {name}", most_seconds)
            found[tree][name] = relative_to(BASE, seconds)
    return found


def _step(tx: optax.GradientTransformation, params: Any) -> Callable[[], Any]:
    # Not all zero and not the parameters themselves: one more array to read.
    gradients = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    state = tx.init(params)

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return partial(compiled(step, gradients, state, params), gradients, state, params)


def training_steps(job: Job, rounds: int) -> dict[str, Any]:
    """Returns {arm: time} of whole training steps, all seeds at once."""
    model, seeds = job.model, jnp.arange(job.seeds)
    params = init_params(init_gpt(model), seeds)
    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, 2**20, np.uint8))
    draw = partial(sample_windows, batch=job.batch, context=job.context)
    loss, counts = partial(next_token_loss, model), (np.int32(0), np.int32(1))

    def call(smoothing: optax.GradientTransformation | None) -> Callable[[], Any]:
        tx = smoothed_optimizer("adamw", 8e-3, smoothing, weight_decay=0.1, clip=1.0)
        state = init_state(tx, params)
        train = train_steps(loss, tx, draw, 1)
        run = train.lower(state, seeds, text, *counts).compile()

        def turn() -> Any:
            nonlocal state  # the call takes over its memory
            state, losses = run(state, seeds, text, *counts)
            return losses

        return turn

    calls = {arm: call(smoothing) for arm, smoothing in _smoothings().items()}
    return relative_to(BASE, in_turns(calls, rounds, "training"))
