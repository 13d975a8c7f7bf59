"""The authors' published code, on the inputs and outputs it produced."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gradsmooth_optax as gs

pytestmark = pytest.mark.core

DATA = pathlib.Path(__file__).parent / "data"
CASES = json.loads((DATA / "authors_smoother.json").read_text())
VARIANTS = {
    "none": "standard",
    "rescale": "norm_preserving",
    "normalize_before": "directional",
}
ROLES = ("lin.weight", "lin.bias", "norm.weight", "norm.bias")
TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def vectors():
    with np.load(DATA / "authors_smoother.npz") as file:
        return dict(file)


def name(case):
    strength = case.get("alpha", case.get("rho"))
    scope = "proj" if case["proj_only"] else "full"
    return (
        f"{case['case']}-L{case['L']}-{case['method']}-{strength}"
        f"-{case['normalize']}-{scope}"
    )


def matrix_of(case):
    """num_layers -> S, from the description in the contract."""
    if case["method"] == "window":
        return lambda n: oracle.window_matrix(n, case["alpha"])
    if case["method"] == "laplacian":
        return lambda n: oracle.laplacian_matrix(n, case["alpha"])
    return lambda n: oracle.ema_matrix(n, case["rho"], case["reverse"])


def transformations(case, depth):
    variant = VARIANTS[case["normalize"]]
    matrix = matrix_of(case)(case["L"])
    if case["method"] == "window":
        yield gs.smooth_over_depth(depth, case["alpha"], variant=variant)
    elif case["method"] == "laplacian":
        operator = gs.laplacian(case["alpha"])
        yield gs.smooth_over_depth(depth, operator, variant=variant)
    else:
        operator = gs.ema(case["rho"], reverse=case["reverse"])
        yield gs.smooth_over_depth(depth, operator, variant=variant)
    yield gs.smooth_over_depth(depth, gs.dense(matrix), variant=variant)
    yield gs.smooth_over_depth(depth, gs.operator_fn(matrix_of(case)), variant=variant)


def module_tree(leaves):
    """{"lin": {"weight": ...}, ...} from {"lin.weight": ...}."""
    tree = {}
    for role, leaf in leaves.items():
        module, parameter = role.split(".")
        tree.setdefault(module, {})[parameter] = jnp.asarray(leaf)
    return tree


def test_all_the_published_cases_are_here():
    assert len(CASES) == 108
    assert {case["method"] for case in CASES} == {"window", "laplacian", "ema"}
    assert {case["L"] for case in CASES} == {2, 3, 5}


@pytest.mark.parametrize("case", CASES, ids=name)
def test_scanned_blocks_reproduce_the_authors_smoother(case, vectors):
    inputs = {role: vectors[f"{case['case']}/in/{role}"] for role in ROLES}
    depth = gs.scanned("blocks/")
    if case["proj_only"]:
        depth = depth.only_projections()
    updates = {"blocks": module_tree(inputs)}
    for tx in transformations(case, depth):
        out, _ = tx.update(updates, tx.init(updates))
        for role in ROLES:
            module, parameter = role.split(".")
            result = out["blocks"][module][parameter]
            reference = vectors[f"{case['case']}/out/{role}"]
            assert oracle.relative_error(result, reference) < TOLERANCE, role


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["L"] == 5 or c["method"] == "window"], ids=name
)
def test_unrolled_blocks_reproduce_the_authors_smoother(case, vectors):
    inputs = {role: vectors[f"{case['case']}/in/{role}"] for role in ROLES}
    depth = gs.unrolled()
    if case["proj_only"]:
        depth = depth.only_projections()
    updates = {
        f"blocks_{layer}": module_tree({role: x[layer] for role, x in inputs.items()})
        for layer in range(case["L"])
    }
    tx = next(iter(transformations(case, depth)))
    out, _ = tx.update(updates, tx.init(updates))
    for role in ROLES:
        module, parameter = role.split(".")
        result = np.stack(
            [out[f"blocks_{layer}"][module][parameter] for layer in range(case["L"])]
        )
        reference = vectors[f"{case['case']}/out/{role}"]
        assert oracle.relative_error(result, reference) < TOLERANCE, role


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_oracle_itself_reproduces_the_authors_smoother(case, vectors):
    roles = [r for r in ROLES if r.startswith("lin") or not case["proj_only"]]
    blocks = [
        {role: vectors[f"{case['case']}/in/{role}"][layer] for role in roles}
        for layer in range(case["L"])
    ]
    out = oracle.smooth(blocks, matrix_of(case), VARIANTS[case["normalize"]])
    for role in roles:
        result = np.stack([block[role] for block in out])
        reference = vectors[f"{case['case']}/out/{role}"]
        assert oracle.relative_error(result, reference) < TOLERANCE, role
