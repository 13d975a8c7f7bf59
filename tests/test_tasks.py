"""The tasks lm and reverse are what they say: data, model, initialization, states."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import plain_layers
import pytest
from plain_layers import affine

pytest.importorskip("flax")

import gradsmooth_optax as gs
from benchmarks.evidence.task import parts_of
from benchmarks.evidence.tasks import TASKS, lm, reverse
from benchmarks.models.gpt import GPT
from benchmarks.training import data_key

LM = {"width": 8, "heads": 2, "context": 8, "batch": 4, "eval_windows": 3}
REVERSE = {
    **{"width": 8, "heads": 2, "length": 4, "vocabulary": 5},
    **{"batch": 6, "eval_sequences": 6},
}
LAYERS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text whose held-out last tenth has bytes that the rest has not."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("abcde fghij " * 75 + "UVWXYZ0123" * 10)
    return [str(path)]


@pytest.fixture(scope="module")
def tasks(corpus):
    return {
        "lm": compiled(lm.build(LAYERS, **LM, corpus=corpus)),
        "reverse": compiled(reverse.build(LAYERS, **REVERSE)),
    }


def compiled(task):
    functions = {name: getattr(task, name) for name in ("loss", "evaluate", "states")}
    return task._replace(**{name: jax.jit(f) for name, f in functions.items()})


def logits_of(model, params, inputs):
    return jax.jit(model.apply)({"params": params}, inputs)


def random_params(task, seed=0, scale=0.3):
    """Values for every parameter, so that nothing is hidden by a 0 or a 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(task.init, jax.random.key(0)),
    )


def cross_entropy(logits, wanted):
    logits = np.asarray(logits, np.float64)
    picked = np.take_along_axis(logits, np.asarray(wanted)[..., None], -1)[..., 0]
    return np.mean(np.log(np.exp(logits).sum(-1)) - picked)


# Both.


@pytest.mark.parametrize("name", ["lm", "reverse"])
def test_a_batch_depends_on_the_key_and_the_step_alone(tasks, name):
    task = tasks[name]
    draw = jax.jit(functools.partial(task.draw, task.data))
    first = draw(jax.random.key(1), 7)
    assert not np.array_equal(first, draw(jax.random.key(1), 8))
    assert not np.array_equal(first, draw(jax.random.key(2), 7))
    np.testing.assert_array_equal(first, draw(jax.random.key(1), 7))


@pytest.mark.parametrize("name", ["lm", "reverse"])
def test_a_loss_is_the_mean_over_the_examples_of_a_batch(tasks, name):
    task, params = tasks[name], random_params(tasks[name])
    batch = task.draw(task.data, jax.random.key(0), 0)
    alone = [task.loss(params, batch[i : i + 1]) for i in range(len(batch))]
    np.testing.assert_allclose(task.loss(params, batch), np.mean(alone), rtol=1e-5)


@pytest.mark.parametrize("name", ["lm", "reverse"])
def test_the_metric_is_a_loss_in_nats_of_which_less_is_better(tasks, name):
    (metric,) = TASKS[name].METRICS
    assert metric.lower_is_better
    assert metric.unit.startswith("nats/")
    assert [*tasks[name].evaluate(random_params(tasks[name]))] == [metric.name]


def test_parts_of_a_gpts_blocks_are_disjoint_and_cover_them(tasks):
    task = tasks["lm"]
    params = jax.eval_shape(task.init, jax.random.key(0))
    roles = {
        part: {group.role for group in gs.describe(scope, params).groups}
        for part, scope in task.scopes.items()
    }
    assert roles == {
        "attention": {
            f"attention/{n}/kernel" for n in ("query", "key", "value", "out")
        },
        "mlp": {"mlp_in/kernel", "mlp_out/kernel"},
        "norms": {"attention_norm/scale", "mlp_norm/scale"},
    }
    assert {role for part in roles.values() for role in part} == {
        group.role for group in gs.describe(task.depth, params).groups
    }


def test_parts_are_told_apart_by_the_names_in_a_path_however_deep():
    of_part = {
        "attention": ["attention/qkv/kernel", "cell/attention/heads/out/kernel"],
        "mlp": ["mlp_in/kernel", "cell/mlp_out/kernel"],
        "norms": ["mlp_norm/bias", "attention/q_norm/scale", "cell/norm/bias"],
        "biases": ["mlp_in/bias", "attention/qkv/bias", "cell/normal/bias"],
        # None of them, whatever they sound like.
        None: ["skip/kernel", "attention_norm/kernel", "mlp_in/kernel_scale"],
    }
    params = {}
    for path in itertools.chain(*of_part.values()):
        *modules, leaf = f"blocks/{path}".split("/")
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = np.zeros((LAYERS, 2, 2))
    params["attention"] = {"out": {"kernel": np.zeros((2, 2))}}  # of no block
    found = {
        part: sorted(str(group.role) for group in gs.describe(spec, params).groups)
        for part, spec in parts_of(gs.scanned("blocks/")).items()
    }
    del of_part[None]
    assert found == {part: sorted(paths) for part, paths in of_part.items()}


@pytest.mark.parametrize("name", ["lm", "reverse"])
def test_depth_holds_every_parameter_of_the_blocks_and_no_other(tasks, name):
    task = tasks[name]
    params = jax.eval_shape(task.init, jax.random.key(0))
    grouped = {group.role for group in gs.describe(task.depth, params).groups}
    assert len(grouped) == len(jax.tree.leaves(params["blocks"]))
    for leaf in jax.tree.leaves(params["blocks"]):
        assert leaf.shape[0] == LAYERS


# Language modeling.


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * scale


def test_states_of_the_gpt_are_what_its_first_blocks_alone_give(tasks):
    """The model cut off after k blocks has the k-th state before its head."""
    task, params = tasks["lm"], random_params(tasks["lm"])
    tokens = task.draw(task.data, jax.random.key(0), 0)
    states = np.asarray(task.states(params, tokens))
    assert states.shape == (LAYERS + 1, LM["batch"], LM["context"], LM["width"])
    table = np.asarray(params["embed"]["embedding"])
    np.testing.assert_allclose(states[0], table[tokens[:, :-1]] / 0.02, rtol=1e-6)
    for layers in (1, LAYERS):
        model = GPT(256, layers, LM["width"], LM["heads"], LM["context"])
        blocks = jax.tree.map(lambda x, k=layers: x[:k], params["blocks"])
        logits = logits_of(model, {**params, "blocks": blocks}, tokens[:, :-1])
        last = rms_norm(states[layers], params["final_norm"]["scale"])
        np.testing.assert_allclose(last @ table.T, logits, rtol=1e-3, atol=1e-4)


def test_recomputing_activations_changes_no_state(tasks, corpus):
    task, again = tasks["lm"], lm.build(LAYERS, **LM, corpus=corpus, remat=True)
    params = random_params(task)
    tokens = task.draw(task.data, jax.random.key(0), 0)
    recomputed = jax.jit(again.states)(params, tokens)
    np.testing.assert_allclose(recomputed, task.states(params, tokens), rtol=1e-5)


def test_language_models_train_on_other_text_than_they_are_evaluated_on(tasks):
    task, params = tasks["lm"], random_params(tasks["lm"])
    held_out = b"UVWXYZ0123" * 10
    drawn = task.draw(task.data, jax.random.key(0), 0)
    assert {*np.unique(drawn)}.isdisjoint(held_out)
    # Three windows at even distances, the first at the start and the last at the end.
    windows = np.array([list(held_out[at : at + 9]) for at in (0, 45, 91)])
    np.testing.assert_allclose(
        task.evaluate(params)["validation loss"],
        task.loss(params, jnp.asarray(windows)),
        rtol=1e-5,
    )


def test_language_models_decay_matrices_only(tasks):
    params = jax.eval_shape(tasks["lm"].init, jax.random.key(0))
    decayed = tasks["lm"].decayed(params)
    for path, is_decayed in jax.tree_util.tree_leaves_with_path(decayed):
        assert is_decayed == ("norm" not in jax.tree_util.keystr(path)), path


# Reversing.


def test_the_target_is_the_sequence_read_backwards(tasks):
    task, params = tasks["reverse"], random_params(tasks["reverse"])
    symbols = task.draw(None, jax.random.key(0), 0)
    model = reverse.Encoder(5, LAYERS, 8, heads=2, length=4)
    logits = logits_of(model, params, symbols)
    mirrored = np.array([[*row][::-1] for row in np.asarray(symbols)])
    loss = task.loss(params, symbols)
    np.testing.assert_allclose(loss, cross_entropy(logits, mirrored), rtol=1e-5)
    assert abs(loss - cross_entropy(logits, symbols)) > 0.01


def test_whoever_says_the_mirrored_symbols_has_no_loss(tasks):
    """Parameters by hand: the answer 0 1 3 2, whatever the input is."""
    task = tasks["reverse"]
    zeros = jax.tree.map(np.zeros_like, random_params(task))
    places = 10 * np.eye(
        4, 8, dtype="f4"
    )  # position i is axis i of the residual stream
    head = np.zeros((8, 5), "f4")
    head[range(4), [0, 1, 3, 2]] = 50.0
    params = {
        **zeros,
        "positions": places,
        "final_norm": {**zeros["final_norm"], "scale": np.ones(8, "f4")},
        "head": {**zeros["head"], "kernel": head},
    }
    assert task.loss(params, jnp.array([[2, 3, 1, 0]])) < 1e-6
    assert task.loss(params, jnp.array([[0, 1, 3, 2]])) > 10


# As PyTorch's.
torch_norm = functools.partial(plain_layers.layer_norm, epsilon=1e-5)


def torch_layer(x, params, heads):
    """TransformerEncoderLayer(norm_first=True) of one sequence."""
    mixed = plain_layers.attention(
        torch_norm(x, params["attention_norm"]), params, heads
    )
    x = x + mixed
    hidden = affine(torch_norm(x, params["mlp_norm"]), params["mlp_in"])
    return x + affine(np.maximum(hidden, 0.0), params["mlp_out"])


def test_the_encoder_is_that_of_pytorch_with_its_states(tasks):
    task, params = tasks["reverse"], random_params(tasks["reverse"])
    symbols = np.asarray(task.draw(None, jax.random.key(0), 0))
    states = np.asarray(task.states(params, symbols))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    x = wide["in"]["embedding"][symbols] + wide["positions"]
    expected = [x]
    for layer in range(LAYERS):
        block = jax.tree.map(lambda leaf, k=layer: leaf[k], wide["blocks"])
        x = np.stack([torch_layer(sequence, block, heads=2) for sequence in x])
        expected.append(x)
    np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5)
    logits = affine(torch_norm(x, wide["final_norm"]), wide["head"])
    found = task.loss(params, symbols)
    assert found == pytest.approx(cross_entropy(logits, symbols[:, ::-1]), rel=1e-5)


@functools.cache
def initialized():
    """Parameters of a model large enough to tell distributions apart."""
    options = REVERSE | {"width": 64, "heads": 4, "length": 12, "vocabulary": 32}
    task = reverse.build(4, **options)
    return jax.device_get(jax.jit(task.init)(jax.random.key(3)))


WIDTH = 64
# What PyTorch's documentation says of Linear, and of MultiheadAttention's source:
# {path: largest value of a uniform distribution around 0}.
UNIFORM = {
    "blocks/qkv/kernel": math.sqrt(6 / (WIDTH + 3 * WIDTH)),  # xavier_uniform_
    "blocks/out/kernel": WIDTH**-0.5,
    "blocks/mlp_in/kernel": WIDTH**-0.5,
    "blocks/mlp_in/bias": WIDTH**-0.5,
    "blocks/mlp_out/kernel": (2 * WIDTH) ** -0.5,
    "blocks/mlp_out/bias": (2 * WIDTH) ** -0.5,
    "head/kernel": WIDTH**-0.5,
    "head/bias": WIDTH**-0.5,
}
CONSTANT = {
    **{"blocks/qkv/bias": 0.0, "blocks/out/bias": 0.0},
    **{"blocks/attention_norm/scale": 1.0, "blocks/attention_norm/bias": 0.0},
    **{"blocks/mlp_norm/scale": 1.0, "blocks/mlp_norm/bias": 0.0},
    **{"final_norm/scale": 1.0, "final_norm/bias": 0.0},
}
NORMAL = {"in/embedding": 1.0, "positions": 0.02}


def at(tree, path):
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def test_the_encoder_has_no_other_parameters_than_those_of_pytorch():
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(initialized())
    }
    assert paths == {*UNIFORM, *CONSTANT, *NORMAL}
    assert at(initialized(), "blocks/qkv/kernel").shape == (4, WIDTH, 3 * WIDTH)
    assert at(initialized(), "blocks/mlp_in/kernel").shape == (4, WIDTH, 2 * WIDTH)


@pytest.mark.parametrize("path", UNIFORM)
def test_linear_layers_start_uniform_within_pytorchs_bound(path):
    values, bound = at(initialized(), path), UNIFORM[path]
    # Of every layer: a stack initialized as one would have another fan-in.
    for layer in values if path.startswith("blocks") else [values]:
        # Five standard errors, of the mean and of the variance of a uniform.
        sigma, error = bound / math.sqrt(3), 5 / math.sqrt(layer.size)
        assert np.abs(layer).max() <= bound * (1 + 1e-6)
        assert np.abs(layer).max() > bound * (1 - 10 / layer.size)
        assert abs(layer.mean()) < error * sigma
        assert layer.var() == pytest.approx(sigma**2, rel=0.9 * error)


@pytest.mark.parametrize("path", CONSTANT)
def test_attention_biases_and_norms_start_at_pytorchs_constants(path):
    assert np.all(at(initialized(), path) == CONSTANT[path])


@pytest.mark.parametrize("path", NORMAL)
def test_symbols_start_standard_normal_and_positions_small(path):
    values, error = at(initialized(), path), 5 / math.sqrt(12 * WIDTH)
    assert abs(values.mean()) < error * NORMAL[path]
    assert values.var() == pytest.approx(NORMAL[path] ** 2, rel=1.5 * error)
    assert np.abs(values).max() > 2.5 * NORMAL[path]


def test_layers_and_seeds_start_apart():
    kernel = at(initialized(), "blocks/qkv/kernel")
    for one, other in itertools.combinations(kernel, 2):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05


def test_the_evaluation_of_reversing_is_fixed_and_of_no_seeds_training(tasks):
    task, again = tasks["reverse"], reverse.build(LAYERS, **REVERSE)
    params = random_params(task)
    evaluated = float(task.evaluate(params)["evaluation loss"])
    assert evaluated == float(jax.jit(again.evaluate)(params)["evaluation loss"])
    loss = jax.jit(
        lambda seed, step: task.loss(params, task.draw(None, data_key(seed), step))
    )
    trained_on = [float(loss(*of)) for of in itertools.product(range(20), range(10))]
    assert not np.isclose(trained_on, evaluated, rtol=1e-5).any()
    assert abs(np.mean(trained_on) - evaluated) < 5 * np.std(trained_on)


def test_reversing_decays_everything_as_adamw_of_pytorch_does(tasks):
    params = jax.eval_shape(tasks["reverse"].init, jax.random.key(0))
    decayed = tasks["reverse"].decayed(params)
    assert jax.tree.structure(decayed) == jax.tree.structure(params)
    assert all(jax.tree.leaves(decayed))
