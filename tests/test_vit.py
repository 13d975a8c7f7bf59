"""The vision task is what it says: data, augmentation, model, states, parts."""

import collections
import itertools

import jax
import numpy as np
import pytest
from plain_layers import affine, block, layer_norm

pytest.importorskip("flax")
pytest.importorskip("sklearn")

import gradsmooth_optax as gs
from benchmarks.data.digits import split_digits
from benchmarks.evidence.tasks import vit

LAYERS, WIDTH, HEADS, PATCH, BATCH, HELD_OUT = 3, 8, 2, (2, 4), 64, 100
KERNELS = ["attention/out", "attention/qkv", "mlp_in", "mlp_out"]
NORMS = ["attention_norm", "mlp_norm"]


@pytest.fixture(scope="module")
def task():
    options = {"width": WIDTH, "heads": HEADS, "patch": PATCH, "batch": BATCH}
    task = vit.build(LAYERS, **options, eval_images=HELD_OUT)
    names = ("loss", "evaluate", "states", "draw")
    return task._replace(**{name: jax.jit(getattr(task, name)) for name in names})


@pytest.fixture(scope="module")
def started(task):
    """What two seeds start with."""
    keys = jax.random.split(jax.random.key(0))
    return jax.device_get(jax.jit(jax.vmap(task.init))(keys))


@pytest.fixture(scope="module")
def params(task):
    """Values for every parameter, so that nothing is hidden by a 0 or a 1."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(task.init, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def batch(task):
    return jax.device_get(task.draw(task.data, jax.random.key(1), 7))


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# The model in NumPy, one image at a time.


def states_and_logits(params, image):
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    rows, columns = PATCH
    corners = itertools.product(range(0, 8, rows), range(0, 8, columns))
    patches = [image[i : i + rows, j : j + columns].ravel() for i, j in corners]
    pixels = (np.stack(patches).astype(np.float64) - 0.305) / 0.376
    x = affine(pixels, params["embed"]) + params["positions"]
    states = [x]
    for layer in range(LAYERS):
        states.append(x := block(x, params["blocks"][layer], HEADS))
    pooled = layer_norm(x.mean(0), params["final_norm"])
    return np.stack(states), affine(pooled, params["head"])


def metrics(params, images, labels):
    logits = np.stack([states_and_logits(params, image)[1] for image in images])
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return losses.mean(), np.mean(logits.argmax(1) == labels)


def test_the_loss_is_the_cross_entropy_of_a_pre_norm_transformer(task, params, batch):
    expected, _ = metrics(params, *batch)
    assert float(task.loss(params, batch)) == pytest.approx(expected, rel=1e-5)


def test_states_are_the_residual_stream_around_every_block(task, params, batch):
    found = task.states(params, batch)
    assert found.shape == (LAYERS + 1, BATCH, 8, WIDTH)
    expected = [states_and_logits(params, image)[0] for image in batch.images]
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-4, atol=1e-5)


def test_the_evaluation_is_of_all_held_out_images(task, params):
    _, test = split_digits(HELD_OUT)
    found = task.evaluate(params)
    assert [*found] == [metric.name for metric in vit.METRICS]
    expected_nll, expected_accuracy = metrics(params, *test)
    assert float(found["test NLL"]) == pytest.approx(expected_nll, rel=1e-5)
    assert float(found["test accuracy"]) == pytest.approx(expected_accuracy)
    assert 0 < expected_accuracy < 1


def test_arms_are_judged_by_a_loss_in_nats_and_shown_with_their_accuracy():
    nll, accuracy = vit.METRICS
    assert nll.lower_is_better
    assert nll.unit.startswith("nats/")
    assert not accuracy.lower_is_better


# Data.


def shifts(image):
    """All images that are this one moved by at most a pixel, {(down, right): image}."""
    found = {}
    for down, right in itertools.product((-1, 0, 1), repeat=2):
        moved = np.zeros_like(image)
        for i, j in itertools.product(range(8), repeat=2):
            if 0 <= i + down < 8 and 0 <= j + right < 8:
                moved[i + down, j + right] = image[i, j]
        found[down, right] = moved
    return found


def test_half_of_the_images_are_shifted_by_a_pixel_and_labels_are_kept(task):
    known = {}
    for image, label in zip(*map(np.asarray, task.data), strict=True):
        for shift, moved in shifts(image).items():
            known.setdefault(moved.tobytes(), []).append((shift, int(label)))
    seen = collections.Counter()
    for step in range(20):
        drawn = jax.device_get(task.draw(task.data, jax.random.key(2), step))
        for image, label in zip(*drawn, strict=True):
            possible = [
                shift for shift, of in known[image.tobytes()] if of == int(label)
            ]
            seen[possible[0]] += 1
    number = 20 * BATCH
    directions = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    assert {*seen} == {(0, 0), *directions}
    # Five standard errors.
    assert abs(seen[0, 0] / number - 1 / 2) < 5 * np.sqrt(1 / 4 / number)
    for shift in directions:
        assert abs(seen[shift] / number - 1 / 8) < 5 * np.sqrt(7 / 64 / number)


def test_a_batch_depends_on_the_key_and_the_step_alone(task, batch):
    def images(key, step):
        return task.draw(task.data, jax.random.key(key), step).images

    np.testing.assert_array_equal(images(1, 7), batch.images)
    assert not np.array_equal(images(1, 8), batch.images)
    assert not np.array_equal(images(2, 7), batch.images)
    assert batch.images.shape == (BATCH, 8, 8)
    assert batch.labels.shape == (BATCH,)


def test_no_held_out_image_is_trained_on(task):
    _, test = split_digits(HELD_OUT)
    train = np.asarray(task.data.images)
    assert len(train) + HELD_OUT == 1797
    trained_on = {
        moved.tobytes() for image in train for moved in shifts(image).values()
    }
    assert len(test.images) == HELD_OUT
    assert not any(image.tobytes() in trained_on for image in test.images)


# Parameters.


def test_seeds_start_apart_and_with_equal_odds_for_all_classes(task, started, batch):
    first, second = (jax.tree.map(lambda leaf, k=k: leaf[k], started) for k in (0, 1))
    for path, leaf in by_path(first).items():
        drawn = path.endswith(("kernel", "positions")) and path != "head/kernel"
        assert drawn == (np.ptp(leaf) > 0), path
        assert drawn != np.array_equal(leaf, by_path(second)[path]), path
    assert float(task.loss(first, batch)) == pytest.approx(np.log(10), rel=1e-6)


def test_every_linear_map_starts_by_its_inputs_and_a_blocks_outputs_by_depth(started):
    of_role = {"positions": (started["positions"], 1.0)}
    of_role["embed"] = started["embed"]["kernel"], 1 / (PATCH[0] * PATCH[1])
    blocks = [by_path(of) for of in started["blocks"].values()]
    for linear in KERNELS:
        kernels = np.stack([of[f"{linear}/kernel"] for of in blocks])
        outputs = 2 * LAYERS if linear in ("attention/out", "mlp_out") else 1
        of_role[linear] = kernels, 1 / (kernels.shape[-2] * outputs)
    for role, (values, variance) in of_role.items():
        # Five standard errors.
        close = pytest.approx(variance, rel=5 * np.sqrt(2 / values.size))
        assert np.square(values).mean() == close, role


def grouped(depth, params):
    """{role: its layers} of what a depth spec couples."""
    groups = gs.describe(depth, params).groups
    found = {str(group.role): [*group.layers] for group in groups}
    assert len(found) == len(groups)
    return found


def test_depth_holds_every_parameter_of_the_blocks_in_all_layers(task, params):
    roles = [*by_path(params["blocks"][0])]
    assert len(roles) == 12
    assert grouped(task.depth, params) == {role: [*range(LAYERS)] for role in roles}
    paths = by_path(params)
    assert len([path for path in paths if path.startswith("blocks/")]) == 12 * LAYERS


def test_parts_are_disjoint_and_cover_the_blocks(task, params):
    parts = {name: grouped(spec, params) for name, spec in task.scopes.items()}
    assert {name: sorted(part) for name, part in parts.items()} == {
        "attention": ["attention/out/kernel", "attention/qkv/kernel"],
        "mlp": ["mlp_in/kernel", "mlp_out/kernel"],
        "norms": [f"{norm}/{of}" for norm in NORMS for of in ("bias", "scale")],
        "biases": [f"{linear}/bias" for linear in KERNELS],
    }
    roles = itertools.chain(*parts.values())
    assert sorted(roles) == sorted(grouped(task.depth, params))
    for part in parts.values():
        assert all(layers == [*range(LAYERS)] for layers in part.values())


def test_matrices_are_decayed_and_those_of_the_blocks_are_hidden(task, params):
    hidden = {
        f"blocks/{layer}/{linear}/kernel"
        for layer in range(LAYERS)
        for linear in KERNELS
    }
    leaves = by_path(params)
    for tree, expected in (
        (task.hidden(params), hidden),
        (task.decayed(params), hidden | {"embed/kernel", "head/kernel"}),
    ):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert {path for path, value in by_path(tree).items() if value} == expected
        assert all(leaves[path].ndim == 2 for path in expected)
