"""The evidence harness keeps its promises: the search, the arms, the numbers, files."""

import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental.compilation_cache import compilation_cache

pytest.importorskip("flax")

import gradsmooth_optax as gs
from benchmarks.corpus import load_corpus, sample_windows, spread_windows
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import arms, presets, results, search, trials
from benchmarks.evidence.arms import (
    BASE,
    FULL,
    GROUPINGS,
    MEAN,
    NORM_MATCHED_MEAN,
    SMOOTHED,
    WINDOW,
    WITH_GROUPINGS,
    controls_of,
    plan_of_parts,
)
from benchmarks.evidence.mechanism import (
    before_and_after,
    model_probe,
    update_statistics,
)
from benchmarks.evidence.search import NoOptimum, Trial, next_rate, next_trial
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import TASKS, rl
from benchmarks.gpt import init_gpt
from benchmarks.json_files import COST, RESULTS
from benchmarks.optimizers import smoothed_optimizer, warmup_cosine
from benchmarks.training import TrainState, data_key, init_params, train_steps

ROOT = Path(__file__).parent.parent
TINY = {
    **{"depths": [3], "width": 8, "heads": 1, "context": 8, "batch": 4},
    **{"steps": 4, "warmup": 1, "eval_windows": 2, "micro_batches": 2, "lanes": 2},
    **{"screen_seeds": 2, "confirm_seeds": 2, "corpus": [str(ROOT / "LICENSE")]},
}
# All that are screened in any case; the best smoothed one has controls of its own.
ALL_ARMS = (BASE, *SMOOTHED, *controls_of(WINDOW), MEAN, NORM_MATCHED_MEAN)
by_name = pytest.mark.parametrize("arm", ALL_ARMS, ids=lambda arm: arm.name)


# The search for a learning rate.

# As far as a search may go, and so as many trials as it may take.
REACH = 8
STARTS = st.sampled_from([1.0, 1e-3, 8e-3, 0.3])
COSTS = st.one_of(st.floats(-10, 10), st.just(math.inf), st.integers(0, 2))


def searched(cost, start):
    """All that a search tries, {rate: cost}, in order."""
    costs = {}
    while (rate := next_rate(costs, start)) is not None:
        assert rate not in costs, "tried twice"
        costs[rate] = cost(rate)
        assert len(costs) <= 2 * REACH + 1
    return costs


@hypothesis.given(
    st.lists(COSTS, min_size=2 * REACH + 1, max_size=2 * REACH + 1), STARTS
)
@hypothesis.settings(max_examples=200)
def test_a_search_ends_with_no_better_rate_on_either_side_or_says_so(costs, start):
    of_rate = {start * 2.0**k: c for k, c in zip(range(-8, 9), costs, strict=True)}
    try:
        found = searched(of_rate.__getitem__, start)  # a KeyError: beyond its reach
    except NoOptimum:
        # Nothing else would do: either way from the start costs fall to the end.
        lowest = min(of_rate.values())
        assert lowest in (of_rate[start / 256], of_rate[start * 256]) or any(
            of_rate[start * 2.0**k] < of_rate[start] or of_rate[start] == math.inf
            for k in (-1, 1)
        )
        return
    best = search.best_rate(found)
    assert found[best] == min(found.values()) < math.inf
    assert found[best / 2] >= found[best] <= found[best * 2]
    # Factors of two without a gap.
    exponents = sorted(math.log2(rate / start) for rate in found)
    assert exponents == list(range(int(exponents[0]), int(exponents[-1]) + 1))


@hypothesis.given(
    st.lists(st.floats(0.1, 2), min_size=16, max_size=16), st.integers(-7, 7), STARTS
)
def test_a_search_finds_the_one_optimum_and_tries_little_else(slopes, optimum, start):
    def cost(rate):
        exponent = round(math.log2(rate / start))
        low, high = sorted([exponent, optimum])
        return sum(slopes[low + 8 : high + 8])

    found = searched(cost, start)
    assert search.best_rate(found) == start * 2.0**optimum
    assert len(found) == abs(optimum) + 3


@pytest.mark.parametrize("largest", range(-6, 3))
def test_rates_that_diverge_lead_to_smaller_ones(largest):
    found = searched(
        lambda rate: -rate if math.log2(rate) <= largest else math.inf, 1.0
    )
    assert search.best_rate(found) == 2.0**largest
    assert found[2.0 ** (largest + 1)] == math.inf


@pytest.mark.parametrize(("sign", "end"), [(1, 2.0**-8), (-1, 2.0**8)])
def test_a_search_without_end_names_the_rates_and_what_to_do(sign, end):
    with pytest.raises(NoOptimum) as error:
        searched(lambda rate: sign * rate, 1.0)
    message = str(error.value)
    assert f"{end:g}" in message
    assert "0.5, 1.0" in message
    assert "--option learning_rate=VALUE --out FILE" in message


def test_a_screen_is_its_mean_as_a_cost_and_infinite_where_a_seed_diverged():
    def result(stage, name, rate, *values):
        named = {"stage": stage, "name": name, "learning_rate": rate}
        return {**named, "metric_per_seed": list(values)}

    finished = [
        result("screen", BASE.name, 1.0, 2.0, 4.0),
        result("screen", BASE.name, 2.0, 1.0, None),
        result("screen", WINDOW.name, 4.0, 1.0, 1.0),
        result("confirm", BASE.name, 8.0, 1.0, 1.0),
    ]
    screened = functools.partial(search.screened, finished)
    assert screened(BASE, True) == {1.0: 3.0, 2.0: math.inf}
    assert screened(BASE, False) == {1.0: -3.0, 2.0: math.inf}


# The order of trials, on an experiment without training.

DEPTHS = (6, 12)
EVERY_ARM = dict.fromkeys(
    (*ALL_ARMS, *(control for arm in SMOOTHED for control in controls_of(arm)))
)
CELLS = [(layers, arm.name) for layers in DEPTHS for arm in EVERY_ARM]


def experiments(of_arms):
    cells = [(layers, arm.name) for layers in DEPTHS for arm in of_arms]
    return st.fixed_dictionaries(
        {
            # (exponent of the best rate, its metric) of every depth and arm
            "optima": st.fixed_dictionaries(
                dict.fromkeys(cells, st.tuples(st.integers(-2, 2), st.floats(1, 3)))
            ),
            "lower_is_better": st.booleans(),
            "start": STARTS,
        }
    )


EXPERIMENTS = experiments(EVERY_ARM)
few = hypothesis.settings(max_examples=5)


class Experiment:
    """Every arm has one best rate; a confirmation says the opposite of the screen."""

    def __init__(self, optima, lower_is_better, start, plan=FULL):
        self.optima, self.start, self.lower = optima, start, lower_is_better
        self.plan = plan

    def rate(self, layers, arm):
        return self.start * 2.0 ** self.optima[layers, arm.name][0]

    def cost(self, layers, arm):
        return self.optima[layers, arm.name][1]

    def best(self, layers):
        return min(self.plan.screened, key=functools.partial(self.cost, layers))

    def result(self, trial):
        off = math.log2(trial.learning_rate / self.rate(trial.layers, trial.arm))
        cost = self.cost(trial.layers, trial.arm) + abs(off)
        cost *= (1 if self.lower else -1) * (1 if trial.stage == "screen" else -1)
        return {
            "layers": trial.layers,
            "stage": trial.stage,
            "name": trial.arm.name,
            "learning_rate": trial.learning_rate,
            "metric_per_seed": [cost - 0.25, cost + 0.25],
        }

    def next(self, finished, also=()):
        return next_trial(finished, DEPTHS, self.start, self.lower, also, self.plan)

    def all(self, also=()):
        done, finished = [], []
        while trial := self.next(finished, also):
            done.append(trial)
            finished.append(json.loads(json.dumps(self.result(trial))))
        return done, finished


@few
@hypothesis.given(EXPERIMENTS)
def test_what_is_confirmed_is_what_the_protocol_says_and_nothing_twice(values):
    experiment = Experiment(**values)
    done, _ = experiment.all()
    assert max(Counter(done).values()) == 1
    for layers in DEPTHS:
        best_rates = {arm.name: experiment.rate(layers, arm) for arm in EVERY_ARM}
        expected = to_confirm(best_rates, experiment.best(layers).name)
        assert names_and_rates(done, layers, "confirm") == expected


def names_and_rates(done, layers, stage):
    here = [trial for trial in done if trial[:2] == (layers, stage)]
    return {(trial.arm.name, trial.learning_rate) for trial in here}


WINDOWS = (
    *("window(0.1)", "window(0.2)", "window(0.5)", "window(0.2), proj"),
    *("window(0.2), joined", "window(0.2), joined with mid_block"),
)


def controls_named(best):
    return {f"norm-matched {best}", f"shuffled {best}"} if best in WINDOWS else set()


def to_confirm(best_rates, best, more=()):
    """{(name, rate)} that the protocol wants, by the screen's best rates and arm.

    Args:
        more: names of other arms that are confirmed in any case.
    """
    main = {
        *more,
        *("base", "window(0.1)", "window(0.2)", "window(0.2), norm-preserving"),
        *("norm-matched window(0.2)", "shuffled window(0.2)", best),
    }
    controls = controls_named(best)
    mean, control = "mean over depth", "norm-matched mean over depth"
    of_mean = {best_rates[mean], best_rates[control]}
    return (
        {(name, best_rates[of]) for name in main | controls for of in main}
        | {(name, best_rates[of]) for of in controls for name in (best, of)}
        | {(name, rate) for name in (mean, control) for rate in of_mean}
        | {(mean, best_rates["base"])}
    )


@few
@hypothesis.given(EXPERIMENTS)
def test_every_arm_is_screened_from_the_bases_best_rate_at_every_depth(values):
    experiment = Experiment(**values)
    done, _ = experiment.all()
    start = experiment.start
    for layers in DEPTHS:
        controls = controls_of(experiment.best(layers))
        rates = {arm: [] for arm in (*ALL_ARMS, *controls)}
        for trial in done:
            if trial[:2] == (layers, "screen"):
                rates[trial.arm].append(trial.learning_rate)
        # That of the next depth begins where that of the last depth ended.
        assert rates[BASE][0] == start
        start = experiment.rate(layers, BASE)
        for arm in rates:
            best = experiment.rate(layers, arm)
            assert {best / 2, best, best * 2} <= set(rates[arm])
            if arm is not BASE:
                assert rates[arm][0] == start
    stages = [(trial.layers, trial.stage) for trial in done]
    assert list(dict.fromkeys(stages)) == [
        (layers, stage) for layers in DEPTHS for stage in ("screen", "confirm")
    ]


@few
@hypothesis.given(EXPERIMENTS, st.randoms(use_true_random=False))
def test_a_run_goes_on_with_the_same_trial_wherever_it_stopped(values, random):
    experiment = Experiment(**values)
    done, finished = experiment.all()
    for stop in [0, 1, *random.sample(range(len(done)), 8), len(done) - 1]:
        # Whatever the order in which the finished ones stand in the file.
        shuffled = random.sample(finished[:stop], stop)
        assert experiment.next(shuffled) == done[stop]
    assert experiment.next(finished[::-1]) is None


PARTS = plan_of_parts(("attention", "norms"))


@few
@hypothesis.given(experiments((BASE, *PARTS.screened)))
def test_with_parts_the_base_and_each_part_run_and_nothing_else_does(values):
    experiment = Experiment(**values, plan=PARTS)
    done, _ = experiment.all()
    names = {"base", *(f"window(0.5), {of}" for of in ("full", "attention", "norms"))}
    for layers in DEPTHS:
        best_rates = {experiment.rate(layers, arm) for arm in (BASE, *PARTS.screened)}
        screened = names_and_rates(done, layers, "screen")
        assert {name for name, _ in screened} == names
        assert names_and_rates(done, layers, "confirm") == {
            (name, rate) for name in names for rate in best_rates
        }
    assert max(Counter(done).values()) == 1


def test_an_arm_of_a_part_is_the_strong_window_on_that_part_alone():
    assert [
        (arm.operator, arm.alpha, arm.variant, arm.scope, arm.control)
        for arm in PARTS.screened
    ] == [
        ("window", 0.5, "standard", scope, None)
        for scope in ("full", "attention", "norms")
    ]


WITH_JOINED = (
    *EVERY_ARM,
    *GROUPINGS,
    *(control for arm in GROUPINGS for control in controls_of(arm)),
)
JOINED = ("window(0.2), joined", "window(0.2), joined with mid_block")


@few
@hypothesis.given(experiments(WITH_JOINED), st.booleans())
def test_with_groupings_both_are_confirmed_and_all_else_is_as_without(values, is_best):
    if is_best:  # of all arms, and so controlled
        values["optima"] |= {(layers, JOINED[1]): (1, 0.5) for layers in DEPTHS}
    experiment = Experiment(**values, plan=WITH_GROUPINGS)
    done, _ = experiment.all()
    for layers in DEPTHS:
        best = experiment.best(layers).name
        assert best == JOINED[1] or not is_best
        best_rates = {arm.name: experiment.rate(layers, arm) for arm in WITH_JOINED}
        expected = to_confirm(best_rates, best, more=JOINED)
        assert names_and_rates(done, layers, "confirm") == expected
        screened = {name for name, _ in names_and_rates(done, layers, "screen")}
        names = {*(arm.name for arm in ALL_ARMS), *JOINED, *controls_named(best)}
        assert screened == names


def test_tasks_have_the_arms_that_suit_them():
    assert presets.plan_of("lm", "full") == presets.plan_of("rl", "quick") == FULL
    assert presets.plan_of("diffusion", "full") == WITH_GROUPINGS
    for task in ("lm", "vit"):
        plan = presets.plan_of(task, "parts")
        scopes = [arm.scope for arm in plan.screened]
        assert scopes[:4] == ["full", "attention", "mlp", "norms"]
        assert not plan.controlled


def test_the_replications_rate_is_confirmed_whatever_the_screen_says():
    also = presets.confirmed_anyway("reverse", "adamw", "full")
    assert {(arm.name, rate) for arm, rate in also} == {
        ("base", 2e-3),
        ("window(0.2), proj", 2e-3),
    }
    experiment = Experiment(dict.fromkeys(CELLS, (0, 1.0)), True, 1e-3)
    without, _ = experiment.all()
    done, _ = experiment.all(also)
    added = set(done) - set(without)
    assert added == {Trial(n, "confirm", *a) for n in DEPTHS for a in also}
    assert presets.confirmed_anyway("lm", "adamw", "full") == ()


# The arms: each against plain loops.

NUM_LAYERS = 4
SHAPES = {"mlp_in": (3, 2), "mlp_norm": (3,)}
LEAF = {"mlp_in": "kernel", "mlp_norm": "scale"}


def tree_of(blocks, embedding):
    stacked = oracle.stacked_tree(blocks)
    return {
        "blocks": {role: {LEAF[role]: stacked[role]} for role in stacked},
        "embed": {"embedding": embedding},
    }


def blocks_of(tree):
    return oracle.unstacked({r: tree["blocks"][r][LEAF[r]] for r in SHAPES})


def gradients(step, num_layers=NUM_LAYERS, shapes=None):
    blocks = oracle.random_blocks(num_layers, shapes=shapes or SHAPES, seed=step)
    return tree_of(blocks, np.full((5, 3), 0.1 * step, np.float32))


def mean_of_all(blocks):
    mean = {role: np.mean([b[role] for b in blocks], axis=0) for role in blocks[0]}
    return [mean for _ in blocks]


def projections_only(blocks):
    smoothed = oracle.window([{"mlp_in": b["mlp_in"]} for b in blocks], 0.2)
    return [{**b, **s} for b, s in zip(blocks, smoothed, strict=True)]


PLAIN = {
    "base": lambda blocks: blocks,
    "window(0.1)": lambda blocks: oracle.window(blocks, 0.1),
    "window(0.2)": lambda blocks: oracle.window(blocks, 0.2),
    "window(0.5)": lambda blocks: oracle.window(blocks, 0.5),
    "window(0.2), proj": projections_only,
    "window(0.2), norm-preserving": lambda blocks: oracle.window(
        blocks, 0.2, variant="norm_preserving", norm_scope="param"
    ),
    "similarity_window(0.2)": lambda blocks: oracle.similarity_window(blocks, 0.2),
    # Before they have learned anything.
    "learn_alpha": lambda blocks: oracle.window(blocks, 0.1),
    "norm-matched window(0.2)": lambda blocks: oracle.norm_matched(
        blocks, lambda b: oracle.window(b, 0.2), "param"
    ),
    "mean over depth": mean_of_all,
    "norm-matched mean over depth": lambda blocks: oracle.norm_matched(
        blocks, mean_of_all, "param"
    ),
}
SHUFFLED = "shuffled window(0.2)"


@functools.cache
def tiny_task(layers=3):
    options = presets.options_of("lm", "adamw", "quick", TINY)
    return TASKS["lm"].build(layers, **presets.task_options(options))


@functools.cache
def steps_of(arm):
    """(Updates, uncoupled updates) of an arm over momentum, at two steps."""
    inner = optax.trace(0.5)
    coupled = arms.coupled(arm, inner, arms.scope_of(arm, tiny_task()))
    first, second = gradients(1), gradients(2)

    @jax.jit
    def steps(first, second):
        state, found = coupled.transformation.init(first), []
        for gradient in (first, second):
            before = coupled.inner(gradient, state, first)
            after, state = coupled.transformation.update(gradient, state, first)
            found.append((after, before))
        return found

    return steps(first, second)


def test_there_is_a_plain_computation_of_every_arm():
    assert {*PLAIN, SHUFFLED} == {arm.name for arm in ALL_ARMS}
    assert len(ALL_ARMS) == len({arm.name for arm in ALL_ARMS})


@pytest.mark.parametrize(
    "arm", [arm for arm in ALL_ARMS if arm.name in PLAIN], ids=lambda arm: arm.name
)
def test_an_arm_couples_as_plain_loops_do(arm):
    after, _ = steps_of(arm)[0]
    expected = PLAIN[arm.name](blocks_of(gradients(1)))
    oracle.assert_blocks_close(blocks_of(after), expected)
    np.testing.assert_array_equal(
        after["embed"]["embedding"], gradients(1)["embed"]["embedding"]
    )


@by_name
def test_the_inner_update_is_that_of_the_preconditioner_alone(arm):
    momentum = jax.tree.map(lambda g, h: 0.5 * g + h, gradients(1), gradients(2))
    for (_, before), expected in zip(
        steps_of(arm), (gradients(1), momentum), strict=True
    ):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), before, expected
        )


def test_an_arm_couples_the_scope_that_it_names():
    task = tiny_task()
    params = jax.eval_shape(task.init, jax.random.key(0))

    def coupled(scope):
        spec = arms.scope_of(dataclasses.replace(WINDOW, scope=scope), task)
        return {str(group.role) for group in gs.describe(spec, params).groups}

    kernels = {f"attention/{of}/kernel" for of in ("query", "key", "value", "out")}
    scales = {"attention_norm/scale", "mlp_norm/scale"}
    assert coupled("attention") == kernels
    assert coupled("norms") == scales
    assert coupled("proj") == kernels | {"mlp_in/kernel", "mlp_out/kernel"}
    assert coupled("full") == coupled("proj") | scales


def test_the_shuffled_window_couples_layers_that_are_no_neighbors():
    arm = next(arm for arm in ALL_ARMS if arm.name == SHUFFLED)
    coupled = arms.coupled(arm, optax.identity(), arms.scope_of(arm, tiny_task()))
    one_hot = {"blocks": {"w": {"kernel": np.eye(6, dtype="f4")}}}
    state = coupled.transformation.init(one_hot)
    update, again = (
        coupled.transformation.update(one_hot, state)[0]["blocks"]["w"]["kernel"]
        for _ in range(2)
    )
    matrix = np.asarray(update)
    np.testing.assert_array_equal(matrix, again)
    assert not np.diag(matrix, 1).any()
    assert not np.diag(matrix, -1).any()
    np.testing.assert_allclose(
        np.sort(matrix, None), np.sort(oracle.window_matrix(6, 0.2), None), rtol=1e-6
    )
    np.testing.assert_allclose(matrix.sum(0), 1, rtol=1e-6)


def test_the_file_tells_arms_apart_as_the_protocol_does():
    """operator, alpha, variant, scope and control of every arm, by its name."""
    assert {
        arm.name: (arm.operator, arm.alpha, arm.variant, arm.scope, arm.control)
        for arm in ALL_ARMS
    } == {
        "base": ("none", 0.0, "standard", "full", None),
        "window(0.1)": ("window", 0.1, "standard", "full", None),
        "window(0.2)": ("window", 0.2, "standard", "full", None),
        "window(0.5)": ("window", 0.5, "standard", "full", None),
        "window(0.2), proj": ("window", 0.2, "standard", "proj", None),
        "window(0.2), norm-preserving": (
            *("window", 0.2, "norm_preserving", "full", None),
        ),
        "similarity_window(0.2)": (
            *("similarity_window", 0.2, "standard", "full", None),
        ),
        "learn_alpha": ("learn_alpha", 0.1, "standard", "full", None),
        "norm-matched window(0.2)": (
            *("window", 0.2, "standard", "full", "norm_matched"),
        ),
        "shuffled window(0.2)": (
            *("window", 0.2, "standard", "full", "shuffled_depth"),
        ),
        "mean over depth": ("mean", 1.0, "standard", "full", "full_average"),
        "norm-matched mean over depth": (
            *("mean", 1.0, "standard", "full", "norm_matched"),
        ),
    }


def test_fixed_windows_have_controls_of_their_own():
    for arm in ALL_ARMS:
        controls = controls_of(arm)
        if (arm.operator, arm.variant, arm.control) == ("window", "standard", None):
            assert [control.control for control in controls] == [
                *("norm_matched", "shuffled_depth"),
            ]
        elif arm.control is None:
            assert controls == ()
        for control in controls:
            # All else is the arm's.
            named = {"name": arm.name, "control": arm.control}
            assert dataclasses.replace(control, **named) == arm
            assert control.name.endswith(f" {arm.name}")


@pytest.mark.parametrize("control", ["norm_matched", "shuffled_depth"])
def test_controls_of_projections_leave_norm_scales_alone(control):
    (arm,) = (a for a in controls_of(arms.PROJECTIONS) if a.control == control)
    (after, before), _ = steps_of(arm)
    after, before = after["blocks"], before["blocks"]
    np.testing.assert_array_equal(
        after["mlp_norm"]["scale"], before["mlp_norm"]["scale"]
    )
    assert not np.allclose(after["mlp_in"]["kernel"], before["mlp_in"]["kernel"])


# The trials.


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """The environment in which another process finds what this one has compiled."""
    directory = tmp_path_factory.mktemp("compiled")
    values = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in values.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def tiny_job(optimizer="adamw"):
    return presets.job_of(optimizer, presets.options_of("lm", optimizer, "quick", TINY))


@functools.cache
def tiny_measures(job):
    return trials.build_measures(job, tiny_task())


@functools.cache
def tiny_trial(job, arm):
    return trials.build_trial(job, tiny_task(), arm, tiny_measures(job))


def trained(arm, rate, seeds):
    return tiny_trial(tiny_job(), arm)(rate, seeds, lambda steps: None)


@pytest.mark.parametrize("arm", [BASE, WINDOW], ids=lambda arm: arm.name)
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_an_arm_is_the_optimizer_of_the_pretraining_benchmark(name, arm):
    job, rate, shapes = tiny_job(name), 0.03, {"mlp_in": (3, 3), "mlp_norm": (3,)}
    ours = trials.build_optimizer(job, tiny_task(), arm)
    theirs = smoothed_optimizer(
        name,
        warmup_cosine(rate, job.warmup, job.steps),
        arm.alpha,
        weight_decay=job.weight_decay,
        clip=job.clip,
    )
    params, *batches = (gradients(i, shapes=shapes) for i in range(1, 4))

    @jax.jit
    def updates(params, batches):
        found = []
        for tx, state in (
            (ours, trials.at_rate(ours.init(params), rate)),
            (theirs, theirs.init(params)),
        ):
            for gradient in batches:
                update, state = tx.update(gradient, state, params)
            found.append(update)
        return found

    assert np.linalg.norm(batches[0]["blocks"]["mlp_in"]["kernel"]) > job.clip
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7),
        *updates(params, batches),
    )


RATE, SEEDS = 0.02, [3, 5]
CORPUS = load_corpus([ROOT / "LICENSE"], 9)
HAND = smoothed_optimizer(
    "adamw", warmup_cosine(RATE, 1, 4), 0.2, weight_decay=0.1, clip=1.0
)


@functools.cache
def hand_step():
    """One step of one seed on a batch of four, as anybody would write it."""
    loss = tiny_task().loss

    @jax.jit
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        update, state = HAND.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value, gradient

    return step


@functools.cache
def by_hand(lane):
    """Losses of all steps, the last parameters and state, and the batch of step 4."""
    params = init_params(tiny_task().init, jnp.array(SEEDS))
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[lane], params)
    key = jax.random.fold_in(jax.random.key(SEEDS[lane]), 1)
    draw = jax.jit(functools.partial(sample_windows, batch=4, context=8))
    batches = [draw(CORPUS.train, key, number) for number in range(5)]
    state, losses = jax.jit(HAND.init)(params), []
    for batch in batches[:4]:
        params, state, loss, _ = hand_step()(params, state, batch)
        losses.append(float(loss))
    return losses, params, state, batches[4]


def loss_and_gradient(lane, two_windows):
    """At the end of training."""
    _, params, state, _ = by_hand(lane)
    # Twice the same have the same mean, and the shape that is compiled already.
    *_, loss, gradient = hand_step()(params, state, np.tile(two_windows, (2, 1)))
    return float(loss), jax.device_get(gradient)


def test_a_trial_is_what_a_loop_over_seeds_and_steps_gives():
    measured, job = trained(WINDOW, RATE, SEEDS), tiny_job()
    assert (job.weight_decay, job.clip, job.warmup, job.steps) == (0.1, 1.0, 1, 4)
    windows = spread_windows(CORPUS.validation, 2, 8)
    for lane in range(2):
        losses, *_ = by_hand(lane)
        np.testing.assert_allclose(measured.train_loss[:, lane], losses, rtol=2e-4)
        metric, _ = loss_and_gradient(lane, windows)
        np.testing.assert_allclose(
            measured.metrics["validation loss"][lane], metric, rtol=2e-4
        )
    assert measured.train_loss.shape == (4, 2)
    assert measured.seconds_per_step > 0


def cosine(x, y):
    return np.sum(x * y, -1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def layer_vectors(tree):
    """(L, n): everything of a block as one vector."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree["blocks"])]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def like(tree, value):
    return jax.tree.map(lambda leaf: value, tree)


def roughness(u):
    return np.sum(np.diff(u, axis=0) ** 2) / np.sum(u**2)


@functools.cache
def compiled_states():
    return jax.jit(tiny_task().states)


def test_the_mechanism_is_measured_on_the_batch_that_comes_next():
    """After the last step, against NumPy on gradients, updates and states."""
    mechanism = trained(WINDOW, RATE, SEEDS).mechanism
    assert tiny_job().probed == [1, 2, 3, 4]
    for lane in range(2):
        _, params, state, batch = by_hand(lane)
        parts = [loss_and_gradient(lane, batch[k : k + 2])[1] for k in (0, 2)]
        a, b = (layer_vectors(part) for part in parts)
        noise = np.sum((a - b) ** 2) / 2 / np.sum(((a + b) / 2) ** 2)

        whole = jax.tree.map(lambda x, y: (x + y) / 2, *parts)
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(whole)))
        clipped = jax.tree.map(operator.truediv, whole, like(whole, max(1.0, norm)))
        m, v = (optax.tree_utils.tree_get(state, name) for name in ("mu", "nu"))
        adam = jax.tree.map(  # its fifth step, with b1 0.9 and b2 0.95
            lambda m, v, g: (
                ((0.9 * m + 0.1 * g) / (1 - 0.9**5))
                / (np.sqrt((0.95 * v + 0.05 * g**2) / (1 - 0.95**5)) + 1e-8)
            ),
            *(jax.device_get(m), jax.device_get(v), clipped),
        )
        before = layer_vectors(adam)
        after = oracle.window_matrix(3, 0.2) @ before

        states = np.asarray(compiled_states()(params, batch), np.float64)
        steps = np.diff(states, axis=0)
        bent = np.sum(steps / np.linalg.norm(steps, axis=-1, keepdims=True), axis=0)
        expected = {
            "roughness": {"before": roughness(before), "after": roughness(after)},
            "adjacent_cosine": {
                "before": np.mean(cosine(before[:-1], before[1:])),
                "after": np.mean(cosine(after[:-1], after[1:])),
            },
            "line_shape_score": np.mean(3 / np.linalg.norm(bent, axis=-1)),
            "residual_alignment": np.mean(cosine(steps[:-1], steps[1:])),
            "gradient_noise": noise,
        }
        found = jax.tree.map(lambda values, lane=lane: values[-1, lane], mechanism)
        jax.tree.map(
            # Adam amplifies the rounding of small gradients over the steps.
            lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-3, atol=5e-4),
            found,
            expected,
        )
    assert all(x.shape == (4, 2) for x in jax.tree.leaves(mechanism))


# The same measures on made-up numbers, of two stacks of layers.


def two_stacks(seed):
    rng = np.random.default_rng(seed)
    shapes = {"encoder": (4, 2, 3), "decoder": (3, 5), "embedding": (6,)}
    return {
        name: {"kernel": rng.normal(size=shape).astype("f4")}
        for name, shape in shapes.items()
    }


def made_up_task(draw, rollout=None):
    """Whose gradient is the mean of a batch, of trees like the parameters."""

    def loss(params, batch):
        means = jax.tree.map(lambda leaf: leaf.mean(0), batch)
        return optax.tree_utils.tree_vdot(params, means)

    def states(params, batch):
        scale = params["embedding"]["kernel"][0]
        return scale * jnp.moveaxis(batch["encoder"]["kernel"], 1, 0)

    return Task(
        depth=gs.first_match(
            *(gs.scanned(f"{name}/", stack=name) for name in ("encoder", "decoder"))
        ),
        data=stacked_trees(4),
        init=None,
        draw=draw,
        loss=loss,
        evaluate=None,
        states=states,
        decayed=None,
        hidden=None,
        rollout=rollout,
    )


def stacked_trees(number):
    return jax.tree.map(lambda *x: np.stack(x), *map(two_stacks, range(number)))


def of_step(data, key, step):
    """A batch that the seed and the step decide."""
    return jax.tree.map(lambda leaf: leaf + step + jax.random.normal(key), data)


def two_batches(params, drawn):
    """The first of them depends on the parameters, the second is far off."""
    first = jax.tree.map(lambda leaf, of: leaf + 0.1 * of[None], drawn, params)
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 100 * leaf**2]), first)


def test_with_a_rollout_the_model_is_measured_on_the_first_of_its_batches():
    params, seed, step = two_stacks(9), 3, 7
    probe = jax.jit(model_probe(made_up_task(of_step, two_batches), 2))
    task = made_up_task(of_step)
    gradient, measures = probe(params, seed, task.data, step)

    drawn = of_step(task.data, data_key(seed), step)
    batch = jax.device_get(two_batches(params, drawn))
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    jax.tree.map(
        lambda found, of: np.testing.assert_allclose(found, of.mean(0), rtol=1e-4),
        *(gradient, batch),
    )
    blocks = np.concatenate(
        [batch[name]["kernel"].reshape(4, -1) for name in ("encoder", "decoder")], 1
    )
    a, b = (blocks[k : k + 2].mean(0) for k in (0, 2))
    noise = np.sum((a - b) ** 2) / 2 / np.sum(((a + b) / 2) ** 2)
    np.testing.assert_allclose(measures["gradient_noise"], noise, rtol=1e-3)
    states = np.asarray(task.states(params, batch), np.float64)
    steps = np.diff(states, axis=0)
    alignment = np.mean(cosine(steps[:-1], steps[1:]))
    np.testing.assert_allclose(measures["residual_alignment"], alignment, atol=1e-4)


def test_an_update_is_compared_with_itself_before_coupling():
    coupled = arms.coupled(WINDOW, optax.trace(0.5), arms.scope_of(WINDOW, tiny_task()))
    transformation, first, second = coupled.transformation, *map(gradients, (1, 2))

    @jax.jit
    def updates(first, second):
        _, state = transformation.update(first, transformation.init(first), first)
        return before_and_after(coupled)(second, state, first)

    found = updates(first, second)
    momentum = jax.tree.map(lambda g, h: 0.5 * g + h, first, second)
    assert {*found} == {"before", "after"}
    oracle.assert_blocks_close(blocks_of(found["before"]), blocks_of(momentum))
    smoothed = oracle.window(blocks_of(momentum), 0.2)
    oracle.assert_blocks_close(blocks_of(found["after"]), smoothed)


def test_statistics_of_an_update_are_over_all_stacks_and_the_blocks_alone():
    updates = two_stacks(5)
    found = jax.jit(functools.partial(update_statistics, made_up_task(of_step)))(
        updates
    )
    stacks = [updates[k]["kernel"] for k in ("encoder", "decoder")]
    stacks = [stack.reshape(len(stack), -1).astype(np.float64) for stack in stacks]
    rough = sum(np.sum(np.diff(u, axis=0) ** 2) for u in stacks)
    squares = sum(np.sum(u**2) for u in stacks)
    cosines = np.concatenate([cosine(u[:-1], u[1:]) for u in stacks])
    assert found["roughness"] == pytest.approx(rough / squares, rel=1e-5)
    assert found["adjacent_cosine"] == pytest.approx(cosines.mean(), rel=1e-4)


def timeless(measured):
    return measured._replace(seconds_per_step=0.0)


def test_a_trial_again_gives_the_same_bits_and_lanes_do_not_matter():
    many = timeless(trained(WINDOW, RATE, [0, 1, 2, 3]))
    first, second = (timeless(trained(WINDOW, RATE, s)) for s in ([0, 1], [2, 3]))
    jax.tree.map(
        np.testing.assert_array_equal,
        many._replace(seconds_per_step=None),
        jax.tree.map(
            lambda x, y: np.concatenate([x, y], axis=-1),
            first._replace(seconds_per_step=None),
            second._replace(seconds_per_step=None),
        ),
    )
    again = timeless(trained(WINDOW, RATE, [0, 1]))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_arms_start_from_the_same_parameters_and_data_and_end_apart():
    base, window = (trained(arm, RATE, [0, 1]) for arm in (BASE, WINDOW))
    np.testing.assert_allclose(base.train_loss[0], window.train_loss[0], rtol=1e-6)
    losses = (arm.metrics["validation loss"] for arm in (base, window))
    assert np.all(np.not_equal(*losses))


def as_result(arm, rate, seeds):
    trial = Trial(3, "screen", arm, rate)
    measured = trained(arm, rate, seeds)
    names = ["validation loss"]
    return results.arm_result(trial, seeds, tiny_job(), measured, names)


def test_arms_are_judged_by_the_first_metric_named_and_the_others_are_kept():
    measured = trials.Measured(
        metrics={
            "accuracy": np.array([0.5, np.nan]),
            "loss": np.array([1.25, 2.5]),
            "zeal": np.array([7.0, 8.0]),
        },
        train_loss=np.ones((4, 2)),
        mechanism={},
        before={"loss": np.array([3.0, 4.0])},
        seconds_per_step=0.01,
    )
    trial = Trial(3, "screen", WINDOW, RATE)
    names = ["loss", "zeal", "accuracy"]
    found = results.arm_result(trial, [0, 1], tiny_job(), measured, names)
    assert found["metric_per_seed"] == [1.25, 2.5]
    assert [*found["other_metrics_per_seed"].items()] == [
        *(("zeal", [7.0, 8.0]), ("accuracy", [0.5, None])),
    ]
    assert found["diverged"] == [False, False]
    assert found["metrics_before"] == {"loss": 3.5}  # of all seeds


def test_an_arm_that_diverges_is_recorded_as_diverged(tmp_path):
    path, seeds = tmp_path / "a.json", [0, 1]
    written = [as_result(WINDOW, rate, seeds) for rate in (1e30, RATE)]
    results.write_results({"config": {}, "sittings": []}, written, path)

    def not_json(word):
        raise AssertionError(f"{word} is no JSON")

    lost, kept = json.loads(path.read_text(), parse_constant=not_json)["arms"]
    assert lost["metric_per_seed"] == [None, None]
    assert lost["diverged"] == [True, True]
    assert lost["curve"]["train_loss"][-1] is None
    assert lost["learning_rate"] == 1e30
    assert kept["diverged"] == [False, False]
    assert np.isfinite(kept["metric_per_seed"]).all()
    # It was tried, and is not chosen.
    costs = search.screened([lost, kept], WINDOW, True)
    assert costs[1e30] == math.inf
    assert search.best_rate(costs) == RATE


# The command, with two arms.


def two_arms(monkeypatch):
    """Only the base and one window; what training compiles is shared by the tests."""
    plan = arms.Plan((WINDOW,), (WINDOW,), controlled=False)
    monkeypatch.setattr(presets, "plan_of", lambda task, preset: plan)
    monkeypatch.setattr(command, "build_measures", lambda job, task: None)
    monkeypatch.setattr(
        command, "build_trial", lambda job, task, arm, _: tiny_trial(job, arm)
    )


PROGRAM = """
import sys
from benchmarks.evidence import __main__ as command, arms, presets
plan = arms.Plan((arms.WINDOW,), (arms.WINDOW,), controlled=False)
presets.plan_of = lambda task, preset: plan
sys.exit(command.main(sys.argv[1:]))
"""
VOLATILE = {"date", "commit", "versions", "machine", "sittings"}


def options(path, preset="quick", **changes):
    given = [f"{name}={json.dumps(value)}" for name, value in (TINY | changes).items()]
    named = [word for option in given for word in ("--option", option)]
    return ["--task", "lm", "--preset", preset, *named, "--out", str(path)]


def lasting(path):
    """What of a result file does not depend on when and where it was made."""
    value = json.loads(path.read_text())
    kept = {key: value[key] for key in value if key not in VOLATILE}
    for arm in kept["arms"]:
        del arm["seconds_per_step"]
    return kept


def arm_lines(path):
    return [x.rstrip(",") for x in path.read_text().splitlines() if '"stage"' in x]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The result file of a run that nothing interrupted."""
    path = tmp_path_factory.mktemp("finished") / "a.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        two_arms(monkeypatch)
        assert command.main(options(path)) == 0
    return path


def test_a_killed_run_goes_on_and_gives_the_numbers_of_one_that_was_not(
    finished, compiled_programs, tmp_path, monkeypatch, capsys
):
    path, few = tmp_path / "a.json", 4
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *options(path)],
        cwd=ROOT,
        env=os.environ | compiled_programs,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for line, _ in zip(process.stdout, range(few), strict=False):
            assert line.startswith("screen 3 layers, ")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = arm_lines(path)
    assert few <= len(kept) < len(arm_lines(finished))

    two_arms(monkeypatch)
    assert command.main(options(path)) == 0
    assert f"{path} has {len(kept)} trials" in capsys.readouterr().out
    assert arm_lines(path)[: len(kept)] == kept
    assert lasting(path) == lasting(finished)
    sittings = json.loads(path.read_text())["sittings"]
    assert len(sittings) == 2
    assert len(json.loads(finished.read_text())["sittings"]) == 1
    # No lock and no half file stay behind.
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_on_two_devices_weights_and_batches_are_split():
    program = """
import jax
from benchmarks.evidence import placement
from benchmarks.evidence.tasks import reverse
leaf = jax.ShapeDtypeStruct
shapes = {"kernel": leaf((2, 3, 8, 4), "f4"), "odd": leaf((2, 3, 5), "f4")}
split, whole = jax.tree.leaves(placement.shardings(shapes))
assert split.shard_shape((2, 3, 8, 4)) == (2, 3, 8, 2)
assert whole.is_fully_replicated
sizes = dict(width=8, heads=2, length=4, vocabulary=8, batch=4, eval_sequences=2)
task = placement.with_split_batches(reverse.build(2, **sizes))
batch = jax.jit(lambda key: task.draw(None, key, 0))(jax.random.key(0))
assert batch.sharding.shard_shape((4, 4)) == (2, 4)
"""
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        check=True,
    )


def test_a_finished_run_trains_nothing_again(finished, monkeypatch, capsys):
    two_arms(monkeypatch)
    before = finished.read_bytes()
    monkeypatch.setattr(command, "build_trial", None)
    assert command.main(options(finished)) == 0
    assert finished.read_bytes() == before
    count = len(arm_lines(finished))
    assert f"all {count} trials are in {finished}" in capsys.readouterr().out


def test_no_minutes_begin_no_trial(finished, tmp_path, monkeypatch, capsys):
    two_arms(monkeypatch)
    path = tmp_path / "a.json"
    assert command.main([*options(path), "--minutes", "0"]) == 0
    assert "0 minutes are over: the same command goes on" in capsys.readouterr().out
    assert not path.exists()

    value = json.loads(finished.read_text())
    value["arms"] = value["arms"][:3]
    path.write_text(before := json.dumps(value))
    assert command.main([*options(path), "--minutes", "0"]) == 0
    assert path.read_text() == before


def test_ctrl_c_keeps_the_finished_trials(tmp_path, monkeypatch, capsys):
    two_arms(monkeypatch)
    path, run = tmp_path / "a.json", tiny_trial(tiny_job(), BASE)

    def interrupted(rate, seeds, progress):
        if path.exists():
            raise KeyboardInterrupt
        return run(rate, seeds, progress)

    monkeypatch.setattr(command, "build_trial", lambda *_: interrupted)
    assert command.main(options(path)) == 130
    assert "finished trials are kept" in capsys.readouterr().out
    assert len(arm_lines(path)) == 1


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_results_of_other_options_are_an_error_that_names_them(finished, capsys):
    before = finished.read_bytes()
    message = error_of(options(finished, width=16, clip=None), capsys)
    assert "width was 8, now 16" in message
    assert "clip was 1.0, now None" in message
    assert "batch" not in message
    assert "--out" in message
    assert finished.read_bytes() == before


def test_results_of_another_optimizer_are_an_error(tmp_path, monkeypatch, capsys):
    """AdamW and Muon have the same options for this task."""
    monkeypatch.setattr(command, "build_measures", lambda job, task: None)
    monkeypatch.setattr(command, "build_trial", fake_trial)
    path = tmp_path / "a.json"
    arguments = ["--task", "reverse", "--preset", "quick", "--out", str(path)]
    assert command.main([*arguments, "--option", "learning_rate=8e-3"]) == 0
    before = path.read_bytes()
    arguments += ["--option", "learning_rate=8e-3", "--optimizer", "muon"]
    message = error_of(arguments, capsys)
    assert "adamw" in message
    assert "muon" in message
    assert path.read_bytes() == before


def test_a_result_file_in_use_is_refused_and_free_again_afterwards(tmp_path, capsys):
    path = tmp_path / "a.json"
    with results.locked(path):
        assert "another process writes" in error_of(options(path), capsys)
    assert command.main([*options(path), "--minutes", "0"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "lm", "--option", "widht=3"], ["'widht'", "width", "depths"]),
        (
            ["--task", "reverse", "--preset", "long"],
            ["'long'", "'reverse'", "full, quick"],
        ),
        (["--task", "lm", "--preset", "huge"], ["huge", "small-batch"]),
        (["--task", "chess"], ["chess", "reverse"]),
        (["--task", "lm", "--optimizer", "adam"], ["adam", "muon"]),
        (["--task", "lm", "--option", "width"], ["NAME=VALUE"]),
        (
            ["--task", "lm", "--option", 'corpus=["nowhere.txt"]'],
            ["nowhere.txt", "no corpus file"],
        ),
    ],
    ids=lambda value: value[-1] if value[0].startswith("--") else "",
)
def test_what_does_not_exist_is_an_error_that_lists_what_does(
    arguments, words, tmp_path, capsys
):
    message = error_of([*arguments, "--out", str(tmp_path / "a.json")], capsys)
    for word in words:
        assert word in message


def test_results_belong_under_their_task_and_quick_ones_are_not_committed():
    results_of = ROOT / "benchmarks" / "results"
    found = functools.partial(command.result_path, "lm", "sgd")
    assert found("full").resolve() == results_of / "lm" / "sgd.json"
    assert found("deep").resolve() == results_of / "lm" / "sgd-deep.json"
    assert results_of not in found("quick").resolve().parents
    assert results_of not in found("tpu").resolve().parents


# All arms, on measurements that cost nothing.


def fake_trial(job, task, arm, measures):
    """Every rate but one is worse; steps and seeds are counted as in training."""
    best = 8e-3 * (2 if arm.name == "window(0.5)" else 1)

    def run(rate, seeds, progress):
        for _ in range(len(seeds) // job.lanes):
            progress(job.steps)
        cost = 2 + abs(math.log2(rate / best)) + len(arm.name) / 100
        of_probes = np.ones((len(job.probed), len(seeds)))
        return trials.Measured(
            metrics={
                metric.name: np.asarray(seeds) / 100 + cost + place
                for module in TASKS.values()
                for place, metric in enumerate(module.METRICS)
            },
            train_loss=np.full((job.steps, len(seeds)), 2.0),
            mechanism={
                **dict.fromkeys(
                    ("gradient_noise", "line_shape_score", "residual_alignment"),
                    of_probes,
                ),
                "adjacent_cosine": {"before": of_probes, "after": of_probes},
                "roughness": {"before": of_probes, "after": of_probes},
            },
            before={},
            seconds_per_step=0.01,
        )

    return run


HEADER = {
    *("task", "optimizer", "metric", "config", "versions", "commit", "date", "arms"),
    *("preset", "machine", "sittings", "other_metrics"),  # ours
}
OF_ARM = {
    *("name", "stage", "operator", "alpha", "variant", "scope", "control"),
    *("learning_rate", "metric_per_seed", "curve", "mechanism", "seconds_per_step"),
    *("diverged", "layers", "seeds", "other_metrics_per_seed"),
}
OF_MECHANISM = {
    *("roughness", "adjacent_cosine", "line_shape_score", "residual_alignment"),
    *("gradient_noise", "steps"),
}


def assert_complete(value, screen_seeds, confirm_seeds):
    """What the protocol asks of a finished result file."""
    # Files of one metric that are older than the others leave these out.
    value = {"other_metrics": [], **value}
    assert set(value) == HEADER
    others = [metric["name"] for metric in value["other_metrics"]]
    assert set(value["metric"]) == {"name", "unit", "lower_is_better"}
    sign = 1 if value["metric"]["lower_is_better"] else -1
    for arm in value["arms"]:
        before = arm.pop("metrics_before", {})
        assert set(before) <= {value["metric"]["name"], *others}
        assert not before or arm["operator"] == "none"
        of_others = arm.setdefault("other_metrics_per_seed", {})
        assert set(arm) == OF_ARM
        assert list(of_others) == others
        assert {len(values) for values in of_others.values()} <= {len(arm["seeds"])}
        assert set(arm["mechanism"]) == OF_MECHANISM
        assert set(arm["curve"]) == {"steps", "train_loss"}
        assert len(arm["curve"]["steps"]) == len(arm["curve"]["train_loss"]) <= 20
        assert arm["curve"]["steps"][-1] == value["config"]["steps"]
        assert arm["mechanism"]["steps"][-1] == value["config"]["steps"]
        assert len(arm["metric_per_seed"]) == len(arm["seeds"]) == len(arm["diverged"])
        lost = [metric is None for metric in arm["metric_per_seed"]]
        assert arm["diverged"] == lost
    keys = [
        (arm["layers"], arm["stage"], arm["name"], arm["learning_rate"])
        for arm in value["arms"]
    ]
    assert max(Counter(keys).values()) == 1

    stages = {"screen": screen_seeds, "confirm": confirm_seeds}
    seeds = {
        stage: {tuple(a["seeds"]) for a in value["arms"] if a["stage"] == stage}
        for stage in stages
    }
    for stage, at_least in stages.items():
        (of_all,) = seeds[stage]  # the same in every arm: they are paired
        assert len({*of_all}) == len(of_all) >= at_least
    assert {*next(iter(seeds["screen"]))}.isdisjoint(next(iter(seeds["confirm"])))

    for layers in value["config"]["depths"]:
        here = [arm for arm in value["arms"] if arm["layers"] == layers]
        best_rates, lowest = {}, {}
        in_screen = {arm["name"] for arm in here if arm["stage"] == "screen"}
        for name in in_screen:
            costs = {
                arm["learning_rate"]: math.inf
                if None in arm["metric_per_seed"]
                else sign * np.mean(arm["metric_per_seed"])
                for arm in here
                if (arm["stage"], arm["name"]) == ("screen", name)
            }
            best = best_rates[name] = min(sorted(costs), key=costs.__getitem__)
            lowest[name], rates = costs[best], sorted(costs)
            assert rates[0] < best < rates[-1], (layers, name)
            assert np.all(np.divide(rates[1:], rates[:-1]) <= 2)
        plan = presets.plan_of(value["task"], value["preset"])
        smoothed = [arm.name for arm in plan.screened]
        best = min(smoothed, key=lowest.__getitem__)
        if value["preset"] == "parts":
            wanted = {"base", *smoothed}
            to_be_there = {*itertools.product(wanted, best_rates.values())}
        else:
            more = {*JOINED} & {*smoothed}
            wanted = {arm.name for arm in ALL_ARMS} | more | controls_named(best)
            to_be_there = to_confirm(best_rates, best, more)
        assert in_screen == wanted
        confirmed = {
            (a["name"], a["learning_rate"]) for a in here if a["stage"] == "confirm"
        }
        assert not to_be_there - confirmed, layers


def test_a_run_of_all_arms_leaves_a_file_as_the_protocol_describes_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "build_measures", lambda job, task: None)
    monkeypatch.setattr(command, "build_trial", fake_trial)
    path = tmp_path / "a.json"
    changes = {"depths": [2, 3], "screen_seeds": 4, "confirm_seeds": 16, "steps": 40}
    assert command.main(options(path, **changes)) == 0
    value = json.loads(path.read_text())
    assert_complete(value, 4, 16)
    assert value["config"] == presets.options_of("lm", "adamw", "quick", TINY | changes)
    assert (value["task"], value["optimizer"], value["preset"]) == (
        *("lm", "adamw", "quick"),
    )
    assert value["arms"][0]["seeds"] == [0, 1, 2, 3]
    assert value["arms"][-1]["seeds"] == list(range(4, 20))
    assert path.stat().st_size < 500_000
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(value["arms"]) + 1
    assert printed[0] == "screen 2 layers, base at 0.008: validation loss 2.0550"


def test_a_file_of_several_metrics_says_which_they_are(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    two_arms(monkeypatch)
    monkeypatch.setattr(command, "build_trial", fake_trial)
    path = tmp_path / "a.json"
    arguments = ["--task", "vit", "--preset", "quick", "--out", str(path)]
    assert command.main(arguments) == 0
    value = json.loads(path.read_text())
    nll, accuracy = (metric._asdict() for metric in TASKS["vit"].METRICS)
    assert (value["metric"], value["other_metrics"]) == (nll, [accuracy])
    for arm in value["arms"]:
        assert [*arm["other_metrics_per_seed"]] == ["test accuracy"]
        # As `fake_trial` has it: by 1 more.
        (others,) = arm["other_metrics_per_seed"].values()
        np.testing.assert_allclose(np.subtract(others, arm["metric_per_seed"]), 1)
    means = capsys.readouterr().out.splitlines()[0].split(": ")[1]
    assert means == "test NLL 2.0450, test accuracy 3.0450"


def test_a_run_of_parts_leaves_a_file_as_the_protocol_describes_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "build_measures", lambda job, task: None)
    monkeypatch.setattr(command, "build_trial", fake_trial)
    path = tmp_path / "a.json"
    changes = {"depths": [3], "screen_seeds": 4, "confirm_seeds": 16}
    assert command.main(options(path, preset="parts", **changes)) == 0
    value = json.loads(path.read_text())
    assert_complete(value, 4, 16)
    scopes = {arm["scope"] for arm in value["arms"]}
    assert scopes == {"full", "attention", "mlp", "norms"}


# The presets.


def presets_of(task):
    """The names that the error of an unknown one lists."""
    with pytest.raises(presets.OptionError) as error:
        presets.options_of(task, "adamw", "no such")
    return str(error.value).split("there are ")[1].split(", ")


PRESETS = [(task, preset) for task in TASKS for preset in presets_of(task)]
# Long enough for the longest windows, and quick to read.
SOURCES = [str(path) for path in sorted((ROOT / "tests").glob("*.py"))]


def of_preset(name, optimizer, preset):
    changes = {"corpus": SOURCES} if name == "lm" else {}
    found = presets.options_of(name, optimizer, preset, changes)
    return found, presets.job_of(optimizer, found)


def shapes_of(task, lanes):
    seeds = jax.ShapeDtypeStruct((lanes,), jnp.int32)
    return seeds, jax.eval_shape(functools.partial(init_params, task.init), seeds)


def state_shapes(optimizer, params):
    def state(params):
        return TrainState(params, jax.vmap(optimizer.init)(params))

    return jax.eval_shape(state, params)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("vit", {"patch": [2]}, "patch=[2] must be a height and a width"),
        ("vit", {"patch": [3, 4]}, "patch=[3, 4] does not divide images of 8 pixels"),
        ("vit", {"eval_images": 1797}, "eval_images=1797 must be between 10 and 1787"),
        ("diffusion", {"patch": 3}, "patch=3 does not divide images of 8 pixels"),
        ("diffusion", {"depths": [9, 8]}, "depths=[9, 8] must be odd and at least 3"),
        ("diffusion", {"width": 9, "heads": 3}, "width=9 must be even"),
        ("rl", {"updates": 3}, "updates=3 of a step do not divide batch=16"),
        ("rl", {"updates": 8}, "divide the 2 examples of an update"),
        ("rl", {"warmup": 5}, "write --option warmup=null"),
        ("rl", {"eval_problems": 4096}, "eval_problems=4096 are more than the 1094"),
        ("lm", {"micro_batches": 1}, "micro_batches=1 must be at least 2"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_built(
    task, changes, words
):
    with pytest.raises(presets.OptionError, match=re.escape(words)):
        presets.options_of(task, "adamw", "full", changes)


def test_every_task_has_a_quick_a_full_and_a_large_preset():
    for task in TASKS:
        assert {"quick", "full", "tpu"} <= set(presets_of(task)) <= {*presets.NAMES}


@functools.cache
def fitted(name, layers, lanes, written):
    """(Task, parameters of a lane, batch, that of an update, states), by shapes alone.

    One for all presets whose models and data are the same.
    """

    def start(layers, width, heads, *_):
        init = init_gpt(rl._model(layers, width, heads))
        shapes = jax.eval_shape(init, jax.random.key(0))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(rl, "_trained_start", start)
        task = TASKS[name].build(layers, **json.loads(written))
    _, params = shapes_of(task, lanes)
    for optimizer in ("adamw", "sgd", "muon"):
        _, job = of_preset(name, optimizer, "full")
        tx = trials.build_optimizer(job, task, WINDOW)
        state = state_shapes(tx, params)
        assert len(jax.tree.leaves(state.params)) == len(jax.tree.leaves(params))

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    drawn = batch = jax.eval_shape(
        functools.partial(task.draw, task.data), jax.random.key(0), np.int32(0)
    )
    if task.rollout is not None:
        batches = jax.eval_shape(task.rollout, one, batch)
        batch = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), batches)
    metrics = jax.eval_shape(task.evaluate, one)
    assert set(metrics) == {metric.name for metric in TASKS[name].METRICS}
    assert all(metric.shape == () for metric in metrics.values())
    return task, one, drawn, batch, jax.eval_shape(task.states, one, batch)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_the_options_of_every_preset_fit_together(name, preset):
    """By shapes alone, without training a start or any parameter."""
    found, _ = of_preset(name, "adamw", preset)
    for optimizer in ("adamw", "sgd", "muon"):
        chosen, job = of_preset(name, optimizer, preset)
        # The same model and data under every base.
        assert presets.task_options(chosen) == presets.task_options(found)
        assert chosen["screen_seeds"] % job.lanes == 0
        assert chosen["confirm_seeds"] % job.lanes == 0
        if preset not in presets.NOT_COMMITTED:
            assert (chosen["screen_seeds"], chosen["confirm_seeds"]) == (4, 16)
        assert chosen["batch"] % job.micro_batches == 0
        assert job.micro_batches >= 2
        assert chosen["learning_rate"] > 0
        assert (job.warmup or 0) < job.steps
        assert job.schedule(job.steps - 1) <= 1.0

    # More layers of the same shapes fit as well, and take longer to trace.
    assert all(layers % 2 or name != "diffusion" for layers in found["depths"])
    layers = 5
    written = json.dumps(presets.task_options(found), sort_keys=True)
    task, one, drawn, batch, states = fitted(name, layers, found["lanes"], written)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(drawn)} == {found["batch"]}
    examples = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    assert len(examples) == 1
    assert examples.pop() % found["micro_batches"] == 0
    assert states.shape[0] == layers + 1
    assert states.shape[-1] == found["width"]
    for scope in {arm.scope: arm for arm in presets.plan_of(name, preset).screened}:
        arm = dataclasses.replace(WINDOW, scope=scope)
        assert gs.describe(arms.scope_of(arm, task), one).groups, scope


@pytest.mark.parametrize(("preset", "billions"), [("tpu", 1.2), ("tpu-deep", 2.4)])
def test_large_presets_have_the_sizes_of_the_paper(preset, billions):
    found, _ = of_preset("lm", "adamw", preset)
    (layers,) = found["depths"]
    task = TASKS["lm"].build(layers, **presets.task_options(found))
    _, params = shapes_of(task, 1)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == pytest.approx(billions * 1e9, rel=0.02)


def test_a_window_at_the_size_of_the_paper_compiles():
    """From shapes: 1.2 billion parameters, which no test should hold in memory."""
    found, job = of_preset("lm", "adamw", "tpu")
    task = TASKS["lm"].build(found["depths"][-1], **presets.task_options(found))
    optimizer = trials.build_optimizer(job, task, WINDOW)
    seeds, params = shapes_of(task, job.lanes)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count > 1.2e9
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.data)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    most = max(np.diff(job.probed, prepend=0)).item()
    train = train_steps(task.loss, optimizer, task.draw, most)
    state = state_shapes(optimizer, params)
    compiled = train.lower(state, seeds, data, step, step).compile()
    # Parameters and Adam's two moments in float32, and nothing else of their size.
    taken = compiled.memory_analysis().argument_size_in_bytes - data.size
    assert taken == pytest.approx(3 * 4 * count, rel=1e-3)


# What is committed.

WANTED = {
    *(
        f"{task}/{optimizer}.json"
        for task in ("lm", "vit", "diffusion", "rl")
        for optimizer in ("sgd", "adamw", "muon")
    ),
    *("reverse/adamw.json", "lm/adamw-parts.json", "vit/adamw-parts.json"),
}


COMMITTED = {
    path.relative_to(RESULTS).as_posix()
    for path in RESULTS.glob("*/*.json")
    if path.parent != COST
}


@pytest.mark.parametrize("name", sorted(WANTED | COMMITTED))
def test_committed_results_are_complete(name):
    path = RESULTS / name
    assert path.stat().st_size < 500_000
    value = json.loads(path.read_text())
    cell = value["task"], value["optimizer"], value["preset"]
    assert command.result_path(*cell).resolve() == path
    assert_complete(value, 4, 16)
    also = presets.confirmed_anyway(*cell)
    confirmed = {
        (arm["name"], arm["learning_rate"])
        for arm in value["arms"]
        if arm["stage"] == "confirm"
    }
    assert {(arm.name, rate) for arm, rate in also} <= confirmed
    lower = value["metric"]["lower_is_better"]
    config = value["config"]
    start = config["learning_rate"]
    plan = presets.plan_of(value["task"], value["preset"])
    depths = config["depths"]
    assert next_trial(value["arms"], depths, start, lower, also, plan) is None
