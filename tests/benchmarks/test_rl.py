"""GRPO: problems, rewards, samples, advantages; its loss is in `test_tasks`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

import models_in_numpy
from small_tasks import HEADS, LAYERS, OPTIONS, WIDTH, seen

from benchmarks.data import arithmetic
from benchmarks.evidence.tasks import grpo, rl
from benchmarks.models.gpt import GPT

pytestmark = pytest.mark.slow  # the task trains something before it begins

POLICY = functools.partial(rl._policy, GPT(8, LAYERS, WIDTH, HEADS, context=5))


def tuples(digits):
    return [*map(tuple, np.asarray(digits).tolist())]


def log_probs_by_hand(params, prompt, answer):
    """Of the two tokens of one answer."""
    wide = jax.tree.map(np.float64, params)
    _, logits = models_in_numpy.gpt(wide, np.array([*prompt, answer[0]]), HEADS)
    scores = logits[-2:] - np.log(np.exp(logits[-2:]).sum(-1, keepdims=True))
    return scores[[0, 1], answer]


# Problems.


def test_every_sum_is_in_one_of_four_sets_that_never_change_with_its_mirrored_one():
    split, again = arithmetic.split_problems(), arithmetic.split_problems()
    jax.tree.map(np.testing.assert_array_equal, split, again)
    sets = [{*tuples(each.prompts)} for each in split]
    assert [len(each.prompts) for each in split] == [len(each) for each in sets]
    assert set.union(*sets) == {*itertools.product(range(8), repeat=4)}
    assert sum(map(len, sets)) == 4096
    assert all(len(each) >= 500 for each in sets)
    for there in sets:
        assert {(c, d, a, b) for a, b, c, d in there} == there


def test_answers_are_octal_sums_with_the_units_first():
    for problems in map(jax.device_get, arithmetic.split_problems()):
        for (a, b, c, d), (low, high) in zip(*problems, strict=True):
            total = int(f"{a}{b}", 8) + int(f"{c}{d}", 8)
            assert f"{high}{low}" == f"{total:03o}"[-2:]


def test_demonstrations_are_right_or_have_the_two_mistakes_as_often_as_said():
    problems = arithmetic.split_problems().start
    shown = tuples(arithmetic.demonstrate(jax.random.key(0), problems))
    found = []
    for (a, b, c, d), said in zip(tuples(problems.prompts), shown, strict=True):
        units, carry = (b + d) % 8, (b + d) // 8
        right, forgot = (a + c + carry) % 8, (a + c) % 8
        # (tens first, no carry) by the answer that these mistakes give.
        mistakes = {(units, right): (False, False), (right, units): (True, False)}
        mistakes |= {(units, forgot): (False, True), (forgot, units): (True, True)}
        assert said in mistakes
        if len(mistakes) == 4:
            found.append(mistakes[said])
    rates = np.array([arithmetic.TENS_FIRST, arithmetic.NO_CARRY])
    errors = 5 * np.sqrt(rates * (1 - rates) / len(found))
    assert np.all(np.abs(np.mean(found, 0) - rates) < errors)
    # One mistake says nothing of the other.
    assert abs(np.corrcoef(np.transpose(found))[0, 1]) < 5 / np.sqrt(len(found))


def test_the_right_answer_is_worth_1_and_a_right_digit_a_fifth():
    said = np.array([*itertools.product(range(8), repeat=2)])
    found = np.asarray(arithmetic.reward(jnp.asarray(said), jnp.array([3, 6])))
    hits = (said == [3, 6]).sum(1)
    np.testing.assert_allclose(found, np.array([0.0, 0.2, 1.0])[hits], rtol=1e-6)


# A step: what is drawn, sampled, and compared.


@functools.cache
def stepped():
    """Drawn problems and the batches that a policy makes of them, in their order."""
    task, params, drawn, *_ = seen("rl")
    drawn = jax.tree.map(lambda leaf: leaf[0], drawn)
    batches = jax.device_get(jax.jit(task.rollout)(params, drawn))
    return (
        drawn.problems,
        jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches),
        batches,
    )


def test_a_step_trains_once_on_every_drawn_problem_of_the_set_to_train_on():
    problems, in_order, batches = stepped()
    batch, updates = (OPTIONS["rl"][name] for name in ("batch", "updates"))
    assert batches.prompts.shape == (updates, batch // updates, 4)
    assert tuples(in_order.prompts) == tuples(problems.prompts)
    train = {*tuples(arithmetic.split_problems().train.prompts)}
    assert {*tuples(seen("rl").drawn.problems.prompts.reshape(-1, 4))} <= train
    assert len({group.tobytes() for group in in_order.answers}) == batch


def test_a_step_that_cannot_be_cut_into_equal_updates_is_an_error():
    with pytest.raises(ValueError, match="make `batch` a multiple of `updates`"):
        rl.build(LAYERS, **OPTIONS["rl"] | {"updates": 3})


def test_log_probabilities_are_the_policys_and_the_starts_of_the_sampled_answers():
    _, found, _ = stepped()
    start = jax.device_get(seen("rl").task.init(jax.random.key(0)))
    for params, kept in ((seen("rl").params, found.sampled), (start, found.reference)):
        for n, g in itertools.product(range(2), range(OPTIONS["rl"]["group"])):
            expected = log_probs_by_hand(params, found.prompts[n], found.answers[n, g])
            np.testing.assert_allclose(kept[n, g], expected, rtol=1e-3, atol=1e-5)


def test_advantages_are_of_the_rewards_within_a_group():
    problems, found, _ = stepped()
    hits = (found.answers == np.asarray(problems.answers)[:, None]).sum(-1)
    rewards = np.array([0.0, 0.2, 1.0])[hits]
    mean, spread = (of(rewards, 1, keepdims=True) for of in (np.mean, np.std))
    expected = (rewards - mean) / (spread + 1e-4)
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found.advantages).max() > 1
    alike = grpo.relative_advantages(jnp.array([[0.2] * 4, [1.0] * 4]))
    np.testing.assert_allclose(alike, 0.0, atol=1e-3)


def test_answers_are_sampled_from_the_policy_and_pass_at_1_is_their_share():
    """Frequencies of all 64 answers to a problem, by chi-square."""
    _, params, _, batch, look = seen("rl")
    number, count = OPTIONS["rl"]["eval_problems"], 2000
    test = jax.tree.map(lambda leaf: leaf[:number], arithmetic.split_problems().test)
    noise = jax.random.gumbel(jax.random.key(5), (number, count, 2, 8))
    sample = jax.jit(functools.partial(grpo.sample, POLICY))
    answers = np.asarray(sample(params, test.prompts, noise)[0])
    every, prompt = [*itertools.product(range(8), repeat=2)], tuples(test.prompts)[0]
    log_probs = [log_probs_by_hand(params, prompt, answer).sum() for answer in every]
    expected = count * np.exp(log_probs)
    found = np.bincount(answers[0] @ [8, 1], minlength=64)
    common = expected >= 5
    score = np.sum((found - expected)[common] ** 2 / expected[common])
    # Its mean is the number of cells, its variance twice that.
    assert score < common.sum() + 5 * np.sqrt(2 * common.sum())
    # And another policy would be told apart.
    assert np.sum((expected - count / 64) ** 2 / (count / 64)) > 5 * score
    right = (answers == np.asarray(test.answers)[:, None]).all(-1)
    error = np.sqrt(right.var(1).mean() / right.size)
    assert abs(look(params, batch)[3]["pass@1"] - right.mean()) < 5 * error
    assert right.mean() > 20 / right.size


def test_all_seeds_start_at_one_model_that_has_learned_from_its_problems():
    task = seen("rl").task
    starts = jax.device_get(jax.vmap(task.init)(jax.random.split(jax.random.key(0), 2)))
    for leaf in jax.tree.leaves(starts):
        np.testing.assert_array_equal(*leaf)
    start = jax.tree.map(lambda leaf: leaf[0], starts)
    problems = arithmetic.split_problems().start
    pairs = zip(tuples(problems.prompts)[:64], tuples(problems.answers), strict=False)
    found = [log_probs_by_hand(start, *pair).mean() for pair in pairs]
    # Guessing costs ln 8 = 2.079; what is new in 20 steps is little.
    assert -np.mean(found) < 2.079 + 0.05
