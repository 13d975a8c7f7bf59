"""`gradsmooth_optax.trial`: the search, the statistics, the file, the words."""

import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import gradsmooth_optax as gs
from benchmarks import trial_rules
from gradsmooth_optax.trial import _statistics as rules
from gradsmooth_optax.trial._arguments import settings_of
from gradsmooth_optax.trial._protocol import Outcome, Run, thresholds
from gradsmooth_optax.trial._search import Ladder, choice, next_points, points_of_all
from tests.trial_runs import ARGUMENTS, compare, optimizer, train, train_many

# -- The search ------------------------------------------------------------------------


def searched(cost, rates, blocks):
    costs = {}
    while points := next_points(costs, rates, blocks):
        assert not set(points) & costs.keys()
        for i, j in points:
            block = 1.0 if blocks is None else blocks.at(j)
            costs[i, j] = cost(rates.at(i), block)
    return costs


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.1, 3), st.floats(0.1, 3))
def test_the_search_finds_the_lowest_point_along_the_ridge_of_the_blocks_own_rate(
    best, best_of_blocks, steep, steep_of_blocks
):
    def cost(rate, block):
        own, blocks = math.log2(rate) - best, math.log2(rate * block) - best_of_blocks
        return steep * own**2 + steep_of_blocks * blocks**2

    rates, blocks = Ladder((0.5, 1.0, 2.0)), Ladder((0.25, 0.5, 1.0))
    costs = searched(cost, rates, blocks)
    lowest = min(
        (cost(rates.at(i), blocks.at(j)), (i, j))
        for i in rates.places
        for j in blocks.places
    )
    assert min(costs.values()) == pytest.approx(lowest[0], abs=1e-9)


@given(st.floats(-3, 3))
def test_the_choice_is_the_minimum_of_a_parabola_through_the_logarithms(best):
    rates = Ladder((0.5, 1.0, 2.0))
    costs = searched(lambda rate, _: (math.log2(rate) - best) ** 2, rates, None)
    found = choice(costs, rates, None)
    assert math.log2(found.rate) == pytest.approx(best, abs=1e-3)
    assert found.inside
    assert found.block_rate == 1.0
    second = abs(math.log2(found.second_rate) - best)
    assert second <= 1 + 1e-9  # the better of the two neighbors


def test_an_arm_that_stopped_beside_the_lowest_place_is_tried_where_others_were_best():
    rates, blocks = Ladder((0.5, 1.0, 2.0)), Ladder((0.25, 0.5, 1.0))

    def cost(arm, rate, block):
        hollow = 10 * abs(math.log2(rate) - 6) + abs(math.log2(block)) - 5
        beside = abs(math.log2(rate)) + abs(math.log2(block))
        return min(hollow, beside) if arm == "base" else hollow

    costs = {"plain": {}, "base": {}, "window": {}}
    ladders = {"plain": None, "base": blocks, "window": blocks}
    asked = []
    while any((points := points_of_all(costs, rates, ladders)).values()):
        for arm, of_arm in points.items():
            asked += [(arm, point) for point in of_arm]
            for i, j in of_arm:
                block = blocks.at(j) if ladders[arm] else 1.0
                costs[arm][i, j] = cost(arm, rates.at(i), block)
    assert len(asked) == len(set(asked))
    assert min(searched(functools.partial(cost, "base"), rates, blocks).values()) == 0
    assert min(costs["base"].values()) == min(costs["window"].values()) == -5


def test_what_diverges_is_left_for_lower_rates_and_an_endless_slope_is_said():
    rates = Ladder((1.0, 2.0))
    costs = searched(lambda rate, _: math.inf if rate > 0.1 else 1 / rate, rates, None)
    assert choice(costs, rates, None).rate == rates.at(-4) == 0.0625
    costs = searched(lambda rate, _: rate, rates, None)
    assert not choice(costs, rates, None).inside
    assert min(costs)[0] == rates.places[0]


# -- The statistics --------------------------------------------------------------------


def test_a_contrast_is_the_paired_t_test_with_its_interval_and_the_flips_of_signs():
    rng = np.random.default_rng(0)
    arm, base = rng.normal(size=(2, 9))
    found = rules.contrast("a", "b", arm, base)
    expected = stats.ttest_rel(arm, base)
    low, high = expected.confidence_interval()
    assert [found.p, found.low, found.high] == pytest.approx(
        [expected.pvalue, low, high]
    )
    inner = expected.confidence_interval(0.9)
    assert found.inner == pytest.approx((inner.high - inner.low) / 2)
    sums = [abs(np.dot(s, arm - base)) for s in itertools.product((-1, 1), repeat=9)]
    assert found.p_flip == pytest.approx(np.mean(np.array(sums) >= sums[0] - 1e-12))
    assert found.p_flip_floor == 2 / 2**9
    assert found.wins == np.sum(arm < base)


def test_a_diverged_run_is_worse_than_all_others_and_is_never_dropped():
    base = np.arange(10.0)
    arm = base - 0.5
    arm[3] = math.nan
    found = rules.contrast("a", "b", arm, base)
    assert found.diverged == (1, 0)
    assert found.wins == 9
    assert found.differences[3] == math.inf
    assert math.isnan(found.p)
    # The signed ranks: ten at stake, the largest against.
    ranks = np.array([5.0] * 9 + [10.0])
    signs = np.array(list(itertools.product((-1, 1), repeat=10)))
    as_far = np.abs(signs @ ranks) >= abs(-9 * 5.0 + 10)
    assert found.p_flip == pytest.approx(as_far.mean())
    both = rules.contrast("a", "b", [math.inf, 1, 2], [math.nan, 1, 1])
    assert both.differences[0] == 0
    assert both.diverged == (1, 1)


def test_holm_steps_down():
    assert rules.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert rules.holm([math.nan, 0.01]) == pytest.approx([1.0, 0.02])


def word_of(gains, at_second=None, noise=0.3, seeds=12, margin=None):
    """The finding of a window that is better than its three references by `gains`."""
    rng = np.random.default_rng(0)

    def contrasts(means):
        return {
            kind: rules.contrast(
                "w", kind, rng.normal(-mean, noise, seeds), np.zeros(seeds)
            )
            for kind, mean in zip(
                ("base", "norm-matched", "shuffled"), means, strict=True
            )
        }

    second = {"w": contrasts(gains if at_second is None else at_second)}
    (found,) = rules.findings({"w": contrasts(gains)}, second, margin)
    return found.word


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        (rules.HELP, {"gains": (1, 1, 1)}),
        (rules.UNKNOWN, {"gains": (1, 0, 1)}),
        (rules.UNKNOWN, {"gains": (1, 1, 0)}),
        (rules.UNKNOWN, {"gains": (0, 1, 1)}),
        (rules.DEPENDS, {"gains": (1, 1, 1), "at_second": (1, -1, 1)}),
        (rules.NO_HELP, {"gains": (-1, 1, 1)}),
        (rules.DEPENDS, {"gains": (-1, 1, 1), "at_second": (1, 1, 1)}),
        (rules.SAME, {"gains": (0, 0, 0), "noise": 0.01, "margin": 0.1}),
        (rules.UNKNOWN, {"gains": (0, 0, 0), "margin": 0.05}),
        (rules.EXPLORATORY, {"gains": (1, 1, 1), "seeds": 7}),
    ],
)
def test_the_verdict_follows_the_rules(expected, arguments):
    assert word_of(**arguments) == expected


def test_the_rules_keep_their_level_and_find_what_is_there_with_the_selection_inside():
    its_norms_help, neighbors_help = (
        trial_rules.simulate(truth, 50, 0) for truth in trial_rules.TRUTHS[6:9:2]
    )
    # 50 draws at 5 % are 7 or fewer with a probability of 0.997.
    assert its_norms_help["trial"] <= 7 / 50
    assert its_norms_help["significant against the base, controls not"] > 7 / 50
    assert neighbors_help["trial"] > 0.5


# -- A comparison ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("trial") / "trial.json"
    return path, compare(train, path)


def test_a_finished_comparison_has_found_every_arms_rates_and_runs_nothing_more(
    finished,
):
    path, result = finished
    assert result.is_complete
    assert list(result.choices) == [
        *("plain", "base", "window(0.5)"),
        *("norm-matched window(0.5)", "shuffled window(0.5)"),
    ]
    base = result.choices["base"]
    assert base.rate == pytest.approx(1.5, rel=0.2)
    assert base.block_rate == pytest.approx(0.5, rel=0.2)
    assert result.choices["plain"].block_rate == 1.0

    def never(made, seed):
        raise AssertionError("a finished run is run again")

    again = compare(never, path)
    assert again.outcomes == result.outcomes
    assert gs.trial.read_result(path).verdict == result.verdict


def test_the_result_is_told_in_a_table_in_words_in_html_and_for_an_appendix(finished):
    _, result = finished
    text = str(result)
    assert "window(0.5): not told apart from the base" in text
    assert "The blocks' own rate (× 0.499): better than one rate for all by" in text
    assert "give `tune_metric` one of its own" in text
    assert [line.split()[0] for line in text.splitlines()[4:9]] == [
        *("plain", "base", "window(0.5)", "norm-matched", "shuffled"),
    ]
    assert "window(0.5) minus norm-matched window(0.5)" in text
    assert "<table>" in result._repr_html_()
    assert "not told apart" in result._repr_html_()
    assert "Holm's correction for 1 operators" in result.appendix


def test_the_plot_has_a_row_for_every_contrast_and_a_line_for_every_arm(finished):
    _, result = finished
    figure = result.plot()
    left, right = figure.axes
    assert [
        label.get_text().replace("\n", " ") for label in left.get_yticklabels()
    ] == [
        "base minus plain",
        "window(0.5) minus base",
        "window(0.5) minus norm-matched window(0.5)",
        "window(0.5) minus shuffled window(0.5)",
    ]
    assert len(right.get_lines()) == 3
    plt.close(figure)


def test_a_higher_metric_gives_the_mirrored_result(finished, tmp_path):
    _, result = finished
    mirrored = compare(
        lambda made, seed: -train(made, seed), tmp_path / "t.json", better="higher"
    )
    assert mirrored.choices == result.choices
    (one,), (other,) = mirrored.findings, result.findings
    assert one.contrasts["base"].p == other.contrasts["base"].p
    difference = re.compile(r"difference (\S+) \[(\S+), (\S+)\]")
    mean, low, high = map(float, difference.search(result.verdict).groups())
    found = difference.search(mirrored.verdict).groups()
    assert [*map(float, found)] == pytest.approx([-mean, -high, -low])


def test_a_killed_comparison_goes_on_to_the_same_file(finished, tmp_path):
    path, _ = finished
    new = tmp_path / "trial.json"
    command = [sys.executable, "-m", "tests.trial_runs"]
    for limit in (57, 0):
        ended = subprocess.run(
            command,
            env=os.environ | {"TRIAL": str(new), "KILL_AFTER": str(limit)},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == (-9 if limit else 0), ended.stderr
        if limit:
            part = gs.trial.read_result(new)
            assert "NOT COMPLETE" in str(part)
            assert len(part.outcomes) == 56
    runs, before = (
        [
            {k: v for k, v in run.items() if k != "seconds"}
            for run in json.loads(p.read_text())["runs"]
        ]
        for p in (new, path)
    )
    assert runs == before


def test_ctrl_c_returns_what_there_is(tmp_path):
    seeds = []

    def interrupted(made, seed):
        seeds.append(seed)
        if len(seeds) == 40:
            raise KeyboardInterrupt
        return train(made, seed)

    result = compare(interrupted, tmp_path / "t.json")
    assert len(result.outcomes) == 38
    assert not result.is_complete
    assert "the same call goes on" in str(result)
    assert "so far" in str(result).splitlines()[4]


def test_a_run_that_raises_counts_as_diverged_and_is_tried_again(tmp_path):
    calls = []

    def flaky(made, seed):
        calls.append(seed)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        return train(made, seed)

    result = compare(flaky, tmp_path / "t.json")
    assert "1 runs raised and count as diverged, the last: RuntimeError: out" in str(
        result
    )
    again = compare(train, tmp_path / "t.json")
    assert "raised" not in str(again)
    assert again.is_complete


def test_what_the_first_run_raises_is_raised(tmp_path):
    def broken(made, seed):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        compare(broken, tmp_path / "t.json")


def test_a_depth_that_couples_nothing_is_told_by_the_first_arm_that_uses_it(tmp_path):
    with pytest.raises(ValueError, match="no/layers"):
        gs.trial.compare(
            train,
            optimizer,
            gs.scanned("no/layers"),
            path=tmp_path / "t.json",
            **ARGUMENTS,
        )


def test_a_generators_hopeless_runs_are_stopped_in_the_screen_alone(tmp_path):
    def steps(made, seed):
        end = train(made, seed)
        for k in range(8):
            yield end + 4.0 * 2.0**-k

    result = compare(steps, tmp_path / "t.json")
    stopped = [run for run, of in result.outcomes.items() if of.stopped]
    assert stopped
    assert {run.stage for run in stopped} == {"screen"}
    assert result.choices["base"].block_rate == pytest.approx(0.5, rel=0.2)
    assert result.is_complete


def test_a_run_is_hopeless_where_the_best_one_was_better_at_half_the_progress():
    settings = settings_of(
        *(gs.scanned("h"), {}, [1.0], 8, 2, [1.0], None, None, "lower", None),
    )
    best, now = (Run("screen", "base", rate, 1.0, 0) for rate in (1.0, 2.0))
    outcomes = {best: Outcome({"metric": 1.0}, (8.0, 7, 6, 5, 4, 3, 2, 1))}
    assert thresholds(settings, outcomes, now) == (math.inf, 8, 8, 7, 7, 6, 6, 5)


def test_seeds_that_train_at_once_give_one_program_for_each_arm_and_order(tmp_path):
    traces = []

    @gs.trial.many_seeds
    def counted(made, seeds):
        traces.append(len(seeds))
        return train_many.train(made, seeds)

    result = compare(counted, tmp_path / "t.json", metric="cost")
    # Five arms, each for the two seeds of the screen and the eight of the rest.
    assert len(traces) == 10
    assert result.is_complete
    assert result.choices["base"].block_rate == pytest.approx(0.5, rel=0.1)


@pytest.mark.slow
def test_processes_give_the_same_result(finished, tmp_path):
    _, result = finished
    parallel = compare(train, tmp_path / "t.json", workers=2)
    assert parallel.choices == result.choices
    assert parallel.verdict == result.verdict


def test_a_dry_run_says_how_many_runs_it_will_be_and_writes_nothing(tmp_path):
    result = compare(train, tmp_path / "t.json", dry_run=True)
    assert "about 112 runs to choose rates, at most 80 to confirm" in str(result)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_what_the_file_holds(finished):
    path, result = finished
    assert str(compare(train, path, dry_run=True)) == str(result)


# -- What goes wrong -------------------------------------------------------------------


def test_a_file_of_other_settings_is_refused_with_the_difference(finished):
    path, _ = finished
    with pytest.raises(gs.trial.OtherSettings, match="seeds: there 8, now 9"):
        compare(train, path, seeds=9)


def test_a_training_that_has_changed_is_refused_on_resume(tmp_path):
    path = tmp_path / "t.json"
    calls = []

    def interrupted(made, seed):
        calls.append(seed)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return train(made, seed)

    compare(interrupted, path)
    with pytest.raises(ValueError, match="but the same run now gives"):
        compare(lambda made, seed: train(made, seed) + 1e-3, path)


def test_a_training_that_does_not_repeat_is_said(tmp_path):
    calls = iter(range(10**6))
    result = compare(
        lambda made, seed: train(made, seed) + 1e-4 * next(calls), tmp_path / "t.json"
    )
    assert "`train` is not deterministic: one run gave" in str(result)


def test_two_processes_do_not_share_a_file(tmp_path):
    def nested(made, seed):
        with pytest.raises(RuntimeError, match=r"another process is writing `path`"):
            compare(train, tmp_path / "t.json")
        raise KeyboardInterrupt

    compare(nested, tmp_path / "t.json")


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (lambda rate, seed: None, TypeError, "returned None .* no `return`"),
        (lambda rate, seed: "0.1", TypeError, "must return a number"),
        (lambda rate, seed: {"a": 1.0, "b": 2.0}, ValueError, "say which the verdict"),
        (
            lambda rate, seed: {f"of {seed}": 1.0},
            ValueError,
            "the same keys every time",
        ),
        (lambda rate, seed: math.nan, ValueError, "nothing finite at any of `rates`"),
        (lambda rate, seed: rate, ValueError, "seems to ignore `seed`"),
        (lambda rate, seed: (_ for _ in ()), TypeError, "yields nothing"),
        (lambda rate, seed: rate + seed, TypeError, "'base' never went through"),
    ],
)
def test_a_training_that_no_verdict_can_come_from_is_told_at_once(
    returned, error, words, tmp_path
):
    with pytest.raises(error, match=words):
        compare(lambda made, seed: returned(made[1], seed), tmp_path / "t.json")


@pytest.mark.parametrize("package", ["scipy", "tqdm", "filelock"])
def test_what_the_extra_brings_is_asked_for_before_anything_runs(
    package, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    said = f'needs {package}.*pip install "gradsmooth_optax\\[trial\\]"'
    with pytest.raises(ImportError, match=said):
        compare(train, tmp_path / "trial.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rates": []}, "`rates` must be finite numbers above 0"),
        ({"rates": [0.1, -1]}, "`rates` must be finite numbers above 0"),
        ({"block_rates": 1.0}, "`block_rates` must be finite"),
        ({"seeds": 1}, "`seeds` must be a whole number from 2"),
        ({"screen_seeds": 0.5}, "`screen_seeds` must be a whole number from 1"),
        ({"arms": {}}, "at least one operator"),
        ({"arms": {"base": 0.2}}, "which is taken"),
        ({"better": "more"}, "`better` must be one of 'lower', 'higher'"),
        ({"margin": -1}, "`margin` must be"),
        ({"tune_metric": "a"}, "Name both"),
        ({"workers": 2}, "cannot be sent"),
    ],
)
def test_arguments_are_checked_before_anything_runs(arguments, words, tmp_path):
    with pytest.raises((TypeError, ValueError), match=words):
        compare(lambda made, seed: 1.0, tmp_path / "t.json", **arguments)


def test_an_operator_without_a_matrix_has_one_control_and_no_verdict_for_neighbors(
    tmp_path,
):
    result = compare(
        train, tmp_path / "t.json", arms={"alike": gs.similarity_window(0.5)}
    )
    assert "shuffled alike" not in result.arms
    assert [f.word for f in result.findings] == [rules.UNKNOWN]


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="holds no comparison"):
        compare(train, path)
    assert path.read_text() == '{"a": 1}'


def test_smoothing_reaches_the_users_chain_coupled_first_and_then_scaled(tmp_path):
    seen = {}

    def watched(made, seed):
        smoothing, rate = made
        updates = {"h": jnp.array([[1.0], [0.0], [0.0]]), "e": jnp.ones(2)}
        smoothed, _ = smoothing.update(updates, smoothing.init(updates))
        assert smoothed["e"].tolist() == [1, 1]
        seen.setdefault(seed, []).append(smoothed["h"][:, 0].tolist())
        return rate**2 - rate + seed

    arguments = {**ARGUMENTS, "block_rates": [0.5], "rates": [1.0]}
    arguments |= {"seeds": 2, "screen_seeds": 1}
    gs.trial.compare(
        watched, optimizer, gs.scanned("h"), path=tmp_path / "t.json", **arguments
    )
    assert [1.0, 0.0, 0.0] in seen[0]  # plain
    assert [0.5, 0.0, 0.0] in seen[0]  # base
    assert [0.375, 0.125, 0.0] in seen[0]  # window(0.5), times 0.5
