"""What smoothing adds to an optimizer: to its chain, its step, and a training step.

All times are ratios to the base without smoothing; that of `base again`, a second
compiled copy, is the noise.
"""

from collections.abc import Callable, Mapping
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
from benchmarks.optimizers import smoothed_optimizer
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


def chains(
    megabytes: float, layers: int, rounds: int, most_seconds: float = float("inf")
) -> dict[str, Any]:
    """Returns {layout: {chain: time, temporaries}}: smoothing in and after optimizers.

    Each in units of its base. Temporaries in units of the updates' size.
    """
    return {
        layout: _chains(
            updates_of(megabytes, layers, layout),
            depth_of(layout),
            f"chains, {layout}",
            rounds,
            most_seconds,
        )
        for layout in LAYOUTS
    }


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


def _chains(
    updates: Any, depth: Any, label: str, rounds: int, most_seconds: float
) -> dict[str, Any]:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(updates))
    costs = {}
    for name, pair in chains_of(depth).items():
        states = [tx.init(updates) for tx in pair]
        runs = [
            compiled(tx.update, updates, state, updates)
            for tx, state in zip(pair, states, strict=True)
        ]
        calls = {
            of: partial(run, updates, state, updates)
            for of, run, state in zip((BASE, name), runs, states, strict=True)
        }
        seconds = in_turns(calls, rounds, f"{label}: {name}", most_seconds)
        costs |= relative_to(BASE, seconds)
        costs[name]["temporaries"] = temporaries(runs[1]) / size
    return costs


def optimizer_steps(
    megabytes: float,
    layers: int,
    rounds: int,
    most_seconds: float = float("inf"),
    names: tuple[str, ...] = ("adamw", "sgd", "muon"),
) -> dict[str, Any]:
    """Returns {tree: {optimizer: {arm: time}}} of one update, applied.

    The trees are the parameters of the default GPT, and one stacked leaf of this size.
    """
    trees = {
        "default GPT": jax.tree.map(
            lambda leaf: leaf[0],
            init_params(init_gpt(Job().model), jnp.arange(1)),
        ),
        f"{megabytes:g} MB": updates_of(megabytes, layers, "stacked"),
    }
    return {
        tree: {
            name: _step_costs(params, name, f"{tree}, {name}", rounds, most_seconds)
            for name in names
        }
        for tree, params in trees.items()
    }


def _step_costs(
    params: Any, name: str, label: str, rounds: int, most_seconds: float
) -> dict[str, Any]:
    # Not all zero and not the parameters themselves: one more array to read.
    gradients = jax.tree.map(lambda leaf: 0.5 * leaf, params)

    def call(alpha: float, variant: Any = "standard") -> Callable[[], Any]:
        tx = smoothed_optimizer(name, _RATE, alpha, variant=variant)
        state = tx.init(params)

        def step(gradients: Any, state: Any, params: Any) -> Any:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        run = compiled(step, gradients, state, params)
        return partial(run, gradients, state, params)

    calls = {
        BASE: call(0.0),
        AGAIN: call(0.0),
        "window": call(0.2),
        "norm_preserving": call(0.2, "norm_preserving"),
    }
    return relative_to(BASE, in_turns(calls, rounds, label, most_seconds))


def training_steps(
    job: Job,
    rounds: int,
    steps_per_turn: int = 1,
    arms: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Returns {arm: time} of whole training steps.

    Args:
      job: model and batch.
      rounds: turns of every arm.
      steps_per_turn: in one compiled call, all seeds at once.
      arms: options of `smoothed_optimizer` by name, besides the base and its copy.
    """
    if arms is None:
        arms = {
            "window": {"alpha": 0.2},
            "norm_preserving": {"alpha": 0.2, "variant": "norm_preserving"},
        }
    model, seeds = job.model, jnp.arange(job.seeds)
    params = init_params(init_gpt(model), seeds)
    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, 2**20, np.uint8))

    draw = partial(sample_windows, batch=job.batch, context=job.context)
    loss = partial(next_token_loss, model)

    def call(alpha: float = 0.0, **options: Any) -> Callable[[], Any]:
        tx = smoothed_optimizer(
            "adamw", 8e-3, alpha, weight_decay=0.1, clip=1.0, **options
        )
        state = init_state(tx, params)
        counts = np.int32(0), np.int32(steps_per_turn)
        train = train_steps(loss, tx, draw, steps_per_turn)
        run = train.lower(state, seeds, text, *counts).compile()

        def turn() -> Any:
            nonlocal state  # the call takes over its memory
            state, losses = run(state, seeds, text, *counts)
            return losses

        return turn

    calls = {BASE: call(), AGAIN: call()}
    calls |= {name: call(**options) for name, options in arms.items()}
    return relative_to(BASE, in_turns(calls, rounds, "training"))
