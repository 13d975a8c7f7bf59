"""Everything that the README shows is executed."""

import doctest
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_readme_print_what_they_show():
    blocks = _blocks("python")
    if importlib.util.find_spec("flax") is None:
        blocks = [block for block in blocks if "flax" not in block]
    example = "\n".join(blocks)  # each goes on where the last one ended
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", None, 0)
    assert len(test.examples) >= 35
    assert doctest.DocTestRunner().run(test).failed == 0


def test_every_chain_of_the_placement_table_adds_what_its_formula_says():
    table = README.split("| `optax.chain` of |")[1].split("\n\n")[0]
    table = table.replace("\N{NO-BREAK SPACE}", " ")
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", table, re.MULTILINE)
    rng = np.random.default_rng(0)
    g, theta = rng.normal(size=(2, 4, 3)).astype("float32")
    eta, lam, clip, alpha, eps = 0.1, 0.3, 0.7, 0.4, 0.2
    rates = np.array([1.0, 0.0, 2.0, 0.5], "float32")[:, None]
    s = gs.window(alpha).matrix(4)

    def p(x):  # the first step of Adam
        return x / (np.abs(x) + eps)

    expected = {
        "-η (S P(g) + λ θ)": -eta * (s @ p(g) + lam * theta),
        "-η H S P(g)": -eta * rates * (s @ p(g)),
        "-η S H P(g)": -eta * s @ (rates * p(g)),
        "-η P(S g)": -eta * p(s @ g),
        "-η S (P(g) + λ θ)": -eta * s @ (p(g) + lam * theta),
        "-η S P(clip(g))": -eta * s @ p(g * min(1, clip / np.linalg.norm(g))),
    }
    names = {
        **vars(optax),
        "scale_by_adam": lambda: optax.scale_by_adam(eps=eps),
        "S": gs.smooth_over_depth(gs.scanned("blocks/"), alpha),
        "per_layer_rates": optax.stateless(lambda u, _: _scaled(u, rates)),
        "wd": lam,
        "lr": eta,
        "c": clip,
    }
    assert [formula for _, formula in rows] == list(expected)
    for chain, formula in rows:
        tx = eval(f"chain({chain})", dict(names))
        params = {"blocks": {"w": jnp.asarray(theta)}}
        updates, _ = tx.update(
            {"blocks": {"w": jnp.asarray(g)}}, tx.init(params), params
        )
        np.testing.assert_allclose(
            updates["blocks"]["w"],
            expected[formula],
            rtol=1e-4,
            atol=1e-6,
            err_msg=chain,
        )


def _scaled(updates, rates):
    return jax.tree.map(lambda x: x * rates, updates)


def test_every_row_of_the_depth_table_finds_the_layers_of_its_path():
    section = README.split("## Telling it where depth is")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .*? \| (`\S*/.*?) \| `(gs\..*?)`[ :|].*\|$", section, re.M)
    assert len(rows) == 6
    for paths, call in rows:
        spec = eval(call, {"gs": gs})
        hash(spec)
        for path, shape in re.findall(r"`(\S+)`(?: \(([\w, ]+)\))?", paths):
            axis = shape.split(", ").index("L") if shape else None
            if "layers_" in path and "…" in path:  # cycles, scanned, and the remainder
                axis = None if "remainder" in path else 1
            leaf = jnp.ones((3, 3, 3) if axis is not None else (3, 3))
            tree = _tree_of(path.replace("…", "w"), leaf)
            group, *others = gs.describe(spec, tree).groups
            assert not others
            assert len(group.layers) == (1 if axis is None else 3), path


def _tree_of(path, leaf):
    for segment in reversed(path.split("/")):
        leaf = {segment: leaf}
    return leaf


# What stands in the README for things of the reader's.
STAND_INS = {
    "depth": gs.scanned("blocks/"),
    "params": {"blocks": {"w": jnp.ones((3, 2))}, "head": jnp.ones(2)},
    "updates": {"blocks": {"w": jnp.ones((3, 2))}, "head": jnp.ones(2)},
    "per_microbatch_updates": {"blocks": {"w": jnp.ones((2, 3, 2))}},
    "states": jnp.arange(12.0).reshape(4, 3) ** 2,
    "inner": optax.scale_by_adam(),
    "opt": optax.scale_by_adam(),
    "smooth": gs.smooth_over_depth(gs.scanned("blocks/"), 0.2),
    "smoothing": gs.smooth_over_depth(gs.scanned("blocks/"), 0.1),
    "tx": gs.adamw(1e-3, gs.smooth_over_depth(gs.scanned("blocks/"))),
    "operator": gs.window(0.2),
    "op": gs.window(0.2),
    "first": gs.window(0.2),
    "second": gs.gaussian(1.0),
    "matrix": np.eye(3),
    "function": lambda num_layers: np.eye(num_layers),
    "spec": gs.scanned("blocks/"),
    "predicate": lambda path: True,
    "labels": {"blocks": "train", "head": "frozen"},
    "learning_rate": 1e-3,
    "lr": 1e-3,
    "alpha": 0.2,
    "radius": 1,
    "decay": 0.5,
    "sigma": 1.0,
    "strength": 1.0,
    "rho": 0.5,
    "rates": 0.5,
    "preconditioner": optax.scale_by_adam(),
    "seed": 0,
    "n": 3,
    "k": 10,
    "num_layers": 3,
    "differences": {"window": [0.1, -0.2, 0.05]},
}


def _calls() -> list[str]:
    """All calls of the library and of optax in the README's text and tables."""
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`((?:gs|optax)\.[\w.]+\(.*?\))`", text)
    return sorted(span.replace(r"\|", "|") for span in set(spans))


@pytest.mark.filterwarnings("ignore::gradsmooth_optax.DepthWarning")
def test_every_call_that_the_readme_names_can_be_made_as_shown():
    calls = _calls()
    assert len(calls) >= 40
    names = {**STAND_INS, "gs": gs, "optax": optax}
    for call in calls:
        if call.endswith("(...)"):
            assert callable(eval(call.removesuffix("(...)"), names)), call
        else:
            eval(call, dict(names))


def test_what_the_readme_says_of_speed_and_evidence_is_what_the_results_say():
    pytest.importorskip("flax")  # the extra "bench"
    from benchmarks import readme

    assert readme.main(["--check"]) == 0
