"""What `gradsmooth_optax.trial` searches and concludes: pure functions of the costs."""

import functools
import itertools
import math

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

RATES, BLOCKS = Ladder((0.5, 1.0, 2.0)), Ladder((0.25, 0.5, 1.0))


# The search.


def test_a_ladder_goes_on_by_its_own_factors_and_by_2_where_it_has_one_rate():
    ladder = Ladder((1.0, 2.0, 6.0))
    assert [ladder.at(i) for i in (-1, 0, 2, 3)] == [0.5, 1.0, 6.0, 18.0]
    assert [Ladder((1.0,)).at(i) for i in (-1, 1)] == [0.5, 2.0]
    assert list(ladder.places) == list(range(-6, 9))


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

    costs = searched(cost, RATES, BLOCKS)
    lowest = min(
        cost(RATES.at(i), BLOCKS.at(j)) for i in RATES.places for j in BLOCKS.places
    )
    assert min(costs.values()) == pytest.approx(lowest, abs=1e-9)


@given(st.floats(-3, 3))
def test_the_choice_is_the_minimum_of_a_parabola_through_the_logarithms(best):
    costs = searched(lambda rate, _: (math.log2(rate) - best) ** 2, RATES, None)
    found = choice(costs, RATES, None)
    assert math.log2(found.rate) == pytest.approx(best, abs=1e-3)
    assert found.inside
    assert found.block_rate == 1.0
    second = abs(math.log2(found.second_rate) - best)
    assert second <= 1 + 1e-9  # the better of the two neighbors


def test_the_choice_of_two_rates_is_the_minimum_of_their_paraboloid():
    def cost(rate, block):
        own, blocks = math.log2(rate) - 0.3, math.log2(rate * block) + 0.6
        return 2 * own**2 + 3 * blocks**2 + own * blocks

    found = choice(searched(cost, RATES, BLOCKS), RATES, BLOCKS)
    assert math.log2(found.rate) == pytest.approx(0.3, abs=1e-3)
    assert math.log2(found.block_rate) == pytest.approx(-0.9, abs=1e-3)
    assert found.inside


def test_an_arm_that_stopped_beside_the_lowest_place_is_tried_where_others_were_best():
    def cost(arm, rate, block):
        hollow = 10 * abs(math.log2(rate) - 6) + abs(math.log2(block)) - 5
        beside = abs(math.log2(rate)) + abs(math.log2(block))
        return min(hollow, beside) if arm == "base" else hollow

    costs = {"plain": {}, "base": {}, "window": {}}
    ladders = {"plain": None, "base": BLOCKS, "window": BLOCKS}
    asked = []
    while any((points := points_of_all(costs, RATES, ladders)).values()):
        for arm, of_arm in points.items():
            asked += [(arm, point) for point in of_arm]
            for i, j in of_arm:
                block = BLOCKS.at(j) if ladders[arm] else 1.0
                costs[arm][i, j] = cost(arm, RATES.at(i), block)
    assert len(asked) == len(set(asked))
    assert min(searched(functools.partial(cost, "base"), RATES, BLOCKS).values()) == 0
    assert min(costs["base"].values()) == min(costs["window"].values()) == -5


def test_what_diverges_is_left_for_lower_rates_and_an_endless_slope_is_said():
    rates = Ladder((1.0, 2.0))
    costs = searched(lambda rate, _: math.inf if rate > 0.1 else 1 / rate, rates, None)
    assert choice(costs, rates, None).rate == rates.at(-4) == 0.0625
    costs = searched(lambda rate, _: rate, rates, None)
    assert not choice(costs, rates, None).inside
    assert min(costs)[0] == rates.places[0]


def test_a_run_is_hopeless_where_the_best_one_was_better_at_half_the_progress():
    settings = settings_of(
        *(gs.scanned("h"), {}, [1.0], 8, 2, [1.0], None, None, "lower", None),
    )
    best, now = (Run("screen", "base", rate, 1.0, 0) for rate in (1.0, 2.0))
    outcomes = {best: Outcome({"metric": 1.0}, (8.0, 7, 6, 5, 4, 3, 2, 1))}
    assert thresholds(settings, outcomes, now) == (math.inf, 8, 8, 7, 7, 6, 6, 5)


# The statistics.


def test_a_contrast_is_the_paired_t_test_with_its_interval_and_the_flips_of_signs():
    rng = np.random.default_rng(0)
    arm, base = rng.normal(size=(2, 9))
    found = rules.contrast("a", "b", arm, base)
    expected = stats.ttest_rel(arm, base)
    low, high = expected.confidence_interval()
    assert [found.p, found.low, found.high] == pytest.approx(
        [expected.pvalue, low, high]
    )
    assert found.mean == pytest.approx(np.mean(arm - base))
    inner = expected.confidence_interval(0.9)
    assert found.inner == pytest.approx((inner.high - inner.low) / 2)
    sums = [abs(np.dot(s, arm - base)) for s in itertools.product((-1, 1), repeat=9)]
    assert found.p_flip == pytest.approx(np.mean(np.array(sums) >= sums[0] - 1e-12))
    assert found.p_flip_floor == 2 / 2**9
    assert found.wins == np.sum(arm < base)
    assert found.seeds == 9


def test_equal_differences_and_one_seed_have_no_spread_to_judge_by():
    same = rules.contrast("a", "b", np.ones(4), np.ones(4))
    assert (same.mean, same.low, same.high, same.p, same.p_flip) == (0, 0, 0, 1, 1)
    assert same.wins == 0
    base = np.arange(4.0)
    shifted = rules.contrast("a", "b", base - 0.1, base)  # equal but for rounding
    assert (shifted.p, shifted.inner, shifted.wins) == (0.0, 0.0, 4)
    assert shifted.p_flip == shifted.p_flip_floor == 2 / 2**4
    one = rules.contrast("a", "b", [1.0], [2.0])
    assert (one.mean, one.p_flip, one.p_flip_floor) == (-1, 1, 1)
    assert math.isnan(one.p)


def test_the_same_is_where_the_90_percent_interval_lies_within_the_margin():
    found = rules.contrast("a", "b", np.tile([-0.9, 1.1], 6), np.zeros(12))
    assert found.mean == pytest.approx(0.1)
    assert found.inner > 0.1
    for margin, is_same in ((0.99, False), (1.01, True)):
        assert found.is_the_same(margin * (0.1 + found.inner)) == is_same


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


def test_metrics_are_costs_of_which_lower_is_better():
    found = rules.as_costs([1.0, None, math.nan, -math.inf], "higher")
    assert found.tolist() == [-1.0, math.inf, math.inf, math.inf]
    assert rules.as_costs([1.0, -math.inf], "lower").tolist() == [1.0, math.inf]


KINDS = ("base", "norm-matched", "shuffled")


def found_of(gains, at_second=None, noise=0.3, seeds=12, margin=None, diverged=0):
    """The finding of a window that is better than its three references by `gains`."""
    rng = np.random.default_rng(0)

    def contrasts(means):
        drawn = [rng.normal(-mean, noise, seeds) for mean in means]
        drawn[-1][:diverged] = math.nan
        return {
            kind: rules.contrast("w", kind, costs, np.zeros(seeds))
            for kind, costs in zip(KINDS, drawn, strict=False)
        }

    second = {"w": contrasts(gains if at_second is None else at_second)}
    (found,) = rules.findings({"w": contrasts(gains)}, second, margin)
    return found


VERDICTS = [
    (rules.HELP, {"gains": (1, 1, 1)}),
    (rules.UNKNOWN, {"gains": (1, 0, 1)}),
    (rules.UNKNOWN, {"gains": (1, 1, 0)}),
    (rules.UNKNOWN, {"gains": (0, 1, 1)}),
    (rules.UNKNOWN, {"gains": (1, 1)}),  # no shuffled control
    (rules.DEPENDS, {"gains": (1, 1, 1), "at_second": (1, -1, 1)}),
    (rules.NO_HELP, {"gains": (-1, 1, 1)}),
    (rules.DEPENDS, {"gains": (-1, 1, 1), "at_second": (1, 1, 1)}),
    (rules.NO_HELP, {"gains": (-1, 1, 1), "at_second": (-1, -1, -1)}),
    (rules.SAME, {"gains": (0, 0, 0), "noise": 0.01, "margin": 0.1}),
    (rules.UNKNOWN, {"gains": (0, 0, 0), "noise": 0.01}),  # no margin
    (rules.UNKNOWN, {"gains": (0, 0, 0), "margin": 0.05}),
    (rules.HELP, {"gains": (1, 1, 1), "seeds": 8}),
    (rules.EXPLORATORY, {"gains": (1, 1, 1), "seeds": 7}),
    (rules.DIVERGED, {"gains": (1, 1, 1), "diverged": 1}),
]


@pytest.mark.parametrize(("expected", "arguments"), VERDICTS)
def test_the_verdict_follows_the_rules(expected, arguments):
    assert found_of(**arguments).word == expected


def test_the_p_of_help_is_the_largest_of_its_three_corrected_for_the_operators():
    found = found_of(gains=(1, 0.2, 1))
    largest = max(c.p for c in found.contrasts.values())
    assert found.p == largest == found.contrasts["norm-matched"].p
    contrasts = {"v": found_of(gains=(0, 0, 0)).contrasts, "w": found.contrasts}
    _, of_two = rules.findings(contrasts, {}, None)
    assert of_two.p == min(2 * largest, 1)


def test_the_rules_keep_their_level_and_find_what_is_there_with_the_selection_inside():
    its_norms_help, neighbors_help = (
        trial_rules.simulate(truth, 50, 0) for truth in trial_rules.TRUTHS[6:9:2]
    )
    # 50 draws at 5 % are 7 or fewer with a probability of 0.997.
    assert its_norms_help["trial"] <= 7 / 50
    assert its_norms_help["significant against the base, controls not"] > 7 / 50
    assert neighbors_help["trial"] > 0.5
