"""The Fréchet distance of sets of digits, in the features of a small classifier.

As the Fréchet inception distance, but with a network that is trained here, on the same
images in [-1, 1] and in seconds: values compare with each other only.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.data.digits import CLASSES, SIZE, split_digits

# Few, for the covariances of some hundred images; a distance still depends on how many
# samples there are.
FEATURES = 16
_STEPS = 200


class Moments(NamedTuple):
    """Mean `(F,)` and covariance `(F, F)` of features."""

    mean: jax.Array
    covariance: jax.Array


def moments(features: jax.Array) -> Moments:
    """Returns the moments of features `(N, F)`, with N in the covariance's divisor."""
    mean = jnp.mean(features, axis=0)
    centered = features - mean
    return Moments(mean, centered.T @ centered / len(features))


def frechet_distance(one: Moments, other: Moments) -> jax.Array:
    """Returns the squared Fréchet (2-Wasserstein) distance of two Gaussians.

    |μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½). NaN where a moment is not finite.
    """
    values, vectors = jnp.linalg.eigh(one.covariance)
    root = (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T
    # Has the eigenvalues of C₁ C₂ and is symmetric.
    product = jnp.linalg.eigvalsh(root @ other.covariance @ root)
    overlap = jnp.sum(jnp.sqrt(jnp.maximum(product, 0.0)))
    spread = jnp.trace(one.covariance) + jnp.trace(other.covariance) - 2 * overlap
    distance = jnp.sum(jnp.square(one.mean - other.mean)) + spread
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in (*one, *other)]
    return jnp.where(functools.reduce(jnp.logical_and, finite), distance, jnp.nan)


class Classifier(nn.Module):
    """Maps images `(batch, 8, 8)` to features and to logits of the classes."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images.reshape(len(images), SIZE * SIZE)
        x = nn.relu(nn.Dense(64)(x))
        features = nn.gelu(nn.Dense(FEATURES)(x))
        return features, nn.Dense(CLASSES)(features)


@functools.lru_cache
def trained_classifier(
    *held_out: int,
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the function of a classifier of images in [-1, 1]; the same every time.

    Args:
      *held_out: how many digits it is not trained on, as in `split_digits`.

    Returns:
      images `(N, 8, 8)` -> features `(N, 16)`, logits `(N, 10)`.
    """
    train = split_digits(*held_out)[0]
    images, labels = jnp.asarray(2 * train.images - 1), jnp.asarray(train.labels)
    model = Classifier()
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, _STEPS))

    def loss(params: Any) -> jax.Array:
        _, logits = cast(tuple, model.apply({"params": params}, images))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(each)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train_all(key: jax.Array) -> Any:
        params = model.init(key, images[:1])["params"]
        carry = (params, optimizer.init(params))
        return jax.lax.scan(step, carry, length=_STEPS)[0][0]

    variables = {"params": train_all(jax.random.key(0))}
    return lambda images: cast(tuple, model.apply(variables, images))
