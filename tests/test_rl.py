"""The GRPO task is what it says: problems, rewards, sampling, loss, and its start."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

import gradsmooth_optax as gs
from benchmarks.data import arithmetic
from benchmarks.evidence.tasks import grpo, rl
from benchmarks.models.gpt import GPT

LAYERS, BATCH, GROUP, UPDATES = 2, 6, 5, 2
KL, CLIP = 0.3, 0.2
OPTIONS = {
    **{"width": 8, "heads": 2, "batch": BATCH, "group": GROUP, "updates": UPDATES},
    **{"clip_ratio": CLIP, "kl": KL, "start_steps": 20, "start_batch": 8},
    **{"start_learning_rate": 1e-2, "eval_problems": 7},
}
MODEL = GPT(8, LAYERS, 8, 2, context=5)


@pytest.fixture(scope="module")
def task():
    built = rl.build(LAYERS, **OPTIONS)
    names = ("loss", "evaluate", "states", "rollout", "draw")
    return built._replace(**{name: jax.jit(getattr(built, name)) for name in names})


@pytest.fixture(scope="module")
def params(task):
    """Values for every parameter, and answers that are far from sure and far from even.

    They are not the start's, so that the divergence from it is not 0.
    """
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.6, size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(task.init, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def drawn(task):
    return task.draw(task.data, jax.random.key(1), 7)


@pytest.fixture(scope="module")
def batches(task, params, drawn):
    return task.rollout(params, drawn)


@jax.jit
def model_logits(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def log_probs_by_hand(params, prompt, answer):
    """Of the two tokens of one answer, from the model's logits in float64."""
    tokens = jnp.asarray([[*prompt, *answer]])[:, :5]
    logits = np.asarray(model_logits(params, tokens)[0], np.float64)[-2:]
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.array([scores[0, answer[0]], scores[1, answer[1]]])


def first_of(batches):
    return jax.tree.map(lambda leaf: leaf[0], batches)


# Problems.


def test_every_sum_is_in_exactly_one_of_the_three_sets():
    split = arithmetic.split_problems()
    sets = [{*map(tuple, np.asarray(each.prompts).tolist())} for each in split]
    assert [len(each.prompts) for each in split] == [len(each) for each in sets]
    assert set.union(*sets) == {*itertools.product(range(8), repeat=4)}
    assert sum(map(len, sets)) == 4096
    assert all(len(each) >= 1000 for each in sets)


def test_a_sum_and_the_same_with_its_numbers_swapped_are_in_one_set():
    for problems in arithmetic.split_problems():
        there = {*map(tuple, np.asarray(problems.prompts).tolist())}
        assert {(c, d, a, b) for a, b, c, d in there} == there


def test_answers_are_octal_sums_with_the_units_first():
    for problems in map(jax.device_get, arithmetic.split_problems()):
        for (a, b, c, d), (low, high) in zip(*problems, strict=True):
            total = int(f"{a}{b}", 8) + int(f"{c}{d}", 8)
            assert f"{high}{low}" == f"{total:03o}"[-2:]


def test_the_three_sets_are_the_same_at_every_call():
    one, other = arithmetic.split_problems(), arithmetic.split_problems()
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_demonstrations_are_right_or_have_the_two_mistakes_as_often_as_said():
    problems = arithmetic.split_problems().start
    shown = arithmetic.demonstrate(jax.random.key(0), problems)
    found = {}
    prompts = np.asarray(problems.prompts).tolist()
    for (a, b, c, d), said in zip(prompts, np.asarray(shown).tolist(), strict=True):
        units, carry = (b + d) % 8, (b + d) // 8
        right, forgot = (a + c + carry) % 8, (a + c) % 8
        kinds = {
            "right": [units, right],
            "tens first": [right, units],
            "no carry": [units, forgot],
            "both": [forgot, units],
        }
        assert said in kinds.values()
        if len({*map(tuple, kinds.values())}) == 4:
            kind = next(name for name, answer in kinds.items() if answer == said)
            found[kind] = found.get(kind, 0) + 1
    first, none, count = arithmetic.TENS_FIRST, arithmetic.NO_CARRY, sum(found.values())
    expected = {
        "right": (1 - first) * (1 - none),
        "tens first": first * (1 - none),
        "no carry": (1 - first) * none,
        "both": first * none,
    }
    for kind, share in expected.items():
        error = 5 * np.sqrt(share * (1 - share) / count)
        assert found[kind] / count == pytest.approx(share, abs=error), kind


def test_the_right_answer_is_worth_1_and_a_right_digit_a_fifth():
    said = np.array([*itertools.product(range(8), repeat=2)])
    found = np.asarray(arithmetic.reward(jnp.asarray(said), jnp.array([3, 6])))
    for (low, high), value in zip(said.tolist(), found, strict=True):
        digits = (low == 3) + (high == 6)
        assert value == pytest.approx({0: 0.0, 1: 0.2, 2: 1.0}[digits])


# What is drawn, and what is sampled.


def test_drawn_problems_depend_on_the_key_and_the_step_alone(task):
    def found(seed, step):
        drawn = task.draw(task.data, jax.random.key(seed), step)
        return [*drawn.problems, jax.random.key_data(drawn.keys)]

    first = found(1, 7)
    for again, leaf in zip(found(1, 7), first, strict=True):
        np.testing.assert_array_equal(again, leaf)
    for other in (found(1, 8), found(2, 7)):
        pairs = zip(other, first, strict=True)
        assert not any(np.array_equal(*pair) for pair in pairs)
    assert {len(leaf) for leaf in first} == {BATCH}


def test_drawn_problems_are_those_of_reinforcement_learning(task):
    train = {
        *map(tuple, np.asarray(arithmetic.split_problems().train.prompts).tolist())
    }
    for step in range(10):
        prompts = task.draw(task.data, jax.random.key(0), step).problems.prompts
        assert {*map(tuple, np.asarray(prompts).tolist())} <= train


def test_a_step_trains_once_on_every_drawn_problem(drawn, batches):
    prompts = np.asarray(batches.prompts)
    assert prompts.shape == (UPDATES, BATCH // UPDATES, 4)
    np.testing.assert_array_equal(prompts.reshape(BATCH, 4), drawn.problems.prompts)
    assert batches.answers.shape == (UPDATES, BATCH // UPDATES, GROUP, 2)


def test_a_step_that_cannot_be_cut_into_equal_updates_is_an_error():
    with pytest.raises(ValueError, match="make `batch` a multiple of `updates`"):
        rl.build(LAYERS, **OPTIONS | {"updates": 4})


def test_answers_are_sampled_from_the_distribution_of_the_policy(params):
    """Frequencies of all 64 answers to one problem, by chi-square."""
    policy = functools.partial(rl._policy, MODEL)
    prompt, count = jnp.array([[4, 7, 2, 5]]), 4000
    noise = jax.random.gumbel(jax.random.key(5), (1, count, 2, 8))
    answers, _ = jax.jit(functools.partial(grpo.sample, policy))(params, prompt, noise)
    every = [*itertools.product(range(8), repeat=2)]
    expected = count * np.array(
        [np.exp(log_probs_by_hand(params, [4, 7, 2, 5], each).sum()) for each in every]
    )
    assert expected.sum() == pytest.approx(count, rel=1e-4)
    codes = np.asarray(answers[0]) @ [8, 1]
    found, common = np.bincount(codes, minlength=64), expected >= 5
    assert common.sum() > 20
    score = np.sum((found - expected)[common] ** 2 / expected[common])
    # Its mean is the number of cells, its variance twice that.
    assert score < common.sum() + 5 * np.sqrt(2 * common.sum())
    # And another model would be told apart.
    assert np.sum((expected - count / 64) ** 2 / (count / 64)) > 10 * score


def test_answers_to_a_problem_are_sampled_anew_for_every_one_of_a_group(batches):
    groups = np.asarray(batches.answers).reshape(BATCH, GROUP, 2)
    distinct = [len({*map(tuple, group.tolist())}) for group in groups]
    assert np.mean(distinct) > 2
    assert len({group.tobytes() for group in groups}) == BATCH


def test_sampling_keeps_the_log_probabilities_of_what_it_sampled(params, batches):
    batch = first_of(batches)
    for n, prompt in enumerate(np.asarray(batch.prompts)):
        for g, answer in enumerate(np.asarray(batch.answers[n])):
            expected = log_probs_by_hand(params, prompt, answer)
            np.testing.assert_allclose(batch.sampled[n, g], expected, rtol=1e-4)


def test_the_reference_is_the_start(task, batches):
    batch, start = first_of(batches), task.init(jax.random.key(0))
    for n, prompt in enumerate(np.asarray(batch.prompts)):
        for g, answer in enumerate(np.asarray(batch.answers[n])):
            expected = log_probs_by_hand(start, prompt, answer)
            np.testing.assert_allclose(batch.reference[n, g], expected, rtol=1e-4)


def test_advantages_are_of_the_rewards_within_a_group(drawn, batches):
    answers = np.asarray(batches.answers).reshape(BATCH, GROUP, 2)
    advantages = np.asarray(batches.advantages).reshape(BATCH, GROUP)
    for said, right, found in zip(
        answers, np.asarray(drawn.problems.answers), advantages, strict=True
    ):
        hits = [int((each == right).sum()) for each in said]
        rewards = np.array([{0: 0.0, 1: 0.2, 2: 1.0}[hit] for hit in hits])
        expected = (rewards - np.mean(rewards)) / (np.std(rewards) + 1e-4)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(advantages).max() > 1


def test_a_group_of_equal_rewards_has_no_advantages():
    found = grpo.relative_advantages(jnp.array([[0.2] * 4, [1.0] * 4]))
    np.testing.assert_allclose(found, 0.0, atol=1e-3)


# The loss.


def moved(batch, seed=0):
    """The batch as if another policy, not far from this one, had sampled it."""
    rng = np.random.default_rng(seed)
    by = rng.normal(scale=0.4, size=batch.sampled.shape).astype("f4")
    advantages = rng.normal(size=batch.advantages.shape).astype("f4")
    return batch._replace(sampled=batch.sampled + by, advantages=advantages)


def test_the_loss_is_the_clipped_surrogate_and_the_penalty_by_loops(
    task, params, batches
):
    batch = jax.device_get(moved(first_of(batches)))
    values, clipped, penalties = [], 0, 0.0
    for n, prompt in enumerate(batch.prompts):
        for g, answer in enumerate(batch.answers[n]):
            current = log_probs_by_hand(params, prompt, answer)
            for t in range(2):
                ratio = np.exp(current[t] - batch.sampled[n, g, t])
                advantage = batch.advantages[n, g]
                within = min(max(ratio, 1 - CLIP), 1 + CLIP)
                clipped += ratio != within
                apart = batch.reference[n, g, t] - current[t]
                penalties += (penalty := np.exp(apart) - apart - 1)
                gain = min(ratio * advantage, within * advantage)
                values.append(KL * penalty - gain)
    assert 0 < clipped < len(values)
    assert penalties > 0.1
    assert task.loss(params, batch) == pytest.approx(np.mean(values), rel=1e-4)


def test_the_loss_is_the_mean_over_the_problems_of_a_batch(task, params, batches):
    batch = moved(first_of(batches))
    alone = [
        task.loss(params, jax.tree.map(lambda leaf, k=n: leaf[k : k + 1], batch))
        for n in range(BATCH // UPDATES)
    ]
    assert task.loss(params, batch) == pytest.approx(np.mean(alone), rel=1e-4)


def test_the_first_gradient_of_a_step_is_that_of_the_policy_gradient(
    task, params, batches
):
    """REINFORCE with the group's advantages, and the penalty's gradient in closed form.

    That of exp(a) - a - 1, with a of slope -1 in the log-probability, is 1 - exp(a).
    """
    batch = first_of(batches)

    def policy_gradient(params):
        tokens = jnp.concatenate(
            [jnp.repeat(batch.prompts, GROUP, 0), batch.answers.reshape(-1, 2)], 1
        )
        scores = jax.nn.log_softmax(model_logits(params, tokens[:, :5])[:, 3:])
        picked = jnp.take_along_axis(scores, tokens[:, 4:, None], -1)[..., 0]
        frozen = jax.lax.stop_gradient(picked)
        slope = 1 - jnp.exp(batch.reference.reshape(-1, 2) - frozen)
        weight = KL * slope - batch.advantages.reshape(-1, 1)
        return jnp.mean(weight * picked)

    expected = jax.jit(jax.grad(policy_gradient))(params)
    found = jax.jit(jax.grad(task.loss))(params, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()
        ),
        found,
        expected,
    )


# The metrics.


def test_pass_at_1_is_how_often_sampled_answers_are_right(task, params):
    """Over very many samples to every problem, within five standard errors."""
    problems = jax.tree.map(lambda leaf: leaf[:7], arithmetic.split_problems().test)
    count = 1000
    noise = jax.random.gumbel(jax.random.key(9), (7, count, 2, 8))
    policy = functools.partial(rl._policy, MODEL)
    answers, _ = jax.jit(functools.partial(grpo.sample, policy))(
        params, problems.prompts, noise
    )
    right = (np.asarray(answers) == np.asarray(problems.answers)[:, None]).all(-1)
    found = float(task.evaluate(params)["pass@1"])
    error = np.sqrt(right.var(1).mean() / right.size)
    assert found > 20 / right.size
    assert abs(found - right.mean()) < 5 * error


def test_whoever_says_the_right_answers_has_both_metrics_at_1(task):
    """A table of answers in place of a model: by hand, with one problem to evaluate."""
    problem = jax.tree.map(lambda leaf: leaf[:1], arithmetic.split_problems().test)
    right = problem.answers[0]

    def sure(_, tokens):
        place = jnp.clip(jnp.arange(tokens.shape[-1]) - 3, 0, 1)
        scores = 50.0 * jax.nn.one_hot(right[place], 8)
        return jnp.broadcast_to(jax.nn.log_softmax(scores), (*tokens.shape, 8))

    noise = jax.random.gumbel(jax.random.key(0), (1, 8, 2, 8))
    answers, kept = grpo.sample(sure, None, problem.prompts, noise)
    assert np.all(arithmetic.reward(answers, right) == 1.0)
    found = grpo.log_probabilities(sure, None, problem.prompts, answers)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)
    np.testing.assert_array_equal(found, kept)


def test_more_is_better_of_both_metrics_and_no_key_is_needed(task, params):
    assert not any(metric.lower_is_better for metric in rl.METRICS)
    found, again = task.evaluate(params), task.evaluate(params)
    assert {*found} == {metric.name for metric in rl.METRICS}
    assert all(float(found[name]) == float(again[name]) for name in found)
    assert float(found["pass@1"]) <= 1.0


# The model.


def test_all_seeds_start_at_the_same_trained_model(task):
    keys = jax.random.split(jax.random.key(0), 3)
    starts = jax.device_get(jax.jit(jax.vmap(task.init))(keys))
    for leaf in jax.tree.leaves(starts):
        assert leaf.shape[0] == 3
        np.testing.assert_array_equal(leaf[1:], leaf[:-1])


def test_the_start_has_learned_from_its_problems(task):
    problems = jax.tree.map(lambda leaf: leaf[:64], arithmetic.split_problems().start)
    policy = functools.partial(rl._policy, MODEL)
    found = jax.jit(functools.partial(grpo.log_probabilities, policy))(
        task.init(jax.random.key(0)), problems.prompts, problems.answers[:, None]
    )
    # Guessing costs ln 8 = 2.079; what is new in 20 steps is little.
    assert -float(found.mean()) < 2.079 + 0.05


def test_states_of_the_policy_are_what_its_first_blocks_alone_give(
    task, params, batches
):
    batch = first_of(batches)
    states = np.asarray(task.states(params, batch))
    assert states.shape == (LAYERS + 1, BATCH // UPDATES, GROUP, 5, 8)
    prompts = np.repeat(np.asarray(batch.prompts)[:, None], GROUP, 1)
    tokens = np.concatenate([prompts, batch.answers[..., :1]], -1)
    table = np.asarray(params["embed"]["embedding"])
    np.testing.assert_allclose(states[0], table[tokens] / 0.02, rtol=1e-6)
    for layers in (1, LAYERS):
        cut = {
            **params,
            "blocks": jax.tree.map(lambda x, k=layers: x[:k], params["blocks"]),
        }
        model = GPT(8, layers, 8, 2, context=5)
        logits = jax.jit(model.apply)({"params": cut}, tokens.reshape(-1, 5))
        last = states[layers].reshape(-1, 5, 8)
        last = last / np.sqrt(np.square(last).mean(-1, keepdims=True) + 1e-6)
        last = last * params["final_norm"]["scale"]
        np.testing.assert_allclose(last @ table.T, logits, rtol=1e-3, atol=1e-4)


def test_depth_and_its_parts_hold_the_parameters_of_the_blocks(task, params):
    def leaves(depth):
        return len({group.role for group in gs.describe(depth, params).groups})

    assert leaves(task.depth) == len(jax.tree.leaves(params["blocks"]))
    parts = {name: leaves(depth) for name, depth in task.scopes.items()}
    assert parts == {"attention": 4, "mlp": 2, "norms": 2}
    assert sum(parts.values()) == leaves(task.depth)


def test_matrices_decay_and_those_of_the_blocks_are_muons(task, params):
    decayed, hidden = task.decayed(params), task.hidden(params)
    assert jax.tree.structure(hidden) == jax.tree.structure(params)
    for path, is_hidden in jax.tree_util.tree_leaves_with_path(hidden):
        name = jax.tree_util.keystr(path)
        assert is_hidden == ("kernel" in name), name
    for path, is_decayed in jax.tree_util.tree_leaves_with_path(decayed):
        assert is_decayed == ("norm" not in jax.tree_util.keystr(path)), path
