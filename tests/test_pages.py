"""Everything that the README and the guides show is executed."""

import doctest
import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.fixture
def own_names_in_optax():
    """Takes out of optax what a guide registers there."""
    before = set(vars(optax))
    yield
    for name in set(vars(optax)) - before:
        if f"optax.{name}" not in sys.modules:
            delattr(optax, name)


@pytest.mark.usefixtures("own_names_in_optax")
@every_page
def test_the_examples_of_a_page_print_what_they_show(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.DOTALL)
    example = "\n".join(blocks)  # each goes on where the last one ended
    for name in re.findall(r"^>>> (?:from|import) (flax|equinox)", example, re.M):
        pytest.importorskip(name)
    test = doctest.DocTestParser().get_doctest(example, {}, page.name, None, 0)
    assert doctest.DocTestRunner().run(test).failed == 0


PARAMS = {"blocks": {"w": jnp.ones((3, 2))}, "head": jnp.ones(2)}
MONITOR = gs.diagnostics.monitor_depth(optax.identity(), gs.scanned("blocks/"))

# What stands in the pages for things of the reader's.
STAND_INS = {
    "depth": gs.scanned("blocks/"),
    "params": PARAMS,
    "updates": PARAMS,
    "state": optax.contrib.schedule_free_sgd().init(PARAMS),
    "record": gs.diagnostics.monitored(MONITOR.update(PARAMS, MONITOR.init(PARAMS))[1]),
    "train": lambda optimizer, seeds: seeds,
    "factors": [0.1, 0.3, 1.0],
    "per_microbatch_updates": {"blocks": {"w": jnp.ones((2, 3, 2))}},
    "states": jnp.arange(12.0).reshape(4, 3) ** 2,
    "inner": optax.scale_by_adam(),
    "smooth": gs.smooth_over_depth(gs.scanned("blocks/"), 0.2),
    "smoothing": gs.smooth_over_depth(gs.scanned("blocks/"), 0.1),
    "S": gs.smooth_over_depth(gs.scanned("blocks/"), 0.1),
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
    "learning_rate_schedule": optax.constant_schedule(1e-3),
    "lr": 1e-3,
    "wd": 1e-4,
    "alpha": 0.2,
    "radius": 1,
    "decay": 0.5,
    "sigma": 1.0,
    "strength": 1.0,
    "rho": 0.5,
    "rate": 0.5,
    "rates": 0.5,
    "preconditioner": optax.scale_by_adam(),
    "seed": 0,
    "n": 3,
    "k": 10,
    "num_layers": 3,
    "gradients": [
        {"blocks": {"w": jax.random.normal(jax.random.key(i), (3, 2))}}
        for i in range(16)
    ],
    "differences": {"window": [0.1, -0.2, 0.05]},
}


@every_page
@pytest.mark.filterwarnings("ignore::gradsmooth_optax.DepthWarning")
def test_every_call_that_a_page_names_can_be_made_as_shown(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.DOTALL)
    names = {**STAND_INS, "gs": gs, "optax": optax}
    for call in set(re.findall(r"`((?:gs|optax)\.[\w.]+\(.*?\))`", text)):
        eval(call.replace(r"\|", "|"), dict(names))
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def test_the_numbers_and_the_picture_of_the_pages_are_those_of_the_results():
    if importlib.util.find_spec("flax") is None:
        pytest.skip('needs the extra "bench"')
    from benchmarks import readme

    assert readme.main(["--check"]) == 0
