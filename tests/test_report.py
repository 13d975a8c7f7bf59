"""The report of the evidence, from result files made here."""

import json

import numpy as np
import pytest

from benchmarks.json_files import write_json
from benchmarks.report import __main__ as command
from benchmarks.report.__main__ import RESULTS, main
from benchmarks.report.comparisons import (
    base_of,
    best_against_best,
    best_rate,
    confirmed,
    control_of,
    kinds,
    p_value,
    survive_holm,
    tuned_rate,
    window_of,
)
from benchmarks.report.figures import drawings, svg
from benchmarks.report.grid import grid
from benchmarks.report.headline import in_short
from benchmarks.report.names import metric_text
from benchmarks.report.records import Metric, read_source, read_sources
from benchmarks.report.text import confirm_table, report, screen_table
from benchmarks.report.verdicts import Verdict, outcomes, verdict_of

RATES = (0.002, 0.004, 0.008, 0.016)
SCREEN, CONFIRM = range(4), range(4, 20)
STEPS = [20, 50, 100]

# name: (fields, what it adds to the base's metric at every rate).
KINDS = {
    "base": {"operator": "none", "alpha": 0.0},
    "window(0.1)": {"alpha": 0.1},
    "window(0.2)": {"alpha": 0.2},
    "window(0.2), proj": {"scope": "proj"},
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


def arm(name, stage, layers, rate, level):
    """An arm whose metric is `level` and some noise of which the seeds share most."""
    seeds = SCREEN if stage == "screen" else CONFIRM
    noise = [
        0.1 * np.sin(7 * seed) + 0.001 * np.sin(seed * len(name)) for seed in seeds
    ]
    fields = {
        "operator": "window",
        "alpha": 0.2,
        "variant": "standard",
        "scope": "full",
        "control": None,
    }
    before, after = ([x, 0.9 * x, 0.8 * x] for x in (1.5, 1.2))
    series = {"before": before, "after": before if name == "base" else after}
    return {
        "name": name,
        "stage": stage,
        "layers": layers,
        **fields,
        **KINDS[name],
        "learning_rate": rate,
        "seeds": list(seeds),
        "metric_per_seed": (level + np.array(noise)).tolist(),
        "diverged": [False] * len(seeds),
        "curve": {"steps": STEPS, "train_loss": [3.0, 2.5, None]},
        "mechanism": {
            "steps": STEPS,
            "roughness": series,
            "adjacent_cosine": series,
            "line_shape_score": before,
            "residual_alignment": after,
            "gradient_noise": before,
        },
        "seconds_per_step": 0.05,
    }


def result(
    effects, *, layers=(6,), best=0.004, sign=1, rates=RATES, confirm=True, **fields
):
    """A result file: `effects` by name are added to the base's loss at every rate."""
    arms = []
    for depth in layers:
        for name in KINDS:
            for rate in rates:
                level = 2.5 + 0.1 * np.log2(rate / best) ** 2 + effects.get(name, 0.0)
                if name not in NOT_SCREENED:
                    arms.append(arm(name, "screen", depth, rate, level))
                if confirm:
                    arms.append(arm(name, "confirm", depth, rate, level))
    for of in arms:
        of["metric_per_seed"] = [sign * value for value in of["metric_per_seed"]]
    return {
        "task": "lm",
        "optimizer": "adamw",
        "preset": "full",
        "metric": {
            "name": "validation loss",
            "unit": "nats/byte",
            "lower_is_better": sign > 0,
        },
        "config": {"depths": list(layers), "width": 32, "steps": 200, "batch": 4},
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "commit": {"sha": "0123456789abcdef", "modified": False},
        "date": "2026-11-22T10:00:00+00:00",
        "sittings": [
            {
                "date": "2026-11-22T10:00:00+00:00",
                "commit": {"sha": "0123456789abcdef", "modified": False},
            }
        ],
        "machine": {"cpus": 2, "devices": ["cpu"]},
        "arms": arms,
        **fields,
    }


def written(directory, *values):
    """Writes result files where the command finds them."""
    for value in values:
        preset = "" if value["preset"] == "full" else f"-{value['preset']}"
        path = directory / value["task"] / f"{value['optimizer']}{preset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(value, path)
    return directory


def only_setting(directory, value):
    ((setting,),) = (s.settings for s in read_sources(written(directory, value)))
    return setting


def with_other(value, name, level, lower_is_better=False):
    """Adds another metric, by a function of an arm that gives its level."""
    metric = {"name": name, "unit": "", "lower_is_better": lower_is_better}
    value.setdefault("other_metrics", []).append(metric)
    for of in value["arms"]:
        others = of.setdefault("other_metrics_per_seed", {})
        others[name] = [level(of)] * len(of["seeds"])
    return value


def renamed(value, names, **fields):
    """Makes other arms of some: {name: fields that differ}."""
    for of in value["arms"]:
        if of["name"] in names:
            of |= {"operator": "window", **fields, **names[of["name"]]}
    return value


def of_parts(effect_of_norms, **fields):
    """A result of parts, of full and norms."""
    effects = {"window(0.2)": effect_of_norms}
    value = result(effects, **{"preset": "parts", **fields})
    kept = ("base", "window(0.1)", "window(0.2)")
    value["arms"] = [of for of in value["arms"] if of["name"] in kept]
    names = {
        "window(0.1)": {"name": "window(0.5), full", "scope": "full"},
        "window(0.2)": {"name": "window(0.5), norms", "scope": "norms"},
    }
    return renamed(value, names, alpha=0.5)


def section(text, heading):
    """What stands below a heading of the second level."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def text_of(directory, *values):
    return report(read_sources(written(directory, *values)), [])


def arms_of(value, name, stage):
    return [of for of in value["arms"] if (of["name"], of["stage"]) == (name, stage)]


def kind_of(setting, name):
    (kind,) = (kind for kind in kinds(setting) if kind.name == name)
    return kind


def without(value, name, stage, *rates):
    """Takes out the arms of one name and stage, of all rates or of some."""
    value["arms"] = [
        of
        for of in value["arms"]
        if (of["name"], of["stage"]) != (name, stage)
        or (rates and of["learning_rate"] not in rates)
    ]


def shift(value, name, stage, rate, by):
    """Adds to the metric of an arm."""
    for of in arms_of(value, name, stage):
        if of["learning_rate"] == rate:
            of["metric_per_seed"] = [metric + by for metric in of["metric_per_seed"]]


def cells_of(table, start):
    """The cells of the row of a table that starts with these words."""
    (row,) = (line for line in table.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in row.split("|")[2:-1]]


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


HELPS = {"window(0.2)": -0.05}
CONTROLLED = [
    Verdict.NEIGHBORS,
    Verdict.COUPLING,
    Verdict.SMALLER,
    Verdict.HURTS,
    Verdict.NOTHING,
]


@pytest.mark.parametrize("name", ["window(0.2)", "window(0.5)"])
@pytest.mark.parametrize("sign", [1, -1], ids=["lower is better", "higher is better"])
@pytest.mark.parametrize("verdict", CONTROLLED, ids=lambda verdict: verdict.name)
def test_the_verdict_follows_from_the_base_and_the_arms_own_controls(
    tmp_path, verdict, sign, name
):
    setting = only_setting(tmp_path, result(effects(verdict, name), sign=sign))
    assert verdict_of(setting, kind_of(setting, name)) is verdict


def test_an_arm_without_controls_is_compared_with_none(tmp_path):
    stronger = {"window(0.5)": -0.01, **dict.fromkeys(NOT_SCREENED, 0.02)}
    value = result({"learn_alpha": -0.05, "window(0.2)": -0.02, **stronger})
    setting = only_setting(tmp_path, value)
    found = kind_of(setting, "learn_alpha")
    assert verdict_of(setting, found) is Verdict.NO_CONTROLS
    assert control_of(setting, found, "norm_matched") is None
    table = confirm_table(setting)
    for name in ("learn_alpha", "window(0.2), norm-preserving", "window(0.1)"):
        assert cells_of(table, name)[-2:] == ["", ""]
    # Each against its own.
    assert all("-0.0200" in cell for cell in cells_of(table, "window(0.2)")[-2:])
    assert all("-0.0300" in cell for cell in cells_of(table, "window(0.5)")[-2:])
    text = text_of(tmp_path, value)
    assert "**-0.0500 ± 0.0005** (16/16)†; helps (it has no controls) |" in text
    assert "controls): lm, adamw, 6 layers, learn_alpha (-0.0500 ± 0.0005)." in text
    assert "(shuffled)): lm, adamw, 6 layers, window(0.2) (-0.0200 ± 0.0005)." in text


def test_a_control_may_be_best_at_a_rate_that_the_base_has_not(tmp_path):
    value = result(effects(Verdict.COUPLING))
    control = "norm-matched window(0.2)"
    shift(value, control, "screen", 0.016, -0.6)
    without(value, "base", "confirm", 0.016)
    setting = only_setting(tmp_path, value)
    kind, base = kind_of(setting, control), base_of(setting)
    assert tuned_rate(setting, kind).rate == 0.016
    assert best_against_best(setting, kind, base).num_seeds == 16
    assert verdict_of(setting, window_of(setting, 0.2)) is Verdict.COUPLING


def test_the_best_screened_arm_waits_for_controls_of_its_own(tmp_path):
    value = result({"window(0.5)": -0.05, "window(0.2)": -0.02})
    without(value, "shuffled window(0.5)", "confirm")
    setting = only_setting(tmp_path, value)
    assert verdict_of(setting, kind_of(setting, "window(0.5)")) is Verdict.UNFINISHED
    assert verdict_of(setting, window_of(setting, 0.2)) is Verdict.NEIGHBORS
    text = text_of(tmp_path, value)
    assert "window(0.5): **-0.0500 ± 0.0005** (16/16)†; unfinished |" in text
    assert "Not finished, and not counted: lm, adamw, 6 layers, window(0.5)." in text


def test_a_diverged_seed_is_shown_and_decides(tmp_path):
    value = result(HELPS)
    for of in arms_of(value, "window(0.2)", "confirm"):
        of["metric_per_seed"][3], of["diverged"][3] = None, True
    setting = only_setting(tmp_path, value)
    assert verdict_of(setting, window_of(setting, 0.2)) is Verdict.DIVERGED
    text = text_of(tmp_path, value)
    assert "diverged in 1 of 16" in text
    assert "diverged (15/16)" in text
    assert "Not counted, since runs that they rest on diverged: lm, adamw, 6 l" in text


@pytest.mark.parametrize(
    "missing", ["base", "window(0.2)", "norm-matched window(0.2)", None]
)
def test_an_unfinished_run_is_shown_as_unfinished(tmp_path, missing):
    value = result(HELPS, confirm=missing is not None)
    without(value, missing, "confirm")
    setting = only_setting(tmp_path, value)
    assert verdict_of(setting, window_of(setting, 0.2)) is Verdict.UNFINISHED
    text = text_of(tmp_path, value)
    assert "Not finished, and not counted: lm, adamw, 6 layers" in text
    assert ("The confirmation has not run." in text) is (missing is None)
    assert "gain at tuned rates" not in text  # nothing is known yet


def test_a_depth_without_arms_and_a_file_without_base_are_shown(tmp_path):
    no_base = result({}, optimizer="sgd")
    no_base["arms"] = [of for of in no_base["arms"] if of["name"] != "base"]
    text = text_of(tmp_path, result({}) | {"arms": []}, no_base)
    assert text.count("\n\nVerdict on window(0.2): unfinished.") == 2
    assert "not counted: lm, adamw, 6 layers; lm, sgd, 6 layers, window(0.2)" in text
    assert main(["--results", str(tmp_path)]) == 0


def test_two_arms_are_compared_at_the_better_of_the_rates_that_both_ran_at(tmp_path):
    value = result({})
    # On the seeds of the confirmation another rate than that of the screen is best.
    shift(value, "window(0.2)", "confirm", 0.008, -0.3)
    shift(value, "base", "confirm", 0.002, -0.2)
    setting = only_setting(tmp_path, value)
    window, base = window_of(setting, 0.2), base_of(setting)
    assert tuned_rate(setting, window) == (0.004, False)
    assert confirmed(setting, window).learning_rate == 0.008
    assert best_rate(setting, base) == (0.002, True)
    found = best_against_best(setting, window, base)
    np.testing.assert_allclose(found.mean, -0.1, atol=1e-3)
    opposite = best_against_best(setting, base, window)
    np.testing.assert_allclose(opposite.mean, -found.mean)


def test_rates_that_only_one_of_two_arms_ran_at_do_not_count(tmp_path):
    value = result({})
    shift(value, "window(0.2)", "confirm", 0.008, -0.3)
    without(value, "base", "confirm", 0.008)
    setting = only_setting(tmp_path, value)
    window, base = window_of(setting, 0.2), base_of(setting)
    found = best_against_best(setting, window, base)
    np.testing.assert_allclose(found.mean, 0, atol=1e-3)
    assert verdict_of(setting, window) is Verdict.NOTHING
    # All the same it is the window's best, beside an arm that ran there.
    found = best_against_best(setting, window, window_of(setting, 0.1))
    np.testing.assert_allclose(found.mean, -0.2, atol=1e-3)


@pytest.mark.parametrize("name", ["base", "window(0.2)", "shuffled window(0.2)"])
def test_a_comparison_waits_for_the_best_rates_of_the_screen(tmp_path, name):
    value = result(effects(Verdict.NEIGHBORS))
    without(value, name, "confirm", 0.004)
    setting = only_setting(tmp_path, value)
    assert confirmed(setting, kind_of(setting, name)) is None
    assert verdict_of(setting, window_of(setting, 0.2)) is Verdict.UNFINISHED


def test_a_control_without_a_screen_has_the_rates_it_was_confirmed_at(tmp_path):
    value = result(effects(Verdict.NEIGHBORS, "window(0.5)"))
    shift(value, "norm-matched window(0.5)", "confirm", 0.008, -0.3)
    setting = only_setting(tmp_path, value)
    control, window = (
        kind_of(setting, name) for name in ("norm-matched window(0.5)", "window(0.5)")
    )
    assert confirmed(setting, control).learning_rate == 0.008
    assert verdict_of(setting, window) is Verdict.SMALLER
    assert "norm-matched window(0.5)" not in screen_table(setting)
    # It waits for the best rate of the arm that it is a control of.
    without(value, "norm-matched window(0.5)", "confirm", 0.004)
    setting = only_setting(tmp_path, value)
    assert confirmed(setting, control) is None
    assert verdict_of(setting, window) is Verdict.UNFINISHED


def test_the_mean_over_depth_has_rates_of_its_own(tmp_path):
    value = result({"window(0.2)": -0.05, "mean over depth": 0.1})
    for stage in ("screen", "confirm"):
        shift(value, "mean over depth", stage, 0.016, -0.6)
    without(value, "window(0.2)", "confirm", 0.016)
    without(value, "norm-matched mean over depth", "confirm")
    text = text_of(tmp_path, value)
    # 0.1 + 0.4 at four times the best rate - 0.6.
    table = section(text, "The mean over depth")
    assert cells_of(table, "lm, adamw, 6 layers") == [
        "**-0.1000 ± 0.0005** (16/16)",
        *("not run", "not run"),
    ]
    effects = {"mean over depth": 0.1, "norm-matched mean over depth": 0.3}
    worse = text_of(tmp_path, result(HELPS | effects))
    table = section(worse, "The mean over depth")
    assert cells_of(table, "lm, adamw, 6 layers") == [
        *("**+0.1000 ± 0.0005** (0/16)", "**-0.1999 ± 0.0006** (16/16)"),
        "**+0.2999 ± 0.0005** (0/16)",
    ]


def test_a_rate_at_which_a_seed_diverged_was_tried_but_is_not_the_best(tmp_path):
    value = result({}, best=0.016)
    for of in arms_of(value, "base", "screen"):
        if of["learning_rate"] == 0.016:
            of["metric_per_seed"][0], of["diverged"][0] = None, True
    setting = only_setting(tmp_path, value)
    assert tuned_rate(setting, base_of(setting)) == (0.008, False)
    assert "diverged in 1 of 4" in screen_table(setting)


def test_an_optimum_at_an_end_of_the_rates_is_said(tmp_path):
    text = text_of(tmp_path, result(HELPS, best=0.016))
    assert "(0.016, at an end)" in text
    assert "coupling neighbors helps‡ |" in text
    assert (
        "Provisional, since the best rate of an arm under the verdict is at an end of "
        "those tried: lm, adamw, 6 layers (base, window(0.2), norm-matched "
        "window(0.2), shuffled window(0.2))."
    ) in text
    inside = text_of(tmp_path, result(HELPS, best=0.004))
    assert not any(words in inside for words in (", at an end", "Provisional"))
    assert inside.count("‡") == 1  # what it means


def test_the_metric_is_said_once_if_all_settings_share_it(tmp_path):
    accuracy = {"name": "accuracy", "unit": "", "lower_is_better": False}
    same = text_of(tmp_path, result({}), result({}, optimizer="sgd"))
    assert "\n\nMetric: validation loss (nats/byte), lower is better.\n\n| set" in same
    assert "| metric |" not in same
    other = result({}, sign=-1, optimizer="sgd", metric=accuracy)
    mixed = text_of(tmp_path, result({}), other)
    table = mixed.split("## The mean over depth")[0]
    assert cells_of(table, "lm, sgd, 6 layers")[0] == "accuracy, higher is better"


def test_the_sign_of_a_difference_is_that_of_the_metric(tmp_path):
    accuracy = {"name": "accuracy", "unit": "", "lower_is_better": False}
    value = result(HELPS, sign=-1, metric=accuracy)
    text = text_of(tmp_path, value)
    setting = only_setting(tmp_path, value)
    assert "accuracy, higher is better" in text
    assert "**+0.0500 ± 0.0005** (16/16)" in text
    assert "-0.0500" not in text
    found = best_against_best(setting, window_of(setting, 0.2), base_of(setting))
    assert (found.mean < 0, found.wins) == (True, 16)


def test_without_any_gain_the_first_sentence_is_that(tmp_path):
    text = text_of(tmp_path, result({}, layers=(6, 12)))
    sentence = "**No setting shows a gain at tuned rates**"
    assert text.split("\n\n")[2].startswith(sentence)
    nowhere = "**That it is the coupling of neighbors which helps is shown nowhere**"
    assert sentence not in text_of(tmp_path, result(HELPS))
    for gain in ("learn_alpha", "mean over depth"):
        other = text_of(tmp_path, result({gain: -0.05}))
        assert sentence not in other
        assert nowhere in other


def test_the_headline_counts_settings_and_comparisons(tmp_path):
    helps = result(effects(Verdict.NEIGHBORS), layers=(6, 12), optimizer="adamw")
    smaller = result(effects(Verdict.SMALLER), optimizer="sgd")
    hurts = result({"window(0.2)": 0.05, "learn_alpha": -0.05}, optimizer="muon")
    text = text_of(tmp_path, helps, smaller, hurts)
    first = text.split("\n\n")[2]
    assert "the base optimizer in 3 of 4 settings (lm 3 of 4), and" in first
    assert (
        "did best in the screen in 4. **That it is the coupling of neighbors" in first
    )
    assert "helps is shown in 2**" in first
    window = "window(0.2) (-0.0500 ± 0.0005)"
    both = f"lm, adamw, 6 layers, {window}; lm, adamw, 12 layers, {window}."
    assert f"in random order (shuffled)): {both}\n" in text
    assert f"and not told apart from it): lm, sgd, 6 layers, {window}.\n" in text
    assert "**It hurts** (worse than the base): lm, muon, 6 layers, window(0.2)" in text
    assert "no controls): lm, muon, 6 layers, learn_alpha (-0.0500 ± 0.0005)." in text
    # Two windows, norm-preserving and the mean in each, learn_alpha in one.
    assert (
        "Of the 17 comparisons of main arms with the base, the 95 % interval excludes "
        "0 in 5 (4 better, 1 worse), after Holm's correction in 5; by chance "
        "it would in one of twenty, 0.8 of them."
    ) in text
    assert "learn_alpha: **-0.0500 ± " in text


def test_settings_of_several_depths_are_compared_by_depth(tmp_path):
    value = result({}, layers=(6, 24))
    for of in arms_of(value, "window(0.2)", "confirm"):
        gain = 0.05 if of["layers"] == 24 else 0.0
        of["metric_per_seed"] = [loss - gain for loss in of["metric_per_seed"]]
    text = text_of(tmp_path, value)
    assert "**By depth**, window(0.2) in lm, adamw: " in text
    assert " ± 0.0005 at 6, -0.0500 ± 0.0005 at 24 layers." in text


def test_a_preset_is_a_setting_of_its_own_after_the_full_ones(tmp_path):
    text = text_of(tmp_path, result({}), result({}, preset="deep", layers=(48,)))
    assert text.index("## lm, adamw\n") < text.index("## lm, adamw, deep\n")
    # Whoever ran it had seen the others: it is shown, and not counted.
    assert "beats the base optimizer in 0 of 1 setting (lm 0 of 1), and" in text
    assert "--task lm --optimizer adamw --preset deep" in text


def test_the_published_replication_stands_beside_the_same_here(tmp_path):
    value = result({"window(0.2), proj": -0.02}, layers=(24,), task="reverse")
    text = text_of(tmp_path, value)
    (published,) = (line for line in text.splitlines() if "3.1121" in line)
    assert "-0.0209 [-0.0264, -0.0154]" in published
    (here,) = (line for line in text.splitlines() if line.startswith("| the same here"))
    cells = [cell.strip() for cell in here.split("|")[2:-1]]
    base, window = (
        np.mean(of["metric_per_seed"])
        for name in ("base", "window(0.2), proj")
        for of in arms_of(value, name, "confirm")
        if of["learning_rate"] == 0.002
    )
    assert cells[:3] == ["16", f"{base:.4f}", f"{window:.4f}"]
    assert cells[3].startswith(f"{window - base:+.4f} [")
    assert cells[4] == "16/16"
    assert "published" not in text_of(tmp_path / "other", result({}))


# Other metrics than the one that arms are tuned by.


def accuracy_of(of):
    """Best at the highest rate; the window adds a tenth."""
    return of["learning_rate"] + (0.1 if of["name"] == "window(0.2)" else 0.0)


def test_other_metrics_are_shown_at_the_rates_that_they_are_best_at(tmp_path):
    value = with_other(result(HELPS), "accuracy", accuracy_of)
    with_other(value, "distance", accuracy_of, lower_is_better=True)
    table = text_of(tmp_path, value).split("(no correction for this):\n\n")[1]
    header, *_ = table.splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        *("arm", "accuracy, higher is better", "at rate (and the base's)"),
        *("minus base", "distance, lower is better", "at rate (and the base's)"),
        "minus base",
    ]
    table = table.split("\n\n")[0]
    # Not at 0.004, the best by the first; more is won by one and lost by the other.
    assert cells_of(table, "base") == ["0.0160", "0.016", "", "0.0020", "0.002", ""]
    assert cells_of(table, "window(0.2)") == [
        *("0.1160", "0.016", "**+0.1000 ± 0.0000** (16/16)"),
        *("0.1020", "0.002", "**+0.1000 ± 0.0000** (0/16)"),
    ]
    assert cells_of(table, "learn_alpha")[2].endswith("0.0000 ± 0.0000 (0/16)")


def test_other_metrics_change_no_verdict_and_no_table_of_the_first(tmp_path):
    alone = text_of(tmp_path / "a", result(HELPS))
    value = with_other(result(HELPS), "accuracy", accuracy_of)
    both = text_of(tmp_path / "b", value)
    added = both[both.index("By what else was measured") :].split("<details>")[0]
    assert both.replace(added, "") == alone


def test_a_run_that_diverged_by_the_first_metric_has_no_number_by_another(tmp_path):
    value = with_other(result(HELPS), "accuracy", accuracy_of)
    for of in arms_of(value, "window(0.2)", "confirm"):
        of["metric_per_seed"][3], of["diverged"][3] = None, True
    table = text_of(tmp_path, value).split("(no correction for this):\n\n")[1]
    cells = cells_of(table.split("\n\n")[0], "window(0.2)")
    assert cells[0] == "diverged in 1 of 16"
    assert cells[2] == "diverged (15/16)"


def test_a_metric_is_named_with_its_unit_and_direction():
    text = "validation loss (nats/byte), lower is better"
    assert metric_text(Metric("validation loss", "nats/byte", 1)) == text
    assert metric_text(Metric("pass@1", "", -1)) == "pass@1, higher is better"


# What to couple.


def test_parts_have_a_table_of_their_own(tmp_path):
    text = text_of(tmp_path, result({}), of_parts(-0.05), of_parts(0.03, task="vit"))
    table = section(text, "Which parameters to couple")
    header = next(line for line in table.splitlines() if line.startswith("| "))
    loss = "validation loss (nats/byte), lower is better"
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        f"{task}, adamw, parts, 6 layers: {loss}" for task in ("lm", "vit")
    ]
    lm, vit = cells_of(table, "window(0.5), norms")
    assert lm == "**-0.0500 ± 0.0005** (16/16)"
    assert vit.startswith("**+0.0300 ± 0.000")
    full = cells_of(table, "window(0.5), full")
    assert [float(cell.split(" ±")[0]) for cell in full] == pytest.approx(
        [0, 0], abs=1e-3
    )
    assert all(float(level) for level in cells_of(table, "base"))
    assert "Which parameters" not in text_of(tmp_path / "other", result({}))


def test_a_part_that_did_not_run_in_one_setting_has_an_empty_cell(tmp_path):
    other = of_parts(0.0, task="vit")
    other["arms"] = [of for of in other["arms"] if of["scope"] != "norms"]
    table = section(
        text_of(tmp_path, result({}), of_parts(0.0), other),
        "Which parameters to couple",
    )
    assert cells_of(table, "window(0.5), norms")[1] == ""
    assert cells_of(table, "window(0.5), full")[1] != ""


def test_parts_count_in_no_verdict_and_in_no_other_table(tmp_path):
    values = [result(HELPS), of_parts(-0.5)]
    without = text_of(tmp_path / "a", values[0])
    text = text_of(tmp_path / "b", *values)
    before = text.split("## Which parameters to couple")[0]
    assert before == without.split("## lm, adamw\n")[0]
    assert "Verdict" not in section(text, "lm, adamw, parts")
    assert "window(0.5), norms" in section(text, "lm, adamw, parts")


def test_parts_have_a_figure_of_their_own_and_are_in_no_other(tmp_path):
    figures = drawings(read_sources(written(tmp_path, result(HELPS), of_parts(-0.05))))

    def rows(name):
        return [
            [t.get_text() for t in ax.get_yticklabels()] for ax in figures[name].axes
        ]

    assert rows("differences.svg") == [["lm, adamw, 6 layers"]]
    assert rows("parts.svg") == [["window(0.5), full", "window(0.5), norms"]]
    alone = drawings(read_sources(written(tmp_path / "other", result(HELPS))))
    assert "parts.svg" not in alone


def test_groupings_compare_one_stack_with_the_base_and_with_two(tmp_path):
    effects = {"window(0.2)": -0.02, "window(0.2), proj": -0.05, "learn_alpha": 0.01}
    both = {
        "window(0.2), proj": {"name": "window(0.2), joined", "scope": "joined"},
        "learn_alpha": {
            **{"name": "window(0.2), joined with mid_block", "alpha": 0.2},
            "scope": "joined with mid_block",
        },
    }
    value = renamed(result(effects, task="diffusion"), both)
    text = text_of(tmp_path, value, result({}))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section(text, "One stack or two").splitlines()
        if line.startswith("| diffusion")
    ]
    expected = {"joined": (-0.05, -0.03), "joined with mid_block": (0.01, 0.03)}
    assert [row[:2] for row in rows] == [
        ["diffusion, adamw, 6 layers", scope] for scope in expected
    ]
    for row, differences in zip(rows, expected.values(), strict=True):
        found = [float(cell.strip("*").split(" ")[0]) for cell in row[2:]]
        np.testing.assert_allclose(found, differences, atol=1e-3)
    assert "One stack or two" not in text_of(tmp_path / "other", result({}))


# Beside the paper.


def beside_paper(text):
    """The rows of the paper's table, as cells."""
    lines = section(text, "Beside the paper's own numbers").splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


PAPERS = {
    "vit": ("test accuracy", "74.56 %"),
    "diffusion": ("Fréchet distance", "6.58 / 4.01"),
    "rl": ("pass@1", "55.45 %"),
    "lm": ("validation loss", "GPT"),
}


@pytest.mark.parametrize("task", PAPERS)
def test_the_papers_numbers_stand_beside_the_metric_that_is_most_like_its(
    tmp_path, task
):
    pytest.importorskip("flax")
    pytest.importorskip("sklearn")
    from benchmarks.evidence.tasks import TASKS

    first, *others = TASKS[task].METRICS
    sign = 1 if first.lower_is_better else -1
    value = result(HELPS, task=task, metric=first._asdict(), sign=sign)
    for other in others:
        with_other(value, other.name, accuracy_of, other.lower_is_better)
    (row,) = beside_paper(text_of(tmp_path, value))
    wanted, number = PAPERS[task]
    assert row[0] == task
    assert number in " ".join(row[1:4])
    assert row[5].startswith(wanted)
    if wanted == first.name:
        assert row[7].startswith(f"**{-0.05 * sign:+.4f} ±")
    else:  # at its own best rate
        lower = next(m for m in others if m.name == wanted).lower_is_better
        assert row[6] == ("0.0020" if lower else "0.0160")
        assert row[7].startswith("**+0.1000 ±")


def test_the_papers_numbers_are_said_once_a_task_and_of_full_presets_alone(tmp_path):
    values = [
        *(result({}, layers=(6, 12)), result({}, optimizer="sgd")),
        *(result({}, preset="deep", layers=(48,)), result({}, task="reverse")),
        result({}, task="rl"),
    ]
    rows = beside_paper(text_of(tmp_path, *values))
    assert [(row[0], row[4]) for row in rows] == [
        ("lm", "adamw, 6 layers"),
        ("", "adamw, 12 layers"),
        ("", "sgd, 6 layers"),
        ("rl", "adamw, 6 layers"),
    ]
    assert all(any(row[1:4]) == bool(row[0]) for row in rows)
    other = text_of(tmp_path / "other", result({}, preset="deep"))
    assert "Beside the paper" not in other


# All of it at a glance.


def test_the_grid_has_a_row_per_task_and_depth_and_a_column_per_optimizer(tmp_path):
    values = [
        *(result(HELPS, layers=(6, 12)), result({}, optimizer="sgd")),
        *(result(HELPS, task="vit", optimizer="muon"), result({}, preset="deep")),
    ]
    settings = [s for x in read_sources(written(tmp_path, *values)) for s in x.settings]
    header, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in grid(outcomes(settings)).splitlines()
    )
    assert header == ["task", "metric", "sgd", "adamw", "muon"]
    found = {row[0]: [cell.split("; ")[-1] for cell in row[2:]] for row in rows}
    helps, nothing = Verdict.NEIGHBORS.value, Verdict.NOTHING.value
    assert found == {
        "lm, 6 layers": [nothing, helps, ""],
        "lm, 12 layers": ["", helps, ""],
        "lm, deep, 6 layers": ["", nothing, ""],
        "vit, 6 layers": ["", "", helps],
    }
    cells = {row[0]: row[2:] for row in rows}
    assert cells["vit, 6 layers"][2].startswith("**-0.0500 ± 0.0005** (16/16)†; ")
    assert {row[1] for row in rows} == {"validation loss (nats/byte), lower is better"}


def test_in_short_is_the_first_sentence_and_the_counts_without_the_places(tmp_path):
    values = [result(HELPS), result({}, optimizer="sgd"), result({}, task="vit")]
    without(values[2], "base", "confirm")
    settings = [s for x in read_sources(written(tmp_path, *values)) for s in x.settings]
    found = in_short(outcomes(settings))
    text = report(read_sources(tmp_path), [])
    assert found.startswith(text.split("\n\n")[2])
    assert "beats the base optimizer in 1 of 2 settings" in found
    assert "Of the 8 comparisons of main arms with the base" in found
    assert "without any coupling**, beat the base in 0 of 2 settings" in found
    assert "layers" not in found.split("Not finished, and not counted: ")[0]


@pytest.mark.usefixtures("drawn_once")
def test_a_picture_is_shown_in_the_section_of_its_source_and_kept(tmp_path):
    values = [result({}), result({}, optimizer="sgd")]
    options = ["--results", str(written(tmp_path, *values))]
    picture = tmp_path / "figures" / "lm-sgd-samples.png"
    picture.parent.mkdir()
    picture.write_bytes(b"a picture")
    assert main(options) == main([*options, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.count("(figures/lm-sgd-samples.png)") == 1
    assert "(figures/lm-sgd-samples.png)" in section(text, "lm, sgd")
    assert picture.read_bytes() == b"a picture"


def test_two_arms_that_are_the_same_are_an_error(tmp_path):
    value = result({})
    value["arms"].append(value["arms"][0])
    written(tmp_path, value)
    with pytest.raises(ValueError, match=r"adamw.json: base at 0.002 is there twice"):
        read_source(tmp_path / "lm" / "adamw.json")


def test_holm_rejects_step_by_step_until_one_is_kept():
    assert survive_holm([0.02, 0.001, 0.04, 0.03]) == [False, True, False, False]
    assert survive_holm([0.01, 0.001, 0.02]) == [True, True, True]
    assert survive_holm([]) == []


def test_p_values_are_those_of_the_paired_t_test(tmp_path):
    import scipy.stats

    setting = only_setting(tmp_path, result({"window(0.1)": 0.0003}))
    window, base = window_of(setting, 0.1), base_of(setting)
    expected = scipy.stats.ttest_rel(
        confirmed(setting, window).losses, confirmed(setting, base).losses
    )
    found = p_value(best_against_best(setting, window, base))
    assert 0 < found < 1
    np.testing.assert_allclose(found, expected.pvalue, rtol=1e-6)


def test_holm_is_over_all_settings(tmp_path):
    values = [result(HELPS), result({}, optimizer="sgd")]
    settings = [s for x in read_sources(written(tmp_path, *values)) for s in x.settings]
    assert [len(outcome.survivors) for outcome in outcomes(settings)] == [1, 0]


def test_writing_twice_gives_the_same_files_and_a_check_agrees(tmp_path):
    options = ["--results", str(written(tmp_path, result(HELPS, layers=(6, 12))))]
    assert main([*options, "--check"]) == 1
    assert not (tmp_path / "README.md").exists()
    assert main(options) == 0
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in first if path.suffix == ".svg"} == {
        "differences.svg",
        "lm-adamw-rates.svg",
        "lm-adamw-mechanism.svg",
    }
    assert main([*options, "--check"]) == 0
    assert main(options) == 0
    second = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert first == second


@pytest.fixture
def drawn_once(monkeypatch):
    """What of a test draws again is the same, see the test of writing twice."""
    kept = {}

    def once(sources):
        if not kept:
            kept.update({name: svg(of) for name, of in drawings(sources).items()})
        return kept

    monkeypatch.setattr(command, "drawings", once)
    monkeypatch.setattr(command, "svg", str)


@pytest.mark.usefixtures("drawn_once")
def test_a_check_finds_what_differs(tmp_path, capsys):
    options = ["--results", str(written(tmp_path, result(HELPS)))]
    main(options)
    figures = tmp_path / "figures"
    rates = figures / "lm-adamw-rates.svg"
    drawn = rates.read_text()

    def complaint():
        capsys.readouterr()
        assert main([*options, "--check"]) == 1
        return capsys.readouterr().out

    rates.write_text(drawn.replace("</svg>", "<g/></svg>"))
    assert "lm-adamw-rates.svg differs" in complaint()
    rates.unlink()
    assert "lm-adamw-rates.svg is missing" in complaint()
    # Another version draws otherwise; then the figure need only be there.
    rates.write_text("<!-- Matplotlib v3.0.0, https://matplotlib.org/ -->")
    assert main([*options, "--check"]) == 0
    (figures / "old.svg").write_text(drawn)
    assert "old.svg is left over" in complaint()
    main(options)
    assert not (figures / "old.svg").exists()

    path = tmp_path / "lm" / "adamw.json"
    value = json.loads(path.read_text())
    value["sittings"][0]["date"] = "2027-01-01T10:00:00+00:00"
    write_json(value, path)
    assert "README.md differs" in complaint()


def test_a_directory_without_results_is_an_error_that_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path)])
    assert "run `python -m benchmarks.evidence`" in capsys.readouterr().err


def test_the_committed_report_is_what_the_command_produces():
    if not any(RESULTS.glob("*/*.json")):
        return
    assert main(["--check"]) == 0
