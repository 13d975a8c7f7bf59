"""The operators whose cost is measured: here an operator is added, and nowhere else.

What the committed results do not have of it yet is shown as not measured.
"""

from typing import Any

import gradsmooth_optax as gs


def operators() -> dict[str, Any]:
    """Returns every operator at a usual strength, by the call that makes it."""
    window = gs.window(0.2)
    return {
        "window(0.2)": window,
        "window(0.2, radius=3)": gs.window(0.2, radius=3),
        "window(0.2, radius=8)": gs.window(0.2, radius=8),
        "gaussian(1.0)": gs.gaussian(1.0),
        "gaussian(3.0)": gs.gaussian(3.0),
        "laplacian(0.2)": gs.laplacian(0.2),
        "ema(0.5)": gs.ema(0.5),
        "tikhonov(1.0)": gs.tikhonov(1.0),
        "mean_over_depth()": gs.mean_over_depth(),
        "repeat(window(0.2), 8)": gs.repeat(window, 8),
        "similarity_window(0.2)": gs.similarity_window(0.2),
        "controls.norm_matched(window(0.2))": gs.controls.norm_matched(window),
        "controls.shuffled(window(0.2), 0)": gs.controls.shuffled(window, 0),
    }
