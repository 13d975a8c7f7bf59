"""Training of several arms in turns, so that their times compare.

A machine that is busy for a while slows down whatever runs then. So the arms take
turns of a few steps, in an order that rotates, and times are compared within a round.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.training import TrainState

# (state, first step, number of steps) -> state, losses (at least number of steps, S).
Train = Callable[[TrainState, int, int], tuple[TrainState, jax.Array]]
# parameters stacked over seeds -> losses (S,).
Evaluate = Callable[[Any], jax.Array]


class Plan(NamedTuple):
    """When the arms take turns and when they are evaluated, in steps.

    Attributes:
      steps: all steps of a run.
      chunk: the longest turn of an arm.
      eval_every: steps between evaluations; the last step always has one.
    """

    steps: int
    chunk: int
    eval_every: int

    @property
    def evaluations(self) -> list[int]:
        """The steps after which all arms are evaluated."""
        return [*range(self.eval_every, self.steps, self.eval_every), self.steps]

    @property
    def rounds(self) -> list[int]:
        """The steps at which all arms have had a turn."""
        turns = range(self.chunk, self.steps, self.chunk)
        return sorted({*turns, *self.evaluations})


class Curves(NamedTuple):
    """What was measured, NaN where a run has not come yet.

    Attributes:
      train_loss: float32 of shape `(arms, steps, S)`.
      validation_loss: float32 of shape `(arms, evaluations, S)`.
      seconds: of every turn, all seeds together, float64 of shape `(arms, rounds)`.
    """

    train_loss: np.ndarray
    validation_loss: np.ndarray
    seconds: np.ndarray


class Run(NamedTuple):
    """All arms after the same number of steps: all that a checkpoint has to hold."""

    step: int
    states: dict[str, TrainState]
    curves: Curves


def new_run(states: dict[str, TrainState], plan: Plan, num_seeds: int) -> Run:
    """Returns a run before its first step."""
    arms = len(states)

    def unmeasured(count: int, *seeds: int, dtype: Any) -> np.ndarray:
        return np.full((arms, count, *seeds), np.nan, dtype)

    return Run(
        step=0,
        states=states,
        curves=Curves(
            train_loss=unmeasured(plan.steps, num_seeds, dtype=np.float32),
            validation_loss=unmeasured(
                len(plan.evaluations), num_seeds, dtype=np.float32
            ),
            seconds=unmeasured(len(plan.rounds), dtype=np.float64),
        ),
    )


def train_in_turns(
    run: Run,
    plan: Plan,
    trainers: Mapping[str, Train],
    evaluate: Evaluate,
    after_turn: Callable[[str, int, float], None] = lambda arm, steps, loss: None,
) -> Iterator[Run]:
    """Trains every arm to the end and yields the run after every round.

    Args:
      run: where to start; its states and curves are used up.
      plan: of the whole run.
      trainers: what trains each arm, compiled, so that no turn's time has compilation
        in it; the names and their order are those of `run.states`.
      evaluate: the validation losses of one arm's parameters.
      after_turn: called with the arm, its steps of this turn and their mean loss.

    Yields:
      The run, valid until the next one is asked for.
    """
    names = list(trainers)
    states, curves = dict(run.states), run.curves
    evaluations = {step: index for index, step in enumerate(plan.evaluations)}
    start = run.step
    for index, end in enumerate(plan.rounds):
        if end <= start:
            continue
        for turn in range(len(names)):
            arm = (index + turn) % len(names)
            name = names[arm]

            began = time.perf_counter()
            states[name], losses = trainers[name](states[name], start, end - start)
            jax.block_until_ready((states[name], losses))
            curves.seconds[arm, index] = time.perf_counter() - began

            losses = np.asarray(losses)[: end - start]
            curves.train_loss[arm, start:end] = losses
            if end in evaluations:
                curves.validation_loss[arm, evaluations[end]] = np.asarray(
                    evaluate(states[name].params)
                )
            after_turn(name, end - start, float(np.mean(losses)))
        start = end
        yield Run(end, dict(states), curves)
