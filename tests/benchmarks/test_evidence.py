"""The evidence: a task is trained as `trial` asks, and goes on where it was ended."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

import tiny_task
from small_tasks import random_like

import gradsmooth_optax as gs
from benchmarks import signals
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import presets, training
from benchmarks.evidence.tasks import TASKS, diffusion, rl
from benchmarks.evidence.training import TUNING
from benchmarks.json_files import TRIALS
from benchmarks.models.gpt import init_gpt
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.training import data_key, init_params

RATE, SEEDS = 0.1, (3, 5)


@functools.cache
def tiny():
    job = training.Job("adamw", steps=4, warmup=1, weight_decay=0.1, clip=1.0)
    return tiny_task.build(3), dataclasses.replace(job, micro_batches=2)


def test_a_training_is_what_loops_give_and_its_updates_are_measured_around_smoothing():
    task, job = tiny()
    smoothing = gs.smooth_over_depth(task.depth, 0.5)
    optimizer = training.optimizer_of(job, task)(smoothing, RATE)
    train = training.train_of(job, task)
    values = jax.jit(lambda seeds: train(optimizer, seeds))(jnp.array(SEEDS))

    @jax.jit
    def step(params, state, batch):
        gradients = jax.grad(task.loss)(params, batch)
        before, _ = optimizer.base.update(gradients, state[0], params)
        updates, state = optimizer.whole.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, before

    for lane, seed in enumerate(SEEDS):
        params = jax.tree.map(lambda x: x[0], init_params(task.init, jnp.array([seed])))
        state = optimizer.whole.init(params)
        for index in range(job.steps + 1):
            if index == job.steps:
                loss = float(task.evaluate(params)["validation loss"])
                assert values["validation loss"][lane] == pytest.approx(loss, rel=1e-3)
            batch = task.draw(task.data, data_key(jnp.int32(seed)), jnp.int32(index))
            params, state, before = step(params, state, batch)
        # Of the step that comes next, whose batch no parameter had seen.
        blocks = np.asarray(before["blocks"]["kernel"], float).reshape(3, -1)
        mixed = np.asarray(gs.window(0.5).matrix(3)) @ blocks
        for moment, u in (("before", blocks), ("after", mixed)):
            roughness = np.sum(np.diff(u, axis=0) ** 2) / np.sum(u**2)
            found = values[f"roughness {moment}, step 4"][lane]
            assert found == pytest.approx(roughness, rel=1e-3)


def test_a_run_that_is_ended_goes_on_and_a_finished_one_trains_nothing_again(
    tmp_path, monkeypatch, capsys
):
    arms = {"window(0.5)": gs.window(0.5)}
    monkeypatch.setitem(command.trial.compare.__kwdefaults__, "arms", arms)
    # The trainings themselves are tested above.
    monkeypatch.setattr(command, "optimizer_of", lambda *_: lambda *made: made)
    monkeypatch.setitem(command.TASKS, "reverse", tiny_task)
    options = ["--task", "reverse", "--preset", "quick", "--out", str(tmp_path)]
    traced, most = [], [3]

    def quick(made, seeds):
        traced.append(made)
        if len(traced) > most[0]:
            raise KeyboardInterrupt
        smoothing, rate = made
        updates = {"blocks": {"kernel": jnp.ones((6, 3, 3))}}
        smoothing.update(updates, smoothing.init(updates))
        noise = jax.vmap(lambda s: jax.random.normal(jax.random.key(s)))(seeds)
        loss = jnp.log(rate / RATE) ** 2 + noise
        return {"validation loss": loss, TUNING: loss}

    monkeypatch.setattr(command, "train_of", lambda *_: quick)
    assert command.main(options) == 130
    path = tmp_path / "reverse-adamw-6-quick.json"
    first = json.loads(path.read_text())
    assert not gs.trial.read_result(path).is_complete
    most[0] = np.inf
    assert command.main(options) == 0
    assert "reverse, adamw, 6 layers" in capsys.readouterr().out
    result = gs.trial.read_result(path)
    assert result.is_complete
    assert result.settings.metric == "validation loss"
    assert result.settings.tune_metric == TUNING
    assert [finding.word for finding in result.findings] == ["exploratory"]
    kept = json.loads(path.read_text())
    assert kept["runs"][: len(first["runs"])] == first["runs"]
    most[0] = 0
    assert command.main(options) == 0


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
    """By shapes alone, without training anything."""

    def start(layers, width, heads, *_):
        init = init_gpt(rl._model(layers, width, heads))
        return random_like(jax.eval_shape(init, jax.random.key(0)))

    def classifier(*_):
        return lambda images: (jnp.zeros((len(images), 2)), None)

    monkeypatch.setattr(rl, "_trained_start", start)
    monkeypatch.setattr(diffusion, "trained_classifier", classifier)
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
    draw = functools.partial(task.draw, task.data)
    batch = jax.eval_shape(draw, jax.random.key(0), np.int32(0))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {full["batch"]}
    metrics = jax.eval_shape(task.evaluate, params)
    assert set(metrics) == {metric.name for metric in TASKS[name].METRICS}
    for scope in ("full", "proj", *task.scopes):
        assert gs.describe(command.scope_of(task, scope), params).groups, scope


def test_committed_trials_are_complete():
    for path in TRIALS.glob("*.json"):
        assert gs.trial.read_result(path).is_complete, path


@pytest.mark.slow
def test_signals_are_measured_at_three_moments_and_not_again(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(signals.TASKS, "reverse", tiny_task)
    out = tmp_path / "signals.json"
    arguments = ["--task", "reverse", "--optimizer", "adamw", "--steps", "2"]
    arguments += ["--batches", "16", "--out", str(out)]
    assert signals.main(arguments) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())["signals"]
    moments = [(of["moment"], of["step"]) for of in found]
    assert moments == [("start", 0), ("middle", 1), ("end", 2)]
    assert set(found[0]["block"]["left"]) >= {"best filter", "window(0.5)"}
    monkeypatch.setattr(signals, "signals", None)
    assert signals.main(arguments) == 0
    assert capsys.readouterr().out == table
