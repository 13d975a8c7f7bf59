"""The report of the evidence, from result files made here."""

import json

import numpy as np
import pytest

from benchmarks.json_files import write_json
from benchmarks.report.__main__ import RESULTS, main
from benchmarks.report.comparisons import (
    base_of,
    best_against_best,
    confirmed,
    p_value,
    survive_holm,
    tuned_rate,
    window_of,
)
from benchmarks.report.records import read_source, read_sources
from benchmarks.report.text import report, screen_table
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
    "mean over depth": {"operator": "mean_over_depth", "control": "full_average"},
}


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
        "config": {"depths": list(layers), "width": 32, "steps": 200},
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "commit": {"sha": "0123456789abcdef", "modified": False},
        "date": "2026-11-22T10:00:00+00:00",
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


def text_of(directory, *values):
    return report(read_sources(written(directory, *values)), [])


def arms_of(value, name, stage):
    return [of for of in value["arms"] if (of["name"], of["stage"]) == (name, stage)]


HELPS = {"window(0.2)": -0.05}
EFFECTS = {
    Verdict.NEIGHBORS: HELPS | {"norm-matched window(0.2)": -0.02},
    Verdict.ANY_COUPLING: HELPS | {"shuffled window(0.2)": -0.05},
    Verdict.SMALLER_STEP: HELPS | {"norm-matched window(0.2)": -0.05},
    Verdict.HURTS: {"window(0.2)": 0.05},
    Verdict.NOTHING: {},
}


@pytest.mark.parametrize("sign", [1, -1], ids=["lower is better", "higher is better"])
@pytest.mark.parametrize("verdict", EFFECTS, ids=lambda verdict: verdict.name)
def test_the_verdict_follows_from_the_base_and_both_controls(tmp_path, verdict, sign):
    setting = only_setting(tmp_path, result(EFFECTS[verdict], sign=sign))
    assert verdict_of(setting) is verdict


def test_a_diverged_seed_is_shown_and_decides(tmp_path):
    value = result(HELPS)
    for of in arms_of(value, "window(0.2)", "confirm"):
        of["metric_per_seed"][3], of["diverged"][3] = None, True
    assert verdict_of(only_setting(tmp_path, value)) is Verdict.DIVERGED
    text = text_of(tmp_path, value)
    assert "diverged in 1 of 16" in text
    assert "diverged (15/16)" in text
    assert "1 setting is not counted above, since runs that they rest on" in text


@pytest.mark.parametrize(
    "missing", ["base", "window(0.2)", "norm-matched window(0.2)", None]
)
def test_an_unfinished_run_is_shown_as_unfinished(tmp_path, missing):
    value = result(HELPS, confirm=missing is not None)
    value["arms"] = [
        of for of in value["arms"] if (of["name"], of["stage"]) != (missing, "confirm")
    ]
    assert verdict_of(only_setting(tmp_path, value)) is Verdict.UNFINISHED
    text = text_of(tmp_path, value)
    assert "1 setting is not finished, and not counted above: lm, adamw, 6" in text
    assert ("The confirmation has not run." in text) is (missing is None)
    assert "gain at tuned rates" not in text  # nothing is known yet


def test_a_depth_without_arms_and_a_file_without_base_are_shown(tmp_path):
    no_base = result({}, optimizer="sgd")
    no_base["arms"] = [of for of in no_base["arms"] if of["name"] != "base"]
    text = text_of(tmp_path, result({}) | {"arms": []}, no_base)
    assert "### lm, adamw, 6 layers: unfinished\n" in text
    assert "lm, sgd, 6 layers: unfinished" in text
    assert main(["--results", str(tmp_path)]) == 0


def test_the_rate_is_the_best_of_the_screen_and_not_of_the_confirmation(tmp_path):
    value = result({})
    for of in arms_of(value, "window(0.2)", "confirm"):
        # Far better on the seeds of the confirmation, at a rate other than the best.
        if of["learning_rate"] == 0.016:
            of["metric_per_seed"] = [loss - 9 for loss in of["metric_per_seed"]]
    setting = only_setting(tmp_path, value)
    window = window_of(setting, 0.2)
    assert tuned_rate(setting, window) == (0.004, False)
    assert confirmed(setting, window).learning_rate == 0.004
    assert verdict_of(setting) is Verdict.NOTHING


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
    assert "(best rate at an end: base, window(0.2), norm-matched window(0.2)" in text
    assert "so that the verdict is provisional: lm, adamw, 6 layers" in text
    inside = text_of(tmp_path, result(HELPS, best=0.004))
    assert not any(words in inside for words in (", at an end", "rate at an end:"))


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
    sentence = "**No setting shows a gain at tuned rates.**"
    assert text.split("\n\n")[2].startswith(sentence)
    assert "no evidence here that coupling neighbors helps" in text
    assert sentence not in text_of(tmp_path, result(HELPS))
    assert sentence not in text_of(tmp_path, result({"learn_alpha": -0.05}))


def test_the_headline_counts_settings_and_comparisons(tmp_path):
    helps = result(EFFECTS[Verdict.NEIGHBORS], layers=(6, 12), optimizer="adamw")
    smaller = result(EFFECTS[Verdict.SMALLER_STEP], optimizer="sgd")
    hurts = result({"window(0.2)": 0.05, "learn_alpha": -0.05}, optimizer="muon")
    text = text_of(tmp_path, helps, smaller, hurts)
    assert "window(0.2) beats the base optimizer in 3 of 4 settings" in text
    assert "helps in 2 of them**" in text
    assert "lm, adamw, 6 layers; lm, adamw, 12 layers." in text
    assert "In 1 the gain is not told apart from what a smaller step gives" in text
    assert "Window(0.2) hurts in 1 (lm, muon, 6 layers: +0.0500 ± " in text
    # window(0.1), window(0.2) and norm-preserving in each, learn_alpha in one.
    assert "These are 13 comparisons with the base" in text
    assert "one in twenty (0.7)" in text
    assert "5 do (4 better, 1 worse), 5 of them after Holm" in text
    assert "learn_alpha: **-0.0500 ± " in text


def test_settings_of_several_depths_are_compared_by_depth(tmp_path):
    value = result({}, layers=(6, 24))
    for of in arms_of(value, "window(0.2)", "confirm"):
        gain = 0.05 if of["layers"] == 24 else 0.0
        of["metric_per_seed"] = [loss - gain for loss in of["metric_per_seed"]]
    text = text_of(tmp_path, value)
    assert "at 24 layers; better where deeper" in text
    same = text_of(tmp_path, result({}, layers=(6, 24)))
    assert "the intervals of the shallowest and the deepest overlap" in same


def test_a_preset_is_a_setting_of_its_own_after_the_full_ones(tmp_path):
    text = text_of(tmp_path, result({}), result({}, preset="deep", layers=(48,)))
    assert text.index("## lm, adamw\n") < text.index("## lm, adamw, deep\n")
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
    value["date"] = "2027-01-01T10:00:00+00:00"
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
