"""The residual stream of a Flax model whose layers are one scanned module."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn


def scanned_states(model: nn.Module, params: Any, inputs: jax.Array) -> jax.Array:
    """Returns the stream before the first and after every block, `(L + 1, ...)`.

    Args:
      model: sows it as `input`, and in its module `blocks` as `states`.
      params: of the model.
      inputs: of the model.
    """
    _, kept = cast(
        tuple, model.apply({"params": params}, inputs, mutable="intermediates")
    )
    sown = kept["intermediates"]
    (first,), (after,) = sown["input"], sown["blocks"]["states"]
    return jnp.concatenate([first[None], after])
