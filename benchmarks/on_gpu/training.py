"""A GPT trained under smoothing and its controls, all arms of a seed in one program.

Exploratory: one set of rates, which nobody tuned, and as many seeds as fit into the
time. What an arm does is traced, so that there is one program: its lanes are the arms,
which see the same batches from the same parameters. So a seed that is done is a pair of
every two arms, whenever the run is ended.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradsmooth_optax as gs
from benchmarks.comparison import format_difference, paired_difference
from benchmarks.data.corpus import (
    VOCABULARY,
    load_corpus,
    sample_windows,
    spread_windows,
)
from benchmarks.models.gpt import GPT, init_gpt, mean_loss, next_token_loss
from benchmarks.optimizers import matrices
from benchmarks.training import data_key

# Far from the seeds of other benchmarks.
_FIRST_SEED = 1000
_DEPTH = gs.scanned("blocks/")


class Plan(NamedTuple):
    """Sizes of a training."""

    layers: int = 24
    width: int = 512
    heads: int = 8
    context: int = 256
    batch: int = 8  # windows per step, of every arm
    step_batch: int = 32  # and of the one training step that is timed
    eval_windows: int = 256  # from files that nobody trains on
    dtype: str = "bfloat16"  # of activations; parameters and updates are float32
    peak: float = 1e-3  # after a tenth of the steps; then a cosine to a tenth
    seeds: int = 5  # that the number of steps is sized for, from a measured step
    fewest_steps: int = 100
    most_steps: int = 800
    seconds: float = 160.0  # for all of it, compiling too


FULL = Plan()
# In float32, which takes half of bfloat16's time to compile on CPU.
QUICK = Plan(*(2, 8, 2, 8, 2, 2, 4, "float32", 1e-3, 2, 2, 3, 300.0))


class Arm(NamedTuple):
    """What is traced of an arm.

    Attributes:
      alpha: strength of the window.
      matched: whether updates only get the norms that the window would give them.
      block_rate: learning rate of the blocks over that of the rest.
    """

    alpha: Any
    matched: Any
    block_rate: Any


ARMS = {
    "base": Arm(0.0, False, 1.0),
    "base, block rate 0.5": Arm(0.0, False, 0.5),
    "base, block rate 0.25": Arm(0.0, False, 0.25),
    "window(0.5)": Arm(0.5, False, 1.0),
    "window(0.5), block rate 0.25": Arm(0.5, False, 0.25),
    "norm-matched": Arm(0.5, True, 1.0),
    "norm-matched, block rate 0.25": Arm(0.5, True, 0.25),
}
# Arms against the base, and at one block rate against each other.
PAIRS = (
    *((arm, "base") for arm in ARMS if arm != "base"),
    ("window(0.5)", "norm-matched"),
    ("window(0.5), block rate 0.25", "base, block rate 0.25"),
    ("window(0.5), block rate 0.25", "norm-matched, block rate 0.25"),
    ("norm-matched, block rate 0.25", "base, block rate 0.25"),
)


def model_of(plan: Plan) -> GPT:
    """Returns the GPT of these sizes."""
    return GPT(
        vocabulary=VOCABULARY,
        layers=plan.layers,
        width=plan.width,
        heads=plan.heads,
        context=plan.context,
        dtype=jnp.dtype(plan.dtype),
    )


@functools.cache  # as it is compiled once
def initializer(plan: Plan) -> Callable[[jax.Array], Any]:
    """Returns what makes the parameters from a key."""
    return jax.jit(init_gpt(model_of(plan)))


def one_step(plan: Plan) -> tuple[Callable[[Any, jax.Array], jax.Array], Any, Any]:
    """Returns the loss, parameters and tokens of one training step."""
    model = model_of(plan)
    params = initializer(plan)(jax.random.key(0))
    shape = (plan.step_batch, plan.context + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCABULARY)
    return lambda params, tokens: next_token_loss(model, params, tokens), params, tokens


def optimizer(arm: Arm, rate: Any) -> optax.GradientTransformation:
    """Returns AdamW as the arm has it, all of which may be traced."""
    window = gs.window(arm.alpha)
    smooth = gs.smooth_over_depth(_DEPTH, window)
    match = gs.smooth_over_depth(_DEPTH, gs.controls.norm_matched(window))

    def coupled(updates: Any, params: Any) -> Any:
        del params
        smoothed, matched = (
            tx.update(updates, tx.init(updates))[0] for tx in (smooth, match)
        )
        return jax.tree.map(
            lambda one, other: jnp.where(arm.matched, one, other), matched, smoothed
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95),
        optax.stateless(coupled),
        optax.add_decayed_weights(0.1, matrices),
        optax.scale_by_learning_rate(rate),
        gs.scale_over_depth(_DEPTH, arm.block_rate),
    )


def rate_at(step: Any, steps: Any, peak: float) -> jax.Array:
    """Returns the learning rate of a step, of steps that may be traced."""
    warmup = jnp.maximum(1, steps // 10)
    done = jnp.clip((step - warmup) / jnp.maximum(1, steps - warmup), 0, 1)
    decayed = 0.1 + 0.45 * (1 + jnp.cos(jnp.pi * done))
    return peak * jnp.minimum(1, (step + 1) / warmup) * decayed


class _Programs:
    """What is compiled: the start of all lanes, a step, the evaluation."""

    def __init__(self, plan: Plan, train: np.ndarray, validation: np.ndarray):
        self.plan, model = plan, model_of(plan)
        self.arms = Arm(*map(jnp.asarray, zip(*ARMS.values(), strict=True)))
        # Arrays as arguments: a program that holds them is slow to compile.
        self.text = jnp.asarray(train)
        windows = spread_windows(validation, plan.eval_windows, plan.context)
        self.windows = jnp.asarray(windows)

        def lanes_of(params: Any) -> Any:
            lane = params, optimizer(ARMS["base"], 0.0).init(params)
            shape = (len(ARMS),)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, shape + x.shape), lane)

        def of_lane(lane: Any, arm: Arm, tokens: jax.Array, rate: jax.Array) -> Any:
            params, state = lane
            value, gradients = jax.value_and_grad(next_token_loss, argnums=1)(
                model, params, tokens
            )
            updates, state = optimizer(arm, rate).update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value

        def step(
            lanes: Any, arms: Arm, text: jax.Array, seed: Any, step: Any, steps: Any
        ) -> Any:
            key, sizes = data_key(seed), (plan.batch, plan.context)
            tokens = sample_windows(text, key, step, *sizes)
            rate = rate_at(step, steps, plan.peak)
            return jax.vmap(of_lane, (0, 0, None, None))(lanes, arms, tokens, rate)

        def evaluate(lanes: Any, windows: jax.Array) -> jax.Array:
            return jax.vmap(lambda params: mean_loss(model, params, windows))(lanes[0])

        self._spread = jax.jit(lanes_of)
        self._step = jax.jit(step, donate_argnums=0)
        self._evaluate = jax.jit(evaluate)

    def start(self, seed: int) -> Any:
        """The lanes of all arms, at the same parameters."""
        key = jax.random.fold_in(jax.random.key(seed), 0)
        return self._spread(initializer(self.plan)(key))

    def step(self, lanes: Any, seed: int, step: int, steps: int) -> Any:
        """The lanes after one of `steps` steps, and their losses."""
        counts = map(np.int32, (seed, step, steps))
        return self._step(lanes, self.arms, self.text, *counts)

    def evaluate(self, lanes: Any) -> jax.Array:
        """The held-out loss of every lane."""
        return self._evaluate(lanes, self.windows)


def _train_seed(
    programs: _Programs, seed: int, steps: int, deadline: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Final training and held-out losses of all arms, None if the time is over."""
    lanes, last = programs.start(seed), []
    for step in range(steps):
        lanes, losses = programs.step(lanes, seed, step, steps)
        if step >= steps - 20:
            last.append(losses)
        if step % 20 == 0:
            jax.block_until_ready(losses)  # else the clock is of what was asked for
            if time.monotonic() > deadline:
                return None
    return np.mean(np.array(last), 0), np.asarray(programs.evaluate(lanes))


def train(plan: Plan, seconds: float) -> Iterator[dict[str, Any]]:
    """Trains seed after seed, and yields the result after each.

    Args:
      plan: sizes; the number of steps is chosen for the seconds.
      seconds: for all of it, compiling too.
    """
    began = time.monotonic()
    deadline = began + seconds
    corpus = load_corpus(None, plan.context + 1)
    programs = _Programs(plan, corpus.train, corpus.validation)

    compiling, step_seconds, eval_seconds = _calibrated(programs)
    # A little less than fits: a seed that is cut off is lost.
    of_seed = 0.92 * (deadline - time.monotonic()) / plan.seeds - eval_seconds
    steps = int(np.clip(of_seed / step_seconds, plan.fewest_steps, plan.most_steps))
    tokens = len(ARMS) * plan.batch * plan.context
    print(
        f"training: compiled in {compiling:.0f} s, {1e3 * step_seconds:.1f} ms for a "
        f"step of {len(ARMS)} arms, {tokens / step_seconds:,.0f} tokens/s, {steps} "
        f"steps for each of {plan.seeds} seeds",
        flush=True,
    )
    report = {
        "note": "exploratory: rates untuned, one schedule, one process",
        "arms": {name: arm._asdict() for name, arm in ARMS.items()},
        "corpus": {"sha256": corpus.sha256, "train_bytes": corpus.train.size},
        "steps": steps,
        "compile_seconds": compiling,
        "step_milliseconds": 1e3 * step_seconds,
        "tokens_per_second": tokens / step_seconds,
        "parameters": _parameters(plan),
        "seeds": [],
        "train_loss": {name: [] for name in ARMS},
        "validation_bits_per_byte": {name: [] for name in ARMS},
    }
    for seed in range(_FIRST_SEED, _FIRST_SEED + 2 * plan.seeds):
        start = time.monotonic()
        found = _train_seed(programs, seed, steps, deadline)
        if found is None:
            break
        report["seeds"].append(seed)
        for name, last, held_out in zip(ARMS, *found, strict=True):
            report["train_loss"][name].append(float(last))
            bits = float(held_out) / np.log(2)
            report["validation_bits_per_byte"][name].append(float(bits))
        report["differences"] = differences(report["validation_bits_per_byte"])
        report["seconds"] = time.monotonic() - began
        print(_progress(report), flush=True)
        yield report
        if time.monotonic() + (time.monotonic() - start) > deadline:
            break


def _calibrated(programs: _Programs) -> tuple[float, float, float]:
    """Seconds of the first calls, which compile, of a step and of an evaluation."""

    def seconds_of(function: Callable[[], Any]) -> float:
        start = time.monotonic()
        jax.block_until_ready(function())
        return time.monotonic() - start

    lanes = programs.start(0)

    def steps(number: int) -> Any:
        nonlocal lanes
        losses = None
        for step in range(number):
            lanes, losses = programs.step(lanes, 0, step, number)
        return losses

    def evaluation() -> Any:
        return programs.evaluate(lanes)

    first = seconds_of(lambda: steps(1)) + seconds_of(evaluation)
    return first, seconds_of(lambda: steps(10)) / 10, seconds_of(evaluation)


def _parameters(plan: Plan) -> int:
    params = jax.eval_shape(init_gpt(model_of(plan)), jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def differences(losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns the paired differences of `PAIRS`, with 95 % t-intervals."""
    found = []
    for arm, against in PAIRS:
        of_pair = paired_difference(np.array(losses[arm]), np.array(losses[against]))
        shown = {"arm": arm, "against": against, "shown": format_difference(of_pair)}
        found.append(shown | of_pair._asdict())
    return found


def _progress(report: dict[str, Any]) -> str:
    losses = report["validation_bits_per_byte"]
    shown = ", ".join(f"{name} {of[-1]:.4f}" for name, of in losses.items())
    return f"  seed {report['seeds'][-1]}: {shown} ({report['seconds']:.0f} s)"
