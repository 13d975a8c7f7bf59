"""How much an operator shrinks the differences between layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradsmooth_optax._checks import positive_int
from gradsmooth_optax._operators.composed import with_matrix


def contraction_factor(operator: Any, num_layers: int) -> float:
    """How much the operator shrinks differences between layers, at worst.

    The μ of the paper's theory: ‖D S u‖ ≤ μ ‖D u‖ for every u, with (D u)_l = u_{l+1} -
    u_l, so μ = ‖D S D⁺‖₂. For `window(alpha)` it is 1 - α (1 - cos(π/L)).

    Args:
      operator: an operator with a matrix and without schedules (see `Operator.at`).
      num_layers: L, an int ≥ 1.

    Returns:
      μ: below 1 where S contracts, 0 for one layer, and inf where S does not keep an
      update constant that is the same in all layers.

    Raises:
      TypeError: for an operator without a matrix.

    Example:
      >>> import gradsmooth_optax as gs
      >>> round(gs.diagnostics.contraction_factor(gs.window(0.5), 4), 4)
      0.8536
      >>> import math
      >>> round(1 - 0.5 * (1 - math.cos(math.pi / 4)), 4)
      0.8536

    References:
      arXiv 2606.30813, section 4.
    """
    operator = with_matrix(operator, "contraction_factor")
    if positive_int("num_layers", num_layers) == 1:
        return 0.0
    s = np.asarray(operator.matrix(num_layers), np.float64)
    difference = np.diff(np.eye(num_layers), axis=0)
    # A user's function may compute in float32.
    if np.abs(difference @ s.sum(1)).max() > 1e-5 * max(1, np.abs(s).max()):
        return float("inf")
    return float(np.linalg.norm(difference @ s @ np.linalg.pinv(difference), 2))
