"""The task of diffusion is what it says: noising, U-ViT, sampler, Fréchet distance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_layers import affine, block, layer_norm

pytest.importorskip("flax")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import scipy.linalg

import gradsmooth_optax as gs
from benchmarks.data.digits import split_digits
from benchmarks.evidence.task import parts_of
from benchmarks.evidence.tasks import diffusion
from benchmarks.evidence.tasks.frechet import (
    Moments,
    frechet_distance,
    moments,
    trained_classifier,
)
from benchmarks.models.uvit import UViT

# Of what is computed, and of what is only looked at: there are two stacks of two.
LAYERS, DEEP, HALF = 3, 5, 2
MODEL = {"width": 8, "heads": 2}
OPTIONS = {
    **MODEL,
    **{"batch": 6, "eval_images": 297, "eval_times": 2},
    **{"samples": 20, "sampler_steps": 2},
}
HELD_OUT = OPTIONS["eval_images"]
BLOCKS = ["in_blocks_0", "in_blocks_1", "mid_block", "out_blocks_0", "out_blocks_1"]
ROLES = {
    *(
        f"{norm}/{of}"
        for norm in ("attention_norm", "mlp_norm")
        for of in ("scale", "bias")
    ),
    *(
        f"{dense}/{of}"
        for dense in ("attention/qkv", "attention/out", "mlp_in", "mlp_out")
        for of in ("kernel", "bias")
    ),
}
SKIPS = {"skip/kernel", "skip/bias"}


@functools.cache
def task():
    built = diffusion.build(LAYERS, **OPTIONS)
    names = ("loss", "evaluate", "states", "init", "draw")
    return built._replace(**{name: jax.jit(getattr(built, name)) for name in names})


@functools.cache
def deep():
    return diffusion.build(DEEP, **OPTIONS)


@functools.cache
def shapes():
    return jax.eval_shape(deep().init, jax.random.key(0))


def random_params(seed=0, scale=0.3):
    """Values for every parameter, so that nothing is hidden by a 0 or a 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(task().init, jax.random.key(0)),
    )


def batch_of(seed=0, step=0):
    return task().draw(task().data, jax.random.key(seed), step)


def paths_of(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# Data.


def test_a_batch_depends_on_the_key_and_the_step_alone():
    first = batch_of(1, 7)
    for other in (batch_of(1, 8), batch_of(2, 7)):
        for one, another in zip(first, other, strict=True):
            assert not np.array_equal(one, another)
    jax.tree.map(np.testing.assert_array_equal, first, batch_of(1, 7))


def test_images_are_in_the_range_of_the_sampler_and_times_before_the_latest():
    data = np.asarray(task().data)
    assert (data.min(), data.max()) == (-1.0, 1.0)
    batches = [batch_of(0, step) for step in range(20)]
    times = np.concatenate([drawn.times for drawn in batches])
    assert 0 <= times.min() < 0.1
    assert 0.9 < times.max() <= diffusion.LATEST
    noise = np.concatenate([drawn.noise for drawn in batches])
    assert noise.std() == pytest.approx(1.0, abs=0.05)
    assert abs(noise.mean()) < 0.05


def test_no_held_out_image_is_trained_on():
    train, held_out = split_digits(HELD_OUT)
    np.testing.assert_array_equal(task().data, 2 * train.images - 1)
    trained_on = {image.tobytes() for image in train.images}
    assert len(train.images) + len(held_out.images) == 1797
    assert not any(image.tobytes() in trained_on for image in held_out.images)


# The model.


def forward(params, image, time, width, heads, patch=2):
    """Predicted noise of one image, and all states, in float64."""
    angles = time * 100 ** (np.arange(width // 2) / (width // 2 - 1))
    tokens = [affine(np.r_[np.cos(angles), np.sin(angles)], params["time"])]
    corners = [(r, c) for r in range(0, 8, patch) for c in range(0, 8, patch)]
    for r, c in corners:
        pixels = image[r : r + patch, c : c + patch].ravel()
        tokens.append(affine(pixels, params["patches"]))
    x = np.array(tokens) + params["positions"]
    states = [x]
    half = LAYERS // 2
    for name in (*(f"in_blocks_{i}" for i in range(half)), "mid_block"):
        states.append(x := block(x, params[name], heads))
    for i in range(half):
        # The first of the out blocks sees what the last of the in blocks gave.
        name, skipped = f"out_blocks_{i}", states[half - i]
        x = affine(np.concatenate([x, skipped], axis=1), params[name]["skip"])
        states.append(x := block(x, params[name], heads))
    patches = affine(layer_norm(x, params["final_norm"]), params["head"])[1:]
    predicted = np.zeros((8, 8))
    for (r, c), pixels in zip(corners, patches, strict=True):
        predicted[r : r + patch, c : c + patch] = pixels.reshape(patch, patch)
    return predicted, states


def noised_by_hand(drawn):
    """What the model is given, by the cosine schedule."""
    images, noise, times = (np.asarray(leaf, np.float64) for leaf in drawn)
    angles = (np.pi / 2 * times)[:, None, None]
    return np.cos(angles) * images + np.sin(angles) * noise


@functools.cache
def by_hand():
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), random_params())
    drawn = batch_of()
    pairs = zip(noised_by_hand(drawn), np.asarray(drawn.times), strict=True)
    return [forward(params, image, time, **MODEL) for image, time in pairs]


def test_the_loss_is_that_of_the_noise_which_a_plain_uvit_predicts():
    predicted = np.array([noise for noise, _ in by_hand()])
    expected = np.mean(np.square(predicted - batch_of().noise))
    np.testing.assert_allclose(task().loss(random_params(), batch_of()), expected, 1e-5)


def test_states_are_the_residual_stream_before_the_first_and_after_every_block():
    states = task().states(random_params(), batch_of())
    assert states.shape == (LAYERS + 1, OPTIONS["batch"], 17, MODEL["width"])
    expected = np.array([states for _, states in by_hand()]).swapaxes(0, 1)
    np.testing.assert_allclose(states, expected, rtol=1e-3, atol=1e-4)


def test_larger_patches_are_read_and_put_back_in_their_places():
    model = UViT(LAYERS, **MODEL, patch=4)
    drawn = batch_of()
    init = jax.eval_shape(model.init, jax.random.key(0), drawn.noise, drawn.times)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape), init)["params"]
    found = jax.jit(model.apply)({"params": params}, drawn.noise, drawn.times)
    for n in range(2):
        image = np.asarray(drawn.noise[n], np.float64)
        wanted, _ = forward(params, image, float(drawn.times[n]), **MODEL, patch=4)
        np.testing.assert_allclose(found[n], wanted, rtol=1e-3, atol=1e-4)


def test_a_loss_is_the_mean_over_the_examples_of_a_batch():
    params, drawn = random_params(), batch_of()
    alone = [
        task().loss(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], drawn))
        for i in range(OPTIONS["batch"])
    ]
    np.testing.assert_allclose(task().loss(params, drawn), np.mean(alone), rtol=1e-5)


def test_seeds_start_apart_and_near_predicting_no_noise():
    one, other = (task().init(jax.random.key(seed)) for seed in (0, 1))
    for path, leaf in paths_of(one).items():
        if path.endswith("kernel"):
            assert not np.array_equal(leaf, paths_of(other)[path])
    expected = np.mean(np.square(batch_of().noise))
    assert task().loss(one, batch_of()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("layers", "named"), [(10, "9 or 11"), (2, "use 3"), (1, "use 3"), (0, "use 3")]
)
def test_a_number_of_layers_that_has_no_middle_is_an_error_that_names_others(
    layers, named
):
    with pytest.raises(ValueError, match=f"odd.*{named}"):
        diffusion.build(layers, **OPTIONS)


# Depth.


def grouped(spec):
    """{(stack, role): layers} of all that a spec couples."""
    found = gs.describe(spec, shapes()).groups
    layers = {(group.stack, group.role): group.layers for group in found}
    assert len(layers) == len(found)
    assert all(group.gaps == () and group.duplicates == () for group in found)
    return layers


def test_depth_is_two_stacks_without_the_middle_block():
    in_blocks = {("in_blocks", role): (0, 1) for role in ROLES}
    out_blocks = {("out_blocks", role): (0, 1) for role in ROLES | SKIPS}
    assert grouped(deep().depth) == in_blocks | out_blocks


@pytest.mark.parametrize(("scope", "middle"), [("joined", 0), ("with mid_block", 1)])
def test_joined_is_one_stack_in_order_of_computation(scope, middle):
    joined = next(deep().scopes[name] for name in deep().scopes if name.endswith(scope))
    number = 2 * HALF + middle
    of_all = {("blocks", role): tuple(range(number)) for role in ROLES}
    skips = {("blocks", role): tuple(range(number))[-HALF:] for role in SKIPS}
    assert grouped(joined) == of_all | skips
    names = [name for name in BLOCKS if middle or name != "mid_block"]
    for layer, name in enumerate(names):
        # Alone in a tree, a block shows its number.
        alone = {name: shapes()[name]}
        groups = gs.describe(joined, alone).groups
        assert {group.layers for group in groups} == {(layer,)}
        assert len(groups) == len(jax.tree.leaves(alone))


def test_parts_are_all_of_depth_but_the_skips_and_share_nothing():
    parts = {name: {*grouped(deep().scopes[name])} for name in parts_of(deep().depth)}
    everything = [group for groups in parts.values() for group in groups]
    assert len(everything) == len({*everything})
    assert {*grouped(deep().depth)} - {*everything} == {("out_blocks", "skip/kernel")}


# What is decayed, and Muon's.


def test_decay_is_of_kernels_and_muon_takes_those_of_the_blocks():
    decayed = paths_of(deep().decayed(shapes()))
    hidden = paths_of(deep().hidden(shapes()))
    assert decayed.keys() == hidden.keys() == paths_of(shapes()).keys()
    assert {path for path in decayed if decayed[path]} == {
        path for path in decayed if path.endswith("/kernel")
    }
    kernels = {role for role in ROLES if role.endswith("kernel")}
    assert {path for path in hidden if hidden[path]} == {
        *(f"{name}/{role}" for name in BLOCKS for role in kernels),
        *(f"out_blocks_{i}/skip/kernel" for i in range(HALF)),
    }


# The sampler.


def test_the_sampler_finds_the_only_image_there_is():
    wanted = np.random.default_rng(0).uniform(-1, 1, (8, 8)).astype("f4")

    def predict(noised, times):
        angles = (jnp.pi / 2 * times)[:, None, None]
        return (noised - jnp.cos(angles) * wanted) / jnp.sin(angles)

    noise = jax.random.normal(jax.random.key(0), (5, 8, 8))
    found = jax.jit(lambda x: diffusion.denoise(predict, x, 3))(noise)
    np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), atol=1e-4)


def test_the_sampler_makes_of_noise_the_gaussian_that_the_images_are():
    """With steps enough it is the flow whose map is known: scaling by the deviation."""
    deviation, mean = 0.1, 0.3

    def predict(noised, times):
        angles = (jnp.pi / 2 * times)[:, None, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        variance = (cos * deviation) ** 2 + sin**2
        return sin * (noised - cos * mean) / variance

    noise = jax.random.normal(jax.random.key(0), (50, 8, 8))
    found = jax.jit(lambda x: diffusion.denoise(predict, x, 500))(noise)
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

    noise = jnp.asarray(x, jnp.float32)
    found = jax.jit(lambda x: diffusion.denoise(predict, x, steps))(noise)
    for k in range(steps, 0, -1):
        time, after = (diffusion.LATEST * at / steps for at in (k, k - 1))
        kept, kept_after = (np.cos(np.pi / 2 * at) ** 2 for at in (time, after))
        predicted = 0.9 * x + 0.01 * time
        image = (x - np.sqrt(1 - kept) * predicted) / np.sqrt(kept)
        image = np.clip(image, -1, 1)
        predicted = (x - np.sqrt(kept) * image) / np.sqrt(1 - kept)
        x = np.sqrt(kept_after) * image + np.sqrt(1 - kept_after) * predicted
    np.testing.assert_allclose(found, x, atol=1e-4)


def test_more_samples_begin_with_the_same_noise():
    few, more = diffusion.starts(2), diffusion.starts(OPTIONS["samples"])
    np.testing.assert_array_equal(few, more[:2])
    assert not np.allclose(more[0], more[1])


# The Fréchet distance and its classifier.


def random_features(seed, number=60, size=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(number, size)) @ rng.normal(size=(size, size)) + seed


def test_the_frechet_distance_is_the_one_with_scipys_root_of_a_matrix():
    one, other = random_features(0), random_features(1)
    (a, b), (c, d) = ((x.mean(0), np.cov(x.T, bias=True)) for x in (one, other))
    expected = np.sum((a - c) ** 2) + np.trace(
        b + d - 2 * scipy.linalg.sqrtm(b @ d).real
    )
    found = [moments(jnp.asarray(x, jnp.float32)) for x in (one, other)]
    assert frechet_distance(*found) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(*found[::-1]) == pytest.approx(expected, rel=1e-4)


def test_the_frechet_distance_of_independent_features_is_that_of_each_alone():
    means, deviations = np.random.default_rng(0).uniform(0.5, 2, (2, 2, 5))
    one, other = (
        Moments(jnp.asarray(mean), jnp.diag(jnp.asarray(deviation) ** 2))
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = sum(np.sum((of[0] - of[1]) ** 2) for of in (means, deviations))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-4)


def test_the_frechet_distance_of_equal_sets_is_zero():
    found = moments(jnp.asarray(random_features(2), jnp.float32))
    scale = float(jnp.trace(found.covariance))
    # A root of what rounding leaves of an eigenvalue: half of the digits.
    assert abs(frechet_distance(found, found)) < np.sqrt(np.finfo("f4").eps) * scale
    # Also where some features never change.
    constant = moments(jnp.ones((10, 4)))
    assert frechet_distance(constant, constant) == pytest.approx(0, abs=1e-6)


def test_the_classifier_knows_digits_that_it_was_not_trained_on():
    _, held_out = split_digits(HELD_OUT)
    _, logits = trained_classifier(HELD_OUT)(jnp.asarray(2 * held_out.images - 1))
    assert np.mean(np.argmax(logits, 1) == held_out.labels) > 0.95


# Evaluation.


def test_the_evaluation_is_of_fixed_noise_on_held_out_images_at_all_times():
    """The model that predicts no noise has the mean square of the noise as its loss."""
    nothing = jax.tree.map(np.zeros_like, random_params())
    names = [metric.name for metric in diffusion.METRICS]
    assert names == ["denoising loss", "Fréchet distance"]
    assert all(metric.lower_is_better for metric in diffusion.METRICS)
    found = task().evaluate(nothing)
    assert [*found] == sorted(names)  # as jit orders them
    number = 2 * HELD_OUT * 64
    error = 5 * np.sqrt(2 / number)
    assert found["denoising loss"] == pytest.approx(1.0, abs=error)


def test_a_distance_is_of_the_samplers_images_to_the_held_out_ones():
    _, held_out = split_digits(HELD_OUT)
    model = UViT(LAYERS, **MODEL)
    predict = diffusion.predictor(model, random_params())
    noise, steps = diffusion.starts(OPTIONS["samples"]), OPTIONS["sampler_steps"]
    images = jax.jit(lambda x: diffusion.denoise(predict, x, steps))(noise)
    both = (
        np.asarray(trained_classifier(HELD_OUT)(jnp.asarray(x))[0], np.float64)
        for x in (images, 2 * held_out.images - 1)
    )
    (a, b), (c, d) = ((x.mean(0), np.cov(x.T, bias=True)) for x in both)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(b @ d).real, 0))
    expected = np.sum((a - c) ** 2) + np.trace(b + d) - 2 * roots.sum()
    found = task().evaluate(random_params())["Fréchet distance"]
    assert found == pytest.approx(expected, rel=1e-3)


def test_parameters_that_are_not_finite_have_metrics_that_are_not():
    for bad in (np.nan, np.inf):
        params = random_params()
        params["head"]["bias"][0] = bad
        assert not any(np.isfinite(x) for x in task().evaluate(params).values())
