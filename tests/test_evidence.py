"""The evidence: tasks are trained as `trial` asks, and their options fit together."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

import gradsmooth_optax as gs
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import presets, training
from benchmarks.evidence.tasks import TASKS, rl
from benchmarks.json_files import COST, RESULTS, TRIALS
from benchmarks.models.gpt import init_gpt
from benchmarks.report.records import read_source
from benchmarks.training import TrainState, data_key, init_params, train_steps

ROOT = Path(__file__).parent.parent
TINY = {
    **{"depths": [3], "width": 8, "heads": 1, "context": 8, "batch": 4},
    **{"steps": 4, "warmup": 1, "eval_windows": 2, "micro_batches": 2, "lanes": 2},
    **{"screen_seeds": 2, "confirm_seeds": 2, "corpus": [str(ROOT / "LICENSE")]},
}
RATE, SEEDS = 0.1, (3, 5)


@functools.cache
def tiny():
    options = presets.options_of("lm", "adamw", "full", TINY)
    task = TASKS["lm"].build(3, **presets.task_options(options))
    return task, presets.job_of("adamw", options)


@functools.cache
def trained():
    task, job = tiny()
    smoothing = gs.smooth_over_depth(task.depth, 0.5)
    optimizer = training.optimizer_of(job, task)(smoothing, RATE)
    train = training.train_of(job, task)
    return optimizer, jax.jit(lambda seeds: train(optimizer, seeds))(jnp.array(SEEDS))


@functools.cache
def by_hand(seed):
    """Parameters and state after a plain loop over the steps."""
    task, job = tiny()
    tx = trained()[0].whole
    params = jax.tree.map(lambda x: x[0], init_params(task.init, jnp.array([seed])))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        gradients = jax.grad(task.loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(job.steps):
        batch = task.draw(task.data, data_key(jnp.int32(seed)), jnp.int32(index))
        params, state = step(params, state, batch)
    return params, state


def test_a_training_is_what_a_loop_over_seeds_and_steps_gives():
    task, job = tiny()
    assert (job.weight_decay, job.clip, job.warmup, job.steps) == (0.1, 1.0, 1, 4)
    _, values = trained()
    for lane, seed in enumerate(SEEDS):
        params, _ = by_hand(seed)
        expected = float(task.evaluate(params)["validation loss"])
        assert values["validation loss"][lane] == pytest.approx(expected, rel=2e-4)


def test_updates_are_measured_before_and_after_smoothing_on_the_next_batch():
    task, job = tiny()
    optimizer, values = trained()
    for lane, seed in enumerate(SEEDS):
        params, state = by_hand(seed)
        batch = task.draw(task.data, data_key(jnp.int32(seed)), jnp.int32(job.steps))
        gradients = jax.grad(task.loss)(params, batch)
        before, _ = optimizer.base.update(gradients, state[0], params)
        leaves = jax.tree.leaves(before["blocks"])
        blocks = np.hstack([np.asarray(x, float).reshape(3, -1) for x in leaves])
        mixed = np.asarray(gs.window(0.5).matrix(3)) @ blocks
        for moment, u in (("before", blocks), ("after", mixed)):
            roughness = np.sum(np.diff(u, axis=0) ** 2) / np.sum(u**2)
            found = values[f"roughness {moment}, step 4"][lane]
            assert found == pytest.approx(roughness, rel=1e-3)


def options(path, **changes):
    given = {**TINY, "depths": [2], **changes}
    return [
        *("--task", "lm", "--out", str(path)),
        *(f"--option={name}={json.dumps(value)}" for name, value in given.items()),
    ]


def quick(made, seeds):
    smoothing, rate = made
    updates = {"blocks": {"kernel": jnp.ones((2, 3, 3))}}
    smoothing.update(updates, smoothing.init(updates))
    noise = jax.vmap(lambda s: jax.random.normal(jax.random.key(s)))(seeds)
    return {"validation loss": jnp.log(rate / RATE) ** 2 + noise, "roughness": noise}


def test_a_run_leaves_a_finished_trial_and_trains_nothing_again(
    tmp_path, monkeypatch, capsys
):
    arms = {"window(0.5)": gs.window(0.5)}
    monkeypatch.setitem(command.trial.compare.__kwdefaults__, "arms", arms)
    # The trainings themselves are tested above.
    monkeypatch.setattr(command, "optimizer_of", lambda *_: lambda *made: made)
    monkeypatch.setattr(command, "train_of", lambda *_: quick)
    assert command.main(options(tmp_path)) == 0
    assert "lm, adamw, 2 layers" in capsys.readouterr().out
    result = gs.trial.read_result(tmp_path / "lm-adamw-2.json")
    assert result.is_complete
    assert result.settings.metric == "validation loss"
    (finding,) = result.findings
    assert finding.word == "exploratory"
    monkeypatch.setattr(command, "train_of", lambda *_: len)
    assert command.main(options(tmp_path)) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "deeper"], "invalid choice: 'deeper'"),
        (["--option", "width=8"], "name another directory with --out"),
        (["--option", "no=1", "--out", "x"], "there is no option 'no' of 'lm'"),
        (["--option", "width"], "'width' is not NAME=VALUE"),
        (["--scope", "no", "--preset", "quick"], "there is no scope 'no' of this task"),
    ],
)
def test_what_does_not_exist_is_an_error_that_lists_what_does(arguments, words, capsys):
    with pytest.raises(SystemExit):
        command.main(["--task", "lm", *arguments])
    assert words in " ".join(capsys.readouterr().err.split())


def test_on_two_devices_weights_and_batches_are_split():
    program = """
import jax
from benchmarks.evidence import placement
from benchmarks.evidence.tasks import reverse
leaf = jax.ShapeDtypeStruct
shapes = {"kernel": leaf((2, 3, 8, 4), "f4"), "odd": leaf((2, 3, 5), "f4")}
split, whole = jax.tree.leaves(placement.shardings(shapes))
assert split.shard_shape((2, 3, 8, 4)) == (2, 3, 8, 2)
assert whole.is_fully_replicated
sizes = dict(width=8, heads=2, length=4, vocabulary=8, batch=4, eval_sequences=2)
task = placement.with_split_batches(reverse.build(2, **sizes))
batch = jax.jit(lambda key: task.draw(None, key, 0))(jax.random.key(0))
assert batch.sharding.shard_shape((4, 4)) == (2, 4)
"""
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        check=True,
    )


# The presets.


def presets_of(task):
    """The names that the error of an unknown one lists."""
    with pytest.raises(presets.OptionError) as error:
        presets.options_of(task, "adamw", "no such")
    return str(error.value).split("there are ")[1].split(", ")


PRESETS = [(task, preset) for task in TASKS for preset in presets_of(task)]
# Long enough for the longest windows, and quick to read.
SOURCES = [str(path) for path in sorted((ROOT / "tests").glob("*.py"))]


def of_preset(name, optimizer, preset):
    changes = {"corpus": SOURCES} if name == "lm" else {}
    found = presets.options_of(name, optimizer, preset, changes)
    return found, presets.job_of(optimizer, found)


def shapes_of(task, lanes):
    seeds = jax.ShapeDtypeStruct((lanes,), jnp.int32)
    return seeds, jax.eval_shape(functools.partial(init_params, task.init), seeds)


def state_shapes(optimizer, params):
    def state(params):
        return TrainState(params, jax.vmap(optimizer.init)(params))

    return jax.eval_shape(state, params)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("vit", {"patch": [2]}, "patch=[2] must be a height and a width"),
        ("vit", {"patch": [3, 4]}, "patch=[3, 4] does not divide images of 8 pixels"),
        ("vit", {"eval_images": 1797}, "eval_images=1797 must be between 10 and 1787"),
        ("diffusion", {"patch": 3}, "patch=3 does not divide images of 8 pixels"),
        ("diffusion", {"depths": [9, 8]}, "depths=[9, 8] must be odd and at least 3"),
        ("diffusion", {"width": 9, "heads": 3}, "width=9 must be even"),
        ("rl", {"updates": 3}, "updates=3 of a step do not divide batch=16"),
        ("rl", {"updates": 8}, "divide the 2 examples of an update"),
        ("rl", {"warmup": 5}, "write --option warmup=null"),
        ("rl", {"eval_problems": 4096}, "eval_problems=4096 are more than the 1094"),
        ("lm", {"micro_batches": 1}, "micro_batches=1 must be at least 2"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_built(
    task, changes, words
):
    with pytest.raises(presets.OptionError, match=re.escape(words)):
        presets.options_of(task, "adamw", "full", changes)


def test_every_task_has_a_quick_a_full_and_a_large_preset():
    for task in TASKS:
        assert {"quick", "full", "tpu"} <= set(presets_of(task)) <= {*presets.NAMES}


@functools.cache
def fitted(name, layers, lanes, written):
    """(Task, parameters of a lane, batch, that of an update, states), by shapes alone.

    One for all presets whose models and data are the same.
    """

    def start(layers, width, heads, *_):
        init = init_gpt(rl._model(layers, width, heads))
        shapes = jax.eval_shape(init, jax.random.key(0))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(rl, "_trained_start", start)
        task = TASKS[name].build(layers, **json.loads(written))
    _, params = shapes_of(task, lanes)
    for optimizer in ("adamw", "sgd", "muon"):
        _, job = of_preset(name, optimizer, "full")
        smoothing = gs.smooth_over_depth(task.depth, 0.2)
        tx = training.optimizer_of(job, task)(smoothing, 1.0)
        state = state_shapes(tx.whole, params)
        assert len(jax.tree.leaves(state.params)) == len(jax.tree.leaves(params))

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    drawn = batch = jax.eval_shape(
        functools.partial(task.draw, task.data), jax.random.key(0), np.int32(0)
    )
    if task.rollout is not None:
        batches = jax.eval_shape(task.rollout, one, batch)
        batch = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), batches)
    metrics = jax.eval_shape(task.evaluate, one)
    assert set(metrics) == {metric.name for metric in TASKS[name].METRICS}
    assert all(metric.shape == () for metric in metrics.values())
    return task, one, drawn, batch, jax.eval_shape(task.states, one, batch)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_the_options_of_every_preset_fit_together(name, preset):
    """By shapes alone, without training a start or any parameter."""
    found, _ = of_preset(name, "adamw", preset)
    for optimizer in ("adamw", "sgd", "muon"):
        chosen, job = of_preset(name, optimizer, preset)
        # The same model and data under every base.
        assert presets.task_options(chosen) == presets.task_options(found)
        assert chosen["screen_seeds"] % job.lanes == 0
        assert chosen["confirm_seeds"] % job.lanes == 0
        if preset not in presets.NOT_COMMITTED:
            assert (chosen["screen_seeds"], chosen["confirm_seeds"]) == (4, 16)
        assert chosen["batch"] % job.micro_batches == 0
        assert job.micro_batches >= 2
        assert chosen["learning_rate"] > 0
        assert (job.warmup or 0) < job.steps
        assert job.schedule(job.steps - 1) <= 1.0

    # More layers of the same shapes fit as well, and take longer to trace.
    assert all(layers % 2 or name != "diffusion" for layers in found["depths"])
    layers = 5
    written = json.dumps(presets.task_options(found), sort_keys=True)
    task, one, drawn, batch, states = fitted(name, layers, found["lanes"], written)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(drawn)} == {found["batch"]}
    examples = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    assert len(examples) == 1
    assert examples.pop() % found["micro_batches"] == 0
    assert states.shape[0] == layers + 1
    assert states.shape[-1] == found["width"]
    for scope in ("full", "proj", *task.scopes):
        assert gs.describe(command.scope_of(task, scope), one).groups, scope


@pytest.mark.parametrize(("preset", "billions"), [("tpu", 1.2), ("tpu-deep", 2.4)])
def test_large_presets_have_the_sizes_of_the_paper(preset, billions):
    found, _ = of_preset("lm", "adamw", preset)
    (layers,) = found["depths"]
    task = TASKS["lm"].build(layers, **presets.task_options(found))
    _, params = shapes_of(task, 1)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == pytest.approx(billions * 1e9, rel=0.02)


def test_a_window_at_the_size_of_the_paper_compiles():
    """From shapes: 1.2 billion parameters, which no test should hold in memory."""
    found, job = of_preset("lm", "adamw", "tpu")
    task = TASKS["lm"].build(found["depths"][-1], **presets.task_options(found))
    smoothing = gs.smooth_over_depth(task.depth, 0.2)
    optimizer = training.optimizer_of(job, task)(smoothing, 1e-3).whole
    seeds, params = shapes_of(task, job.lanes)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count > 1.2e9
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.data)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    most = max(np.diff(job.probed, prepend=0)).item()
    train = train_steps(task.loss, optimizer, task.draw, most)
    state = state_shapes(optimizer, params)
    compiled = train.lower(state, seeds, data, step, step).compile()
    # Parameters and Adam's two moments in float32, and nothing else of their size.
    taken = compiled.memory_analysis().argument_size_in_bytes - data.size
    assert taken == pytest.approx(3 * 4 * count, rel=1e-3)


# What is committed.


@pytest.mark.parametrize(
    "path",
    [p for p in RESULTS.glob("*/*.json") if p.parent not in (COST, TRIALS)],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_committed_results_of_before_are_still_read(path):
    settings = read_source(path).settings
    assert settings
    assert all(len(arm.seeds) == 16 for of in settings for arm in of.confirm)


def test_committed_trials_are_complete():
    for path in TRIALS.glob("*.json"):
        assert gs.trial.read_result(path).is_complete, path
