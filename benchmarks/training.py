"""Training of one arm: all seeds at once, several steps per compiled call.

Nothing here knows about depth smoothing: an arm is any optax optimizer, of any model
and loss. Everything with a leading axis `S` is stacked over seeds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# What separates the random streams of a seed.
_INIT, _DATA = 0, 1


class TrainState(NamedTuple):
    """Parameters and optimizer state, every leaf of shape `(S, ...)`."""

    params: Any
    opt_state: Any


# key -> parameters of one seed.
Init = Callable[[jax.Array], Any]
# (data, key of the data stream, step) -> the batch of one step of one seed.
Draw = Callable[[Any, jax.Array, jax.Array], Any]
# (parameters of one seed, batch) -> scalar.
Loss = Callable[[Any, Any], jax.Array]
# (parameters of one seed, drawn batch) -> batches, a tree with a leading axis of those
# that a step trains on one after the other.
Rollout = Callable[[Any, Any], Any]


@functools.partial(jax.jit, static_argnames="init")
def init_params(init: Init, seeds: jax.Array) -> Any:
    """Returns the initial parameters of every seed, `(S,)`: leaves of `(S, ...)`."""
    return jax.vmap(lambda seed: init(jax.random.fold_in(jax.random.key(seed), _INIT)))(
        seeds
    )


def data_key(seed: jax.Array) -> jax.Array:
    """Returns the key of the data stream of one seed."""
    return jax.random.fold_in(jax.random.key(seed), _DATA)


def init_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """Returns the initial state of an arm; `params` is copied, and serves all."""
    return TrainState(
        # Training donates its state: arms must not share memory.
        jax.tree.map(jnp.copy, params),
        jax.jit(jax.vmap(optimizer.init))(params),
    )


def train_steps(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    draw: Draw,
    most_steps: int,
    rollout: Rollout | None = None,
) -> jax.stages.Wrapped:
    """Returns a compiled function that trains all seeds for several steps.

    The number of steps is an argument of the compiled code and not a part of it: how a
    run is cut into calls, say by an interruption, cannot change its numbers.

    Args:
      loss: of one batch.
      optimizer: any optax optimizer.
      draw: the batch of one step and one seed.
      most_steps: the largest number of steps of one call.
      rollout: makes the batches of a step's updates; None for one, with what was drawn.

    Returns:
      A function `(state, seeds, data, start, num_steps) -> (state, losses)` with
      `losses` of shape `(most_steps, S)`, NaN after `num_steps`. It takes over the
      memory of the state it is given.
    """

    def update(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(state.params, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    def one_step(
        state: TrainState, seed: jax.Array, data: Any, step: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        batch = draw(data, data_key(seed), step)
        if rollout is None:
            return update(state, batch)
        state, values = jax.lax.scan(update, state, rollout(state.params, batch))
        return state, jnp.mean(values)

    def several_steps(
        state: TrainState,
        seeds: jax.Array,
        data: Any,
        start: jax.Array,
        num_steps: jax.Array,
    ) -> tuple[TrainState, jax.Array]:
        def body(index: jax.Array, carry: tuple) -> tuple:
            state, losses = carry
            state, values = jax.vmap(one_step, in_axes=(0, 0, None, None))(
                state, seeds, data, start + index
            )
            return state, losses.at[index].set(values)

        nothing = jnp.full((most_steps, seeds.shape[0]), jnp.nan, jnp.float32)
        return jax.lax.fori_loop(0, num_steps, body, (state, nothing))

    return jax.jit(several_steps, donate_argnums=0)
