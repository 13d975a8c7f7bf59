"""Every operator in one table: how it is made, and what it is in plain NumPy.

A new operator is a row here, and its matrix or its loop is in `oracle`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import oracle
from own_operators import AlikeWindow, TowardsMean

import gradsmooth_optax as gs

VARIANTS = [
    ("standard", "param"),
    ("norm_preserving", "param"),
    ("norm_preserving", "block"),
    ("directional", "param"),
    ("directional", "block"),
]
STRENGTH = 0.375


class Row(NamedTuple):
    """An operator.

    Attributes:
      make: strength -> the operator.
      matrix: (num_layers, strength) -> S, from a plain formula; or None.
      couple: (blocks, strength, norm_scope, ranked) -> blocks, where there is no S.
      scales_one: whether it changes a layer that is alone.
    """

    make: Callable[[Any], gs.Operator]
    matrix: Callable[[int, float], np.ndarray] | None = None
    couple: Callable[..., list] | None = None
    scales_one: bool = False


def two_steps_back(num_layers):
    """Neither symmetric nor of rows that sum to 1."""
    return 0.5 * np.eye(num_layers) + 0.25 * np.eye(num_layers, k=-2)


def towards_mean(n, weight):
    return (1 - weight) * np.eye(n) + weight * np.full((n, n), 1 / n)


def ema(n, rho):
    return oracle.ema_matrix(n, rho, reverse=False)


def permuted(n, matrix):
    """In the order that `shuffled(..., seed=3)` draws, read off a diagonal."""
    given = gs.dense(np.diag(np.arange(1.0, n + 1)))
    order = np.diag(gs.controls.shuffled(given, 3).matrix(n)).astype(int) - 1
    return matrix[np.ix_(order, order)]


def at_the_norms_of_ema(blocks, rho, norm_scope, ranked):
    def coupling(source):
        return oracle.smooth(source, lambda n: ema(n, rho), ranked=ranked)

    return oracle.norm_matched(blocks, coupling, norm_scope, ranked)


OPERATORS = {
    "window": Row(gs.window, oracle.window_matrix),
    "wide window": Row(
        lambda a: gs.window(a, 3, decay=0.5),
        lambda n, a: oracle.window_matrix(n, a, 3, 0.5),
    ),
    "decaying window": Row(
        lambda d: gs.window(0.4, 8, decay=d),
        lambda n, d: oracle.window_matrix(n, 0.4, 8, d),
    ),
    "laplacian": Row(gs.laplacian, oracle.laplacian_matrix),
    "ema": Row(gs.ema, ema),
    "reverse ema": Row(
        lambda rho: gs.ema(rho, reverse=True),
        lambda n, rho: oracle.ema_matrix(n, rho, reverse=True),
    ),
    "gaussian": Row(
        lambda s: gs.gaussian(s, radius=2), lambda n, s: oracle.gaussian_matrix(n, s, 2)
    ),
    "wide gaussian": Row(
        lambda s: gs.compose(gs.gaussian(s, radius=9), gs.gaussian(2.0)),
        lambda n, s: (
            oracle.gaussian_matrix(n, 2.0, 6) @ oracle.gaussian_matrix(n, s, 9)
        ),
    ),
    "tikhonov": Row(gs.tikhonov, oracle.tikhonov_matrix),
    "mean": Row(
        lambda a: gs.compose(gs.window(a), gs.mean_over_depth()),
        lambda n, a: np.full((n, n), 1 / n),
    ),
    "compose": Row(
        lambda a: gs.compose(
            gs.ema(a), gs.laplacian(0.3), gs.operator_fn(two_steps_back)
        ),
        lambda n, a: two_steps_back(n) @ oracle.laplacian_matrix(n, 0.3) @ ema(n, a),
    ),
    "repeat": Row(
        lambda a: gs.repeat(gs.window(a), 5),
        lambda n, a: np.linalg.matrix_power(oracle.window_matrix(n, a), 5),
    ),
    "shuffled": Row(
        lambda a: gs.controls.shuffled(gs.ema(a), 3),
        lambda n, a: permuted(n, ema(n, a)),
    ),
    "layer scale": Row(
        gs.layer_scale, lambda n, factor: factor * np.eye(n), scales_one=True
    ),
    "subclass": Row(TowardsMean, towards_mean),
    "function": Row(
        lambda a: gs.operator_fn(lambda n: TowardsMean(a).matrix(n)), towards_mean
    ),
    # What a layer receives depends on the updates.
    "norm_matched": Row(
        lambda rho: gs.controls.norm_matched(gs.ema(rho)), couple=at_the_norms_of_ema
    ),
    "similarity per param": Row(
        lambda a: gs.similarity_window(a, "param", sharpness=0.5),
        couple=lambda blocks, a, norm_scope, ranked: oracle.similarity_window(
            blocks, a, "param", 0.5, ranked
        ),
    ),
    "similarity per block": Row(
        gs.similarity_window,
        couple=lambda blocks, a, norm_scope, ranked: oracle.similarity_window(
            blocks, a, "block", 1.0, ranked
        ),
    ),
    "alike window": Row(
        AlikeWindow,
        couple=lambda blocks, a, norm_scope, ranked: oracle.alike_window(
            blocks, a, 2.0, ranked
        ),
    ),
    "composed without a matrix": Row(
        lambda a: gs.compose(gs.repeat(AlikeWindow(a), 2), gs.window(0.2)),
        couple=lambda blocks, a, norm_scope, ranked: oracle.window(
            oracle.alike_window(
                oracle.alike_window(blocks, a, 2.0, ranked), a, 2.0, ranked
            ),
            0.2,
            ranked=ranked,
        ),
    ),
}
EVERY = list(OPERATORS)
WITH_MATRIX = [name for name, row in OPERATORS.items() if row.matrix]
# A function of ours closes over its strength.
SCHEDULED = [name for name in EVERY if name != "function"]


def make(name, strength=STRENGTH):
    return OPERATORS[name].make(strength)


def plain(name, num_layers, strength=STRENGTH):
    """S of a run, [[1]] of one layer."""
    if num_layers == 1 and not OPERATORS[name].scales_one:
        return np.ones((1, 1))
    return OPERATORS[name].matrix(num_layers, strength)


def expected_of(
    name,
    blocks,
    variant="standard",
    norm_scope="param",
    ranked=False,
    strength=STRENGTH,
):
    """What the plain loops make of the updates."""

    def coupling(source):
        if OPERATORS[name].couple:
            return OPERATORS[name].couple(source, strength, norm_scope, ranked)
        return oracle.smooth(source, lambda n: plain(name, n, strength), ranked=ranked)

    return oracle.couple(blocks, coupling, variant, norm_scope, ranked)
