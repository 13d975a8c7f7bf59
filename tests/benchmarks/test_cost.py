"""Times on the CPU are of what they say they are.

No test looks at how long anything took.
"""

import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("flax")

import gradsmooth_optax as gs
from benchmarks.cost import __main__ as cost
from benchmarks.cost.cpu import command, compile_time, timing
from benchmarks.cost.cpu import peers as cost_peers
from benchmarks.cost.cpu import steps as cost_steps
from benchmarks.cost.cpu import updates as cost_updates
from benchmarks.cost.cpu.bars import bars, figure, holds
from benchmarks.cost.cpu.report import tables
from benchmarks.cost.operators import operators
from benchmarks.json_files import COST

WINDOW = "window(0.2)"


def test_every_round_runs_every_call_once_in_an_order_of_its_own():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    seconds = timing.in_turns(calls, rounds=20)
    assert {name: len(of) for name, of in seconds.items()} == dict.fromkeys("abc", 20)
    turns = [tuple(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(turns) == 21  # one warms up
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert len(set(turns)) == 6


def test_no_round_begins_after_the_time_is_up_but_some_always_run(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seconds = timing.in_turns({"a": int}, 100, most_seconds=0, fewest_rounds=3)
    assert len(seconds["a"]) == 3


def test_times_are_compared_within_a_turn():
    seconds = {"base": np.array([1.0, 2.0, 4.0]), "other": np.array([2.0, 4.0, 4.0])}
    found = timing.relative_to("base", seconds)
    wanted = {"median": 2.0, "quartiles": [1.5, 2.0], "rounds": 3}
    assert found == {"other": wanted | {"milliseconds": 4000.0}}


# The command.


def test_the_environment_is_set_before_jax_reads_it(monkeypatch):
    started = []
    monkeypatch.setattr(cost.sys, "argv", ["cost", "cpu", "--check"])
    monkeypatch.setattr(cost.os, "environ", {"JAX_PLATFORMS": "cuda"})
    monkeypatch.setattr(cost.os, "execv", lambda *args: started.append(args))
    for device in ("tpu", "gpu"):  # which look for no hardware
        cost.set_environment(device)
        assert cost.os.environ["JAX_PLATFORMS"] == "cpu"
    cost.set_environment("cpu")
    cost.set_environment("cpu")  # once, to have steady memory
    ((_, argv),) = started
    assert argv[1:] == ["-m", "benchmarks.cost", "cpu", "--check"]
    code = (
        "import sys; from benchmarks.cost import __main__ as cost; "
        "print(cost.build_parser().parse_args(['tpu', '--quick']).quick, "
        "'jax' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "False"], ran.stderr


@pytest.mark.slow
def test_a_tiny_run_measures_every_section_and_prints_what_it_writes(
    tmp_path, monkeypatch, capsys
):
    """With few arms: all of them are compiled, which is what takes the time."""

    def keep(module, name, *kept):
        every = getattr(module, name)

        def few(*of):
            return {arm: every(*of)[arm] for arm in kept}

        monkeypatch.setattr(module, name, few)

    keep(cost_updates, "smoothings", WINDOW)
    keep(cost_steps, "chains_of", "momentum(), S")
    keep(cost_steps, "_smoothings", "base", "window")
    keep(command, "optimizers", "optax.adamw", "window")
    keep(cost_peers, "_transformations", f"{cost_peers.OURS}: window", "optax: trace")
    monkeypatch.setattr(cost_steps, "OPTIMIZERS", ("sgd",))
    monkeypatch.setattr(cost_peers, "has_torch", lambda: False)
    # Which other tests have filled.
    monkeypatch.setattr(compile_time.jax, "clear_caches", lambda: None)
    monkeypatch.setattr(command, "crossover", lambda *_: {})
    out = tmp_path / "new" / "cpu.json"
    wanted = [name for name in cost.SECTIONS if name != "learning"]
    options = ["cpu", "--quick", "--out", str(out), "--only", *wanted]
    assert cost.main(options) == 0
    report = json.loads(out.read_text())
    assert list(report["seconds"]) == wanted
    assert tables(report) in capsys.readouterr().out
    found = {
        **{
            f"operators {k}": v
            for k, v in report["operators"]["0.0625 MB float32"].items()
        },
        **{f"chains {k}": v for k, v in report["chains"].items()},
        **{f"steps {k}": v["sgd"] for k, v in report["steps"].items()},
        **{f"peers {k}": v for k, v in report["peers"]["0.0625 MB"].items()},
        "training": report["training"],
    }
    names = {name.split()[0]: {*of} for name, of in found.items()}
    assert len(found) == 9
    assert names == {
        "operators": {WINDOW},
        "chains": {"momentum(), S"},
        "steps": {"window"},
        "peers": {f"{cost_peers.OURS}: window", "optax: trace"},
        "training": {"window"},
    }
    for figures in (of for group in found.values() for of in group.values()):
        low, high = figures["quartiles"]
        assert 0 < low <= figures["median"] <= high
    compiled = report["compile"]["2"]
    assert compiled["optax.adamw"]["median"] == 1
    assert all(compiled["window"][of] > 0 for of in ("trace", "lower", "compile"))


@pytest.mark.parametrize("layout", cost_updates.LAYOUTS)
def test_every_operator_couples_updates_of_the_size_and_dtype_asked_for(layout):
    for dtype in ("float32", "bfloat16"):
        leaves = jax.tree.leaves(cost_updates.updates_of(0.0625, 4, layout, dtype))
        assert sum(leaf.nbytes for leaf in leaves) == 2**16
        assert {leaf.dtype.name for leaf in leaves} == {dtype}
        assert len(leaves) == (1 if layout == "stacked" else 4)
    updates = cost_updates.updates_of(0.0625, 4, layout)
    smoothings = cost_updates.smoothings(layout)
    assert set(operators()) < set(smoothings)
    smoothed = jax.jit(lambda u: {name: f(u) for name, f in smoothings.items()})(
        updates
    )
    for name, found in smoothed.items():
        assert jax.tree.structure(found) == jax.tree.structure(updates)
        changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), found, updates)
        # An average of the layers before it leaves the first one as it is.
        assert any(jax.tree.leaves(changed)), name


def test_the_crossover_compares_two_ways_to_the_same_numbers():
    updates = cost_updates.updates_of(0.0625, 6, "stacked")
    ways = [cost_updates._window(2, widest) for widest in (6, 0)]
    texts = [jax.jit(way).lower(updates).as_text() for way in ways]
    assert ["dot_general" in text for text in texts] == [False, True]
    found = [way(updates)["blocks"]["w"] for way in ways]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def test_twins_get_the_layers_in_order():
    updates = {f"layers_{i}": {"w": np.array(i)} for i in sorted(range(12), key=str)}
    assert [*cost_peers.in_order(updates, "unrolled")] == [*range(12)]


# The bars.


def test_every_bar_is_of_what_is_measured_and_cleared_up_to_its_bound_alone():
    assert tuple(command.sections(command.FULL)) == cost.SECTIONS
    names = {
        "operators": set(cost_updates.smoothings("stacked")),
        "chains": set(cost_steps.chains_of(gs.unrolled())),
        "compile": set(compile_time.optimizers()),
    }
    report = json.loads((COST / "cpu.json").read_text())
    for bar in bars():
        section, *_, name, _ = bar.where
        # Not all has been measured: a new operator is when somebody measures.
        is_there = f'"{name}"' in json.dumps(report.get(section))
        assert (figure(report, bar) is not None) == is_there, bar.what
        assert section in cost.SECTIONS
        assert name in names.get(section, {name}), bar.what
        # A figure that clears it by nothing, and one that doesn't.
        assert holds(bar, bar.bound)
        assert not holds(bar, bar.bound + (-0.01 if bar.is_least else 0.01))
