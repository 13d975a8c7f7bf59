"""`python -m benchmarks.on_gpu` at a tiny size, on whatever runs the tests."""

import json
import math
import sys

import jax.numpy as jnp
import pytest

from benchmarks.cost.cpu.updates import limit
from benchmarks.on_gpu import __main__ as on_gpu
from benchmarks.on_gpu import report as on_gpu_report
from benchmarks.on_gpu import times
from benchmarks.on_gpu import training as on_gpu_training
from benchmarks.on_gpu.session import Session, applied


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of `--quick`, of one layout, without PyTorch and without git."""
    out = tmp_path_factory.mktemp("on_gpu") / "new" / "gpu_times.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        patch.setenv("PATH", "")
        patch.setattr(times, "LAYOUTS", ("stacked",))
        patch.setenv("XLA_CLIENT_MEM_FRACTION", "0.65")
        assert on_gpu.main(["--quick", "--out", str(out), "--commit", "abc"]) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return json.loads(out.read_text())


def test_every_case_has_a_time_and_what_is_skipped_is_told(report):
    operators = report["operators"]
    assert set(operators) == {
        f"{size} MB {dtype}"
        for size in (0.25, 0.5)
        for dtype in ("float32", "bfloat16")
    }
    assert set(operators["0.25 MB float32"]) == {
        *("stacked", "stacked, donated"),
    }
    sections = ("operators", "optimizers", "training_step")
    groups = [of for case in operators.values() for of in case.values()]
    groups += [*report["optimizers"].values(), report["training_step"]]
    assert all(report[section] for section in sections)
    for group in groups:
        assert any("window(0.2)" in name for name in group)
        for case in group.values():
            assert case["milliseconds"]["median"] > 0
            assert math.isfinite(case["ratio"]["median"])
    assert {of["case"] for of in report["skipped"]} == {"all"}
    assert all(of["group"].startswith("peers") for of in report["skipped"])
    assert report["commit"]["sha"] == "abc"
    assert report["card"] is None


def test_every_seed_is_a_pair_of_every_two_arms(report):
    training = report["training"]
    seeds = len(training["seeds"])
    assert seeds >= 2
    losses = training["validation_bits_per_byte"]
    assert set(losses) == set(on_gpu_training.ARMS)
    assert all(
        len(of) == seeds and all(map(math.isfinite, of)) for of in losses.values()
    )
    assert losses["base"] != losses["window(0.5)"] != losses["norm-matched"]
    assert all(of["num_seeds"] == seeds for of in training["differences"])


def test_a_case_that_fails_takes_no_other_with_it(tmp_path):
    session = Session(on_gpu.QUICK, tmp_path / "new.json", {"skipped": []})
    updates = {"w": jnp.ones((3, 2))}
    cases = {
        "fails": applied(lambda u: 1 / 0, updates),
        "base": applied(limit, updates),
    }
    assert list(session.measure("group", cases, "base")) == ["base"]
    (skipped,) = session.report["skipped"]
    assert skipped == {"group": "group", "case": "fails", "why": "division by zero"}


def test_the_page_is_of_the_report(report):
    assert on_gpu_report.tables(report) in on_gpu_report.page(report)
