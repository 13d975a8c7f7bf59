"""A Vision Transformer in Flax NNX for 8 × 8 digits; its blocks are a list of modules.

So every layer has parameters of its own, with its number in their paths.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.data.digits import CLASSES, SIZE

# Pixels of the images, about.
_MEAN, _DEVIATION = 0.305, 0.376


class Attention(nnx.Module):
    """Multi-head self-attention over the tokens of each image."""

    def __init__(
        self, width: int, heads: int, output_init: nnx.Initializer, *, rngs: nnx.Rngs
    ):
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=output_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        images, tokens, width = x.shape
        query, key, value = jnp.split(
            self.qkv(x).reshape(images, tokens, 3 * self.heads, width // self.heads),
            3,
            axis=2,
        )
        return self.out(
            jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        )


class Block(nnx.Module):
    """A pre-norm layer; takes and returns the residual stream."""

    def __init__(
        self, width: int, heads: int, output_init: nnx.Initializer, *, rngs: nnx.Rngs
    ):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, output_init, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 2 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(2 * width, width, kernel_init=output_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class VisionTransformer(nnx.Module):
    """Maps images `(batch, 8, 8)` to logits `(batch, 10)`."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        patch: Sequence[int],
        *,
        rngs: nnx.Rngs,
    ):
        self.patch = tuple(patch)
        rows, columns = self.patch
        tokens = SIZE * SIZE // (rows * columns)
        self.embed = nnx.Linear(rows * columns, width, rngs=rngs)
        # As large as the patches: runs are too short to learn places from nothing.
        places = nnx.initializers.normal(1.0)(rngs.params(), (tokens, width))
        self.positions = nnx.Param(places)
        # The sum of 2 L such outputs has the variance of one ordinary output.
        output_init = nnx.initializers.variance_scaling(
            1 / (2 * layers), "fan_in", "truncated_normal"
        )
        blocks = [Block(width, heads, output_init, rngs=rngs) for _ in range(layers)]
        self.blocks = nnx.List(blocks)
        self.final_norm = nnx.LayerNorm(width, rngs=rngs)
        # All classes are equally likely at the start.
        self.head = nnx.Linear(
            width, CLASSES, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def states(self, images: jax.Array) -> list[jax.Array]:
        """Returns the residual stream before the first and after every block."""
        rows, columns = self.patch
        cut = images.reshape(-1, SIZE // rows, rows, SIZE // columns, columns)
        patches = cut.swapaxes(2, 3).reshape(len(images), -1, rows * columns)
        states = [self.embed((patches - _MEAN) / _DEVIATION) + self.positions]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def __call__(self, images: jax.Array) -> jax.Array:
        pooled = self.states(images)[-1].mean(axis=1)
        return self.head(self.final_norm(pooled))
