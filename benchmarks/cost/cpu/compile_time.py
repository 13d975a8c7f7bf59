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


def learning_optimizers() -> dict[str, optax.GradientTransformation]:
    """Returns AdamW alone and inside the wrappers that learn the coupling."""
    rest = optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3)
    return {
        BASE: optax.adamw(1e-3),
        **{
            wrap.__name__: optax.chain(
                wrap(optax.scale_by_adam(), gs.unrolled()), *rest
            )
            for wrap in (gs.contrib.learn_alpha, gs.contrib.learn_operator)
        },
    }


def compile_times(
    all_layers: Iterable[int],
    repetitions: int,
    arms: Mapping[str, optax.GradientTransformation],
) -> dict[str, Any]:
    """Returns {layers: {optimizer: ratio to AdamW, seconds of each part}}.

    Args:
      all_layers: the depths, of ten small leaves per layer.
      repetitions: of every optimizer, in turns.
      arms: one of them is AdamW alone.
    """
    return {
        str(layers): _compile_times(layers, repetitions, arms) for layers in all_layers
    }


def layered_params(layers: int, roles: int = 10) -> dict[str, Any]:
    """Returns matrices and vectors in equal parts, one leaf per role and layer."""
    return {
        f"layers_{layer}": {
            f"role_{role}": jnp.ones((16, 16) if role % 2 else (16,))
            for role in range(roles)
        }
        for layer in range(layers)
    }


def _compile_times(
    layers: int, repetitions: int, arms: Mapping[str, Any]
) -> dict[str, Any]:
    params = layered_params(layers)
    order, names = random.Random(0), list(arms)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    turns = tqdm(
        total=repetitions * len(names),
        desc=f"compiling {layers} layers",
        leave=False,
        disable=None,
    )
    with turns:
        for _ in range(repetitions):
            order.shuffle(names)
            for name in names:
                seconds[name].append(_seconds_of_parts(arms[name], params))
                turns.update()
    parts = {name: np.array(of_name) for name, of_name in seconds.items()}
    base = parts[BASE].sum(axis=1)
    return {
        name: summary(of_name.sum(axis=1) / base)
        | {
            part: float(np.median(of_part))
            for part, of_part in zip(_PARTS, of_name.T, strict=True)
        }
        for name, of_name in parts.items()
    }


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
