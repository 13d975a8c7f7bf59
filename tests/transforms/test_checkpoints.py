"""Orbax checkpoints: smoothing switched on and off, and a run killed and resumed.

Run as a script this file is the run that is killed: `train` in a process of its own.
"""

import functools
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.slow

LAYERS = 3
DEPTH = gs.scanned("blocks/")


def open_checkpoints(directory):
    ocp = pytest.importorskip("orbax.checkpoint")
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    return ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)


def save(manager, step, tree):
    import orbax.checkpoint as ocp

    manager.save(step, args=ocp.args.StandardSave(tree))


def restore(manager, like):
    import orbax.checkpoint as ocp

    args = ocp.args.StandardRestore(like)
    return manager.restore(manager.latest_step(), args=args)


def params_of(seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(LAYERS, 4, 3)).astype("float32")
    return {"blocks": {"kernel": kernel}, "embed": np.full(5, 0.5, np.float32)}


def smoothed(alpha):
    return gs.smooth_over_depth(DEPTH, alpha)


def momentum(smoothing):
    inner = gs.with_depth_smoothing(optax.trace(0.9), smoothing)
    return optax.chain(inner, optax.scale_by_learning_rate(0.1))


def on_and_off():
    """Name -> the optimizer without smoothing and with it."""
    muon = [gs.muon(0.1, DEPTH, smoothed(alpha), ns_steps=1) for alpha in (0.0, 0.3)]
    return {
        "adamw": (optax.adamw(0.1), gs.adamw(0.1, smoothed(0.3))),
        "sgd": (optax.sgd(0.1, momentum=0.9), momentum(smoothed(0.3))),
        "muon": tuple(muon),
    }


def test_a_checkpoint_resumes_with_smoothing_on_and_back_off(tmp_path):
    """What was saved is, bit by bit, the state of the other optimizer.

    All that a step depends on is then the same; test_recipes.py has the steps.
    """
    params = params_of(0)
    saved, like = {}, {}
    for name, pair in on_and_off().items():
        for way, (before, after) in {"on": pair, "off": pair[::-1]}.items():
            _, state = before.update(params_of(1), before.init(params), params)
            saved[f"{name} {way}"] = state
            like[f"{name} {way}"] = after.init(params)
    # And of `per_layer`, whose state has dicts with numbers for keys.
    unrolled = {f"layers_{i}": params["blocks"]["kernel"][i] for i in range(LAYERS)}
    by_layer = gs.per_layer(optax.scale_by_adam(), gs.unrolled(r"layers_(\d+)"))
    like["per_layer"] = by_layer.init(unrolled)
    _, saved["per_layer"] = by_layer.update(unrolled, like["per_layer"])

    with open_checkpoints(tmp_path) as manager:
        save(manager, 0, saved)
    with open_checkpoints(tmp_path) as manager:
        restored = restore(manager, jax.tree.map(jnp.zeros_like, like))
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, like)
    for name, state in saved.items():
        assert jax.tree.structure(restored[name]) == jax.tree.structure(state), name
        chex.assert_trees_all_equal(restored[name], state)
    by_layer.update(unrolled, restored["per_layer"])


# A run that is killed.

STEPS = 10
SAVE_EVERY = 3


@functools.cache
def scheduled():
    alpha = optax.linear_schedule(0.0, 0.5, STEPS)
    return {
        "adamw": gs.adamw(0.05, smoothed(alpha), weight_decay=0.1),
        "chain": optax.chain(
            optax.trace(0.9),
            gs.smooth_over_depth(DEPTH, alpha, variant="directional"),
            optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.05, STEPS)),
        ),
    }


@jax.jit
def train_step(run, step):
    """One step of every optimizer on a batch of its own."""
    x, y = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (2, 8, 4))

    def loss(params):
        state = x
        for layer in range(LAYERS):
            state = state + jnp.tanh(state @ params["blocks"]["kernel"][layer])
        return jnp.mean((state @ params["head"] - y) ** 2)

    new = {}
    for name, (params, state) in run.items():
        updates, state = scheduled()[name].update(jax.grad(loss)(params), state, params)
        new[name] = (optax.apply_updates(params, updates), state)
    return new


def new_run():
    kernels = np.random.default_rng(1).normal(size=(LAYERS, 4, 4)).astype("float32")
    params = {"blocks": {"kernel": jnp.asarray(kernels)}, "head": jnp.eye(4)}
    return {name: (params, tx.init(params)) for name, tx in scheduled().items()}


def train(directory, killed_after):
    """Trains from the newest checkpoint; prints at which step that was."""
    with open_checkpoints(directory) as manager:
        start = manager.latest_step() or 0
        run = restore(manager, new_run()) if start else new_run()
        print("starts at", start)
        for step in range(start + 1, STEPS + 1):
            run = train_step(run, step)
            if step % SAVE_EVERY == 0 or step == STEPS:
                save(manager, step, run)
            if step == killed_after:
                sys.stdout.flush()
                os.kill(os.getpid(), signal.SIGKILL)
    return run


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_killed_and_resumed_with_a_schedule_of_alpha_is_bit_identical(
    tmp_path, capsys
):
    pytest.importorskip("orbax.checkpoint")
    parts = tmp_path / "parts"
    killed = subprocess.run(
        [sys.executable, "-W", "error", __file__, parts, "7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.strip() == "starts at 0"
    # In this process, another one than that: the rest, and all of it without a kill.
    got = train(parts, killed_after=0)
    assert capsys.readouterr().out.strip() == "starts at 6"
    expected = train(tmp_path / "whole", killed_after=0)
    chex.assert_trees_all_equal(got, expected)
    # The schedules went on where they were.
    assert got["adamw"][1][0].smoothing_state.count == STEPS
    assert got["chain"][1][1].count == STEPS


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
