"""The benchmark of adaptive operators measures what it says, and its table shows it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("flax")

from benchmarks import adaptive
from benchmarks.optimizers import smoothed_optimizer, warmup_cosine
from benchmarks.pretrain_options import build_parser, parse_options

CONFIG, _ = parse_options(build_parser(""), [])
TINY = dataclasses.replace(
    CONFIG,
    layers=3,
    width=8,
    context=8,
    seeds=2,
    steps=4,
    warmup=1,
    batch=2,
    chunk=2,
    eval_windows=2,
)


def test_the_base_is_the_adamw_of_the_pretraining_benchmark():
    params = {
        "embed": np.ones((5, 4), "f4"),
        "blocks": {"kernel": np.ones((3, 4, 4), "f4"), "scale": np.ones((3, 4), "f4")},
    }
    gradients = jax.tree.map(
        lambda x: np.linspace(-1, 1, x.size).reshape(x.shape), params
    )
    gradients = jax.tree.map(lambda x: x.astype("f4"), gradients)
    schedule = warmup_cosine(8e-3, CONFIG.warmup, CONFIG.steps)
    options = {"weight_decay": CONFIG.weight_decay, "clip": CONFIG.clip}
    theirs = smoothed_optimizer("adamw", schedule, 0.0, **options)
    ours = adaptive.optimizer(lambda adam: adam, 8e-3, CONFIG)
    found = [tx.update(gradients, tx.init(params), params)[0] for tx in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_methods_run_on_the_same_seeds_and_report_what_they_learned():
    wraps = adaptive.methods(0.2)
    wraps = {k: wraps[k] for k in (adaptive.BASE, "learn_alpha", "learn_operator")}
    report = adaptive.run(TINY, wraps, (1e-3,))
    arms = report["arms"]
    assert len(arms) == 3
    assert all(len(arm["validation_loss"]) == 2 for arm in arms.values())
    learned = arms["learn_alpha at 0.001"]["learned"]["alpha"]
    assert np.shape(learned["blocks"]) == (2,)
    assert np.shape(
        arms["learn_operator at 0.001"]["learned"]["weights"]["blocks"]
    ) == (
        2,
        1,
        3,
    )
    shown = adaptive.table(json.loads(json.dumps(report)))
    assert [row.split("|")[1].strip() for row in shown.splitlines()[2:]] == list(wraps)


def test_the_table_compares_at_the_best_rate_of_the_base_and_best_against_best():
    def arm(method, rate, *losses):
        return {
            "method": method,
            "learning_rate": rate,
            "validation_loss": list(losses),
            "relative_time": 1.0,
        }

    report = {
        "learning_rates": [1.0, 2.0],
        "arms": {
            "1": arm("AdamW", 1.0, 3.0, 3.0),
            "2": arm("AdamW", 2.0, 2.0, 2.5),
            "3": arm("other", 1.0, 1.0, 1.5),
            "4": arm("other", 2.0, 2.5, None),
        },
    }
    base, row = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in adaptive.table(report).splitlines()[2:]
    )
    assert base[1:] == ["3.0000", "2.2500", "2", "base"]
    assert row[1] == "-1.7500 ± 3.1766 (2/2)"
    assert row[2].startswith("nan")  # one seed of it diverged
    assert row[3:] == ["1", "-1.0000 ± 0.0000 (2/2)"]
