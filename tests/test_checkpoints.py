"""Orbax checkpoints: smoothing switched on and off, and a run killed and resumed.

Run as a script this file is the run that is killed: `train` in a process of its own.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import gradsmooth_optax as gs

ocp = pytest.importorskip("orbax.checkpoint")


def open_checkpoints(directory):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def save(manager, step, tree):
    manager.save(step, args=ocp.args.StandardSave(tree))


def restore(manager, like):
    args = ocp.args.StandardRestore(like)
    return manager.restore(manager.latest_step(), args=args)


def round_trip(directory, tree, like):
    """What a checkpoint of `tree` gives to a program that expects `like`."""
    with open_checkpoints(directory) as manager:
        save(manager, 0, tree)
    with open_checkpoints(directory) as manager:
        return restore(manager, jax.tree.map(jnp.zeros_like, like))


# Smoothing switched on and off.

LAYERS = 3
RATE = 0.1
# The parameters as one leaf per layer and as one leaf for all layers, with their depth.
LAYOUTS = {
    "unrolled": (lambda blocks: oracle.unrolled_tree(blocks), gs.unrolled()),
    "scanned": (
        lambda blocks: {"blocks": oracle.stacked_tree(blocks)},
        gs.scanned("blocks/"),
    ),
}


def tree_of(layout, seed):
    blocks = oracle.random_blocks(
        LAYERS, shapes={"kernel": (4, 3), "bias": (3,)}, seed=seed
    )
    embedding = np.random.default_rng(seed).normal(size=(5, 4)).astype("float32")
    tree = {**LAYOUTS[layout][0](blocks), "embed": embedding}
    return jax.tree.map(jnp.asarray, tree)


def optimizers(name, layout, alpha):
    """The plain optimizer and the smoothing one."""
    depth = LAYOUTS[layout][1]
    smoothing = gs.smooth_over_depth(depth, alpha)
    if name == "adamw":
        return (
            optax.adamw(RATE, weight_decay=0.2),
            gs.adamw(RATE, smoothing, weight_decay=0.2),
        )
    if name == "sgd":
        momentum = gs.with_depth_smoothing(optax.trace(0.9), smoothing)
        return (
            optax.sgd(RATE, momentum=0.9),
            optax.chain(momentum, optax.scale_by_learning_rate(RATE)),
        )
    # The state of optax's muon is another one: its chain is inside of its partition.
    return tuple(
        gs.muon(RATE, depth, S, ns_steps=1)
        for S in (gs.smooth_over_depth(depth, 0.0), smoothing)
    )


DECAY = {"adamw": 0.2, "sgd": 0.0, "muon": 0.0}


def layers_of(tree):
    if "blocks" in tree:
        return oracle.unstacked(tree["blocks"])
    return [tree[f"layers_{layer}"] for layer in range(LAYERS)]


def smoothed(tree, layout, alpha):
    """The tree with its layers smoothed by the plain loops."""
    blocks = oracle.window(layers_of(tree), alpha)
    return {**LAYOUTS[layout][0](blocks), "embed": tree["embed"]}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("adamw", layout) for layout in LAYOUTS),
        *(("sgd", "scanned"), ("muon", "scanned")),
    ],
)
def test_a_plain_checkpoint_resumes_with_smoothing_on_and_back_off(
    name, layout, tmp_path
):
    plain, smoothing = optimizers(name, layout, 0.3)
    params = tree_of(layout, 100)
    state = plain.init(params)
    for seed in range(2):
        updates, state = plain.update(tree_of(layout, seed), state, params)
        params = optax.apply_updates(params, updates)

    # On: what was saved is restored bit by bit into the other optimizer's state.
    saved = {"params": params, "opt_state": state}
    like = {"params": params, "opt_state": smoothing.init(params)}
    restored = round_trip(tmp_path / "plain", saved, like)
    chex.assert_trees_all_equal(restored, saved)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)

    # The next step is the plain one's with its direction smoothed.
    grads = tree_of(layout, 7)
    updates, new_state = plain.update(grads, state, params)
    got, got_state = smoothing.update(grads, restored["opt_state"], restored["params"])
    decay = jax.tree.map(lambda p: DECAY[name] * p, params)
    direction = jax.tree.map(lambda u, d: -u / RATE - d, updates, decay)
    expected = jax.tree.map(
        lambda u, d: -RATE * (u + d), smoothed(direction, layout, 0.3), decay
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(layers_of(got)[0]["kernel"], layers_of(updates)[0]["kernel"])

    # And off: the state went on as without smoothing.
    restored = round_trip(tmp_path / "smoothed", got_state, plain.init(params))
    chex.assert_trees_all_equal(restored, new_state)
    chex.assert_trees_all_equal(
        plain.update(grads, restored, params), plain.update(grads, new_state, params)
    )


def test_a_plain_checkpoint_resumes_with_a_schedule_once_its_count_is_added(tmp_path):
    # As the message for the wrong state says.
    plain, _ = optimizers("adamw", "scanned", 0.3)
    params = tree_of("scanned", 100)
    _, state = plain.update(tree_of("scanned", 0), plain.init(params), params)
    adam, *others = round_trip(tmp_path, state, plain.init(params))
    count = gs.DepthSmoothingState(jnp.int32(5))
    state = (gs.WithDepthSmoothingState(adam, count), *others)
    schedule = optax.linear_schedule(0.0, 0.5, 10)
    _, scheduled = optimizers("adamw", "scanned", schedule)
    assert jax.tree.structure(state) == jax.tree.structure(scheduled.init(params))
    got, state = scheduled.update(params, state, params)
    _, constant = optimizers("adamw", "scanned", 0.25)
    expected, _ = constant.update(params, (adam, *others), params)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
    assert state[0].smoothing_state.count == 6


# A run that is killed.

STEPS = 10
SAVE_EVERY = 3
SCHEDULE = optax.linear_schedule(0.0, 0.5, STEPS)
SCANNED = LAYOUTS["scanned"][1]
SCHEDULED = {
    "adamw": gs.adamw(0.05, gs.smooth_over_depth(SCANNED, SCHEDULE), weight_decay=0.1),
    "chain": optax.chain(
        optax.trace(0.9),
        gs.smooth_over_depth(SCANNED, SCHEDULE, variant="directional"),
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
        updates, state = SCHEDULED[name].update(jax.grad(loss)(params), state, params)
        new[name] = (optax.apply_updates(params, updates), state)
    return new


def new_run():
    kernels = jax.random.normal(jax.random.key(1), (LAYERS, 4, 4))
    params = {"blocks": {"kernel": kernels}, "head": jnp.eye(4)}
    return {name: (params, tx.init(params)) for name, tx in SCHEDULED.items()}


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


def train_in_a_process(directory, killed_after):
    return subprocess.run(
        [sys.executable, "-W", "error", __file__, directory, str(killed_after)],
        capture_output=True,
        text=True,
        check=False,
    )


def final_run(directory):
    with open_checkpoints(directory) as manager:
        assert manager.latest_step() == STEPS
        return restore(manager, new_run())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_killed_and_resumed_with_a_schedule_of_alpha_is_bit_identical(
    tmp_path, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    killed = train_in_a_process(parts, killed_after=7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.strip() == "starts at 0"
    # In this process, another one than that: the rest, and all of it without a kill.
    for directory, start in ((parts, 6), (whole, 0)):
        train(directory, killed_after=0)
        assert capsys.readouterr().out.strip() == f"starts at {start}"

    expected, got = final_run(whole), final_run(parts)
    chex.assert_trees_all_equal(got, expected)
    # The schedules went on where they were.
    assert got["adamw"][1][0].smoothing_state.count == STEPS
    assert got["chain"][1][1].count == STEPS


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
