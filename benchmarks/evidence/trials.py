"""Training of one arm at one learning rate: what is measured, over paired seeds."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.evidence import placement
from benchmarks.evidence.arms import Arm, coupled, scope_of
from benchmarks.evidence.mechanism import (
    before_and_after,
    model_probe,
    update_statistics,
)
from benchmarks.evidence.task import Task
from benchmarks.optimizers import preconditioner, warmup_cosine
from benchmarks.training import TrainState, init_params, train_steps


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
        shares = (0.1, 0.25, 0.5, 0.75, 1.0)
        return sorted({max(1, round(share * self.steps)) for share in shares})


class Measured(NamedTuple):
    """What a trial measured, of S seeds.

    Attributes:
      metrics: {name: values} of the last parameters, of shape `(S,)`.
      train_loss: of every step, shape `(steps, S)`.
      mechanism: {name: values or {"before", "after": values}}, of shape
        `(len(job.probed), S)`.
      before: what of the metrics is there before training, of the base; else empty.
      seconds_per_step: of as many seeds as there are lanes, the median over calls.
    """

    metrics: dict[str, np.ndarray]
    train_loss: np.ndarray
    mechanism: dict[str, Any]
    before: dict[str, np.ndarray]
    seconds_per_step: float


# (learning rate, seeds, called with the steps done) -> what was measured.
RunTrial = Callable[[float, Sequence[int], Callable[[int], Any]], Measured]


def build_optimizer(job: Job, task: Task, arm: Arm) -> optax.GradientTransformation:
    """Returns the optimizer of an arm, with its learning rate in its state.

    So one compiled program serves all rates, see `at_rate`.
    """
    return optax.chain(
        _coupled(job, task, arm).transformation,
        optax.add_decayed_weights(job.weight_decay, task.decayed),
        optax.scale_by_schedule(job.schedule),
        optax.inject_hyperparams(optax.scale)(step_size=-1.0),
    )


def _coupled(job: Job, task: Task, arm: Arm) -> Any:
    clip = optax.identity() if job.clip is None else optax.clip_by_global_norm(job.clip)
    base = preconditioner(job.optimizer, task.depth, task.hidden, job.b2)
    return coupled(arm, optax.chain(clip, base), scope_of(arm, task))


def at_rate(opt_state: Any, learning_rate: jax.typing.ArrayLike) -> Any:
    """Returns the state of an optimizer from `build_optimizer` at a learning rate."""
    step_sizes = optax.tree_utils.tree_get(opt_state, "step_size")
    rates = jnp.full_like(step_sizes, -jnp.asarray(learning_rate))
    return optax.tree_utils.tree_set(opt_state, step_size=rates)


class Measures(NamedTuple):
    """The compiled functions that all arms of a job and task share.

    Attributes:
      init: seeds -> parameters stacked over them.
      evaluate: such parameters -> {metric: `(S,)`}.
      probe: (parameters, seeds, data, step) -> gradients and measures of the model.
      statistics: updates -> measures of them.
    """

    init: Any
    evaluate: Any
    probe: Any
    statistics: Any


def build_measures(job: Job, task: Task) -> Measures:
    """Returns what makes and measures parameters, whatever trains them."""
    init = functools.partial(init_params, task.init)
    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((job.lanes,), jnp.int32))
    probe = model_probe(task, job.micro_batches)
    statistics = functools.partial(update_statistics, task)
    return Measures(
        jax.jit(init, out_shardings=placement.shardings(shapes)),
        jax.jit(jax.vmap(task.evaluate)),
        jax.jit(jax.vmap(probe, in_axes=(0, 0, None, None))),
        jax.jit(jax.vmap(statistics)),
    )


def build_trial(job: Job, task: Task, arm: Arm, measures: Measures) -> RunTrial:
    """Returns what trains an arm, compiled at its first call."""
    optimizer = build_optimizer(job, task, arm)
    probed = job.probed
    most_steps = max(np.diff(probed, prepend=0)).item()
    train = train_steps(task.loss, optimizer, task.draw, most_steps, task.rollout)

    def opt_state_at(learning_rate: Any, params: Any) -> Any:
        return at_rate(jax.vmap(optimizer.init)(params), learning_rate)

    seeds = jax.ShapeDtypeStruct((job.lanes,), jnp.int32)
    shapes = jax.eval_shape(opt_state_at, 1.0, jax.eval_shape(measures.init, seeds))
    opt_state_at = jax.jit(opt_state_at, out_shardings=placement.shardings(shapes))
    updates = jax.jit(jax.vmap(before_and_after(_coupled(job, task, arm))))

    def of_lanes(
        learning_rate: float, seeds: jax.Array, progress: Callable[[int], Any]
    ) -> Measured:
        params = measures.init(seeds)
        state = TrainState(params, opt_state_at(learning_rate, params))
        # All arms begin at the same.
        before = measures.evaluate(params) if arm.operator == "none" else {}
        losses, seconds, probes = [], [], []
        for start, end in zip([0, *probed[:-1]], probed, strict=True):
            began = time.perf_counter()
            state, some = train(
                state, seeds, task.data, np.int32(start), np.int32(end - start)
            )
            losses.append(np.asarray(some)[: end - start])
            seconds.append((time.perf_counter() - began) / (end - start))
            # The step that comes next, whose batch no parameter has seen.
            gradient, of_model = measures.probe(
                state.params, seeds, task.data, np.int32(end)
            )
            both = updates(gradient, state.opt_state[0], state.params)
            at_moment = {moment: measures.statistics(of) for moment, of in both.items()}
            of_updates = {
                name: {moment: at_moment[moment][name] for moment in at_moment}
                for name in at_moment["before"]
            }
            probes.append(jax.device_get(of_updates | of_model))
            progress(end - start)
        return Measured(
            metrics=jax.tree.map(np.asarray, measures.evaluate(state.params)),
            train_loss=np.concatenate(losses),
            mechanism=jax.tree.map(lambda *values: np.stack(values), *probes),
            before=jax.tree.map(np.asarray, before),
            # The first call compiles.
            seconds_per_step=statistics.median(seconds[1:] or seconds),
        )

    def run(
        learning_rate: float, seeds: Sequence[int], progress: Callable[[int], Any]
    ) -> Measured:
        if len(seeds) % job.lanes:
            raise ValueError(f"{len(seeds)} seeds are no multiple of {job.lanes} lanes")
        parts = [
            of_lanes(learning_rate, jnp.array(lanes), progress)
            for lanes in np.reshape(seeds, (-1, job.lanes)).tolist()
        ]
        joined = jax.tree.map(
            lambda *values: np.concatenate(values, axis=-1),
            *(part._replace(seconds_per_step=np.zeros(0)) for part in parts),
        )
        return joined._replace(
            seconds_per_step=statistics.median(part.seconds_per_step for part in parts)
        )

    return run
