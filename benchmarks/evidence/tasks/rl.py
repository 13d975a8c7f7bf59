"""GRPO of a small GPT on arithmetic, from one supervised start for all seeds.

The start learned to add on part of the problems and then to imitate careless answers to
them; GRPO trains on other problems. It is trained again by every process, and another
machine may round otherwise: a result file should be of one machine. Both metrics are
over held-out ones, the same for all seeds; others tune. `pass@1`, the probability that
an answer sampled at temperature 1 is right, is exact: that of the tokens of the right
answer. `mean reward` is of one sampled answer to every problem, with random numbers
that never change; see `benchmarks.data.arithmetic.reward`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

import gradsmooth_optax as gs
from benchmarks.data.arithmetic import (
    ANSWER,
    BASE,
    PROMPT,
    Problems,
    demonstrate,
    reward,
    split_problems,
)
from benchmarks.evidence.task import Metric, Task, parts_of
from benchmarks.evidence.tasks.grpo import (
    Experience,
    grpo_loss,
    log_probabilities,
    relative_advantages,
    sample,
    with_answers,
)
from benchmarks.models.gpt import GPT, init_gpt, scanned_states
from benchmarks.optimizers import hidden_matrices, matrices, warmup_cosine

METRICS = (
    Metric("pass@1", "", lower_is_better=False),
    Metric("mean reward", "", lower_is_better=False),
)

# The part of the start's training on right answers; the rest is on careless ones.
CAREFUL = 0.7


class Drawn(NamedTuple):
    """Problems to answer, with a key each for the samples."""

    problems: Problems
    keys: jax.Array


def build(
    layers: int,
    *,
    width: int,
    heads: int,
    batch: int,
    group: int,
    updates: int,
    clip_ratio: float,
    kl: float,
    start_steps: int,
    start_batch: int,
    start_learning_rate: float,
    eval_problems: int,
) -> Task:
    """Returns the task, after training its start.

    Args:
      layers, width, heads, batch: of every task.
      group: answers sampled to each of them.
      updates: K, the parts that a step's problems are cut into, each for one update;
        it divides `batch`.
      clip_ratio: how far from 1 a ratio of probabilities still counts.
      kl: weight of the divergence from the start.
      start_steps: supervised steps before.
      start_batch: problems in each of those.
      start_learning_rate: their highest.
      eval_problems: of the held-out ones, how many judge; as many others tune.
    """
    if batch % updates:
        raise ValueError(
            f"{batch} problems per step can't be cut into {updates} equal parts.\n"
            "To fix: make `batch` a multiple of `updates`."
        )
    model = _model(layers, width, heads)
    policy = functools.partial(_policy, model)
    start = _trained_start(
        *(layers, width, heads), start_steps, start_batch, start_learning_rate
    )
    problems = split_problems()
    judging, tuning = (
        jax.tree.map(lambda leaf: leaf[:eval_problems], part)
        for part in (problems.test, problems.tuning)
    )
    # Far from the keys of any seed's data.
    test_noise = _noise(jax.random.key(2**31 - 1), (eval_problems, 1))

    def draw(data: Problems, key: jax.Array, step: jax.Array) -> Drawn:
        which, keys = jax.random.split(jax.random.fold_in(key, step))
        chosen = jax.random.randint(which, (batch,), 0, len(data.prompts))
        return Drawn(
            jax.tree.map(lambda leaf: leaf[chosen], data),
            jax.random.split(keys, batch),
        )

    def rollout(params: Any, drawn: Drawn) -> Experience:
        prompts, right = drawn.problems
        noise = jax.vmap(lambda key: _noise(key, (group,)))(drawn.keys)
        answers, sampled = sample(policy, params, prompts, noise)
        experience = Experience(
            prompts,
            answers,
            relative_advantages(reward(answers, right[:, None])),
            sampled,
            log_probabilities(policy, start, prompts, answers),
        )
        return jax.tree.map(
            lambda leaf: leaf.reshape(updates, -1, *leaf.shape[1:]), experience
        )

    def evaluate(params: Any) -> Mapping[str, jax.Array]:
        prompts, right = judging
        answers, _ = sample(policy, params, prompts, test_noise)
        return {
            "pass@1": pass_at_1(params, judging),
            "mean reward": reward(answers, right[:, None]).mean(),
        }

    def pass_at_1(params: Any, problems: Problems) -> jax.Array:
        prompts, right = problems
        of_right = log_probabilities(policy, params, prompts, right[:, None])
        return jnp.exp(of_right.sum(-1)).mean()

    def states(params: Any, batch: Experience) -> jax.Array:
        tokens = with_answers(batch.prompts[:, None], batch.answers[..., :-1])
        flat = tokens.reshape(-1, tokens.shape[-1])
        stream = scanned_states(model, params, flat)
        return stream.reshape(layers + 1, *tokens.shape, width)

    depth = gs.scanned("blocks/")
    return Task(
        depth=depth,
        data=problems.train,
        init=lambda key: start,
        draw=draw,
        loss=functools.partial(grpo_loss, policy, clip_ratio=clip_ratio, kl=kl),
        evaluate=evaluate,
        tuned_by=lambda params: pass_at_1(params, tuning),
        states=states,
        decayed=matrices,
        hidden=hidden_matrices,
        scopes=parts_of(depth, "attention", "mlp", "norms"),
        rollout=rollout,
    )


def _model(layers: int, width: int, heads: int) -> GPT:
    return GPT(BASE, layers, width, heads, context=PROMPT + ANSWER - 1)


def _policy(model: GPT, params: Any, tokens: jax.Array) -> jax.Array:
    flat = tokens.reshape(-1, tokens.shape[-1])
    logits = cast(jax.Array, model.apply({"params": params}, flat))
    return jax.nn.log_softmax(logits).reshape(*tokens.shape, BASE)


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.gumbel(key, (*shape, ANSWER, BASE))


@functools.lru_cache
def _trained_start(
    layers: int,
    width: int,
    heads: int,
    steps: int,
    batch: int,
    learning_rate: float,
) -> Any:
    """Returns parameters after supervised training on the problems of the start."""
    model = _model(layers, width, heads)
    policy = functools.partial(_policy, model)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            warmup_cosine(learning_rate, steps // 10, steps),
            b2=0.95,
            weight_decay=0.1,
            mask=matrices,
        ),
    )
    data = split_problems().start

    def loss(params: Any, prompts: jax.Array, answers: jax.Array) -> jax.Array:
        return -log_probabilities(policy, params, prompts, answers[:, None]).mean()

    def step(state: tuple, now: tuple) -> tuple[tuple, None]:
        params, opt_state = state
        key, careless = now
        which, how = jax.random.split(key)
        chosen = jax.random.randint(which, (batch,), 0, len(data.prompts))
        problems = jax.tree.map(lambda leaf: leaf[chosen], data)
        answers = jnp.where(careless, demonstrate(how, problems), problems.answers)
        gradients = jax.grad(loss)(params, problems.prompts, answers)
        changes, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), None

    @jax.jit
    def train(key: jax.Array) -> Any:
        of_init, of_data = jax.random.split(key)
        params = init_gpt(model)(of_init)
        state = (params, optimizer.init(params))
        careless = jnp.arange(steps) >= CAREFUL * steps
        keys = jax.random.split(of_data, steps)
        (params, _), _ = jax.lax.scan(step, state, (keys, careless))
        return params

    return train(jax.random.key(0))
