"""The examples of CONTRIBUTING.md are what it says they are."""

import ast
import doctest
import itertools
import pickle
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import stacks

import gradsmooth_optax as gs
from gradsmooth_optax import layouts
from gradsmooth_optax._depth import specs

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(heading):
    section = CONTRIBUTING.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def names_of(*modules):
    return {name: value for module in modules for name, value in vars(module).items()}


def run_doctest(function, **names):
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(function, function.__name__, globs={**names})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.fixture
def operator(monkeypatch):
    """The example's operator and its oracle, run as if they were in their files."""
    in_oracle, row, file, export = blocks("An operator")
    plain = names_of(oracle)
    exec(in_oracle, plain)
    (export,) = ast.parse(export).body
    module = types.ModuleType(export.module)
    monkeypatch.setitem(sys.modules, export.module, module)
    exec(file, vars(module))
    (name,) = export.names
    assert name.name == name.asname  # it is public
    made = vars(module)[name.name]
    monkeypatch.setattr(gs, name.name, made, raising=False)
    names = {"gs": gs, "oracle": types.SimpleNamespace(**plain)}
    (linear,) = eval(f"{{{row}}}", {**names, "Linear": lambda *row: row}).values()
    assert linear[0] is made
    return linear


def test_the_example_of_an_operator_is_its_plain_formula(operator):
    make, plain = operator
    run_doctest(make)
    traced = jax.jit(lambda weight: make(weight).matrix(7))
    for num_layers, weight in itertools.product((1, 2, 7), (0.0, 0.3, 1)):
        expected = plain(num_layers, weight)
        matrix = make(weight).matrix(num_layers)
        assert matrix.dtype == "float64"
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=2e-15)
        if num_layers == 7:
            matrix = traced(jnp.float32(weight))
            np.testing.assert_allclose(matrix, expected, rtol=0, atol=4e-7)


def test_the_example_of_an_operator_smooths_by_a_schedule_too(operator):
    make, plain = operator
    u = {"blocks": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))}}
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), make(lambda count: 0.5))
    out, _ = jax.jit(tx.update)(u, tx.init(u))
    expected = plain(4, 0.5) @ np.asarray(u["blocks"]["w"])
    np.testing.assert_allclose(out["blocks"]["w"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`weight` must be between 0 and 1"):
        make(1.5)
    assert make(0.0).is_identity
    assert make(0.2) == make(0.2) != make(0.3)
    assert pickle.loads(pickle.dumps(make(0.2))) == make(0.2)
    assert repr(make(0.2)) == "gs.towards_mean(0.2)"


def test_the_example_of_a_preset_couples_true_neighbors(monkeypatch):
    row, preset = blocks("A layout preset")
    names = names_of(layouts)
    monkeypatch.setitem(specs.PRESETS, "segments", None)  # put back at the end
    exec(preset, names)
    monkeypatch.setattr(layouts, "segments", names["segments"], raising=False)
    run_doctest(names["segments"])
    stack = eval(row, names_of(stacks))
    chains = stacks.random_blocks(stack)
    tree = stacks.build(stack, chains)
    for spec in (stack.spec, stack.preset, "segments"):
        tx = gs.smooth_over_depth(spec, 0.3)
        out, _ = tx.update(tree, tx.init(tree))
        found, wrong = stacks.coupled_pairs(stack, tree, out, 0.3)
        assert found == stacks.true_pairs(stack)
        assert not wrong


def test_the_example_of_a_task_has_what_a_task_has():
    pytest.importorskip("flax")  # the extra "bench"
    module, sizes = blocks("A task")
    task_module, presets = {}, {}
    exec(module, task_module)
    exec(sizes, presets)
    options = presets["_REGRESS"]
    own = ("width", "heads", "batch", "eval_inputs")
    task = task_module["build"](3, **{name: options[name] for name in own})
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = task.draw(task.data, jax.random.key(1), 0)
    states = jax.eval_shape(task.states, params, batch)
    assert states.shape == (4, options["batch"], options["width"])
    assert jax.eval_shape(task.loss, params, batch).shape == ()
    (metric,) = task_module["METRICS"]
    assert list(jax.eval_shape(task.evaluate, params)) == [metric.name]
    roles = {group.role for group in gs.describe(task.depth, params).groups}
    assert roles == params["blocks"].keys()
