"""The report is that of the committed results, by rules tested on files made here."""

import json

import numpy as np
import pytest
import scipy.stats

from benchmarks.json_files import RESULTS, write_json
from benchmarks.report import __main__ as command
from benchmarks.report.comparisons import (
    at_base_rate,
    at_screened_rates,
    base_of,
    best_against_best,
    best_rate,
    best_screened_of,
    confirmed,
    control_of,
    kinds,
    p_value,
    survive_holm,
    tuned_rate,
)
from benchmarks.report.figures import drawings, made_by_this_version
from benchmarks.report.page import page
from benchmarks.report.records import read_sources
from benchmarks.report.verdicts import Verdict, outcomes, verdict_of
from benchmarks.signals import table

RATES, BEST = (0.002, 0.004, 0.008, 0.016), 0.004
SEEDS = {"screen": range(4), "confirm": range(4, 20)}
MEAN = {"operator": "mean", "alpha": 1.0}
KINDS = {
    "base": {"operator": "none", "alpha": 0.0},
    "window(0.1)": {"alpha": 0.1},
    "window(0.2)": {},
    "window(0.2), norm-preserving": {"variant": "norm_preserving"},
    "learn_alpha": {"operator": "learn_alpha", "alpha": 0.1},
    "norm-matched window(0.2)": {"control": "norm_matched"},
    "shuffled window(0.2)": {"control": "shuffled_depth"},
    "mean over depth": MEAN | {"control": "full_average"},
    "norm-matched mean over depth": MEAN | {"control": "norm_matched"},
    "window(0.5)": {"alpha": 0.5},
    "norm-matched window(0.5)": {"alpha": 0.5, "control": "norm_matched"},
    "shuffled window(0.5)": {"alpha": 0.5, "control": "shuffled_depth"},
}
FIELDS = {"operator": "window", "alpha": 0.2, "variant": "standard"}
FIELDS |= {"scope": "full", "control": None}
# The controls of the best screened arm have no screen.
NOT_SCREENED = ("norm-matched window(0.5)", "shuffled window(0.5)")


def arm(name, stage, rate, level, sign):
    """An arm whose metric is `level` and some noise of which the seeds share most."""
    seeds = SEEDS[stage]
    noise = [0.1 * np.sin(7 * s) + 0.001 * np.sin(s * len(name)) for s in seeds]
    return {
        **{"name": name, "stage": stage, "layers": 6, "learning_rate": rate},
        **(FIELDS | KINDS[name]),
        "seeds": list(seeds),
        "metric_per_seed": [sign * (level + x) for x in noise],
        "other_metrics_per_seed": {},
        "mechanism": {"steps": [1, 2], "roughness": {"before": [1], "after": [2]}},
    }


def result(effects, *, sign=1, **fields):
    """A result file: `effects` by name are added to the base's loss at every rate."""
    arms = [
        arm(name, stage, rate, 2.5 + 0.1 * np.log2(rate / BEST) ** 2 + by, sign)
        for name, by in ((name, effects.get(name, 0.0)) for name in KINDS)
        for rate in RATES
        for stage in SEEDS
        if stage == "confirm" or name not in NOT_SCREENED
    ]
    return {
        **{"task": "lm", "optimizer": "adamw", "preset": "full"},
        "metric": {"name": "loss", "unit": "", "lower_is_better": sign > 0},
        **{"config": {"depths": [6]}, "versions": {}, "sittings": [], "machine": {}},
        **{"arms": arms, **fields},
    }


def settings_of(directory, *values):
    for value in values:
        path = directory / value["task"] / f"{value['optimizer']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(value, path)
    return [s for source in read_sources(directory) for s in source.settings]


def setting_of(directory, effects, *, shifts=(), **options):
    """A setting, with (name, stage, rate, by) added to the metric of an arm."""
    value = result(effects, **options)
    for name, stage, rate, by in shifts:
        for of in value["arms"]:
            if (of["name"], of["stage"], of["learning_rate"]) == (name, stage, rate):
                of["metric_per_seed"] = [x + by for x in of["metric_per_seed"]]
    (setting,) = settings_of(directory, value)
    return setting


def kind_of(setting, name):
    (kind,) = (kind for kind in kinds(setting) if kind.name == name)
    return kind


def effects(name):
    """{verdict: what makes it the one on a window}."""
    matched, shuffled = f"norm-matched {name}", f"shuffled {name}"
    return {
        Verdict.NEIGHBORS: {name: -0.05, matched: -0.02},
        Verdict.COUPLING: {name: -0.05, shuffled: -0.05},
        Verdict.SMALLER: {name: -0.05, matched: -0.05},
        Verdict.HURTS: {name: 0.05},
        Verdict.NOTHING: {},
    }


@pytest.mark.parametrize("name", ["window(0.2)", "window(0.5)"])
@pytest.mark.parametrize("sign", [1, -1], ids=["lower is better", "higher is better"])
def test_the_verdict_follows_from_the_base_and_the_arms_own_controls(
    tmp_path, sign, name
):
    for wanted, by in effects(name).items():
        setting = setting_of(tmp_path, by, sign=sign)
        assert verdict_of(setting, kind_of(setting, name)) is wanted


def test_an_arm_without_controls_is_compared_with_none(tmp_path):
    setting = setting_of(tmp_path, {"learn_alpha": -0.05})
    for name in ("learn_alpha", "window(0.2), norm-preserving", "window(0.1)"):
        assert control_of(setting, kind_of(setting, name), "norm_matched") is None
    found = kind_of(setting, "learn_alpha")
    assert best_screened_of(setting) == found
    assert verdict_of(setting, found) is Verdict.NO_CONTROLS
    matched = kind_of(setting, "norm-matched window(0.2)")
    shuffled = kind_of(setting, "shuffled window(0.2)")
    assert control_of(setting, shuffled, "norm_matched") == matched


def test_two_arms_are_compared_at_the_better_of_the_rates_that_both_ran_at(tmp_path):
    # On the seeds of the confirmation another rate than that of the screen is best.
    shifts = [("window(0.2)", "confirm", 0.008, -0.3), ("base", "confirm", 0.002, -0.2)]
    setting = setting_of(tmp_path, {}, shifts=shifts)
    window, base = kind_of(setting, "window(0.2)"), base_of(setting)
    assert tuned_rate(setting, window) == (BEST, False)
    assert best_rate(setting, window) == (0.008, False)
    assert best_rate(setting, base) == (0.002, True)
    for pair, wanted in (((window, base), -0.1), ((base, window), 0.1)):
        found = best_against_best(setting, *pair).mean
        assert found == pytest.approx(wanted, abs=1e-3)
    # Both at the base's best rate, and both at their rates of the screen.
    np.testing.assert_allclose(at_base_rate(setting, window).mean, 0.2, atol=1e-3)
    np.testing.assert_allclose(at_screened_rates(setting, window).mean, 0, atol=1e-3)


def test_p_values_are_those_of_the_paired_t_test_and_holm_is_over_all_settings(
    tmp_path,
):
    assert survive_holm([0.02, 0.001, 0.04, 0.03]) == [False, True, False, False]
    assert survive_holm([0.01, 0.001, 0.02]) == [True, True, True]
    assert survive_holm([]) == []
    setting = setting_of(tmp_path, {"window(0.1)": 0.0003})
    pair = kind_of(setting, "window(0.1)"), base_of(setting)
    wanted = scipy.stats.ttest_rel(*(confirmed(setting, kind).losses for kind in pair))
    found = p_value(best_against_best(setting, *pair))
    assert found == pytest.approx(wanted.pvalue, rel=1e-6)
    values = result({"window(0.2)": -0.05}), result({}, optimizer="sgd")
    found = outcomes(settings_of(tmp_path, *values))
    assert [len(outcome.survivors) for outcome in found] == [1, 0]


# The command.


def test_a_check_finds_what_differs(tmp_path):
    drawn = next(iter(drawings(read_sources(RESULTS)).values()))()
    figures = {"a.svg": drawn, "b.svg": drawn}
    command.write(tmp_path, "the report", figures)
    assert command.differences(tmp_path, "the report", figures) == []
    assert command.differences(tmp_path, "another", figures) != []
    of_b = tmp_path / "figures" / "b.svg"
    of_b.write_text(drawn.replace("</svg>", "<g/></svg>"))
    (found,) = command.differences(tmp_path, "the report", figures)
    assert "b.svg differs" in found
    # Another version draws otherwise; then the figure need only be there.
    of_b.write_text("<!-- Matplotlib v3.0.0, https://matplotlib.org/ -->")
    assert command.differences(tmp_path, "the report", figures) == []
    of_b.unlink()
    (found,) = command.differences(tmp_path, "the report", figures)
    assert "b.svg is missing" in found
    assert (
        len(command.differences(tmp_path, "the report", {})) == 1
    )  # a.svg is too much
    command.write(tmp_path, "the report", {})
    assert not (tmp_path / "figures" / "a.svg").exists()


def test_the_committed_report_is_what_the_command_produces():
    sources = read_sources(RESULTS)
    figures = drawings(sources)
    signals = table(json.loads((RESULTS / "signals.json").read_text()))
    assert (RESULTS / "README.md").read_text() == page(sources, figures, signals) + "\n"
    assert {path.name for path in (RESULTS / "figures").iterdir()} == {*figures}
    # Of each kind one; `python -m benchmarks.report --check` draws them all.
    for name in ("parts.svg", "rl-sgd-rates.svg", "rl-sgd-mechanism.svg"):
        committed = (RESULTS / "figures" / name).read_text()
        if made_by_this_version(committed):
            assert figures[name]() == committed
