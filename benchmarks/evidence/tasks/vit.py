"""Image classification: a Vision Transformer in Flax NNX on scikit-learn's digits.

Its blocks are a list of modules, one after the other: every layer has parameters of its
own, with its number in their paths. Half of the images to train on are shifted by one
pixel. The metrics are the cross-entropy on held-out images, in nats per image, and the
share of them that is classified rightly. Others of the held-out images tune.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gradsmooth_optax as gs
from benchmarks.data.digits import SIZE, split_digits
from benchmarks.evidence.task import Metric, Task, leaves_matching, parts_of
from benchmarks.models.vit import VisionTransformer

METRICS = (
    Metric("test NLL", "nats/image", lower_is_better=True),
    Metric("test accuracy", "", lower_is_better=False),
)


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
    """Returns the task.

    Args:
      layers, width, heads, batch: of every task.
      patch: height and width of a patch, divisors of 8.
      eval_images: held-out images that judge; as many others tune.
    """

    def model(key: jax.Array) -> VisionTransformer:
        return VisionTransformer(layers, width, heads, patch, rngs=nnx.Rngs(key))

    structure, _ = nnx.split(nnx.eval_shape(model, jax.random.key(0)))
    train, judging, tuning = (
        Batch(*map(jnp.asarray, part))
        for part in split_digits(eval_images, eval_images)
    )

    def states(params: Any, drawn: Batch) -> jax.Array:
        return jnp.stack(nnx.merge(structure, params).states(drawn.images))

    def metrics(params: Any, drawn: Batch) -> dict[str, jax.Array]:
        logits, labels = nnx.merge(structure, params)(drawn.images), drawn.labels
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        values = jnp.mean(losses), jnp.mean(logits.argmax(-1) == labels)
        return {metric.name: of for metric, of in zip(METRICS, values, strict=True)}

    def loss(params: Any, drawn: Batch) -> jax.Array:
        return metrics(params, drawn)[METRICS[0].name]

    depth = gs.unrolled(r"blocks/(\d+)/")
    return Task(
        depth=depth,
        data=train,
        init=lambda key: nnx.to_pure_dict(nnx.state(model(key), nnx.Param)),
        draw=lambda data, key, step: _draw(data, jax.random.fold_in(key, step), batch),
        loss=loss,
        evaluate=lambda params: metrics(params, judging),
        tuned_by=lambda params: loss(params, tuning),
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
