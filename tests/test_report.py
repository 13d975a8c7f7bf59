"""The numbers of the report, from result files made here."""

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
    best_pair,
    best_rate,
    best_screened_of,
    confirmed,
    control_of,
    kinds,
    p_value,
    survive_holm,
    tuned_rate,
    window_of,
)
from benchmarks.report.figures import drawings, made_by_this_version
from benchmarks.report.page import page
from benchmarks.report.records import read_sources
from benchmarks.report.verdicts import Verdict, outcomes, verdict_of
from benchmarks.signals import table

RATES = (0.002, 0.004, 0.008, 0.016)
SCREEN, CONFIRM = range(4), range(4, 20)

# {name: fields}; a result has them all.
KINDS = {
    "base": {"operator": "none", "alpha": 0.0},
    "window(0.1)": {"alpha": 0.1},
    "window(0.2)": {"alpha": 0.2},
    "window(0.2), norm-preserving": {"variant": "norm_preserving"},
    "learn_alpha": {"operator": "learn_alpha", "alpha": 0.1},
    "norm-matched window(0.2)": {"control": "norm_matched"},
    "shuffled window(0.2)": {"control": "shuffled_depth"},
    "mean over depth": {"operator": "mean", "alpha": 1.0, "control": "full_average"},
    "norm-matched mean over depth": {
        **{"operator": "mean", "alpha": 1.0, "control": "norm_matched"}
    },
    "window(0.5)": {"alpha": 0.5},
    "norm-matched window(0.5)": {"alpha": 0.5, "control": "norm_matched"},
    "shuffled window(0.5)": {"alpha": 0.5, "control": "shuffled_depth"},
}
# The controls of the best screened arm have no screen.
NOT_SCREENED = ("norm-matched window(0.5)", "shuffled window(0.5)")


def arm(name, stage, rate, level, sign):
    """An arm whose metric is `level` and some noise of which the seeds share most."""
    seeds = SCREEN if stage == "screen" else CONFIRM
    noise = [
        0.1 * np.sin(7 * seed) + 0.001 * np.sin(seed * len(name)) for seed in seeds
    ]
    fields = {"operator": "window", "alpha": 0.2, "variant": "standard"}
    return {
        **{"name": name, "stage": stage, "layers": 6, "learning_rate": rate},
        **{**fields, "scope": "full", "control": None, **KINDS[name]},
        "seeds": list(seeds),
        "metric_per_seed": [sign * (level + x) for x in noise],
        "other_metrics_per_seed": {},
        "mechanism": {"steps": [1, 2], "roughness": {"before": [1], "after": [2]}},
    }


def result(effects, *, best=0.004, sign=1, **fields):
    """A result file: `effects` by name are added to the base's loss at every rate."""
    arms = []
    for name in KINDS:
        for rate in RATES:
            level = 2.5 + 0.1 * np.log2(rate / best) ** 2 + effects.get(name, 0.0)
            stages = ("confirm",) if name in NOT_SCREENED else ("screen", "confirm")
            arms += [arm(name, stage, rate, level, sign) for stage in stages]
    metric = {"name": "loss", "unit": "", "lower_is_better": sign > 0}
    return {
        **{"task": "lm", "optimizer": "adamw", "preset": "full", "metric": metric},
        **{"config": {"depths": [6]}, "versions": {}, "sittings": [], "machine": {}},
        **{"arms": arms, **fields},
    }


def settings_of(directory, *values):
    for value in values:
        path = directory / value["task"] / f"{value['optimizer']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(value, path)
    return [s for source in read_sources(directory) for s in source.settings]


def only_setting(directory, value):
    (setting,) = settings_of(directory, value)
    return setting


def kind_of(setting, name):
    (kind,) = (kind for kind in kinds(setting) if kind.name == name)
    return kind


def without(value, name, stage, *rates):
    """Takes out the arms of one name and stage, of some rates."""
    value["arms"] = [
        of
        for of in value["arms"]
        if (of["name"], of["stage"]) != (name, stage)
        or of["learning_rate"] not in rates
    ]


def shift(value, name, stage, rate, by):
    """Adds to the metric of an arm."""
    for of in value["arms"]:
        if (of["name"], of["stage"], of["learning_rate"]) == (name, stage, rate):
            of["metric_per_seed"] = [metric + by for metric in of["metric_per_seed"]]


def effects(verdict, name="window(0.2)"):
    """What makes the verdict on a window this one."""
    matched, shuffled = f"norm-matched {name}", f"shuffled {name}"
    return {
        Verdict.NEIGHBORS: {name: -0.05, matched: -0.02},
        Verdict.COUPLING: {name: -0.05, shuffled: -0.05},
        Verdict.SMALLER: {name: -0.05, matched: -0.05},
        Verdict.HURTS: {name: 0.05},
        Verdict.NOTHING: {},
    }[verdict]


@pytest.mark.parametrize("name", ["window(0.2)", "window(0.5)"])
@pytest.mark.parametrize("sign", [1, -1], ids=["lower is better", "higher is better"])
@pytest.mark.parametrize(
    "verdict",
    [
        *(Verdict.NEIGHBORS, Verdict.COUPLING, Verdict.SMALLER),
        *(Verdict.HURTS, Verdict.NOTHING),
    ],
    ids=lambda verdict: verdict.name,
)
def test_the_verdict_follows_from_the_base_and_the_arms_own_controls(
    tmp_path, verdict, sign, name
):
    setting = only_setting(tmp_path, result(effects(verdict, name), sign=sign))
    assert verdict_of(setting, kind_of(setting, name)) is verdict


def test_an_arm_without_controls_is_compared_with_none(tmp_path):
    setting = only_setting(tmp_path, result({"learn_alpha": -0.05}))
    for name in ("learn_alpha", "window(0.2), norm-preserving", "window(0.1)"):
        kind = kind_of(setting, name)
        assert control_of(setting, kind, "norm_matched") is None
    found = kind_of(setting, "learn_alpha")
    assert best_screened_of(setting) == found
    assert verdict_of(setting, found) is Verdict.NO_CONTROLS
    shuffled = kind_of(setting, "shuffled window(0.2)")
    matched = kind_of(setting, "norm-matched window(0.2)")
    assert control_of(setting, shuffled, "norm_matched") == matched


def test_two_arms_are_compared_at_the_better_of_the_rates_that_both_ran_at(tmp_path):
    value = result({})
    # On the seeds of the confirmation another rate than that of the screen is best.
    shift(value, "window(0.2)", "confirm", 0.008, -0.3)
    shift(value, "base", "confirm", 0.002, -0.2)
    setting = only_setting(tmp_path, value)
    window, base = window_of(setting, 0.2), base_of(setting)
    assert tuned_rate(setting, window) == (0.004, False)
    assert best_rate(setting, window) == (0.008, False)
    assert best_rate(setting, base) == (0.002, True)
    found = best_against_best(setting, window, base)
    np.testing.assert_allclose(found.mean, -0.1, atol=1e-3)
    opposite = best_against_best(setting, base, window)
    np.testing.assert_allclose(opposite.mean, -found.mean)
    # Both at the base's best rate, and both at their rates of the screen.
    np.testing.assert_allclose(at_base_rate(setting, window).mean, 0.2, atol=1e-3)
    np.testing.assert_allclose(at_screened_rates(setting, window).mean, 0, atol=1e-3)


def test_rates_that_only_one_of_two_arms_ran_at_do_not_count(tmp_path):
    value = result({})
    shift(value, "window(0.2)", "confirm", 0.008, -0.3)
    without(value, "base", "confirm", 0.008)
    setting = only_setting(tmp_path, value)
    window, base = window_of(setting, 0.2), base_of(setting)
    found = best_against_best(setting, window, base)
    np.testing.assert_allclose(found.mean, 0, atol=1e-3)
    # All the same it is the window's best, beside an arm that ran there.
    found = best_against_best(setting, window, window_of(setting, 0.1))
    np.testing.assert_allclose(found.mean, -0.2, atol=1e-3)


def test_what_did_not_run_at_its_best_rate_of_the_screen_is_not_compared(tmp_path):
    value = result({})
    without(value, "window(0.2)", "confirm", 0.004)
    setting = only_setting(tmp_path, value)
    window, base = window_of(setting, 0.2), base_of(setting)
    assert confirmed(setting, window) is None
    assert best_rate(setting, window).rate == 0.004
    assert best_against_best(setting, window, base) is None


def test_a_control_without_a_screen_has_the_rates_it_was_confirmed_at(tmp_path):
    value = result(effects(Verdict.NEIGHBORS, "window(0.5)"))
    shift(value, "norm-matched window(0.5)", "confirm", 0.008, -0.3)
    setting = only_setting(tmp_path, value)
    control = kind_of(setting, "norm-matched window(0.5)")
    assert best_rate(setting, control).rate == 0.008
    assert verdict_of(setting, kind_of(setting, "window(0.5)")) is Verdict.SMALLER
    assert at_screened_rates(setting, control) is None


def test_the_mean_over_depth_has_rates_of_its_own(tmp_path):
    value = result({"window(0.2)": -0.05, "mean over depth": 0.1})
    for stage in ("screen", "confirm"):
        shift(value, "mean over depth", stage, 0.016, -0.6)
    without(value, "base", "confirm", 0.016)
    setting = only_setting(tmp_path, value)
    mean = kind_of(setting, "mean over depth")
    found = best_against_best(setting, mean, base_of(setting))
    # 0.1 + 0.4 at four times the best rate - 0.6.
    np.testing.assert_allclose(found.mean, -0.1, atol=1e-3)


def test_a_verdict_names_the_arms_whose_best_rate_is_at_an_end(tmp_path):
    (outcome,) = outcomes(settings_of(tmp_path, result({}, best=0.016)))
    assert outcome.window.untuned == (
        *("base", "window(0.2)", "norm-matched window(0.2)", "shuffled window(0.2)"),
    )
    (outcome,) = outcomes(settings_of(tmp_path, result({}, best=0.004)))
    assert outcome.window.untuned == ()


def test_by_another_metric_both_arms_are_at_the_rate_where_that_is_better(tmp_path):
    other = {"name": "accuracy", "unit": "", "lower_is_better": False}
    value = result({"window(0.2)": -0.05}, other_metrics=[other])
    for of in value["arms"]:
        # Best at the highest rate; the window adds a tenth.
        found = of["learning_rate"] + 0.1 * (of["name"] == "window(0.2)")
        of["other_metrics_per_seed"] = {"accuracy": [found] * len(of["seeds"])}
    setting = only_setting(tmp_path, value)
    pair = window_of(setting, 0.2), base_of(setting)
    first = best_pair(setting, *pair)
    assert [of.learning_rate for of in first] == [0.004, 0.004]
    window, base = best_pair(setting, *pair, setting.others[0])
    assert (window.learning_rate, base.learning_rate) == (0.016, 0.016)
    np.testing.assert_allclose([window.level, base.level], [-0.116, -0.016])


def test_holm_rejects_step_by_step_until_one_is_kept():
    assert survive_holm([0.02, 0.001, 0.04, 0.03]) == [False, True, False, False]
    assert survive_holm([0.01, 0.001, 0.02]) == [True, True, True]
    assert survive_holm([]) == []


def test_p_values_are_those_of_the_paired_t_test(tmp_path):
    setting = only_setting(tmp_path, result({"window(0.1)": 0.0003}))
    window, base = window_of(setting, 0.1), base_of(setting)
    pair = (confirmed(setting, kind).losses for kind in (window, base))
    expected = scipy.stats.ttest_rel(*pair)
    found = p_value(best_against_best(setting, window, base))
    assert 0 < found < 1
    np.testing.assert_allclose(found, expected.pvalue, rtol=1e-6)


def test_holm_is_over_all_settings(tmp_path):
    values = result({"window(0.2)": -0.05}), result({}, optimizer="sgd")
    found = outcomes(settings_of(tmp_path, *values))
    assert [len(outcome.survivors) for outcome in found] == [1, 0]


# The command.


def test_a_check_finds_what_differs(tmp_path):
    text, drawn = "the report", next(iter(drawings(read_sources(RESULTS)).values()))()
    figures = {"a.svg": drawn, "b.svg": drawn}
    command.write(tmp_path, text, figures)
    assert command.differences(tmp_path, text, figures) == []
    assert command.differences(tmp_path, "another", figures) != []
    of_b = tmp_path / "figures" / "b.svg"
    of_b.write_text(drawn.replace("</svg>", "<g/></svg>"))
    (found,) = command.differences(tmp_path, text, figures)
    assert "b.svg differs" in found
    # Another version draws otherwise; then the figure need only be there.
    of_b.write_text("<!-- Matplotlib v3.0.0, https://matplotlib.org/ -->")
    assert command.differences(tmp_path, text, figures) == []
    of_b.unlink()
    (found,) = command.differences(tmp_path, text, figures)
    assert "b.svg is missing" in found
    assert len(command.differences(tmp_path, text, {})) == 1  # a.svg is left over
    command.write(tmp_path, text, {})
    assert not (tmp_path / "figures" / "a.svg").exists()


def test_the_committed_report_is_what_the_command_produces():
    import json

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
