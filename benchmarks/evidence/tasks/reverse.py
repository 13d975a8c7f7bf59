"""Reversing a sequence of random symbols: the task of the paper's one replication.

An encoder of PyTorch's `TransformerEncoderLayer(norm_first=True)`, initialized as those
are, reads a sequence and says at position i the symbol at the mirrored position.
Sequences are drawn anew at every step. The metric is the cross-entropy on fixed
sequences, in nats per symbol; that of guessing is ln(vocabulary).
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import gradsmooth_optax as gs
from benchmarks.evidence.task import Metric, Task
from benchmarks.evidence.tasks.scanned_states import scanned_states
from benchmarks.optimizers import hidden_matrices

METRICS = (Metric("evaluation loss", "nats/symbol", lower_is_better=True),)


def build(
    layers: int,
    *,
    width: int,
    heads: int,
    length: int,
    vocabulary: int,
    batch: int,
    eval_sequences: int,
) -> Task:
    """Returns the task at a depth.

    Args:
      layers: L.
      width: of the residual stream; the MLP is twice as wide.
      heads: of attention, in every layer.
      length: symbols in a sequence.
      vocabulary: number of symbols.
      batch: sequences per step.
      eval_sequences: sequences of the evaluation.
    """
    model = Encoder(vocabulary, layers, width, heads, length)

    def draw(data: Any, key: jax.Array, step: jax.Array) -> jax.Array:
        del data  # made here
        shape = (batch, length)
        return jax.random.randint(jax.random.fold_in(key, step), shape, 0, vocabulary)

    def loss(params: Any, symbols: jax.Array) -> jax.Array:
        logits = cast(jax.Array, model.apply({"params": params}, symbols))
        wanted = symbols[:, ::-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    held_out = jax.random.randint(
        # Far from the keys of any seed's data.
        jax.random.fold_in(jax.random.key(2**31 - 1), 0),
        (eval_sequences, length),
        0,
        vocabulary,
    )
    return Task(
        depth=gs.scanned("blocks/"),
        data=None,
        init=lambda key: model.init(key, held_out[:1])["params"],
        draw=draw,
        loss=loss,
        evaluate=lambda params: {"evaluation loss": loss(params, held_out)},
        states=functools.partial(scanned_states, model),
        # As in PyTorch's AdamW.
        decayed=lambda params: jax.tree.map(lambda _: True, params),
        hidden=hidden_matrices,
    )


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
