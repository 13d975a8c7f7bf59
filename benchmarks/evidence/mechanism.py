"""Why an arm may help: what its updates and its residual stream look like.

All functions here are of one seed, for `jax.vmap`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.evidence.task import Task
from benchmarks.training import data_key
from gradsmooth_optax import diagnostics

Measures = Mapping[str, jax.Array]


def model_probe(
    task: Task, micro_batches: int
) -> Callable[[Any, jax.Array, Any, jax.Array], tuple[Any, Measures]]:
    """Returns what measures a model on the batch of a step; the same for all arms.

    Args:
      task: what is trained.
      micro_batches: M, the parts that a batch is cut into; it divides the batch.

    Returns:
      A function `(params, seed, data, step) -> (gradient, measures)`:
      `line_shape_score` and `residual_alignment` of the residual stream, and
      `gradient_noise`, the variance of a micro-batch's gradient of the blocks over
      the squared norm of the mean gradient.
    """

    def probe(params: Any, seed: jax.Array, data: Any, step: jax.Array) -> Any:
        batch = task.draw(data, data_key(seed), step)
        if task.rollout is not None:
            batch = jax.tree.map(lambda leaf: leaf[0], task.rollout(params, batch))
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(micro_batches, -1, *leaf.shape[1:]), batch
        )
        gradients = jax.vmap(jax.grad(task.loss), in_axes=(None, 0))(params, parts)
        noise = diagnostics.gradient_noise(gradients, task.depth).values()
        variance = sum(jnp.sum(of_stack.variance) for of_stack in noise)
        signal = sum(jnp.sum(of_stack.squared_norm_of_mean) for of_stack in noise)
        states = task.states(params, batch)
        return jax.tree.map(lambda leaf: leaf.mean(0), gradients), {
            "line_shape_score": diagnostics.line_shape_score(states),
            "residual_alignment": diagnostics.residual_alignment(states),
            "gradient_noise": variance / signal,
        }

    return probe


def update_statistics(task: Task, updates: Any) -> Measures:
    """Returns measures of an update of the blocks; the same for all arms.

    `roughness`, relative to the squared norm, and the mean `adjacent_cosine`.
    """
    stacks = diagnostics.depth_statistics(updates, task.depth).values()
    roughness = jnp.stack([stack.roughness for stack in stacks])
    squares = jnp.concatenate([stack.norms**2 for stack in stacks])
    return {
        "roughness": jnp.sum(roughness) / jnp.sum(squares),
        "adjacent_cosine": jnp.mean(jnp.concatenate([s.cosines for s in stacks])),
    }
