"""`python -m benchmarks.on_gpu` at a tiny size, on whatever runs the tests."""

import json
import math
import sys

import jax.numpy as jnp
import pytest

pytest.importorskip("flax")

from benchmarks.cost.cpu.updates import limit
from benchmarks.on_gpu import __main__ as on_gpu
from benchmarks.on_gpu import report as on_gpu_report
from benchmarks.on_gpu import times
from benchmarks.on_gpu import training as on_gpu_training
from benchmarks.on_gpu.session import Session, applied


@pytest.mark.slow
def test_a_quick_run_times_a_group_of_each_kind_and_pairs_every_seed(
    tmp_path, monkeypatch
):
    """Without PyTorch and without git."""
    every_group, out = times.groups, tmp_path / "new" / "gpu_times.json"

    def first_of_each_kind(plan):
        kinds = {}
        for name, measure in every_group(plan):
            kinds.setdefault(name.split()[0], (name, measure))
        # Which has many programs to compile.
        assert kinds.pop("optimizers")
        assert {*kinds} == {"copies", "operators", "training_step", "peers"}
        return kinds.values()

    monkeypatch.setattr(times, "groups", first_of_each_kind)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.65")
    assert on_gpu.main(["--quick", "--out", str(out), "--commit", "abc"]) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    report = json.loads(out.read_text())
    assert (report["commit"]["sha"], report["card"]) == ("abc", None)
    assert [of["group"].split()[0] for of in report["skipped"]] == ["peers"]
    groups = [of for case in report["operators"].values() for of in case.values()]
    groups.append(report["training_step"])
    assert len(groups) == 2
    for group in groups:
        assert any("window(0.2)" in name for name in group)
        for case in group.values():
            assert case["milliseconds"]["median"] > 0
            assert math.isfinite(case["ratio"]["median"])
    seeds = len(report["training"]["seeds"])
    assert seeds >= 2
    losses = report["training"]["validation_bits_per_byte"]
    assert set(losses) == set(on_gpu_training.ARMS)
    for of_arm in losses.values():
        assert len(of_arm) == seeds
        assert all(map(math.isfinite, of_arm))
    assert losses["base"] != losses["window(0.5)"] != losses["norm-matched"]
    assert all(of["num_seeds"] == seeds for of in report["training"]["differences"])
    assert on_gpu_report.tables(report) in on_gpu_report.page(report)


def test_a_case_that_fails_takes_no_other_with_it(tmp_path):
    session = Session(on_gpu.QUICK, tmp_path / "new.json", {"skipped": []})
    updates = {"w": jnp.ones((3, 2))}
    cases = {"fails": applied(lambda u: 1 / 0, updates)}
    cases["base"] = applied(limit, updates)
    assert list(session.measure("group", cases, "base")) == ["base"]
    (skipped,) = session.report["skipped"]
    assert skipped == {"group": "group", "case": "fails", "why": "division by zero"}
