"""How long jax takes to trace and compile an update of many leaves, one per layer."""

import random
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import gradsmooth_optax as gs
from benchmarks.cost.cpu.timing import summary

BASE = "optax.adamw"
_PARTS = ("trace", "lower", "compile")


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Returns AdamW without and with smoothing of leaves that are one layer each."""

    def smoothed(**options: Any) -> optax.GradientTransformation:
        return gs.adamw(1e-3, gs.smooth_over_depth(gs.unrolled(), 0.2, **options))

    return {
        BASE: optax.adamw(1e-3),
        "window": smoothed(),
        "norm_preserving": smoothed(variant="norm_preserving"),
        "directional, per block": smoothed(variant="directional", norm_scope="block"),
    }


def learning_optimizers() -> Mapping[str, optax.GradientTransformation]:
    """Returns AdamW alone and inside the wrappers that learn the coupling."""
    rest = optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3)
    return {BASE: optax.adamw(1e-3)} | {
        wrap.__name__: optax.chain(wrap(optax.scale_by_adam(), gs.unrolled()), *rest)
        for wrap in (gs.contrib.learn_alpha, gs.contrib.learn_operator)
    }


def layered_params(layers: int) -> dict[str, Any]:
    """Returns five matrices and five vectors for each layer, one leaf each."""
    return {
        f"layers_{layer}": {
            f"role_{role}": jnp.ones((16, 16) if role % 2 else (16,))
            for role in range(10)
        }
        for layer in range(layers)
    }


def compile_times(
    all_layers: Iterable[int], arms: Mapping[str, optax.GradientTransformation]
) -> dict[str, Any]:
    """Returns {layers: {optimizer: ratio to AdamW, seconds of each part}}.

    Args:
      all_layers: the depths.
      arms: one of them is AdamW alone.
    """
    found: dict[str, Any] = {}
    for layers in all_layers:
        params, names = layered_params(layers), list(arms)
        random.Random(0).shuffle(names)
        label = f"compiling {layers} layers"
        seconds = {
            name: _seconds_of_parts(arms[name], params)
            for name in tqdm(names, label, leave=False, disable=None)
        }
        found[str(layers)] = {
            name: summary(np.array([sum(seconds[name]) / sum(seconds[BASE])]))
            | dict(zip(_PARTS, seconds[name], strict=True))
            for name in arms
        }
    return found


def _seconds_of_parts(
    optimizer: optax.GradientTransformation, params: Any
) -> list[float]:
    """How long each of `_PARTS` took."""
    state = optimizer.init(params)
    jax.clear_caches()
    moments = [time.perf_counter()]
    traced = jax.jit(optimizer.update).trace(params, state, params)
    moments.append(time.perf_counter())
    lowered = traced.lower()
    moments.append(time.perf_counter())
    lowered.compile()
    moments.append(time.perf_counter())
    return np.diff(moments).tolist()
