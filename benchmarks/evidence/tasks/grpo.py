"""GRPO: rewards relative to those of other answers to the same problem.

The advantages of DeepSeekMath (outcome supervision), the clipped ratio of PPO, and a
penalty of the divergence from a fixed reference policy by the estimator "k3". A policy
is a function `(params, tokens) -> log-probabilities` of every next token, for tokens
`(..., time)`. Shapes: N problems, G answers each, T tokens each.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Policy = Callable[..., jax.Array]

# Keeps groups of equal rewards from dividing 0 by 0.
_EPSILON = 1e-4


class Experience(NamedTuple):
    """Answers to train on; the leading axis is of problems.

    Attributes:
      prompts: `(N, P)`.
      answers: that were sampled, `(N, G, T)`.
      advantages: `(N, G)`.
      sampled: log-probabilities of the answers' tokens under the policy that sampled
        them, `(N, G, T)`.
      reference: those under the reference policy.
    """

    prompts: jax.Array
    answers: jax.Array
    advantages: jax.Array
    sampled: jax.Array
    reference: jax.Array


def sample(
    policy: Policy, params: object, prompts: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Samples answers at temperature 1.

    Args:
      policy: what answers.
      params: of the policy.
      prompts: `(N, P)`.
      noise: standard Gumbel, `(N, G, T, vocabulary)`.

    Returns:
      The answers and the log-probabilities of their tokens, `(N, G, T)`.
    """
    length = noise.shape[2]
    tokens, kept = prompts[:, None], []
    for place in range(length):
        # Before the first token, the G answers to a problem are one.
        scores = policy(params, tokens)[:, :, -1]
        chosen = jnp.argmax(scores + noise[:, :, place], axis=-1)[..., None]
        scores = jnp.broadcast_to(scores, (*chosen.shape[:2], scores.shape[-1]))
        kept.append(jnp.take_along_axis(scores, chosen, -1))
        tokens = with_answers(tokens, chosen)
    return tokens[:, :, -length:], jnp.concatenate(kept, axis=-1)


def with_answers(prompts: jax.Array, answers: jax.Array) -> jax.Array:
    """Returns `(N, G, P + T)` of prompts `(N, 1 or G, P)` and answers `(N, G, T)`."""
    shape = (*answers.shape[:-1], prompts.shape[-1])
    return jnp.concatenate([jnp.broadcast_to(prompts, shape), answers], axis=-1)


def log_probabilities(
    policy: Policy, params: object, prompts: jax.Array, answers: jax.Array
) -> jax.Array:
    """Returns those of the answers' tokens, `(N, G, T)`.

    Args:
      policy: what answers.
      params: of the policy.
      prompts: `(N, P)`.
      answers: `(N, G, T)`.
    """
    tokens = with_answers(prompts[:, None], answers[..., :-1])
    scores = policy(params, tokens)[:, :, prompts.shape[-1] - 1 :]
    return jnp.take_along_axis(scores, answers[..., None], -1)[..., 0]


def relative_advantages(rewards: jax.Array) -> jax.Array:
    """Returns rewards `(N, G)` less their group's mean, over its standard deviation."""
    centered = rewards - rewards.mean(-1, keepdims=True)
    return centered / (rewards.std(-1, keepdims=True) + _EPSILON)


def grpo_loss(
    policy: Policy, params: object, batch: Experience, *, clip_ratio: float, kl: float
) -> jax.Array:
    """Returns the mean over all tokens of clipped surrogate and penalty.

    Args:
      policy: what is trained.
      params: of the policy.
      batch: answers.
      clip_ratio: how far from 1 a ratio of probabilities still counts.
      kl: weight of the divergence from the reference.
    """
    current = log_probabilities(policy, params, batch.prompts, batch.answers)
    ratio = jnp.exp(current - batch.sampled)
    advantages = batch.advantages[..., None]
    clipped = jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    apart = batch.reference - current
    return jnp.mean(kl * (jnp.exp(apart) - apart - 1) - gain)
