"""Diffusion: a small U-ViT that predicts the noise in images of digits.

The images are scikit-learn's, scaled to [-1, 1]. At time t in [0, 1] an image x and
noise e are mixed as `cos(π t / 2) x + sin(π t / 2) e`, the cosine schedule. The metrics
are the mean squared error of the predicted noise on held-out images, and the Fréchet
distance between these and images made by the deterministic sampler (DDIM), both with
the same fixed noise for every seed and arm. Other held-out images tune.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

import gradsmooth_optax as gs
from benchmarks.data.digits import SIZE, split_digits
from benchmarks.evidence.task import Metric, Task, leaves_matching, parts_of
from benchmarks.evidence.tasks.frechet import (
    frechet_distance,
    moments,
    trained_classifier,
)
from benchmarks.models.uvit import UViT, half_of

METRICS = (
    Metric("denoising loss", "per pixel", lower_is_better=True),
    Metric("Fréchet distance", "", lower_is_better=True),
)

# At 1 there is nothing left of an image.
LATEST = 0.98
# Far from the keys of any seed's data.
_EVALUATION_SEED = 2**31 - 1

# (noised images (N, 8, 8), times (N,)) -> noise.
Predict = Callable[[jax.Array, jax.Array], jax.Array]


class Batch(NamedTuple):
    """Clean images and the noise to mix them with, `(B, 8, 8)`, and times `(B,)`."""

    images: jax.Array
    noise: jax.Array
    times: jax.Array


def build(
    layers: int,
    *,
    width: int,
    heads: int,
    batch: int,
    eval_images: int,
    eval_times: int,
    samples: int,
    sampler_steps: int,
    patch: int = 2,
) -> Task:
    """Returns the task.

    Args:
      layers, width, heads, batch: of every task; `layers`, which counts the middle one,
        is odd, and `width` even.
      eval_images: held-out images that judge; as many others tune.
      eval_times: times at which each of them is denoised.
      samples: images made for the Fréchet distance.
      sampler_steps: evaluations of the model that make an image.
      patch: pixels along an edge of a patch.
    """
    model = UViT(layers, width, heads, patch)
    half = half_of(layers)
    held_out = eval_images, eval_images
    train, *others = (
        jnp.asarray(2 * part.images - 1) for part in split_digits(*held_out)
    )
    classifier = trained_classifier(*held_out)
    wanted = moments(classifier(others[0])[0])
    judging, tuning = (_evaluation_batch(images, eval_times) for images in others)

    def draw(data: jax.Array, key: jax.Array, step: jax.Array) -> Batch:
        of_image, of_noise, of_time = jax.random.split(jax.random.fold_in(key, step), 3)
        images = data[jax.random.randint(of_image, (batch,), 0, len(data))]
        noise = jax.random.normal(of_noise, images.shape)
        return Batch(images, noise, jax.random.uniform(of_time, (batch,)) * LATEST)

    def loss(params: Any, drawn: Batch) -> jax.Array:
        noised = mix(drawn.images, drawn.noise, drawn.times)
        predicted = predictor(model, params)(noised, drawn.times)
        return jnp.mean(jnp.square(predicted - drawn.noise))

    def evaluate(params: Any) -> dict[str, jax.Array]:
        images = denoise(predictor(model, params), starts(samples), sampler_steps)
        features, _ = classifier(images)
        distance = frechet_distance(wanted, moments(features))
        names = (metric.name for metric in METRICS)
        return dict(zip(names, (loss(params, judging), distance), strict=True))

    def states(params: Any, drawn: Batch) -> jax.Array:
        noised = mix(drawn.images, drawn.noise, drawn.times)
        inputs = (noised, drawn.times)
        _, kept = cast(
            tuple, model.apply({"params": params}, *inputs, mutable="intermediates")
        )
        return jnp.stack(kept["intermediates"]["states"])

    def init(key: jax.Array) -> Any:
        return model.init(key, judging.images[:1], judging.times[:1])["params"]

    depth = gs.layouts.uvit()
    return Task(
        depth=depth,
        data=train,
        init=init,
        draw=draw,
        loss=loss,
        evaluate=evaluate,
        tuned_by=lambda params: loss(params, tuning),
        states=states,
        decayed=lambda params: leaves_matching(r"/kernel$", params),
        hidden=lambda params: leaves_matching(rf"^{_BLOCK}/.*kernel$", params),
        scopes={
            # The kernels `skip`, of the out blocks alone, are in none of the parts.
            **parts_of(depth),
            "joined": gs.layouts.uvit(join_at=half),
            "joined with mid_block": _joined_with_mid_block(half),
        },
    )


def starts(samples: int) -> jax.Array:
    """Returns the noise, always the same, that samples are made of."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        _evaluation_key(0), jnp.arange(samples)
    )
    return jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE)))(keys)


def predictor(model: UViT, params: Any) -> Predict:
    """Returns the function of a model that predicts noise."""
    return lambda noised, times: cast(
        jax.Array, model.apply({"params": params}, noised, times)
    )


def mix(images: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
    """Returns noised images, `(N, 8, 8)`, at times `(N,)`: images at 0, noise at 1."""
    of_image, of_noise = _weights(times[:, None, None])
    return of_image * images + of_noise * noise


def denoise(predict: Predict, noise: jax.Array, steps: int) -> jax.Array:
    """Returns the images that the deterministic sampler makes of noise.

    Every step sees the image in the prediction, clipped to [-1, 1], and mixes it anew
    with the noise that then is in its input. What is not finite becomes NaN.

    Args:
      predict: of noise.
      noise: `(N, 8, 8)`, of variance 1.
      steps: evaluations of `predict`, at even distances from `LATEST` on.
    """
    times = LATEST * jnp.arange(steps, 0, -1) / steps

    def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
        noised, _ = carry
        of_image, of_noise = _weights(time)
        predicted = predict(noised, jnp.full(len(noised), time))
        images = (noised - of_noise * predicted) / of_image
        # Clipping would make a number of an infinity.
        images = jnp.where(jnp.isfinite(images), jnp.clip(images, -1.0, 1.0), jnp.nan)
        left = (noised - of_image * images) / of_noise
        of_image, of_noise = _weights(time - LATEST / steps)
        return (of_image * images + of_noise * left, images), None

    (_, images), _ = jax.lax.scan(step, (noise, noise), times)
    return images


def _weights(times: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.cos(jnp.pi / 2 * times), jnp.sin(jnp.pi / 2 * times)


def _evaluation_key(purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(_EVALUATION_SEED), purpose)


def _evaluation_batch(images: jax.Array, times: int) -> Batch:
    """Every image once in each of as many equal spans of time, at its own places.

    The images together cover all of every span evenly.
    """
    number = len(images)
    places = (jnp.arange(number) + 0.5) / number
    spans = LATEST * (jnp.arange(times)[:, None] + places) / times
    repeated = jnp.tile(images, (times, 1, 1))
    noise = jax.random.normal(_evaluation_key(1), repeated.shape)
    return Batch(repeated, noise, spans.ravel())


_BLOCK = r"(in_blocks_\d+|mid_block|out_blocks_\d+)"


def _joined_with_mid_block(half: int) -> gs.DepthSpec:
    def part(name: str, start: int) -> gs.DepthSpec:
        return gs.unrolled(rf"(?:^|/){name}/", start=start, stack="blocks")

    return gs.first_match(
        part(r"in_blocks_(\d+)", 0),
        # It has no number, so its layer is where it starts.
        part(r"mid_block(\d+)?", half),
        part(r"out_blocks_(\d+)", half + 1),
    )
