"""`gs.trial.compare`: what is run and told, the file, going on, and what is wrong."""

import json
import math
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import pytest
from trial_runs import ARGUMENTS, SMALL, compare, optimizer, train, train_many

import gradsmooth_optax as gs
from gradsmooth_optax.trial import _statistics as rules


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("trial") / "trial.json"
    return path, compare(train, path)


def interrupted(after):
    """A training that Ctrl-C ends in this run, of the first on."""
    calls = []

    def until(made, seed):
        calls.append(seed)
        if len(calls) == after:
            raise KeyboardInterrupt
        return train(made, seed)

    return until


# A comparison that is complete.


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

    assert compare(never, path).outcomes == result.outcomes
    assert gs.trial.read_result(path).verdict == result.verdict
    assert str(compare(never, path, dry_run=True)) == str(result)


def test_the_result_is_told_in_a_table_in_words_in_html_and_for_an_appendix(finished):
    _, result = finished
    text = str(result)
    for fragment in (
        "window(0.5): not told apart from the base",
        "The blocks' own rate (× 0.499): better than one rate for all by",
        "give `tune_metric` one of its own",
        "window(0.5) minus norm-matched window(0.5)",
    ):
        assert fragment in text
    assert [line.split()[0] for line in text.splitlines()[4:9]] == [
        *("plain", "base", "window(0.5)", "norm-matched", "shuffled"),
    ]
    assert "<table>" in result._repr_html_()
    assert "not told apart" in result._repr_html_()
    assert "Holm's correction for 1 operators" in result.appendix


def test_the_plot_has_a_row_for_every_contrast_and_a_line_for_every_arm(finished):
    _, result = finished
    figure = result.plot()
    left, right = figure.axes
    labels = [label.get_text().replace("\n", " ") for label in left.get_yticklabels()]
    assert labels == [
        "base minus plain",
        "window(0.5) minus base",
        "window(0.5) minus norm-matched window(0.5)",
        "window(0.5) minus shuffled window(0.5)",
    ]
    assert len(right.get_lines()) == 3
    plt.close(figure)


def test_a_higher_metric_gives_the_mirrored_result(finished):
    _, result = finished
    mirrored = gs.trial.Result(
        result.settings._replace(better="higher"),
        result.arms,
        {
            run: of._replace(metrics={name: -x for name, x in of.metrics.items()})
            for run, of in result.outcomes.items()
        },
        result.notes,
    )
    assert mirrored.is_complete
    assert mirrored.choices == result.choices
    (one,), (other,) = mirrored.findings, result.findings
    assert one.contrasts["base"].p == other.contrasts["base"].p
    difference = re.compile(r"difference (\S+) \[(\S+), (\S+)\]")
    mean, low, high = map(float, difference.search(result.verdict).groups())
    found = difference.search(mirrored.verdict).groups()
    assert [*map(float, found)] == pytest.approx([-mean, -high, -low])


# A comparison that is not: the file, and going on.


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_file(finished, tmp_path):
    path, _ = finished
    new = tmp_path / "trial.json"
    killed = subprocess.run(
        [sys.executable, "-m", "trial_runs"],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path)}
        | {"TRIAL": str(new), "KILL_AFTER": "57"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    part = gs.trial.read_result(new)
    assert "NOT COMPLETE" in str(part)
    assert len(part.outcomes) == 56
    compare(train, new)
    runs, before = (
        [
            {key: value for key, value in run.items() if key != "seconds"}
            for run in json.loads(file.read_text())["runs"]
        ]
        for file in (new, path)
    )
    assert runs == before


def test_ctrl_c_returns_what_there_is(tmp_path):
    result = compare(interrupted(40), tmp_path / "t.json")
    assert len(result.outcomes) == 38  # the first ran twice
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

    result = compare(flaky, tmp_path / "t.json", **SMALL)
    told = "1 runs raised and count as diverged, the last: RuntimeError: out"
    assert told in str(result)
    again = compare(train, tmp_path / "t.json", **SMALL)
    assert "raised" not in str(again)
    assert again.is_complete


def test_a_training_that_has_changed_is_refused_on_resume(tmp_path):
    path = tmp_path / "t.json"
    compare(interrupted(5), path)
    with pytest.raises(ValueError, match="but the same run now gives"):
        compare(lambda made, seed: train(made, seed) + 1e-3, path)


def test_a_training_that_does_not_repeat_is_said(tmp_path):
    calls = iter(range(10**6))
    result = compare(
        lambda made, seed: train(made, seed) + 1e-4 * next(calls),
        tmp_path / "t.json",
        **SMALL,
    )
    assert "`train` is not deterministic: one run gave" in str(result)


def test_a_file_of_other_settings_is_refused_with_the_difference(finished):
    path, _ = finished
    with pytest.raises(gs.trial.OtherSettings, match="seeds: there 8, now 9"):
        compare(train, path, seeds=9)


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="holds no comparison"):
        compare(train, path)
    assert path.read_text() == '{"a": 1}'


def test_two_processes_do_not_share_a_file(tmp_path):
    def nested(made, seed):
        with pytest.raises(RuntimeError, match=r"another process is writing `path`"):
            compare(train, tmp_path / "t.json")
        raise KeyboardInterrupt

    compare(nested, tmp_path / "t.json")


# How trainings are run.


def test_a_generators_hopeless_runs_are_stopped_in_the_screen_alone(tmp_path):
    def steps(made, seed):
        end = train(made, seed)
        for k in range(8):
            yield -(end + 4.0 * 2.0**-k)

    result = compare(steps, tmp_path / "t.json", better="higher", seeds=2)
    stopped = [run for run, of in result.outcomes.items() if of.stopped]
    assert stopped
    assert {run.stage for run in stopped} == {"screen"}
    assert result.choices["base"].block_rate == pytest.approx(0.5, rel=0.2)
    assert result.is_complete


@pytest.mark.slow
def test_seeds_that_train_at_once_give_one_program_for_each_arm_and_order(tmp_path):
    traces = []

    @gs.trial.many_seeds
    def counted(made, seeds):
        traces.append(len(seeds))
        return train_many.train(made, seeds)

    result = compare(counted, tmp_path / "t.json", metric="cost")
    # Five arms, each for the two seeds of the screen and the eight of the rest.
    assert sorted(traces) == [2] * 5 + [8] * 5
    assert result.is_complete
    assert result.choices["base"].block_rate == pytest.approx(0.5, rel=0.1)


@pytest.mark.slow
def test_processes_give_the_same_result(tmp_path):
    alone, parallel = (
        compare(train, tmp_path / f"{workers}.json", workers=workers, **SMALL)
        for workers in (1, 2)
    )
    assert parallel.choices == alone.choices
    assert str(parallel).splitlines()[2:] == str(alone).splitlines()[2:]


def test_a_dry_run_says_how_many_runs_it_will_be_and_writes_nothing(tmp_path):
    result = compare(train, tmp_path / "t.json", dry_run=True)
    assert "about 112 runs to choose rates, at most 80 to confirm" in str(result)
    assert not list(tmp_path.iterdir())


def test_an_operator_without_a_matrix_has_one_control_and_no_verdict_for_neighbors(
    tmp_path,
):
    arms = {"alike": gs.similarity_window(0.5)}
    few = {**SMALL, "seeds": 8, "rates": [1.5]}
    result = compare(train, tmp_path / "t.json", arms=arms, **few)
    assert "shuffled alike" not in result.arms
    assert [f.word for f in result.findings] == [rules.UNKNOWN]


def test_smoothing_reaches_the_users_chain_coupled_first_and_then_scaled(tmp_path):
    wanted = {
        (1.0, 0.0, 0.0, 0.0),  # plain
        (0.5, 0.0, 0.0, 0.0),  # base
        (0.375, 0.125, 0.0, 0.0),  # window(0.5), times 0.5
    }
    seen = set()

    def watched(made, seed):
        smoothing, _ = made
        updates = {"h": jnp.eye(4, 3), "e": jnp.ones(2)}
        smoothed, _ = smoothing.update(updates, smoothing.init(updates))
        assert smoothed["e"].tolist() == [1, 1]
        seen.add(tuple(smoothed["h"][:, 0].tolist()))
        if seen >= wanted:
            raise KeyboardInterrupt
        return train(made, seed)

    compare(watched, tmp_path / "t.json", **SMALL)
    assert seen >= wanted


# What goes wrong.


def broken(made, seed):
    raise RuntimeError("no data")


@gs.trial.many_seeds
def of_no_seed(made, seeds):
    return train_many.train(made, seeds)["cost"].sum()


# What `train` returns of a rate and a seed, and what says so.
TRAININGS = {
    "nothing": (lambda rate, seed: None, "returned None .* no `return`"),
    "text": (lambda rate, seed: "0.1", "must return a number"),
    "several metrics": (lambda rate, seed: {"a": 1.0, "b": 2.0}, "say which the verd"),
    "other metrics": (lambda rate, seed: {f"of {seed}": 1.0}, "the same keys every"),
    "NaN": (lambda rate, seed: math.nan, "nothing finite at any of `rates`"),
    "the same of all seeds": (lambda rate, seed: rate, "seems to ignore `seed`"),
    "no yield": (lambda rate, seed: (_ for _ in ()), "yields nothing"),
    "no smoothing": (lambda rate, seed: rate + seed, "'base' never went through"),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_no_verdict_can_come_from_is_told_at_once(name, tmp_path):
    returned, words = TRAININGS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        compare(lambda made, seed: returned(made[1], seed), tmp_path / "t.json")


def test_what_the_first_run_raises_is_raised(tmp_path):
    with pytest.raises(RuntimeError, match="no data"):
        compare(broken, tmp_path / "t.json")
    with pytest.raises(TypeError, match=r"each of the 2 seeds.*jax\.vmap"):
        compare(of_no_seed, tmp_path / "t.json")


def test_a_depth_that_couples_nothing_is_told_by_the_first_arm_that_uses_it(tmp_path):
    arguments = {**ARGUMENTS, **SMALL, "path": tmp_path / "t.json"}
    with pytest.raises(ValueError, match="no/layers"):
        gs.trial.compare(train, optimizer, gs.scanned("no/layers"), **arguments)


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
