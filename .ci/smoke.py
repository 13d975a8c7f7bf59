"""Whether an installed distribution works, in an environment with nothing else.

    cd "$(mktemp -d)" && PYTHON /path/to/.ci/smoke.py

`.ci/package` runs it with the wheel and with the sdist, away from the checkout.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradsmooth_optax as gs

NAME = "gradsmooth_optax"
CHECKOUT = Path(__file__).resolve().parent.parent
LAYERS, ALPHA, LEARNING_RATE, DECAY = 4, 0.2, 1e-2, 0.1


def check_what_is_installed() -> None:
    place = Path(gs.__file__).resolve().parent
    assert CHECKOUT not in place.parents, f"imported from the checkout: {place}"
    distribution = importlib.metadata.distribution(NAME)
    assert gs.__version__ == distribution.version, distribution.version
    assert (place / "py.typed").is_file()

    files = [Path(str(file)) for file in distribution.files or ()]
    tops = {file.parts[0] for file in files}
    extra = {top for top in tops if top != NAME and not top.endswith(".dist-info")}
    assert not extra, f"more than the package is installed: {sorted(extra)}"
    for other in ("benchmarks", "tests", "oracle", "stacks"):
        assert importlib.util.find_spec(other) is None, f"{other} can be imported"
    assert any(file.name == "LICENSE" for file in files)

    needed = [line for line in distribution.requires or () if "extra ==" not in line]
    names = {line.split(">")[0].split("=")[0].strip() for line in needed}
    assert names == {"jax", "optax"}, needed
    for absent in ("flax", "matplotlib", "chex", "pytest"):
        # optax may need chex of its own accord.
        wanted = any(
            line.startswith(absent) for line in importlib.metadata.requires("optax")
        )
        assert wanted or importlib.util.find_spec(absent) is None, absent


def smoothed_by_hand(gradients: np.ndarray, params: np.ndarray) -> np.ndarray:
    """The first step of `gs.adamw`, in float64, layer by layer."""
    u = gradients / (np.abs(gradients) + 1e-8)  # moments without bias, at step 1
    smooth = np.empty_like(u)
    for layer in range(LAYERS):
        left, right = u[max(layer - 1, 0)], u[min(layer + 1, LAYERS - 1)]
        smooth[layer] = (1 - ALPHA) * u[layer] + ALPHA / 2 * (left + right)
    return params - LEARNING_RATE * (smooth + DECAY * params)


def stepped(depth: Any, params: Any, gradients: Any) -> Any:
    smoothing = gs.smooth_over_depth(depth, ALPHA)
    optimizer = gs.adamw(LEARNING_RATE, smoothing, weight_decay=DECAY)
    plain = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    state = optimizer.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(params))

    @jax.jit
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, _ = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates)

    return step(params, state, gradients)


def check_a_step() -> None:
    rng = np.random.default_rng(0)
    params, gradients = rng.normal(size=(2, LAYERS, 3, 5))
    expected = smoothed_by_hand(gradients, params)

    stacked = [{"blocks": {"w": jnp.asarray(x, "f4")}} for x in (params, gradients)]
    out = stepped(gs.scanned("blocks/"), *stacked)["blocks"]["w"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

    unrolled = [
        {f"layers_{i}": {"w": jnp.asarray(layer, "f4")} for i, layer in enumerate(x)}
        for x in (params, gradients)
    ]
    out = stepped(gs.unrolled(), *unrolled)
    layers = [out[f"layers_{i}"]["w"] for i in range(LAYERS)]
    np.testing.assert_allclose(layers, expected, rtol=1e-5, atol=1e-6)


def check_the_rest() -> None:
    updates = {"embed": jnp.ones(2), "blocks": {"w": jnp.arange(4.0)[:, None]}}
    depth = gs.scanned("blocks/")
    shown = str(gs.describe(depth, updates))
    assert "blocks" in shown, shown
    assert "embed" in shown, shown
    assert str(gs.layouts.maxtext()) == "gs.layouts.maxtext()"
    assert gs.controls.shuffled(gs.window(ALPHA), 0).matrix(LAYERS).shape == (4, 4)
    (of_stack,) = gs.diagnostics.depth_statistics(updates, depth).values()
    np.testing.assert_allclose(of_stack.norms, [0, 1, 2, 3], atol=1e-6)
    decoder = {"decoder": {"layers": {"w": jnp.ones((2, 3))}}}
    shown = str(gs.describe("maxtext", decoder))
    assert "gs.scanned('decoder/layers/', axis=1)" in shown, shown


def check_plots_say_what_they_need() -> None:
    """Without matplotlib a plot is an ImportError with the command to install it."""
    plots = importlib.import_module(f"{NAME}.plots")
    said = ""
    try:
        plots.operator_matrix(gs.window(ALPHA), LAYERS)
    except ImportError as error:
        said = str(error)
    assert f"{NAME}[plots]" in said, said or "a plot was made without matplotlib"


if __name__ == "__main__":
    check_what_is_installed()
    check_a_step()
    check_the_rest()
    check_plots_say_what_they_need()
    print(f"{NAME} {gs.__version__} works, Python {sys.version.split()[0]}")
