"""Trainings that take no time, for the tests of `gradsmooth_optax.trial`."""

import math
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gradsmooth_optax as gs

DEPTH = gs.scanned("h")
ARGUMENTS = {
    **{"rates": [0.5, 1.0, 2.0], "seeds": 8, "screen_seeds": 2},
    **{"arms": {"window(0.5)": gs.window(0.5)}},
}
# Where it is not about the numbers: as few runs as there can be.
SMALL = {"seeds": 2, "screen_seeds": 1, "rates": [1.0, 2.0], "block_rates": [0.5]}


def optimizer(smoothing, rate):
    """No optimizer: what `train` needs to know."""
    return smoothing, rate


def block_factor(smoothing):
    """How much shorter the blocks' updates become."""
    updates = {"h": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), "f4")}
    smoothed, _ = smoothing.update(updates, smoothing.init(updates))
    return jnp.linalg.norm(smoothed["h"]) / jnp.linalg.norm(updates["h"])


def train(made, seed):
    """Best at the rate 1.5, and at half of it for the blocks."""
    smoothing, rate = made
    of_blocks = rate * float(block_factor(smoothing))
    own, blocks = math.log2(rate / 1.5), math.log2(of_blocks / 0.75)
    drawn_by = [seed, round(1e6 * rate), round(1e6 * of_blocks)]
    noise = np.random.default_rng(drawn_by).normal()
    return own**2 + 2 * blocks**2 + 0.05 * noise + np.random.default_rng(seed).normal()


@gs.trial.many_seeds
def train_many(made, seeds):
    smoothing, rate = made
    cost = jnp.log2(rate / 1.5) ** 2
    cost += 2 * jnp.log2(rate * block_factor(smoothing) / 0.75) ** 2
    return {
        "cost": cost + jax.vmap(lambda s: jax.random.normal(jax.random.key(s)))(seeds)
    }


def compare(train, path, **others):
    return gs.trial.compare(
        train, optimizer, DEPTH, path=path, **{**ARGUMENTS, **others}
    )


if __name__ == "__main__":
    path, limit = Path(os.environ["TRIAL"]), int(os.environ["KILL_AFTER"])
    runs = iter(range(10**6))

    def killed(made, seed):
        if next(runs) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(made, seed)

    compare(killed if limit else train, path)
