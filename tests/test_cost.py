"""Times on the CPU are of what they say; the PyTorch twins do what the window does.

No test looks at how long anything took.
"""

import copy
import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("flax")

import gradsmooth_optax as gs
from benchmarks import readme
from benchmarks.cost import __main__ as cost
from benchmarks.cost.__main__ import SECTIONS, build_parser
from benchmarks.cost.cpu import command, timing
from benchmarks.cost.cpu import peers as speed_peers
from benchmarks.cost.cpu import steps as speed_steps
from benchmarks.cost.cpu import updates as speed_updates
from benchmarks.cost.cpu.bars import bars, figure, holds
from benchmarks.cost.cpu.compile_time import layered_params, optimizers
from benchmarks.cost.cpu.report import bars_table, failures, tables
from benchmarks.cost.operators import operators
from benchmarks.json_files import COST

WINDOW = "window(0.2)"


def assert_figures(costs):
    for figures in costs.values():
        low, high = figures["quartiles"]
        assert 0 < low <= figures["median"] <= high


# -- Turns -----------------------------------------------------------------------------


def test_every_round_runs_every_call_once_in_an_order_of_its_own():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    seconds = timing.in_turns(calls, rounds=20)
    assert {name: len(of) for name, of in seconds.items()} == dict.fromkeys("abc", 20)
    turns = [tuple(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(turns) == 21  # one warms up
    assert {tuple(sorted(turn)) for turn in turns} == {("a", "b", "c")}
    assert len(set(turns)) == 6


def test_no_round_begins_after_the_time_is_up_but_some_always_run(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seconds = timing.in_turns({"a": int}, 100, most_seconds=0, fewest_rounds=3)
    assert len(seconds["a"]) == 3


def test_times_are_compared_within_a_turn():
    seconds = {"base": np.array([1.0, 2.0, 4.0]), "other": np.array([2.0, 4.0, 4.0])}
    assert timing.relative_to("base", seconds) == {
        "other": {
            "median": 2.0,
            "quartiles": [1.5, 2.0],
            "rounds": 3,
            "milliseconds": 4000.0,
        }
    }


# -- The command -----------------------------------------------------------------------


def test_the_process_starts_anew_once_to_have_steady_memory(monkeypatch):
    started = []
    monkeypatch.setattr(cost.sys, "argv", ["cost", "cpu", "--check"])
    monkeypatch.setattr(cost.os, "environ", {})
    monkeypatch.setattr(cost.os, "execv", lambda *args: started.append(args))
    cost.set_environment("cpu")
    cost.set_environment("cpu")
    ((_, argv),) = started
    assert argv[1:] == ["-m", "benchmarks.cost", "cpu", "--check"]


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_a_compiler_looks_for_no_hardware(device, monkeypatch):
    monkeypatch.setattr(cost.os, "environ", {"JAX_PLATFORMS": "cuda"})
    cost.set_environment(device)
    assert cost.os.environ["JAX_PLATFORMS"] == "cpu"


def test_options_are_read_before_jax_which_reads_the_environment():
    code = (
        "import sys; from benchmarks.cost import __main__ as cost; "
        "print(cost.build_parser().parse_args(['tpu', '--quick']).quick, "
        "'jax' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "False"], ran.stderr


# -- Sections --------------------------------------------------------------------------


def test_a_tiny_run_measures_every_section_and_prints_what_it_writes(
    tmp_path, monkeypatch, capsys
):
    """With few arms: all of them are compiled, which is what takes the time."""
    smoothings, chains = speed_updates.smoothings, speed_steps.chains_of
    few = {WINDOW, f"{WINDOW}, norm_preserving"}
    for module, name, all_of, kept in (
        (speed_updates, "smoothings", smoothings, few),
        (speed_steps, "chains_of", chains, {"momentum(), S"}),
        (speed_steps, "_smoothings", speed_steps._smoothings, {"base", "window"}),
        (command, "optimizers", optimizers, {"optax.adamw", "window"}),
    ):
        monkeypatch.setattr(
            *(module, name),
            lambda *of, all_of=all_of, kept=kept: {
                arm: made for arm, made in all_of(*of).items() if arm in kept
            },
        )
    monkeypatch.setattr(speed_steps, "OPTIMIZERS", ("sgd",))
    monkeypatch.setattr(speed_peers, "has_torch", lambda: False)
    out = tmp_path / "new" / "cpu.json"
    wanted = [name for name in SECTIONS if name != "learning"]
    options = ["cpu", "--quick", "--out", str(out), "--only", *wanted]
    assert cost.main(options) == 0
    report = json.loads(out.read_text())
    assert list(report["seconds"]) == wanted
    assert len(report["load_before"]) == len(report["load_after"]) == 3
    assert tables(report) in capsys.readouterr().out

    found = report["operators"]["0.0625 MB float32"]
    assert list(found) == ["stacked", "unrolled"]
    for of_layout in found.values():
        assert set(of_layout) == few
        assert_figures(of_layout)
        assert of_layout[WINDOW]["temporaries"] >= 0
    assert list(report["crossover"]) == ["2", "4", "8"]
    for of_ways in report["crossover"].values():
        assert_figures(of_ways)
        assert len(of_ways) == 10
    for of_layout in report["chains"].values():
        assert set(of_layout) == {"momentum(), S"}
        assert_figures(of_layout)
    for tree in ("default GPT", "0.0625 MB"):
        of_sgd = report["steps"][tree]["sgd"]
        assert set(of_sgd) == {"window"}
        assert_figures(of_sgd)
    assert set(report["training"]) == {"window"}
    assert report["compile"]["2"]["optax.adamw"]["median"] == 1
    assert all(
        report["compile"]["2"]["window"][of] > 0 for of in ("trace", "lower", "compile")
    )
    for of_peers in report["peers"]["0.0625 MB"].values():
        who = {name.split(":")[0] for name in of_peers}
        assert who == {speed_peers.OURS, "optax"}
        assert_figures(of_peers)


def test_compile_times_are_of_ten_leaves_per_layer():
    assert len(jax.tree.leaves(layered_params(2))) == 20


@pytest.mark.parametrize("layout", speed_updates.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_have_the_size_and_dtype_asked_for(layout, dtype):
    leaves = jax.tree.leaves(speed_updates.updates_of(1, 4, layout, dtype))
    assert sum(leaf.nbytes for leaf in leaves) == 2**20
    assert {leaf.dtype.name for leaf in leaves} == {dtype}
    assert len(leaves) == (1 if layout == "stacked" else 4)


@pytest.mark.parametrize("layout", speed_updates.LAYOUTS)
def test_every_operator_and_variant_couples_the_updates(layout):
    updates = speed_updates.updates_of(0.0625, 4, layout)
    smoothings = speed_updates.smoothings(layout)
    assert set(operators()) < set(smoothings)
    for name, smooth in smoothings.items():
        smoothed = smooth(updates)
        assert jax.tree.structure(smoothed) == jax.tree.structure(updates)
        changed = jax.tree.map(lambda x, y: bool((x != y).any()), smoothed, updates)
        # An average of the layers before it leaves the first one as it is.
        assert any(jax.tree.leaves(changed)), name


def test_the_crossover_compares_two_ways_to_the_same_numbers():
    updates = speed_updates.updates_of(0.0625, 6, "stacked")
    shifts, matmul = (speed_updates._window(2, widest)(updates) for widest in (6, 0))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        shifts,
        matmul,
    )


# -- PyTorch twins ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["window", "norm_preserving"])
@pytest.mark.parametrize("num_layers", [2, 3, 7])
def test_pytorch_twins_compute_the_window(variant, num_layers):
    torch = pytest.importorskip(
        "torch", reason="PyTorch, an optional peer, is not installed"
    )
    from benchmarks.cost.cpu import torch_twins

    u = np.random.default_rng(0).normal(size=(num_layers, 3, 4)).astype("f4")
    u[-1] = 0  # has no norm to keep
    neighbors = u[[0, *range(num_layers - 1)]] + u[[*range(1, num_layers), -1]]
    expected = 0.7 * u + 0.15 * neighbors
    if variant == "norm_preserving":
        before, after = (
            np.sqrt((x**2).sum((1, 2), keepdims=True)) for x in (u, expected)
        )
        expected[:-1] *= (before / after)[:-1]

    kept = "standard" if variant == "window" else variant
    tx = gs.smooth_over_depth(gs.scanned(""), 0.3, variant=kept)
    ours, _ = tx.update(u, tx.init(u))
    hooked = [torch.tensor(layer) for layer in u]
    torch_twins.HOOK[variant](hooked, 0.3)
    for found in (
        ours,
        torch_twins.STACKED[variant](torch.tensor(u), 0.3),
        torch_twins.LISTED[variant]([torch.tensor(layer) for layer in u], 0.3),
        hooked,
    ):
        found = np.stack([np.asarray(layer) for layer in found])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_twins_get_the_layers_in_order():
    updates = speed_updates.updates_of(0.125, 12, "unrolled")
    leaves = speed_peers.in_order(updates, "unrolled")
    assert all(leaves[i] is updates[f"layers_{i}"]["w"] for i in range(12))


# -- The report ------------------------------------------------------------------------


def report_with(value, bar):
    """A report that has one figure, and 1.0 where that is divided by another."""
    report = {}
    for where, figure_there in ((bar.over, 1.0), (bar.where, value)):
        place = report
        for key in where[:-1]:
            place = place.setdefault(key, {})
        if where:
            place[where[-1]] = figure_there
    return report


@pytest.mark.parametrize("bar", [*bars()], ids=lambda bar: bar.what)
def test_a_bar_is_cleared_up_to_its_bound_and_not_beyond(bar):
    assert figure({}, bar) is None
    beyond = bar.bound - 0.01 if bar.is_least else bar.bound + 0.01
    for value, clears in ((bar.bound, True), (beyond, False)):
        report = report_with(value, bar)
        assert holds(bar, figure(report, bar)) is clears
        assert failures(report) == ([] if clears else [bar.what])
        (row,) = bars_table(report).splitlines()[2:]
        assert ("holds" if clears else "FAILS") in row


def test_a_bar_that_fails_is_an_error_only_where_that_is_asked_for(
    tmp_path, monkeypatch
):
    (bar,) = (bar for bar in bars() if bar.where[0] == "training")
    found = report_with(2.0, bar)["training"]
    measure = {"training": lambda: found}
    monkeypatch.setattr(command, "sections", lambda plan: measure)
    monkeypatch.setattr(command, "tables", lambda report: "")
    options = ["cpu", "--only", "training", "--out", str(tmp_path / "cpu.json")]
    assert cost.main(options) == 0
    assert cost.main([*options, "--check"]) == 1


def test_every_section_can_be_asked_for_and_is_measured():
    assert tuple(command.sections(command.FULL)) == SECTIONS
    assert build_parser().parse_args(["cpu", "--only", *SECTIONS]).only == [*SECTIONS]


def test_every_bar_is_of_something_that_is_measured():
    names = {
        "operators": set(speed_updates.smoothings("stacked")),
        "chains": set(speed_steps.chains_of(gs.unrolled())),
        "compile": set(optimizers()),
    }
    for bar in bars():
        section, *_, name, _ = bar.where
        assert section in SECTIONS
        assert name in names.get(section, {name}), bar.what


def test_the_committed_report_clears_every_bar_that_it_has_a_figure_of():
    # Not of all: a new operator is measured when somebody measures.
    report = json.loads((COST / "cpu.json").read_text())
    assert set(report["seconds"]) <= set(SECTIONS)
    names = set(speed_updates.smoothings("stacked"))
    for of_layout in report["operators"].values():
        for found in of_layout.values():
            assert WINDOW in found
            assert set(found) <= names
    for bar in bars():
        section, *_, name, _ = bar.where
        is_there = f'"{name}"' in json.dumps(report.get(section))
        assert (figure(report, bar) is not None) == is_there, bar.what
    for ways in report["crossover"].values():
        # The library goes over to the matmul after radius 3.
        assert ways["radius 4, matmul"]["median"] < ways["radius 4, shifts"]["median"]


def test_what_was_not_measured_is_said_to_be_so():
    reports = readme.read_reports()
    costs = readme.costs(reports["cpu"])
    table = """
| `gs.window(alpha)` | the paper's | 0.1× / 0.1× | start here |
| `gs.tikhonov(strength)` | smooth | 0.1× / 0.1× | |
| `gs.dense(matrix)` | S u | as `tikhonov` | |
"""
    del costs["tikhonov(1.0)"]
    found = readme.with_costs(table, costs)
    assert (
        f"| `gs.window(alpha)` | the paper's | {costs[WINDOW]} | start here |" in found
    )
    assert "| `gs.tikhonov(strength)` | smooth | not measured | |" in found
    assert "| `gs.dense(matrix)` | S u | as `tikhonov` | |" in found

    older = copy.deepcopy(reports)
    del older["cpu"]["training"]
    del older["tpu"]["topologies"]["v5e:2x2"]["cases"]["tikhonov(1.0)"]
    older["gpu"]["topologies"]["1x1x4"]["cases"]["tikhonov(1.0)"]["measures"] = {}
    found = readme.speed_text(older)
    (row,) = (line for line in found.splitlines() if "any matmul" in line)
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["not measured", "", "", "refused", "", ""]
    assert "not measured (not measured)" in found  # the training step
