"""How a task is trained, as `gradsmooth_optax.trial` asks for it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.evidence import placement
from benchmarks.evidence.mechanism import model_probe, update_statistics
from benchmarks.evidence.task import Task
from benchmarks.optimizers import preconditioner, warmup_cosine
from benchmarks.training import TrainState, init_params, train_steps

# The name of what rates are chosen by, beside the metrics of a task.
TUNING = "tuning"


@dataclasses.dataclass(frozen=True)
class Job:
    """How a task is trained, the same for all arms.

    Attributes:
      optimizer: the base, see `benchmarks.optimizers`.
      steps: of a run.
      warmup: steps of linear rise before the cosine decay to a tenth; None for a
        constant learning rate.
      weight_decay: decoupled.
      b2: of Adam.
      clip: largest global norm of the gradient, or None.
      lanes: seeds that train at once.
      micro_batches: parts of a batch whose gradients are compared.
    """

    optimizer: str
    steps: int
    warmup: int | None
    weight_decay: float
    b2: float = 0.95
    clip: float | None = None
    lanes: int = 4
    micro_batches: int = 4

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate of every step, in units of the highest."""
        if self.warmup is None:
            return optax.constant_schedule(1.0)
        return warmup_cosine(1.0, self.warmup, self.steps)

    @property
    def probed(self) -> list[int]:
        """After how many steps the mechanism is measured."""
        return sorted({max(1, self.steps // 4), self.steps})


class Optimizer(NamedTuple):
    """An arm's optimizer, with what is measured apart.

    Attributes:
      whole: the chain.
      base: the preconditioner alone; its state is the first of the chain's.
      smoothing: what follows it; its state is the second.
    """

    whole: optax.GradientTransformation
    base: optax.GradientTransformationExtraArgs
    smoothing: optax.GradientTransformationExtraArgs


def optimizer_of(job: Job, task: Task) -> Callable[[Any, Any], Optimizer]:
    """Returns what makes an arm's optimizer of its smoothing and rate."""
    clip = optax.identity() if job.clip is None else optax.clip_by_global_norm(job.clip)
    inner = preconditioner(job.optimizer, task.depth, task.hidden, job.b2)

    def optimizer(smoothing: Any, rate: Any) -> Optimizer:
        base = optax.chain(clip, inner)
        whole = optax.chain(
            base,
            smoothing,
            optax.add_decayed_weights(job.weight_decay, task.decayed),
            optax.scale_by_schedule(job.schedule),
            optax.scale(-rate),
        )
        return Optimizer(whole, base, optax.with_extra_args_support(smoothing))

    return optimizer


def train_of(job: Job, task: Task) -> Callable[[Optimizer, jax.Array], dict[str, Any]]:
    """Returns what trains several seeds at once, under `jax.jit`.

    Its values are the metrics of the task, `TUNING`, and what the updates and the
    residual stream looked like: `roughness after, step 50` and their likes.
    """
    probe = model_probe(task, job.micro_batches)
    starts = np.array([0, *job.probed[:-1]])
    lengths = np.diff([0, *job.probed])

    def train(optimizer: Optimizer, seeds: jax.Array) -> dict[str, Any]:
        params = placement.placed(init_params(task.init, seeds))
        opt_state = placement.placed(jax.vmap(optimizer.whole.init)(params))
        steps = train_steps(
            task.loss, optimizer.whole, task.draw, int(lengths.max()), task.rollout
        )

        def stretch(
            state: TrainState, of: tuple[jax.Array, jax.Array]
        ) -> tuple[TrainState, Any]:
            start, length = of
            state, _ = steps(state, seeds, task.data, start, length)
            # The step that comes next, whose batch no parameter has seen.
            gradients, measures = jax.vmap(probe, in_axes=(0, 0, None, None))(
                state.params, seeds, task.data, start + length
            )
            updates = jax.vmap(before_and_after(optimizer))(
                gradients, state.opt_state, state.params
            )
            for moment, update in updates.items():
                of_update = jax.vmap(lambda u: update_statistics(task, u))(update)
                measures = {**measures} | {
                    f"{name} {moment}": x for name, x in of_update.items()
                }
            return state, measures

        state = TrainState(params, opt_state)
        of_stretches = jnp.asarray(starts), jnp.asarray(lengths)
        state, measures = jax.lax.scan(stretch, state, of_stretches)
        mechanism = {
            f"{name}, step {step}": values[index]
            for name, values in sorted(measures.items())
            for index, step in enumerate(job.probed)
        }
        ends = dict(jax.vmap(task.evaluate)(state.params))
        return ends | {TUNING: jax.vmap(task.tuned_by)(state.params)} | mechanism

    return train


def before_and_after(optimizer: Optimizer) -> Callable[[Any, Any, Any], dict[str, Any]]:
    """Returns what gives an arm's updates before and after its smoothing."""

    def updates(gradient: Any, state: Any, params: Any) -> dict[str, Any]:
        before, _ = optimizer.base.update(gradient, state[0], params)
        after, _ = optimizer.smoothing.update(before, state[1], params)
        return {"before": before, "after": after}

    return updates
