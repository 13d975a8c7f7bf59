"""Training of one arm: all seeds at once, several steps per compiled call.

Nothing here knows about depth smoothing: an arm is any optax optimizer. Everything
with a leading axis `S` is stacked over seeds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

# What separates the random streams of a seed.
_INIT, _DATA = 0, 1


class TrainState(NamedTuple):
    """Parameters and optimizer state, every leaf of shape `(S, ...)`."""

    params: Any
    opt_state: Any


# (key of the data stream, step) -> tokens of shape (batch, context + 1).
Batches = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def next_token_loss(model: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of next tokens, in nats per token.

    Args:
        model: maps tokens `(batch, time)` to logits `(batch, time, vocabulary)`.
        params: its parameters.
        tokens: integers of shape `(batch, context + 1)`.
    """
    logits = cast(jax.Array, model.apply({"params": params}, tokens[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses)


@functools.partial(jax.jit, static_argnames="model")
def init_params(model: nn.Module, seeds: jax.Array) -> Any:
    """Returns the initial parameters of every seed, leaves of shape `(S, ...)`.

    Args:
        model: as in `next_token_loss`.
        seeds: integers of shape `(S,)`.
    """

    def one_seed(seed: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), _INIT)
        return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    return jax.vmap(one_seed)(seeds)


def init_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """Returns the initial state of an arm; `params` is copied and so serves every arm.

    Args:
        optimizer: any optax optimizer.
        params: from `init_params`.
    """
    return TrainState(
        # Training donates its state: arms must not share memory.
        jax.tree.map(jnp.copy, params),
        jax.jit(jax.vmap(optimizer.init))(params),
    )


def train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    most_steps: int,
) -> jax.stages.Wrapped:
    """Returns a compiled function that trains all seeds for several steps.

    The number of steps is an argument of the compiled code and not a part of it: how a
    run is cut into calls, say by an interruption, cannot change its numbers.

    Args:
        model: as in `next_token_loss`.
        optimizer: any optax optimizer.
        batches: `(text, key, step) -> tokens` of one step and one seed.
        most_steps: the largest number of steps of one call.

    Returns:
        A function `(state, seeds, text, start, num_steps) -> (state, losses)` with
        `losses` of shape `(most_steps, S)` in nats, NaN after `num_steps`. It takes
        over the memory of the state it is given.
    """

    def one_step(
        state: TrainState, seed: jax.Array, text: jax.Array, step: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), _DATA)
        loss, gradients = jax.value_and_grad(next_token_loss, argnums=1)(
            model, state.params, batches(text, key, step)
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    def several_steps(
        state: TrainState,
        seeds: jax.Array,
        text: jax.Array,
        start: jax.Array,
        num_steps: jax.Array,
    ) -> tuple[TrainState, jax.Array]:
        def body(index: jax.Array, carry: tuple) -> tuple:
            state, losses = carry
            state, loss = jax.vmap(one_step, in_axes=(0, 0, None, None))(
                state, seeds, text, start + index
            )
            return state, losses.at[index].set(loss)

        nothing = jnp.full((most_steps, seeds.shape[0]), jnp.nan, jnp.float32)
        return jax.lax.fori_loop(0, num_steps, body, (state, nothing))

    return jax.jit(several_steps, donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("model", "at_once"))
def mean_loss(
    model: nn.Module, params: Any, windows: jax.Array, at_once: int = 16
) -> jax.Array:
    """Returns every seed's mean loss over all windows, shape `(S,)`, in nats per token.

    Args:
        model: as in `next_token_loss`.
        params: stacked over seeds, leaves of shape `(S, ...)`.
        windows: tokens of shape `(num_windows, context + 1)`, the same for all seeds.
        at_once: windows per forward pass, which bounds the memory.
    """

    def one_seed(params: Any) -> jax.Array:
        def loss(window: jax.Array) -> jax.Array:
            return next_token_loss(model, params, window[None])

        return jnp.mean(jax.lax.map(loss, windows, batch_size=at_once))

    return jax.vmap(one_seed)(params)
