"""Is there anything along depth to couple? Signal and noise of gradients by layer.

What a filter along depth leaves of the error is a quadratic form in products of
layers. Those of different batches hold the signal alone, those of one batch the noise
as well, which layers may share.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._checks import shown
from gradsmooth_optax._depth.checked_groups import coupled_groups
from gradsmooth_optax._depth.groups import Group, text_of
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax._operators.composed import with_matrix
from gradsmooth_optax._operators.smoothers import window
from gradsmooth_optax.diagnostics._cosine_matrix import (
    coupled_layers,
    layer_products,
    rows_of,
)
from gradsmooth_optax.diagnostics._statistics import texts_of

# How much of what layers share the fitted filter believes; 0 is one factor per layer.
_BELIEFS = (0.0, 0.25, 0.5, 0.75, 1.0)
_FEWEST_GROUPS = 4
# A filter that leaves more than this of the error is not worth a run.
_WORTH = 0.99


class Share(NamedTuple):
    """An error as a share of another, with a 95 % interval (jackknife over groups).

    Attributes:
      value: the share; NaN where no signal stands out of the noise.
      low: end of the interval.
      high: the other end.

    Example:
      >>> import gradsmooth_optax as gs
      >>> print(gs.diagnostics.Share(0.9312, 0.911, 0.952))
      0.931 [0.911, 0.952]
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "unknown"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class _Products(NamedTuple):
    """Products of layers, of K groups of batches.

    Attributes:
      between: (K, K, L, L), of the means of two groups; what is on the diagonal is not
        used.
      within: (K, L, L), of single batches, the mean over each group.
    """

    between: np.ndarray
    within: np.ndarray


@dataclasses.dataclass(frozen=True)
class LayerSignal:
    """Signal and noise along depth, of one role or of the whole block.

    All errors are shares of the one that the best single factor leaves.

    Attributes:
      signal: (L, L), ⟨μ_l, μ_k⟩ of the expected gradients of layers l and k, made
        positive semidefinite.
      noise: (L, L), the covariance of one batch's gradient, summed over coordinates.
      cosines: (L-1,), of the signals of neighbors; NaN where a layer has none.
      left: {filter: share}, at the noise that `momentum` leaves.
      left_raw: the same of single batches.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import numpy as np
      >>> rng = np.random.default_rng(0)
      >>> batches = [{"h": 1 + rng.normal(size=(4, 500))} for _ in range(16)]
      >>> of = gs.diagnostics.depth_signal(batches, gs.scanned("h")).blocks["h"]
      >>> of.left_by(gs.mean_over_depth()).value < of.left_by(gs.window(0.5)).value < 1
      True
    """

    signal: np.ndarray
    noise: np.ndarray
    cosines: np.ndarray
    left: Mapping[str, Share]
    left_raw: Mapping[str, Share]
    _products: _Products = dataclasses.field(repr=False)
    _noise_kept: float = dataclasses.field(repr=False)

    def left_by(self, operator: Any) -> Share:
        """What an operator leaves, times its best single factor.

        Args:
          operator: one with a matrix, or the α of a window.
        """
        matrix = with_matrix(operator, "left_by").matrix(len(self.signal))
        fit = _scaled(np.asarray(matrix, np.float64))
        return _shares(self._products, self._noise_kept, {"": fit})[""]


@dataclasses.dataclass(frozen=True, repr=False)
class DepthSignal:
    """What `depth_signal` found; `print` shows a table and what follows from it.

    Attributes:
      blocks: {stack: LayerSignal} of whole blocks.
      roles: {stack: {role: LayerSignal}}.
      num_batches: that were seen.
      momentum: for which the noise is scaled.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import numpy as np
      >>> rng = np.random.default_rng(0)
      >>> batches = [{"h": 1 + rng.normal(size=(4, 500))} for _ in range(32)]
      >>> signal = gs.diagnostics.depth_signal(batches, gs.scanned("h"))
      >>> signal.blocks["h"].cosines.round(1).tolist()  # all layers share the signal
      [1.0, 1.0, 1.0]
    """

    blocks: Mapping[str, LayerSignal]
    roles: Mapping[str, Mapping[str, LayerSignal]]
    num_batches: int
    momentum: float

    @property
    def sentence(self) -> str:
        """What a user can do about it."""
        return "\n".join(_advice(name, of) for name, of in self.blocks.items())

    def __str__(self) -> str:
        lines = [
            f"Error that a filter along depth leaves, as a share of what the best "
            f"single factor\nleaves ({self.num_batches} batches, noise after momentum "
            f"{self.momentum:g}; raw: of single batches)."
        ]
        for stack, block in self.blocks.items():
            rows = {f"{stack} (block)": block} | dict(self.roles[stack])
            names = list(block.left)
            table = [["", *names, "best, raw", "cosine of neighbors"]]
            for name, of in rows.items():
                cosine = _mean_of_finite(of.cosines)
                table.append(
                    [
                        name,
                        *(str(of.left[key]) for key in names),
                        str(of.left_raw[_BEST]),
                        f"{cosine:+.2f}",
                    ]
                )
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines.append("")
            lines += [
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
                for row in table
            ]
        return "\n".join([*lines, "", self.sentence])

    __repr__ = __str__


_BEST, _FACTORS, _MEAN = "best filter", "factor per layer", "depth mean"
_WINDOWS = (0.2, 0.5)


def depth_signal(
    gradients: Iterable[Any],
    depth: DepthLike,
    *,
    groups: int = 16,
    momentum: float = 0.9,
) -> DepthSignal:
    """Is there anything to couple? How much of the noise a filter along depth removes.

    A batch's gradient of layer l is g_l = μ_l + ε_l, and coupling replaces it by
    Σ_k F_lk g_k. With the products S_lk = ⟨μ_l, μ_k⟩ and N_lk = E⟨ε_l, ε_k⟩, the error
    that is left is

        E Σ_l ‖Σ_k F_lk g_k - μ_l‖² = tr (F - I) S (F - I)ᵀ + c tr F N Fᵀ

    where c = (1 - momentum) / (1 + momentum) is what is left of the noise in an average
    over steps. S comes from products of different groups of batches, which share no
    noise, N from those within a batch, minus S. Every filter is fitted without the two
    groups that it is judged on, and the mean is over all pairs of groups; the
    intervals are of the jackknife that leaves out one group. Shown, relative to what
    the best single factor F = a I leaves:

    * *factor per layer*: F diagonal, no coupling;
    * *depth mean*: F = a I + b 11ᵀ/L;
    * *window(α)*: F = a times the window;
    * *best filter*: S (S + c N)⁻¹ or, where that is fitted to noise, something between
      it and the first two, as judged.

    This bounds what averaging noise away can bring, for this model at these parameters.
    Coupling that helps for another reason is not seen, and one that removes noise need
    not help.

    Args:
      gradients: trees, one of each batch, drawn independently at the same parameters:
        at least `groups` of them; raw gradients, or what a preconditioner with a fixed
        state makes of them. Taken one by one; kept are `groups` sums of them.
      depth: where depth is, as in `smooth_over_depth`.
      groups: number of sums, at least 4.
      momentum: b of the optimizer's average over steps, from 0 to below 1.

    Returns:
      A `DepthSignal`: `print` it.

    Raises:
      TypeError: for an argument of the wrong kind.
      ValueError: for fewer batches than groups, trees of different structure or shapes,
        gradients that are not finite, a grouping without neighbors, or as
        `smooth_over_depth`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import numpy as np
      >>> rng = np.random.default_rng(0)  # 4 layers with nothing in common
      >>> means = rng.normal(size=(4, 500))
      >>> batches = [{"h": means + rng.normal(size=(4, 500))} for _ in range(32)]
      >>> print(gs.diagnostics.depth_signal(batches, gs.scanned("h")).sentence)
      h: nothing along depth to couple, the best filter leaves 1.000 [0.999, 1.000] of \
the error that a single factor leaves. What may help instead is a rate of its own for \
the blocks, `gs.scale_over_depth`.

    References:
      McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162,
      for signal and noise from batches.
    """
    spec = as_spec(depth)
    _check_numbers(groups, momentum)
    sums = _summed(gradients, spec, groups)
    kept = (1 - momentum) / (1 + momentum)
    stacks: dict[Any, list[int]] = {}
    for index, group in enumerate(sums.groups):
        stacks.setdefault(group.stack, []).append(index)
    texts = texts_of("stacks", stacks)
    blocks, roles = {}, {}
    for stack, members in stacks.items():
        of_roles = [sums.products[index] for index in members]
        layers = [coupled_layers(sums.groups[index]) for index in members]
        blocks[texts[stack]] = _signal_of(_block(of_roles, layers), kept)
        roles[texts[stack]] = {
            text_of(sums.groups[index].role): _signal_of(of, kept)
            for index, of in zip(members, of_roles, strict=True)
        }
    return DepthSignal(blocks, roles, sums.num_batches, float(momentum))


# -- From batches to products ----------------------------------------------------------


class _Sums(NamedTuple):
    groups: Sequence[Group]
    products: Sequence[_Products]
    num_batches: int


def _summed(gradients: Iterable[Any], spec: Any, num_groups: int) -> _Sums:
    """Products of all groups along depth, from a stream of trees."""
    groups: Sequence[Group] = ()
    positions: list[int] = []
    shapes: Any = None
    sums: list[Any] = [None] * num_groups
    counts = np.zeros(num_groups)
    within: list[Any] = [None] * num_groups

    @jax.jit
    def taken(leaves: dict[int, jax.Array]) -> tuple[list, list]:
        rows = [rows_of(group, leaves) for group in groups]
        return rows, [layer_products(u, u) for u in rows]

    @jax.jit
    def added(total: Any, new: Any) -> Any:
        return jax.tree.map(jnp.add, total, new)

    num_batches = 0
    for tree in _trees(gradients):
        leaves = jax.tree.leaves(tree)
        here = jax.tree.structure(tree), [np.shape(leaf) for leaf in leaves]
        if shapes is None:
            groups = coupled_groups(spec, tree, True).coupled
            if not groups:
                raise ValueError(
                    "`depth` couples no layers of these `gradients`: every stack has "
                    "one layer. See `print(gs.describe(depth, params))`."
                )
            positions = sorted({m.leaf for group in groups for m in group.members})
            shapes = here
        elif here != shapes:
            raise ValueError(
                f"tree {num_batches} of `gradients` has another structure or other "
                "shapes than the first. All must be gradients of the same parameters."
            )
        new = taken({i: jnp.asarray(leaves[i]) for i in positions})
        if not all(np.isfinite(np.trace(np.asarray(gram))) for gram in new[1]):
            raise ValueError(
                f"tree {num_batches} of `gradients` is not finite, or the sum of its "
                "squares is not. Leave such batches out, or scale the loss."
            )
        place = num_batches % num_groups
        rows, grams = new
        sums[place] = rows if sums[place] is None else added(sums[place], rows)
        grams = [np.asarray(gram, np.float64) for gram in grams]
        before = within[place] or [0.0] * len(grams)
        within[place] = [a + b for a, b in zip(before, grams, strict=True)]
        counts[place] += 1
        num_batches += 1
    if num_batches < num_groups:
        raise ValueError(
            f"`gradients` has {num_batches} batches, fewer than `groups` "
            f"({num_groups}). Write `depth_signal(gradients, depth, "
            f"groups={max(num_batches, _FEWEST_GROUPS)})`, or take more batches."
        )

    cross = jax.jit(layer_products)
    of_groups = []
    for index in range(len(groups)):
        layers = len(coupled_layers(groups[index]))
        between = np.zeros((num_groups, num_groups, layers, layers))
        for i, j in itertools.combinations(range(num_groups), 2):
            product = np.asarray(cross(sums[i][index], sums[j][index]), np.float64)
            between[i, j] = product / (counts[i] * counts[j])
            between[j, i] = between[i, j].T
        inside = np.stack([within[k][index] / counts[k] for k in range(num_groups)])
        of_groups.append(_Products(between, inside))
    return _Sums(groups, of_groups, num_batches)


def _trees(gradients: Any) -> Iterable[Any]:
    if isinstance(gradients, Mapping) or not isinstance(gradients, Iterable):
        raise TypeError(
            f"`gradients` must be an iterable of trees, one for each batch, but is of "
            f"type {type(gradients).__name__}. Write `depth_signal((jax.grad(loss)("
            f"params, batch) for batch in batches), depth)`."
        )
    return gradients


def _block(of_roles: Sequence[_Products], layers: Sequence[list[int]]) -> _Products:
    """The products of whole blocks: the sums over the roles that both layers have."""
    everywhere = sorted(set().union(*layers))
    k, n = of_roles[0].within.shape[0], len(everywhere)
    between, within = np.zeros((k, k, n, n)), np.zeros((k, n, n))
    for of, own in zip(of_roles, layers, strict=True):
        place = np.searchsorted(everywhere, own)
        at = np.ix_(place, place)
        between[:, :, at[0], at[1]] += of.between
        within[:, at[0], at[1]] += of.within
    return _Products(between, within)


# -- From products to filters ----------------------------------------------------------

# (signal, what a gradient's products are expected to be) -> F, batched in front.
_Fit = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _signal_of(of: _Products, kept: float) -> LayerSignal:
    k, layers = of.within.shape[:2]
    signal = _nearest_psd(_mean_over_pairs(of.between, np.ones((k, k), bool)))
    noise = of.within.mean(0) - signal
    norms = np.sqrt(np.diagonal(signal))
    scale = norms[1:] * norms[:-1]
    next_to = np.diagonal(signal, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where(scale > 0, next_to / scale, np.nan)
    fits: dict[str, _Fit] = {
        _FACTORS: _believing(0.0),
        _MEAN: _spanned(np.eye(layers), np.full((layers, layers), 1 / layers)),
    }
    for alpha in _WINDOWS:
        matrix = np.asarray(window(alpha).matrix(layers), np.float64)
        fits[f"window({alpha:g})"] = _scaled(matrix)
    return LayerSignal(
        signal,
        noise,
        cosines,
        _all_shares(of, kept, fits),
        _all_shares(of, 1.0, fits),
        of,
        kept,
    )


def _all_shares(
    of: _Products, kept: float, fits: Mapping[str, _Fit]
) -> dict[str, Share]:
    layers = of.within.shape[1]
    candidates = {f"{belief}": _believing(belief) for belief in _BELIEFS}
    candidates["single"] = _scaled(np.eye(layers))
    # Only what is not worse than a single factor may take its place.
    found = _shares(of, kept, dict(fits) | candidates)
    best = min(candidates, key=lambda name: found[name].value)
    return {name: found[name] for name in fits} | {_BEST: found[best]}


def _shares(of: _Products, kept: float, fits: Mapping[str, _Fit]) -> dict[str, Share]:
    """What filters leave of the error, relative to the best single factor."""
    k, layers = of.within.shape[:2]
    pairs = list(itertools.combinations(range(k), 2))
    signals, moments = [], []
    for i, j in pairs:
        others = np.ones(k, bool)
        others[[i, j]] = False
        signal = _mean_over_pairs(of.between, np.outer(others, others))
        signals.append(_nearest_psd(signal))
        moments.append((1 - kept) * signals[-1] + kept * of.within[others].mean(0))
    fitted = np.stack(signals), np.stack(moments)
    judged = np.stack([_symmetric(of.between[i, j]) for i, j in pairs])
    within = np.stack([(of.within[i] + of.within[j]) / 2 for i, j in pairs])
    expected = (1 - kept) * judged + kept * within

    def errors(fit: _Fit) -> np.ndarray:
        f = fit(*fitted)
        squares = np.einsum("plk,pkm,plm->p", f, expected, f)
        return (
            squares
            - 2 * np.einsum("plk,pkl->p", f, judged)
            + np.trace(judged, axis1=1, axis2=2)
        )

    single = errors(_scaled(np.eye(layers)))
    left_out = np.array([[g not in pair for pair in pairs] for g in range(k)])
    return {
        name: _jackknife(errors(fit), single, left_out) for name, fit in fits.items()
    }


def _jackknife(errors: np.ndarray, single: np.ndarray, kept: np.ndarray) -> Share:
    """The ratio of two means over pairs, and its interval from leaving out a group."""
    from scipy import stats  # slow to import

    k = len(kept)
    quantile = float(stats.t.ppf(0.975, k - 1))

    def reach(without: np.ndarray) -> float:
        deviations = without - without.mean()
        return quantile * math.sqrt((k - 1) / k * float(np.sum(deviations**2)))

    if single.mean() <= reach(kept @ single / kept.sum(1)):
        return Share(math.nan, math.nan, math.nan)  # no signal stands out of the noise
    value = float(errors.mean() / single.mean())
    width = reach((kept @ errors) / (kept @ single))
    return Share(value, value - width, value + width)


def _scaled(matrix: np.ndarray) -> _Fit:
    """A matrix times its best factor, not below 0."""

    def fit(signal: np.ndarray, moment: np.ndarray) -> np.ndarray:
        gain = np.einsum("lk,pkl->p", matrix, signal)
        size = np.einsum("lk,pkm,lm->p", matrix, moment, matrix)
        with np.errstate(invalid="ignore", divide="ignore"):
            factor = np.where(size > 0, np.maximum(gain, 0) / size, 0.0)
        return factor[:, None, None] * matrix

    return fit


def _spanned(first: np.ndarray, second: np.ndarray) -> _Fit:
    """The best sum of two matrices, each times a factor."""
    basis = np.stack([first, second])

    def fit(signal: np.ndarray, moment: np.ndarray) -> np.ndarray:
        gains = np.einsum("alk,pkl->pa", basis, signal)
        sizes = np.einsum("alk,pkm,blm->pab", basis, moment, basis)
        factors = np.einsum("pab,pb->pa", np.linalg.pinv(sizes, hermitian=True), gains)
        return np.einsum("pa,alk->plk", factors, basis)

    return fit


def _believing(belief: float) -> _Fit:
    """S (S + c N)⁻¹ with what is off the diagonals times `belief`."""

    def fit(signal: np.ndarray, moment: np.ndarray) -> np.ndarray:
        mask = belief + (1 - belief) * np.eye(signal.shape[-1])
        inverse = np.linalg.pinv(moment * mask, hermitian=True)
        return (signal * mask) @ inverse

    return fit


def _mean_over_pairs(between: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The mean over the wanted pairs of different groups: (L, L), symmetric."""
    wanted = wanted & ~np.eye(len(between), dtype=bool)
    return _symmetric(between[wanted].mean(0))


def _symmetric(x: np.ndarray) -> np.ndarray:
    return (x + x.swapaxes(-1, -2)) / 2


def _nearest_psd(x: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(x)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def _mean_of_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


# -- Words -----------------------------------------------------------------------------


def _advice(stack: str, of: LayerSignal) -> str:
    best, factors = of.left[_BEST], of.left[_FACTORS]
    if math.isnan(best.value):
        return (
            f"{stack}: no signal stands out of the noise of so few batches: take more "
            "of them, or larger ones."
        )
    if best.value > _WORTH:
        return (
            f"{stack}: nothing along depth to couple, the best filter leaves {best} of "
            "the error that a single factor leaves. What may help instead is a rate of "
            "its own for the blocks, `gs.scale_over_depth`."
        )
    if factors.value - best.value < 0.01:
        return (
            f"{stack}: layers differ in their noise, but share nothing: factors per "
            f"layer leave {factors} of the error, the best filter {best}. Try rates "
            "per layer, `gs.scale_over_depth`, rather than coupling."
        )
    windows = {name: of.left[name] for name in of.left if name.startswith("window")}
    name = min(windows, key=lambda key: windows[key].value)
    return (
        f"{stack}: layers share something. The best filter along depth leaves {best} "
        f"of the error, {name} {windows[name]}. Whether that helps a training, "
        "`gs.trial.compare` tells."
    )


def _check_numbers(groups: Any, momentum: Any) -> None:
    if (
        isinstance(groups, bool)
        or not isinstance(groups, int)
        or groups < _FEWEST_GROUPS
    ):
        raise ValueError(
            f"`groups` must be a whole number from {_FEWEST_GROUPS}, but is "
            f"{shown(groups)}: two are judged on, and the others fitted to."
        )
    is_number = isinstance(momentum, int | float | np.floating)
    if isinstance(momentum, bool) or not is_number or not 0 <= momentum < 1:
        raise ValueError(
            f"`momentum` must be a number from 0 to below 1, but is {shown(momentum)}. "
            "Write `momentum=0.9`, or 0 for single batches."
        )
