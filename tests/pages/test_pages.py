"""Everything that the README and the guides show is executed."""

import doctest
import importlib.util
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]

SLOW = ("evidence", "trainers")

every_page = pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW), id=page.stem)
        for page in PAGES
    ],
)


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


def stand_ins():
    """What stands in the pages for things of the reader's."""
    params = {"blocks": {"w": jnp.ones((3, 2))}, "head": jnp.ones(2)}
    depth = gs.scanned("blocks/")
    monitor = gs.diagnostics.monitor_depth(optax.identity(), depth)
    _, monitored = monitor.update(params, monitor.init(params))
    noise = np.random.default_rng(0).normal(size=(16, 3, 2))
    smooth = gs.smooth_over_depth(depth, 0.2)
    window = gs.window(0.2)
    rates = ("alpha", "decay", "sigma", "strength", "rho", "rates", "lr", "wd")
    return {
        **dict.fromkeys(rates, 0.2),
        **dict.fromkeys(("operator", "op", "first", "second"), window),
        **dict.fromkeys(("smooth", "smoothing", "S"), smooth),
        **dict.fromkeys(("inner", "preconditioner"), optax.scale_by_adam()),
        **{"gs": gs, "optax": optax, "depth": depth, "params": params},
        **{"learning_rate": 1e-3, "radius": 1, "seed": 0, "n": 3, "k": 10},
        "state": optax.contrib.schedule_free_sgd().init(params),
        "record": gs.diagnostics.monitored(monitored),
        "train": lambda optimizer, seeds: seeds,
        "factors": [0.1, 0.3, 1.0],
        "tx": gs.adamw(1e-3, smooth),
        "matrix": np.eye(3),
        "function": lambda num_layers: np.eye(num_layers),
        "labels": {"blocks": "train", "head": "frozen"},
        "learning_rate_schedule": optax.constant_schedule(1e-3),
        "gradients": [{"blocks": {"w": jnp.asarray(x, jnp.float32)}} for x in noise],
    }


@pytest.mark.filterwarnings("ignore::gradsmooth_optax.DepthWarning")
def test_every_call_that_the_pages_name_can_be_made_as_shown():
    pages = "\n".join(page.read_text() for page in PAGES)
    text = re.sub(r"^```.*?^```$", "", pages, flags=re.M | re.DOTALL)
    names, failed = stand_ins(), {}
    for call in set(re.findall(r"`((?:gs|optax)\.[\w.]+\(.*?\))`", text)):
        try:
            eval(call.replace(r"\|", "|"), dict(names))
        except Exception as error:
            failed[call] = error
    assert failed == {}
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def test_the_numbers_and_the_picture_of_the_pages_are_those_of_the_results():
    if importlib.util.find_spec("flax") is None:
        pytest.skip('needs the extra "bench"')
    from benchmarks import readme

    assert readme.main(["--check"]) == 0
