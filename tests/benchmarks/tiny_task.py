"""A task of the evidence that compiles in no time: a residual network of matrices."""

import jax
import jax.numpy as jnp

import gradsmooth_optax as gs
from benchmarks.evidence.task import Metric, Task
from benchmarks.optimizers import hidden_matrices, matrices

METRICS = (Metric("validation loss", "", lower_is_better=True),)
WIDTH = 4


def build(layers, **_):
    """The task at a depth, whatever other options are given."""

    def init(key):
        blocks, head = jax.random.split(key)
        return {
            "blocks": {"kernel": jax.random.normal(blocks, (layers, WIDTH, WIDTH))},
            "head": jax.random.normal(head, (WIDTH, 1)),
        }

    def draw(data, key, step):
        return jax.random.normal(jax.random.fold_in(key, step), (4, WIDTH))

    def states(params, inputs):
        def block(x, kernel):
            x = x + jnp.tanh(x @ kernel) / layers
            return x, x

        _, after = jax.lax.scan(block, inputs, params["blocks"]["kernel"])
        return jnp.concatenate([inputs[None], after])

    def loss(params, inputs):
        outputs = states(params, inputs)[-1] @ params["head"]
        return jnp.mean((outputs - inputs.sum(1, keepdims=True)) ** 2)

    held_out = draw(None, jax.random.key(2**31 - 1), 0)
    return Task(
        depth=gs.scanned("blocks/"),
        data=None,
        init=init,
        draw=draw,
        loss=loss,
        evaluate=lambda params: {"validation loss": loss(params, held_out)},
        tuned_by=lambda params: loss(params, -held_out),
        states=states,
        decayed=matrices,
        hidden=hidden_matrices,
    )
