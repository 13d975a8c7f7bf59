"""The tasks of the evidence are what they say: data, model, states, parts, start."""

import itertools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

import models_in_numpy
from small_tasks import (
    CLIP,
    HEADS,
    HELD_OUT_TEXT,
    KL,
    LAYERS,
    OPTIONS,
    PATCH,
    TEXT,
    WIDTH,
    by_path,
    random_like,
    seen,
)

import gradsmooth_optax as gs
from benchmarks.data.digits import split_digits
from benchmarks.evidence.tasks import TASKS


def rows(names):
    """Two of the tasks train something before they begin."""
    slow = pytest.mark.slow
    marks = {"diffusion": slow, "rl": slow}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


of_every_task = pytest.mark.parametrize("name", rows(TASKS))

# Loss, gradient and states, next to plain NumPy: (states, losses) of a batch.


def nats(logits, wanted):
    logits = np.asarray(logits)
    picked = np.take_along_axis(logits, np.asarray(wanted)[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - picked


def lm(params, batch):
    found = [models_in_numpy.gpt(params, row[:-1], HEADS) for row in batch]
    states, logits = zip(*found, strict=True)
    return states, nats(logits, batch[:, 1:])


def reverse(params, batch):
    found = [models_in_numpy.encoder(params, row, HEADS) for row in batch]
    states, logits = zip(*found, strict=True)
    return states, nats(logits, [list(row)[::-1] for row in batch])


def vit(params, batch):
    found = [models_in_numpy.vit(params, x, HEADS, PATCH) for x in batch.images]
    states, logits = zip(*found, strict=True)
    return states, nats(logits, batch.labels)


def diffusion(params, batch):
    states, losses = [], []
    for image, noise, time in zip(*batch, strict=True):
        angle = np.pi / 2 * np.float64(time)
        noised = np.cos(angle) * image + np.sin(angle) * noise
        of_image, said = models_in_numpy.uvit(params, noised, np.float64(time), HEADS)
        states.append(of_image)
        losses.append(np.square(said - noise))
    return states, losses


def rl(params, batch):
    """GRPO, a token at a time: the clipped surrogate and the penalty."""
    states, losses = [], []
    for n, prompt in enumerate(batch.prompts):
        states.append([])
        for g, answer in enumerate(batch.answers[n]):
            tokens = np.array([*prompt, answer[0]])
            of_answer, logits = models_in_numpy.gpt(params, tokens, HEADS)
            states[-1].append(of_answer)
            for t, nat in enumerate(nats(logits[-2:], answer)):
                ratio = np.exp(-nat - batch.sampled[n, g, t])
                within = min(max(ratio, 1 - CLIP), 1 + CLIP)
                advantage = batch.advantages[n, g]
                apart = batch.reference[n, g, t] + nat
                penalty = np.exp(apart) - apart - 1
                gain = min(ratio * advantage, within * advantage)
                losses.append(KL * penalty - gain)
    return states, losses


BY_HAND = {"lm": lm, "lm, remat": lm, "reverse": reverse, "vit": vit}
BY_HAND |= {"diffusion": diffusion, "rl": rl}


@pytest.mark.parametrize("name", rows(BY_HAND))
def test_loss_gradient_and_states_are_those_of_the_model_in_plain_numpy(name):
    _, params, _, batch, look = seen(name)
    if name == "rl":  # as if a policy not far from this one had sampled the answers
        by = 0.4 * np.random.default_rng(0).normal(size=batch.sampled.shape)
        batch = batch._replace(sampled=np.float32(batch.sampled + by))
    loss, gradient, states, _ = look(params, batch)
    wide = jax.tree.map(np.float64, params)
    of_examples, losses = BY_HAND[name](wide, batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    expected = np.moveaxis(np.array(of_examples), -3, 0)
    assert len(expected) == LAYERS + 1
    np.testing.assert_allclose(states, expected, rtol=1e-3, atol=1e-4)
    direction = random_like(params, seed=1, scale=1.0)

    def moved(by):
        there = jax.tree.map(lambda x, d: x + by * d.astype(float), wide, direction)
        return np.mean(BY_HAND[name](there, batch)[1])

    slope = jax.tree.reduce(np.add, jax.tree.map(np.vdot, gradient, direction))
    assert slope == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-3)


def test_a_gpt_sees_no_later_token():
    _, params, _, batch, look = seen("lm")
    changed = batch.copy()
    changed[:, 4] += 1
    states, others = (np.asarray(look(params, of)[2]) for of in (batch, changed))
    np.testing.assert_array_equal(states[:, :, :4], others[:, :, :4])
    assert not np.array_equal(states[1:, :, 5:], others[1:, :, 5:])


# Data.


@of_every_task
def test_a_batch_depends_on_the_key_and_the_step(name):
    for leaf in jax.tree.leaves(seen(name).drawn):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        first, of_step, of_key = np.asarray(leaf)
        assert len(first) == OPTIONS[name]["batch"]
        assert not np.array_equal(first, of_step)
        assert not np.array_equal(first, of_key)


@pytest.mark.parametrize("name", rows(["vit", "diffusion"]))
def test_no_held_out_image_is_trained_on(name):
    train, *others = split_digits(*[OPTIONS[name]["eval_images"]] * 2)
    data = seen(name).task.data
    images = np.asarray(data.images if name == "vit" else (data + 1) / 2)
    np.testing.assert_array_equal(images, train.images)
    trained_on = {image.tobytes() for image in images}
    for held_out in others:
        assert not any(image.tobytes() in trained_on for image in held_out.images)


@of_every_task
def test_rates_are_chosen_by_the_first_metric_on_other_data_than_what_judges(name):
    task, params, _, batch, look = seen(name)
    judged = float(look(params, batch)[3][TASKS[name].METRICS[0].name])
    tuned = float(jax.jit(task.tuned_by)(params))
    assert tuned != judged
    assert tuned == pytest.approx(judged, rel=1.0)


def test_half_of_the_images_of_the_vit_are_shifted_by_a_pixel_and_labels_are_kept():
    task, size = seen("vit").task, OPTIONS["vit"]["batch"]
    shifts = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
    known = {}
    for image, label in zip(*map(np.asarray, task.data), strict=True):
        framed = np.pad(image, 1)
        for i, j in shifts:
            moved = framed[1 + i : 9 + i, 1 + j : 9 + j]
            known.setdefault((moved.tobytes(), int(label)), (i, j))
    draw = jax.jit(jax.vmap(task.draw, in_axes=(None, None, 0)))
    drawn = jax.device_get(draw(task.data, jax.random.key(2), jnp.arange(40)))
    of_all = zip(drawn.images.reshape(-1, 8, 8), drawn.labels.ravel(), strict=True)
    found = [known[image.tobytes(), int(label)] for image, label in of_all]
    for shift in shifts:
        share = 1 / 2 if shift == (0, 0) else 1 / 8
        error = np.sqrt(share * (1 - share) / (40 * size))
        assert found.count(shift) / len(found) == pytest.approx(share, abs=5 * error)


def test_language_models_train_on_other_text_than_they_are_evaluated_on():
    task, params, _, batch, look = seen("lm")
    assert {*map(chr, np.unique(task.data))} == {*TEXT}
    assert {*map(chr, np.unique(batch))} <= {*TEXT}
    # Of either half three windows at even distances, from its start to its end.
    for places, found in (
        ((0, 20, 41), task.tuned_by(params)),
        ((50, 70, 91), look(params, batch)[3]["validation loss"]),
    ):
        windows = [[*HELD_OUT_TEXT.encode()[at : at + 9]] for at in places]
        _, losses = lm(jax.tree.map(np.float64, params), np.array(windows))
        assert found == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_evaluation_of_the_vit_is_of_all_held_out_images():
    _, params, _, batch, look = seen("vit")
    held_out = split_digits(*[OPTIONS["vit"]["eval_images"]] * 2)[1]
    wide = jax.tree.map(np.float64, params)
    logits = [models_in_numpy.vit(wide, x, HEADS, PATCH)[1] for x in held_out.images]
    found = look(params, batch)[3]
    nll = nats(logits, held_out.labels).mean()
    assert found["test NLL"] == pytest.approx(nll, rel=1e-4)
    accuracy = np.mean(np.argmax(logits, 1) == held_out.labels)
    assert found["test accuracy"] == pytest.approx(accuracy)
    assert 0 < accuracy < 1


@of_every_task
def test_metrics_are_those_that_a_task_names_and_losses_are_in_nats(name):
    _, params, _, batch, look = seen(name)
    metrics = TASKS[name].METRICS
    assert {*look(params, batch)[3]} == {metric.name for metric in metrics}
    for metric in metrics:
        of_more = ("pass@1", "mean reward", "test accuracy")
        assert metric.lower_is_better == (metric.name not in of_more)
    assert (metrics[0].unit.startswith("nats/")) == (name in ("lm", "reverse", "vit"))


# What is coupled, decayed, and Muon's: regular expressions of paths.


class Structure(NamedTuple):
    paths: str  # of a layer's leaf, as `describe` names it
    blocks: str  # what `depth` couples
    parts: dict[str, str]  # what the other scopes couple
    of_no_part: str
    decayed: str
    hidden: str


OF_GPT = Structure(
    "{stack}/{role}",
    "^blocks/",
    {
        "attention": r"/attention/(query|key|value|out)/kernel",
        "mlp": r"/mlp_(in|out)/kernel",
        "norms": r"/(attention|mlp)_norm/scale",
    },
    "^$",
    "kernel|embedding",
    "kernel",
)
PARTS = {
    "attention": r"blocks.*/attention/(qkv|out)/kernel",
    "mlp": r"blocks.*/mlp_(in|out)/kernel",
    "norms": r"blocks.*/(attention|mlp)_norm/(scale|bias)",
    "biases": r"blocks.*/(qkv|out|mlp_in|mlp_out|skip)/bias",
}
STRUCTURES = {
    "lm": OF_GPT,
    "reverse": OF_GPT._replace(
        parts={}, of_no_part="", decayed="", hidden="s/.*kernel"
    ),
    "vit": Structure(
        "{stack}/{layer}/{role}", "^blocks/", PARTS, "^$", "kernel", "^blocks/.*kernel"
    ),
    "diffusion": Structure(
        "{stack}_{layer}/{role}",
        "^(in|out)_blocks_",
        PARTS,
        "skip/kernel",
        "kernel",
        "_block.*/kernel",
    ),
    "rl": OF_GPT,
}


@of_every_task
def test_depth_its_parts_decay_and_muon_take_the_leaves_they_should(name):
    task, params, *_ = seen(name)
    structure = STRUCTURES[name]

    def coupled(depth):
        return sorted(
            {
                structure.paths.format(stack=group.stack, role=group.role, layer=layer)
                for group in gs.describe(depth, params).groups
                for layer in group.layers
            }
        )

    def matching(pattern):
        return sorted(path for path in by_path(params) if re.search(pattern, path))

    def chosen(tree):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        return sorted(path for path, is_chosen in by_path(tree).items() if is_chosen)

    blocks = matching(structure.blocks)
    assert coupled(task.depth) == blocks
    parts = {part: coupled(task.scopes[part]) for part in structure.parts}
    for part, pattern in structure.parts.items():
        assert parts[part] == [path for path in matching(pattern) if path in blocks]
    everything = [*itertools.chain(*parts.values())]
    left = {*matching(structure.of_no_part)} & {*blocks}
    assert sorted([*everything, *left]) == blocks
    assert chosen(task.decayed(params)) == matching(structure.decayed)
    assert chosen(task.hidden(params)) == matching(structure.hidden)
    if structure.paths == OF_GPT.paths:
        assert {len(leaf) for leaf in jax.tree.leaves(params["blocks"])} == {LAYERS}


# Where training starts: {leaf: a constant, or a distribution and its size}.

DEEP = (2 * LAYERS) ** -0.5  # of the last map of each half of a block
NORMS = {r".*norm/scale": 1.0}
INITIAL = {
    "lm": {
        r"embed/.*": ("normal", 0.02),
        r".*(query|key|value|mlp_in)/kernel": ("normal", WIDTH**-0.5),
        r".*attention/out/kernel": ("normal", WIDTH**-0.5 * DEEP),
        r".*mlp_out/kernel": ("normal", (4 * WIDTH) ** -0.5 * DEEP),
        **NORMS,
    },
    # What PyTorch's documentation says of Linear, and MultiheadAttention's source.
    "reverse": {
        r"in/embedding": ("normal", 1.0),
        r"positions": ("normal", 0.02),
        r".*qkv/kernel": ("uniform", math.sqrt(6 / (WIDTH + 3 * WIDTH))),  # xavier
        r".*(qkv|/out|norm)/bias": 0.0,
        r"(.*/out|.*mlp_in|head)/(kernel|bias)": ("uniform", WIDTH**-0.5),
        r".*mlp_out/.*": ("uniform", (2 * WIDTH) ** -0.5),
        **NORMS,
    },
    "vit": {
        r"embed/kernel": ("normal", math.prod(PATCH) ** -0.5),
        r"positions": ("normal", 1.0),
        r".*(qkv|mlp_in)/kernel": ("normal", WIDTH**-0.5),
        r".*attention/out/kernel": ("normal", WIDTH**-0.5 * DEEP),
        r".*mlp_out/kernel": ("normal", (2 * WIDTH) ** -0.5 * DEEP),
        r"(.*/bias|head/kernel)": 0.0,
        **NORMS,
    },
}
# That of guessing, for the tasks that start there.
START_LOSS = {"lm": math.log(256), "vit": math.log(10)}


def assert_is_drawn(values, kind, size):
    values = np.asarray(values, np.float64)
    variance = size**2 / 3 if kind == "uniform" else size**2
    # Five standard errors, of the mean and of the variance.
    error = 5 / math.sqrt(values.size)
    assert abs(values.mean()) < error * variance**0.5
    assert values.var() == pytest.approx(variance, rel=1.5 * error)
    if kind == "uniform":
        assert size * (1 - 10 / values.size) < np.abs(values).max() <= size * (1 + 1e-6)
    elif values.size > 200:
        assert np.abs(values).max() > 1.9 * size


@pytest.mark.parametrize("name", INITIAL)
def test_every_parameter_starts_as_it_should_and_apart_from_other_seeds(name):
    task, _, _, batch, look = seen(name)
    init = jax.jit(jax.vmap(task.init))
    both = jax.device_get(init(jax.random.split(jax.random.key(3))))
    unmatched = {*INITIAL[name]}
    for path, leaf in by_path(both).items():
        row = next(row for row in INITIAL[name] if re.fullmatch(row, path))
        unmatched -= {row}
        wanted = INITIAL[name][row]
        if isinstance(wanted, float):
            assert np.all(leaf == wanted), path
        else:
            assert_is_drawn(leaf, *wanted)
            # Of every seed, and of every layer where they are stacked.
            alone = leaf.reshape(-1, *leaf.shape[2:]) if leaf.ndim == 4 else leaf
            for one, other in itertools.combinations(alone, 2):
                assert np.mean(one == other) < 0.01, path
    assert unmatched == set()
    first = jax.tree.map(lambda leaf: leaf[0], both)
    if name in START_LOSS:
        assert look(first, batch)[0] == pytest.approx(START_LOSS[name], rel=0.15)
