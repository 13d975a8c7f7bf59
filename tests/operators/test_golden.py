"""The authors' published code, on the inputs and outputs it produced."""

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
from block_layouts import smoothed

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

DATA = Path(__file__).parents[1] / "data"
VARIANTS = {
    "none": "standard",
    "rescale": "norm_preserving",
    "normalize_before": "directional",
}
ROLES = ("lin.weight", "lin.bias", "norm.weight", "norm.bias")
TOLERANCE = 3e-6


def cases():
    """The description of every case, its inputs and its outputs, by role."""
    with np.load(DATA / "authors_smoother.npz") as file:
        vectors = dict(file)
    for case in json.loads((DATA / "authors_smoother.json").read_text()):
        before, after = (
            {role: vectors[f"{case['case']}/{which}/{role}"] for role in ROLES}
            for which in ("in", "out")
        )
        # Projections only, in the full scope everything.
        chosen = [r for r in ROLES if r.startswith("lin") or not case["proj_only"]]
        layers = range(case["L"])
        blocks = [{role: before[role][layer] for role in chosen} for layer in layers]
        yield case, blocks, {role: after[role] for role in chosen}
        for role in set(ROLES) - set(chosen):
            np.testing.assert_array_equal(after[role], before[role])


def matrix_of(case):
    """num_layers -> S, from the description in the paper."""
    if case["method"] == "window":
        return lambda n: oracle.window_matrix(n, case["alpha"])
    if case["method"] == "laplacian":
        return lambda n: oracle.laplacian_matrix(n, case["alpha"])
    return lambda n: oracle.ema_matrix(n, case["rho"], case["reverse"])


def operator_of(case):
    if case["method"] == "window":
        return gs.window(case["alpha"])
    if case["method"] == "laplacian":
        return gs.laplacian(case["alpha"])
    return gs.ema(case["rho"], reverse=case["reverse"])


def differing(result_of):
    """The cases in which some role is not what the authors' code made."""
    wrong, seen = [], []
    for case, blocks, expected in cases():
        seen.append(case)
        result = result_of(case, blocks)
        for role, want in expected.items():
            error = oracle.relative_error(np.stack([b[role] for b in result]), want)
            if not error < TOLERANCE:
                wrong.append((case, role, error))
    assert len(seen) == 108
    assert {case["method"] for case in seen} == {"window", "laplacian", "ema"}
    assert {case["L"] for case in seen} == {2, 3, 5}
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_ours_reproduce_the_authors_smoother(layout):
    def result_of(case, blocks):
        variant = VARIANTS[case["normalize"]]
        return smoothed(layout, blocks, operator_of(case), variant=variant)

    assert not differing(result_of)


def test_the_oracle_itself_reproduces_the_authors_smoother():
    def result_of(case, blocks):
        return oracle.smooth(blocks, matrix_of(case), VARIANTS[case["normalize"]])

    assert not differing(result_of)
