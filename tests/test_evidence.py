"""The evidence: tasks are trained as `trial` asks, and their options fit together."""

import dataclasses
import functools
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

import tiny_task

import gradsmooth_optax as gs
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import presets, training
from benchmarks.evidence.tasks import TASKS, rl
from benchmarks.json_files import TRIALS
from benchmarks.models.gpt import init_gpt
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.training import data_key, init_params

ROOT = Path(__file__).parent.parent
RATE, SEEDS = 0.1, (3, 5)


@functools.cache
def tiny():
    job = training.Job("adamw", steps=4, warmup=1, weight_decay=0.1, clip=1.0)
    return tiny_task.build(3), dataclasses.replace(job, micro_batches=2)


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
    task, _ = tiny()
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


def quick(made, seeds):
    smoothing, rate = made
    updates = {"blocks": {"kernel": jnp.ones((6, 3, 3))}}
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
    monkeypatch.setitem(command.TASKS, "reverse", tiny_task)
    options = ["--task", "reverse", "--preset", "quick", "--out", str(tmp_path)]
    assert command.main(options) == 0
    assert "reverse, adamw, 6 layers" in capsys.readouterr().out
    result = gs.trial.read_result(tmp_path / "reverse-adamw-6-quick.json")
    assert result.is_complete
    assert result.settings.metric == "validation loss"
    (finding,) = result.findings
    assert finding.word == "exploratory"
    monkeypatch.setattr(command, "train_of", lambda *_: len)
    assert command.main(options) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
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


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("lm", {"width": 9}, "heads=2 do not divide width=9"),
        ("lm", {"width": "wide"}, "should be of the kind of 32"),
        ("lm", {"confirm_seeds": 6}, "no multiple of lanes=4"),
        ("rl", {"updates": 3}, "updates=3 of a step do not divide batch=16"),
        ("rl", {"updates": 8}, "divide the 2 examples of an update"),
        ("rl", {"warmup": 5}, "write --option warmup=null"),
        ("lm", {"micro_batches": 1}, "micro_batches=1 must be at least 2"),
        ("lm", {"steps": 20}, "use at most warmup=19"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_built(
    task, changes, words
):
    with pytest.raises(presets.OptionError, match=re.escape(words)):
        presets.options_of(task, "adamw", "full", changes)


@pytest.mark.parametrize("name", TASKS)
def test_the_options_of_every_preset_fit_together(name, monkeypatch):
    """By shapes alone, without training a start or any parameter."""

    def start(layers, width, heads, *_):
        init = init_gpt(rl._model(layers, width, heads))
        shapes = jax.eval_shape(init, jax.random.key(0))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    monkeypatch.setattr(rl, "_trained_start", start)
    names = presets.NAMES if name == "lm" else ("full", "quick")
    found = {preset: presets.options_of(name, "adamw", preset) for preset in names}
    full = found["full"]
    assert (full["screen_seeds"], full["confirm_seeds"]) == (4, 16)
    task = TASKS[name].build(5, **presets.task_options(full))
    params = jax.eval_shape(task.init, jax.random.key(0))
    for optimizer in OPTIMIZERS:
        options = presets.options_of(name, optimizer, "quick")
        assert presets.task_options(options) == presets.task_options(found["quick"])
        job = presets.job_of(optimizer, options)
        assert job.schedule(job.steps - 1) <= 1.0
        smoothing = gs.smooth_over_depth(task.depth, 0.2)
        tx = training.optimizer_of(job, task)(smoothing, 1.0)
        jax.eval_shape(tx.whole.init, params)
    batch = jax.eval_shape(
        functools.partial(task.draw, task.data), jax.random.key(0), np.int32(0)
    )
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {full["batch"]}
    if task.rollout is not None:
        batches = jax.eval_shape(task.rollout, params, batch)
        batch = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), batches)
    metrics = jax.eval_shape(task.evaluate, params)
    assert set(metrics) == {metric.name for metric in TASKS[name].METRICS}
    states = jax.eval_shape(task.states, params, batch)
    assert (states.shape[0], states.shape[-1]) == (6, full["width"])
    for scope in ("full", "proj", *task.scopes):
        assert gs.describe(command.scope_of(task, scope), params).groups, scope


def test_committed_trials_are_complete():
    for path in TRIALS.glob("*.json"):
        assert gs.trial.read_result(path).is_complete, path
