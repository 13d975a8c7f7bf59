"""Diffusion: the sampler and the Fréchet distance, by closed forms and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

import scipy.linalg
from small_tasks import HEADS, LAYERS, OPTIONS, WIDTH, by_path, seen

import gradsmooth_optax as gs
from benchmarks.data.digits import split_digits
from benchmarks.evidence.tasks import diffusion
from benchmarks.evidence.tasks.frechet import (
    frechet_distance,
    moments,
    trained_classifier,
)
from benchmarks.models.uvit import UViT

pytestmark = pytest.mark.slow  # the task trains something before it begins

HELD_OUT = OPTIONS["diffusion"]["eval_images"]


def test_images_are_in_the_samplers_range_and_times_end_before_nothing_is_left():
    task, _, drawn, *_ = seen("diffusion")
    assert (np.min(task.data), np.max(task.data)) == (-1.0, 1.0)
    assert np.min(drawn.times) >= 0
    assert np.max(drawn.times) <= diffusion.LATEST < 1
    assert np.ptp(drawn.times) > 0.5
    assert np.std(drawn.noise) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("scope", "middle"), [("joined", 0), ("joined with mid_block", 1)]
)
def test_joined_scopes_are_one_stack_in_order_of_computation(scope, middle):
    task, params, *_ = seen("diffusion")
    names = ["in_blocks_0", *["mid_block"] * middle, "out_blocks_0"]
    for layer, name in enumerate(names):
        # Alone in a tree, a block shows its number.
        groups = gs.describe(task.scopes[scope], {name: params[name]}).groups
        assert {(group.stack, group.layers) for group in groups} == {
            ("blocks", (layer,))
        }
        assert len(groups) == len(by_path(params[name]))


# The sampler.


def denoised(predict, noise, steps):
    return jax.jit(lambda x: diffusion.denoise(predict, x, steps))(noise)


def test_the_sampler_makes_of_noise_the_gaussian_that_the_images_are():
    """With steps enough it is the flow whose map is known: scaling by the deviation."""
    deviation, mean = 0.1, 0.3

    def predict(noised, times):
        angles = (jnp.pi / 2 * times)[:, None, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return sin * (noised - cos * mean) / ((cos * deviation) ** 2 + sin**2)

    noise = jax.random.normal(jax.random.key(0), (50, 8, 8))
    found = denoised(predict, noise, 500)
    # Where the sampler starts, the images still have a little part.
    angle = np.pi / 2 * diffusion.LATEST
    at_start = np.hypot(np.cos(angle) * deviation, np.sin(angle))
    standard = (np.asarray(noise) - np.cos(angle) * mean) / at_start
    np.testing.assert_allclose(found, mean + deviation * standard, atol=0.005)


def test_the_sampler_takes_the_steps_of_ddim():
    """The published update, from noised image to noised image, with plain numbers."""
    steps, x = 4, np.random.default_rng(0).normal(size=(2, 8, 8))

    def predict(noised, times):
        return 0.9 * noised + 0.01 * times[:, None, None]

    found = denoised(predict, jnp.asarray(x, jnp.float32), steps)
    for k in range(steps, 0, -1):
        time, after = (diffusion.LATEST * at / steps for at in (k, k - 1))
        kept, kept_after = (np.cos(np.pi / 2 * at) ** 2 for at in (time, after))
        predicted = 0.9 * x + 0.01 * time
        image = (x - np.sqrt(1 - kept) * predicted) / np.sqrt(kept)
        image = np.clip(image, -1, 1)
        predicted = (x - np.sqrt(kept) * image) / np.sqrt(1 - kept)
        x = np.sqrt(kept_after) * image + np.sqrt(1 - kept_after) * predicted
    np.testing.assert_allclose(found, x, atol=1e-4)


# The Fréchet distance, and the evaluation.


def by_scipy(one, other):
    (a, b), (c, d) = ((x.mean(0), np.cov(x.T, bias=True)) for x in (one, other))
    root = scipy.linalg.sqrtm(b @ d).real
    return np.sum((a - c) ** 2) + np.trace(b + d - 2 * root)


def test_the_frechet_distance_is_the_one_with_scipys_root_of_a_matrix():
    rng = np.random.default_rng(0)
    one, other = (
        rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)) + shift for shift in (0, 1)
    )
    a, b = (moments(jnp.asarray(x, jnp.float32)) for x in (one, other))
    assert frechet_distance(a, b) == pytest.approx(by_scipy(one, other), rel=1e-4)
    assert frechet_distance(b, a) == pytest.approx(by_scipy(one, other), rel=1e-4)
    # A root of what rounding leaves of an eigenvalue: half of the digits.
    least = np.sqrt(np.finfo("f4").eps) * float(jnp.trace(a.covariance))
    assert abs(frechet_distance(a, a)) < least
    constant = moments(jnp.ones((10, 4)))
    assert frechet_distance(constant, constant) == pytest.approx(0, abs=1e-6)


def test_the_classifier_knows_digits_that_it_was_not_trained_on():
    _, held_out = split_digits(HELD_OUT)
    _, logits = trained_classifier(HELD_OUT)(jnp.asarray(2 * held_out.images - 1))
    assert np.mean(np.argmax(logits, 1) == held_out.labels) > 0.95


def test_the_evaluation_is_of_fixed_noise_and_of_the_samplers_images():
    _, params, _, batch, look = seen("diffusion")
    # Who predicts no noise has the mean square of the noise as its loss.
    nothing = jax.tree.map(np.zeros_like, params)
    error = 5 * np.sqrt(2 / (2 * HELD_OUT * 64))
    loss = look(nothing, batch)[3]["denoising loss"]
    assert loss == pytest.approx(1.0, abs=error)
    predict = diffusion.predictor(UViT(LAYERS, WIDTH, HEADS), params)
    starts = diffusion.starts(OPTIONS["diffusion"]["samples"])
    np.testing.assert_array_equal(diffusion.starts(2), starts[:2])
    images = denoised(predict, starts, OPTIONS["diffusion"]["sampler_steps"])
    held_out = split_digits(HELD_OUT, HELD_OUT)[1]
    classifier = trained_classifier(HELD_OUT, HELD_OUT)
    features = (
        np.asarray(classifier(jnp.asarray(x))[0], np.float64)
        for x in (images, 2 * held_out.images - 1)
    )
    distance = look(params, batch)[3]["Fréchet distance"]
    assert distance == pytest.approx(by_scipy(*features), rel=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_parameters_that_are_not_finite_have_metrics_that_are_not(bad):
    _, params, _, batch, look = seen("diffusion")
    params = jax.tree.map(np.copy, params)
    params["head"]["bias"][0] = bad
    assert not any(np.isfinite(x) for x in look(params, batch)[3].values())
