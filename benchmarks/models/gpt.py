"""A decoder-only GPT in Flax Linen whose layers are one scanned module, `blocks`.

Every parameter of the blocks is stacked: its axis 0 runs over depth. All kernels are
matrices `(L, inputs, outputs)`, so that rank 2 per layer tells them from norm scales,
for the smoothing's projections, for weight decay and for Muon alike.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

# Tables start this small, so that a tied head starts near the uniform distribution, and
# are read divided by it, so that the residual stream starts at the size of one output.
_EMBEDDING_SCALE = 0.02


class Attention(nn.Module):
    """Causal multi-head self-attention of `(batch, time, width)` activations."""

    heads: int
    output_init: nn.initializers.Initializer
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, time, width = x.shape
        query, key, value = (
            _dense(width, self.dtype, name=name)(x).reshape(
                batch, time, self.heads, width // self.heads
            )
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(
            rotate(query), rotate(key), value, is_causal=True
        )
        return _dense(width, self.dtype, self.output_init, name="out")(
            mixed.reshape(batch, time, width)
        )


class Block(nn.Module):
    """One pre-norm layer: attention and a GELU MLP, each added to the residual stream.

    Called by `nn.scan`: takes and returns the residual stream, `(batch, time, width)`.
    """

    heads: int
    output_init: nn.initializers.Initializer
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        h = nn.RMSNorm(dtype=self.dtype, name="attention_norm")(x)
        x = x + Attention(self.heads, self.output_init, self.dtype, name="attention")(h)
        h = nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)
        h = nn.gelu(_dense(4 * width, self.dtype, name="mlp_in")(h))
        x = x + _dense(width, self.dtype, self.output_init, name="mlp_out")(h)
        # Only kept when "intermediates" is mutable: the states after every layer.
        self.sow("intermediates", "states", x)
        return x, None


class GPT(nn.Module):
    """Maps tokens `(batch, time)` to next-token logits `(batch, time, vocabulary)`.

    Parameters are float32; activations and products are in `dtype`, logits in float32.

    Attributes:
      vocabulary: number of token values.
      layers: L, the depth.
      width: size of the residual stream; a multiple of `heads`.
      heads: attention heads per layer; `width / heads` must be even.
      context: longest sequence it is trained on; positions are rotary.
      remat: recompute each layer's activations in the backward pass.
      dtype: of activations and products.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    context: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(
            self.vocabulary,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(_EMBEDDING_SCALE),
            name="embed",
        )
        x = embed(tokens) / _EMBEDDING_SCALE
        self.sow("intermediates", "input", x)

        # CSE is no danger inside a scan, and preventing it costs time.
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = blocks(
            heads=self.heads,
            # The sum of 2 L such outputs has the variance of one ordinary output.
            output_init=_fan_in(1 / (2 * self.layers)),
            dtype=self.dtype,
            name="blocks",
        )(x)

        x = nn.RMSNorm(dtype=self.dtype, name="final_norm")(x)
        return embed.attend(x).astype(jnp.float32)  # the head is the embedding


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Applies rotary positions to `(batch, time, heads, size)`, with `size` even."""
    time, size = x.shape[1], x.shape[-1]
    frequencies = base ** (-jnp.arange(0, size, 2) / size)
    angles = jnp.arange(time)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _fan_in(scale: float) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


def _dense(
    features: int,
    dtype: Any,
    kernel_init: nn.initializers.Initializer | None = None,
    *,
    name: str,
) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=False,
        dtype=dtype,
        kernel_init=_fan_in(1.0) if kernel_init is None else kernel_init,
        name=name,
    )


def init_gpt(model: GPT) -> Callable[[jax.Array], Any]:
    """Returns what makes a model's parameters from a key."""
    return lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def next_token_loss(model: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the next tokens, in nats.

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
    """Returns the mean loss over `(num_windows, context + 1)` tokens, some at once."""

    def loss(window: jax.Array) -> jax.Array:
        return next_token_loss(model, params, window[None])

    return jnp.mean(jax.lax.map(loss, windows, batch_size=at_once))


def scanned_states(model: nn.Module, params: Any, inputs: jax.Array) -> jax.Array:
    """Returns the residual stream before the first and after every block.

    Its shape is `(L + 1, ...)`.

    Args:
      model: sows it as `input`, and in its scanned module `blocks` as `states`.
      params: of the model.
      inputs: of the model.
    """
    _, kept = cast(
        tuple, model.apply({"params": params}, inputs, mutable="intermediates")
    )
    sown = kept["intermediates"]
    (first,), (after,) = sown["input"], sown["blocks"]["states"]
    return jnp.concatenate([first[None], after])
