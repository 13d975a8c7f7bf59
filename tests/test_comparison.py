import math

import numpy as np
import pytest
import scipy.stats

from benchmarks import comparison


def test_the_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 1.0, 9)
    arm = base + rng.normal(-0.1, 0.05, 9)
    result = comparison.paired_difference(arm, base)
    oracle = scipy.stats.ttest_rel(arm, base).confidence_interval(0.95)
    assert result.mean - result.half_width == pytest.approx(oracle.low)
    assert result.mean + result.half_width == pytest.approx(oracle.high)


def test_a_difference_computed_by_hand():
    # Differences -1, -2, -3: mean -2, deviation 1, t(2 degrees, 97.5 %) = 4.30265.
    result = comparison.paired_difference(
        np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])
    )
    assert result.mean == -2
    assert result.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert (result.wins, result.num_seeds) == (3, 3)


def test_equal_arms_differ_by_exactly_nothing_and_win_nothing():
    losses = np.array([1.0, 2.0, 3.0])
    assert comparison.paired_difference(losses, losses) == (0.0, 0.0, 0, 3)


def test_one_seed_has_a_difference_but_no_interval():
    result = comparison.paired_difference(np.array([1.0]), np.array([2.0]))
    assert result.mean == -1
    assert math.isnan(result.half_width)
    assert comparison.format_difference(result) == "-1.0000 (one seed)"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_seed_is_not_dropped(bad):
    diverged, finite = np.array([1.0, bad, 1.0]), np.array([2.0, 2.0, 2.0])
    result = comparison.paired_difference(diverged, finite)
    assert math.isnan(result.mean)
    assert math.isnan(result.half_width)
    assert result.wins == 2
    assert comparison.format_difference(result) == "nan"
    # And the other way round: a finite run wins over a diverged one.
    assert comparison.paired_difference(finite, diverged).wins == 1


def test_the_table_is_aligned_markdown():
    table = comparison.format_table(["arm", "loss"], [["base", "1.5"], ["α", "10.25"]])
    assert table.splitlines() == [
        "| arm  |  loss |",
        "| ---- | ----: |",
        "| base |   1.5 |",
        "| α    | 10.25 |",
    ]
