"""One run: an arm's optimizer, the user's training, and what it returned."""

from __future__ import annotations

import inspect
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradsmooth_optax._checks import shown
from gradsmooth_optax.trial._arguments import whole_number
from gradsmooth_optax.trial._arms import PLAIN, SHUFFLED, Arm, smoothing_of
from gradsmooth_optax.trial._protocol import SCREEN, Outcome, Run, value_of

Optimizer = Callable[[Any, Any], Any]


class many_seeds:
    """Marks a `train(optimizer, seeds) -> array` that trains several seeds at once.

    `compare` then calls it under `jax.jit`, once compiled for each arm: the rates that
    `optimizer` is given are traced, `seeds` is an int32 array, and everything that
    `train` does must be traceable, so loop by `jax.lax.scan`. In the shuffled control
    seeds that train at once share one order of the layers.

    Args:
      train: takes an optimizer and seeds `(n,)`; returns `(n,)` values of the metric,
        or a dict of such.
      at_once: the most seeds of a call, which bounds the memory; where it divides both
        numbers of seeds, an arm is compiled once. None: all seeds of a stage.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax, jax.numpy as jnp
      >>> @gs.trial.many_seeds
      ... def train(optimizer, seeds):
      ...     def one(seed):
      ...         params = {"h": jax.random.normal(jax.random.key(seed), (4, 3))}
      ...         updates, _ = optimizer.update(params, optimizer.init(params))
      ...         return jnp.sum(optax.apply_updates(params, updates)["h"] ** 2)
      ...     return jax.vmap(one)(seeds)
    """

    def __init__(
        self,
        train: Callable[[Any, Any], Any],
        *,
        at_once: int | None = None,
    ):
        if at_once is not None:
            whole_number("at_once", at_once, 1)
        self.train, self.at_once = train, at_once


class Job:
    """All that a run needs; it travels to other processes whole."""

    def __init__(
        self,
        train: Any,
        optimizer: Optimizer,
        depth: Any,
        arms: Mapping[str, Arm],
        tuned_by: str | None,
    ):
        self.train, self.optimizer, self.depth = train, optimizer, depth
        self.arms, self.tuned_by = arms, tuned_by
        self.programs: dict[tuple[str, int], Any] = {}

    def trained(self, run: Run, rate: Any, block_rate: Any, seeds: Any) -> Any:
        """What `train` returns, if its optimizer uses the arm's smoothing."""
        arm, used = self.arms[run.arm], []
        inner = smoothing_of(arm, self.depth, block_rate, run.seed)

        def update(*args: Any, **extra_args: Any) -> Any:
            used.append(True)
            return inner.update(*args, **extra_args)

        watched = optax.GradientTransformationExtraArgs(inner.init, update)
        train = self.train.train if isinstance(self.train, many_seeds) else self.train
        returned = train(self.optimizer(watched, rate), seeds)
        if inspect.isgenerator(returned):
            return self._checked(returned, arm, used)
        self._check_used(arm, used)
        return returned

    def _checked(self, values: Any, arm: Arm, used: list[bool]) -> Any:
        yield from values
        self._check_used(arm, used)

    def _check_used(self, arm: Arm, used: list[bool]) -> None:
        if arm.name != PLAIN and not used:
            raise TypeError(
                f"the updates of {arm.name!r} never went through `smoothing`: "
                "`optimizer` or `train` ignores it, and all arms would be the same. "
                "Chain it, as in `optax.chain(optax.scale_by_adam(), smoothing, "
                "optax.scale_by_learning_rate(rate))`, and train with what `optimizer` "
                "returned."
            )

    def __call__(
        self, run: Run, limits: Sequence[float] | None, sign: float
    ) -> Outcome:
        """Trains one seed; raises what `train` raises."""
        began = time.perf_counter()
        returned = self.trained(run, run.rate, run.block_rate, run.seed)
        curve: list[float] = []
        if not inspect.isgenerator(returned):
            metrics = _metrics(returned)
        else:
            metrics = {}
            for yielded in returned:
                metrics = _metrics(yielded)
                value = value_of(Outcome(metrics), self.tuned_by)
                curve.append(value)
                hopeless = (
                    limits is not None
                    and len(curve) < len(limits)
                    and (
                        not math.isfinite(value)
                        or sign * value > limits[len(curve) - 1]
                    )
                )
                if hopeless:
                    returned.close()
                    seconds = time.perf_counter() - began
                    return Outcome({}, tuple(curve), True, None, seconds)
            if not curve:
                raise TypeError(
                    "`train` is a generator that yields nothing. Yield the metric, at "
                    "least at the end."
                )
        return Outcome(metrics, tuple(curve), seconds=time.perf_counter() - began)

    def program(self, arm: str, order: int) -> Any:
        """The compiled training of an arm, for `many_seeds`."""
        run = Run(SCREEN, arm, 1.0, 1.0, order)

        def trained(rate: Any, block_rate: Any, seeds: Any) -> Any:
            return self.trained(run, rate, block_rate, seeds)

        return self.programs.setdefault((arm, order), jax.jit(trained))

    def at_once(self, runs: Sequence[Run]) -> list[Outcome]:
        """Trains all seeds of one arm at one point."""
        began = time.perf_counter()
        first = runs[0]
        order = first.seed if self.arms[first.arm].control == SHUFFLED else 0
        returned = self.program(first.arm, order)(
            jnp.float32(first.rate),
            jnp.float32(first.block_rate),
            jnp.array([run.seed for run in runs], jnp.int32),
        )
        whole = returned if isinstance(returned, Mapping) else {"metric": returned}
        values = {name: np.asarray(of, np.float64) for name, of in whole.items()}
        for name, of in values.items():
            if of.shape != (len(runs),):
                raise TypeError(
                    f"`train` under `many_seeds` must return a value for each of the "
                    f"{len(runs)} seeds, but {name!r} has shape {of.shape}. Return "
                    "`jax.vmap(train_one)(seeds)`."
                )
        seconds = (time.perf_counter() - began) / len(runs)
        return [
            Outcome(
                {name: float(of[k]) for name, of in values.items()}, (), seconds=seconds
            )
            for k in range(len(runs))
        ]


def _metrics(returned: Any) -> dict[str, float]:
    """What a run returned as {name: number}, or an error that says what it was."""
    whole = returned if isinstance(returned, Mapping) else {"metric": returned}
    metrics = {}
    for name, value in whole.items():
        array = np.asarray(value) if isinstance(value, jax.Array) else value
        if isinstance(array, np.ndarray) and array.ndim == 0:
            array = array.item()
        if not isinstance(array, numbers.Real) or isinstance(array, bool):
            where = f" under {name!r}" if isinstance(returned, Mapping) else ""
            hint = " It has no `return`?" if value is None else ""
            raise TypeError(
                f"`train` must return a number, or a dict of numbers, but returned "
                f"{shown(value)} of type {type(value).__name__}{where}.{hint}"
            )
        metrics[str(name)] = float(array)
    if not metrics:
        raise TypeError("`train` returned a dict without numbers.")
    return metrics
