"""The loss of a language model: cross-entropy of the next token."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


def next_token_loss(model: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of next tokens, in nats per token.

    Args:
      model: maps tokens `(batch, time)` to logits `(batch, time, vocabulary)`.
      params: its parameters.
      tokens: integers of shape `(batch, context + 1)`.
    """
    logits = cast(jax.Array, model.apply({"params": params}, tokens[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses)


def mean_loss(
    model: nn.Module, params: Any, windows: jax.Array, at_once: int = 16
) -> jax.Array:
    """Returns the mean loss over all windows, in nats per token.

    Args:
      model: as in `next_token_loss`.
      params: its parameters.
      windows: tokens of shape `(num_windows, context + 1)`.
      at_once: windows per forward pass, which bounds the memory.
    """

    def loss(window: jax.Array) -> jax.Array:
        return next_token_loss(model, params, window[None])

    return jnp.mean(jax.lax.map(loss, windows, batch_size=at_once))
