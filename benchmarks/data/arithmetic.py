"""Sums of two octal numbers of two digits: problems whose answers can be checked.

A prompt is the four digits of both numbers, an answer the last two digits of the sum,
units first, as one adds by hand. A token is a digit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BASE = 8
PROMPT, ANSWER = 4, 2
# Of a right digit in an answer that is not right as a whole; that is worth 1.
PARTIAL_CREDIT = 0.2
# Of all 4,096 problems, about; the rest is the test.
START, TRAIN, TUNING = 2000, 1000, 548
# How likely a demonstration has either mistake, each by itself.
TENS_FIRST, NO_CARRY = 0.6, 0.6


class Problems(NamedTuple):
    """Digits, integers with leading axes of any shape.

    Attributes:
      prompts: `(..., PROMPT)`.
      answers: `(..., ANSWER)`, the right ones.
    """

    prompts: Any
    answers: Any


class Split(NamedTuple):
    """All problems in four disjoint sets, each in random order.

    A problem and the same with its numbers swapped are in one set.
    """

    start: Problems
    train: Problems
    tuning: Problems
    test: Problems


def split_problems() -> Split:
    """Returns the four sets, the same ones at every call."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(BASE**PROMPT)
    one, other = np.divmod(numbers, BASE**2)
    pairs, of_problem = np.unique(
        np.minimum(one, other) * BASE**2 + np.maximum(one, other), return_inverse=True
    )
    # Of every pair a place in [0, 1).
    place = (rng.permutation(len(pairs)) / len(pairs))[of_problem]
    prompts = np.stack([numbers // BASE**k % BASE for k in (3, 2, 1, 0)], axis=-1)
    answers = _add(prompts, 1)
    cuts = np.cumsum([START, TRAIN, TUNING]) / len(numbers)
    which = np.searchsorted(cuts, place, side="right")
    return Split(
        *(
            Problems(jnp.asarray(prompts[which == k]), jnp.asarray(answers[which == k]))
            for k in range(len(Split._fields))
        )
    )


def demonstrate(key: jax.Array, problems: Problems) -> jax.Array:
    """Returns answers `(..., ANSWER)` as of someone who adds carelessly.

    Many have the tens first, and many forget the carry, whatever the problem: what a
    model that imitates them can do, but mostly doesn't.

    Args:
      key: of the mistakes.
      problems: to answer.
    """
    shape = (*problems.answers.shape[:-1], 1)
    swap, forget = jax.random.split(key)
    swapped = jax.random.bernoulli(swap, TENS_FIRST, shape)
    forgotten = jax.random.bernoulli(forget, NO_CARRY, shape)
    answers = jnp.where(forgotten, _add(problems.prompts, 0), problems.answers)
    return jnp.where(swapped, answers[..., ::-1], answers)


def reward(said: jax.Array, right: jax.Array) -> jax.Array:
    """Returns 1 for the right answer, else 0.2 for every right digit at its place.

    Args:
      said: answers, `(..., ANSWER)`.
      right: the right ones, of a shape that broadcasts to that.
    """
    equal = said == right
    return jnp.where(equal.all(-1), 1.0, PARTIAL_CREDIT * equal.sum(-1))


def _add(prompts: Any, carry: int) -> Any:
    """The units and the tens of the sums; `carry` is what a carry counts."""
    low = prompts[..., 1] + prompts[..., 3]
    high = prompts[..., 0] + prompts[..., 2] + carry * (low // BASE)
    both = jnp if isinstance(prompts, jax.Array) else np
    return both.stack([low % BASE, high % BASE], axis=-1)
