"""Times of functions that run in turns in one process, so that they compare.

A machine that is busy for a while slows down whatever runs then. So every round runs
all functions once, in a random order, and times are compared within a round.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm


def compiled(function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Returns `function` compiled for these arguments, to be called with them."""
    return jax.jit(function).lower(*arguments).compile()


def temporaries(executable: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled function needs besides inputs and outputs."""
    analysis: Any = executable.memory_analysis()
    return analysis.temp_size_in_bytes


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    label: str = "",
    most_seconds: float = float("inf"),
    fewest_rounds: int = 5,
) -> dict[str, np.ndarray]:
    """Returns the seconds of every call in every round, arrays of shape `(rounds,)`.

    Args:
      calls: what to time; results are waited for, and gone before the next call.
      rounds: how often, after one round that warms up.
      label: for the progress bar.
      most_seconds: after which no further round begins,
      fewest_rounds: unless there were fewer than this.
    """
    order = random.Random(0)
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for turn in tqdm(range(rounds + 1), desc=label, leave=False, disable=None):
        if time.perf_counter() - started > most_seconds and turn > fewest_rounds:
            break
        order.shuffle(names)
        for name in names:
            began = time.perf_counter()
            result = jax.block_until_ready(calls[name]())
            took = time.perf_counter() - began
            del result
            if turn:
                seconds[name].append(took)
    return {name: np.array(of_name) for name, of_name in seconds.items()}


def relative_to(base: str, seconds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the `summary` of every other function's times in units of `base`'s."""
    return {
        name: summary(of_name / seconds[base])
        | {"milliseconds": 1e3 * float(np.median(of_name))}
        for name, of_name in seconds.items()
        if name != base
    }


def summary(values: np.ndarray) -> dict[str, Any]:
    """Returns the median, the quartiles and the number of values, as JSON."""
    return {
        "median": float(np.median(values)),
        "quartiles": [float(q) for q in np.quantile(values, (0.25, 0.75))],
        "rounds": len(values),
    }
