"""Image classification: a Vision Transformer in Flax NNX on scikit-learn's digits.

Its blocks are a list of modules, one after the other: every layer has parameters of its
own, with its number in their paths. Half of the images to train on are shifted by one
pixel. The metrics are the cross-entropy on held-out images, in nats per image, and the
share of them that is classified rightly.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gradsmooth_optax as gs
from benchmarks.evidence.task import Metric, Task, leaves_matching, parts_of
from benchmarks.evidence.tasks.digits import CLASSES, SIZE, split_digits

METRICS = (
    Metric("test NLL", "nats/image", lower_is_better=True),
    Metric("test accuracy", "", lower_is_better=False),
)


# Pixels of the images, about.
_MEAN, _DEVIATION = 0.305, 0.376
# Where an image is cut from its frame of one empty pixel: half of the time as it was.
_CORNERS = [(1, 1)] * 4 + [(0, 1), (2, 1), (1, 0), (1, 2)]


class Batch(NamedTuple):
    """Images `(N, 8, 8)` of values in [0, 1] and their classes `(N,)`."""

    images: jax.Array
    labels: jax.Array


def build(
    layers: int,
    *,
    width: int,
    heads: int,
    patch: Sequence[int],
    batch: int,
    eval_images: int,
) -> Task:
    """Returns the task at a depth.

    Args:
      layers: L.
      width: of the residual stream; the MLP is twice as wide.
      heads: of attention, in every layer.
      patch: height and width of a patch, divisors of 8.
      batch: images per step.
      eval_images: held-out images.
    """

    def model(key: jax.Array) -> VisionTransformer:
        return VisionTransformer(layers, width, heads, patch, rngs=nnx.Rngs(key))

    structure, _ = nnx.split(nnx.eval_shape(model, jax.random.key(0)))
    train, test = (Batch(*map(jnp.asarray, part)) for part in split_digits(eval_images))

    def states(params: Any, drawn: Batch) -> jax.Array:
        return jnp.stack(nnx.merge(structure, params).states(drawn.images))

    def metrics(params: Any, drawn: Batch) -> dict[str, jax.Array]:
        logits, labels = nnx.merge(structure, params)(drawn.images), drawn.labels
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        values = jnp.mean(losses), jnp.mean(logits.argmax(-1) == labels)
        return {metric.name: of for metric, of in zip(METRICS, values, strict=True)}

    depth = gs.unrolled(r"blocks/(\d+)/")
    return Task(
        depth=depth,
        data=train,
        init=lambda key: nnx.to_pure_dict(nnx.state(model(key), nnx.Param)),
        draw=lambda data, key, step: _draw(data, jax.random.fold_in(key, step), batch),
        loss=lambda params, drawn: metrics(params, drawn)[METRICS[0].name],
        evaluate=lambda params: metrics(params, test),
        states=states,
        decayed=lambda params: leaves_matching(r"/kernel$", params),
        hidden=lambda params: leaves_matching(r"^blocks/.*/kernel$", params),
        scopes=parts_of(depth),
    )


def _draw(data: Batch, key: jax.Array, size: int) -> Batch:
    """Random images, each with even odds as it is or shifted in one of 4 directions."""
    which, where = jax.random.split(key)
    picked = jax.random.randint(which, (size,), 0, len(data.labels))
    corners = jax.random.choice(where, jnp.array(_CORNERS), (size,))
    framed = jnp.pad(data.images[picked], [(0, 0), (1, 1), (1, 1)])
    shifted = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, at, (SIZE, SIZE)))(
        framed, corners
    )
    return Batch(shifted, data.labels[picked])


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
