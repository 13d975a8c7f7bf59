"""The encoder of PyTorch's `TransformerEncoderLayer(norm_first=True)` in Flax Linen.

Initialized as those are; its layers are one scanned module, `blocks`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Layer(nn.Module):
    """A pre-norm encoder layer; takes and returns the residual stream."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        batch, time, width = x.shape
        h = nn.LayerNorm(epsilon=1e-5, name="attention_norm")(x)
        # One matrix for all three, as in PyTorch's MultiheadAttention.
        qkv = nn.Dense(3 * width, kernel_init=_xavier, name="qkv")(h)
        query, key, value = jnp.split(
            qkv.reshape(batch, time, 3 * self.heads, width // self.heads), 3, axis=2
        )
        mixed = jax.nn.dot_product_attention(query, key, value)
        x = x + nn.Dense(width, kernel_init=_linear, name="out")(
            mixed.reshape(batch, time, width)
        )
        h = nn.LayerNorm(epsilon=1e-5, name="mlp_norm")(x)
        h = nn.relu(_torch_dense(2 * width, width, "mlp_in")(h))
        x = x + _torch_dense(width, 2 * width, "mlp_out")(h)
        self.sow("intermediates", "states", x)
        return x, None


class Encoder(nn.Module):
    """Maps symbols `(batch, time)` to logits `(batch, time, vocabulary)`."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    length: int

    @nn.compact
    def __call__(self, symbols: jax.Array) -> jax.Array:
        normal = nn.initializers.normal
        table = nn.Embed(
            self.vocabulary, self.width, embedding_init=normal(1.0), name="in"
        )
        # Small beside the symbols: positions as large would make the task far easier.
        places = self.param("positions", normal(0.02), (self.length, self.width))
        x = table(symbols) + places
        self.sow("intermediates", "input", x)
        blocks = nn.scan(
            Layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = blocks(self.heads, name="blocks")(x)
        x = nn.LayerNorm(epsilon=1e-5, name="final_norm")(x)
        return _torch_dense(self.vocabulary, self.width, "head")(x)


_xavier = nn.initializers.xavier_uniform()
# U(-1/√fan_in, 1/√fan_in).
_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _torch_dense(features: int, fan_in: int, name: str) -> nn.Dense:
    """`torch.nn.Linear` as it is initialized: weights and biases alike."""
    bound = fan_in**-0.5

    def bias(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, kernel_init=_linear, bias_init=bias, name=name)
