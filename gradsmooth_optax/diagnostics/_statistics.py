"""How much the updates of neighboring layers differ, per stack and per role."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradsmooth_optax._arrays import num_bits, replicated
from gradsmooth_optax._checks import check_flag
from gradsmooth_optax._coupling.layer_values import LayerValues
from gradsmooth_optax._coupling.layers import layers_of
from gradsmooth_optax._coupling.norms import cosine
from gradsmooth_optax._depth.checked_groups import coupled_groups
from gradsmooth_optax._depth.groups import Group, text_of
from gradsmooth_optax._depth.specs import DepthLike, as_spec


class RoleStatistics(NamedTuple):
    """How the updates of one role vary along depth: see `depth_statistics`.

    Attributes:
      norms: (L,), ‖u_l‖ of every layer.
      cosines: (L-1,), of every pair of neighbors, in depth order.
      roughness: scalar, Σ_l ‖u_{l+1} - u_l‖².
      relative_roughness: scalar, roughness / Σ_l ‖u_l‖².

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = {"blocks": {"w": jnp.array([[3.0, 4.0], [0.0, 5.0]])}}
      >>> statistics = gs.diagnostics.depth_statistics(updates, gs.scanned("blocks/"))
      >>> statistics["blocks"].roles["w"].cosines.tolist()
      [0.800000011920929]
    """

    norms: jax.Array
    cosines: jax.Array
    roughness: jax.Array
    relative_roughness: jax.Array


class DepthStatistics(NamedTuple):
    """How the updates of one stack vary along depth: see `depth_statistics`.

    Attributes:
      norms: (L,), ‖u_l‖ of every layer.
      cosines: (L-1,), of every pair of neighbors, in depth order.
      roughness: scalar, Σ_l ‖u_{l+1} - u_l‖².
      relative_roughness: scalar, roughness / Σ_l ‖u_l‖².
      roles: {role: the same of this role alone}.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = {"blocks": {"b": jnp.full(2, 3.0), "w": jnp.full(2, 4.0)}}
      >>> statistics = gs.diagnostics.depth_statistics(updates, gs.scanned("blocks/"))
      >>> statistics["blocks"].norms.tolist(), sorted(statistics["blocks"].roles)
      ([5.0, 5.0], ['b', 'w'])
    """

    norms: jax.Array
    cosines: jax.Array
    roughness: jax.Array
    relative_roughness: jax.Array
    roles: dict[str, RoleStatistics]


def depth_statistics(
    updates: Any, depth: DepthLike, *, strict: bool = True
) -> dict[str, DepthStatistics]:
    """Norms, cosines and roughness of the updates along depth.

    For every stack of L layers, with u_l the update of the block of layer l (all its
    parameters that `depth` matches, as one vector), and for every role alone:

        norms               ‖u_l‖                                (L,)
        cosines             Re⟨u_l, u_{l+1}⟩ / ‖u_l‖ ‖u_{l+1}‖   (L-1,)
        roughness           Σ_l ‖u_{l+1} - u_l‖²                 scalar
        relative_roughness  roughness / Σ_l ‖u_l‖²               scalar

    A cosine with an update of norm 0 is 0, and so is the relative roughness where all
    are 0. Smoothing by `window`, `gaussian` or `tikhonov` (variant "standard") never
    increases the roughness. The relative one is never increased by `tikhonov` and by
    `window(alpha)` with radius 1 and α ≤ 1/2; by others it can be.

    A parameter of a layer that has no neighbor with it is in no block, and a layer, a
    role or a stack without any neighbors has no entry. Cosines and differences of two
    layers are over the roles in which they are neighbors; a gap that `strict=False`
    permits is no pair, so that `cosines` is shorter by one for each.

    Takes gradients or parameters as well, and works under `jax.vmap`, in `jax.lax.scan`
    and under `jax.jit`, where it needs memory for at most one copy of the updates in
    the dtype of the arithmetic: float32 (float64 for float64 leaves). Sums of squares
    hold for updates of about 1e-16 to 1e18. Inside `jax.shard_map` it is of what one
    device holds.

    Args:
      updates: tree of updates.
      depth: where depth is, as in `smooth_over_depth`.
      strict: as in `smooth_over_depth`. False also permits that nothing matches.

    Returns:
      {stack: DepthStatistics}, all of arrays. A stack or role whose name is not a
      string is under its `repr`.

    Raises:
      TypeError: for an argument of the wrong kind.
      ValueError: for a grouping that does not fit the tree, as `smooth_over_depth`; and
        for two names of stacks, or of roles of a stack, that read alike.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> updates = {"blocks": {"w": jnp.array([[3.0, 4.0], [3.0, 4.0], [-4.0, 3.0]])}}
      >>> statistics = gs.diagnostics.depth_statistics(updates, gs.scanned("blocks/"))
      >>> statistics["blocks"].norms.tolist(), statistics["blocks"].cosines.tolist()
      ([5.0, 5.0, 5.0], [1.0, 0.0])
      >>> float(statistics["blocks"].roughness)  # (0, 0) and then (-7, -1)
      50.0

    References:
      arXiv 2606.30813, section 4, for the depth-differences.
    """
    spec = as_spec(depth)
    check_flag("strict", strict)
    grouping = coupled_groups(spec, updates, strict)
    return statistics_of(grouping.coupled, grouping.leaves)


def statistics_of(
    groups: Sequence[Group], leaves: Sequence[Any] | Mapping[int, Any]
) -> dict[str, DepthStatistics]:
    """The statistics of groups with neighbors, whose members are among the leaves."""
    sums: dict[Hashable, dict[Hashable, list[_Sums]]] = {}
    for group in groups:
        role_sums = sums.setdefault(group.stack, defaultdict(list))
        role_sums[group.role].append(_sums_of(group, leaves))
    stacks = texts_of("stacks", sums)
    return {
        stacks[stack]: _stack_statistics(stack, role_sums)
        for stack, role_sums in sums.items()
    }


class _Sums(NamedTuple):
    """Sums over the parameters of layers and of pairs of neighbors.

    Attributes:
      layers: their numbers, ascending.
      squares: ‖u_l‖², one for each layer.
      pairs: (layer, next layer), ascending.
      pair_sums: (4, number of pairs): Re⟨u_l, u_k⟩, ‖u_k - u_l‖², ‖u_l‖² and ‖u_k‖².
    """

    layers: Sequence[int]
    squares: jax.Array
    pairs: Sequence[tuple[int, int]]
    pair_sums: jax.Array


def _stack_statistics(
    stack: Hashable, role_sums: dict[Hashable, list[_Sums]]
) -> DepthStatistics:
    totals = {role: _total(sums) for role, sums in role_sums.items()}
    roles = texts_of(f"roles of stack {stack!r}", totals)
    block = _statistics(_total(list(totals.values())))
    return DepthStatistics(
        *block, roles={roles[role]: _statistics(s) for role, s in totals.items()}
    )


def _statistics(sums: _Sums) -> RoleStatistics:
    dots, differences, squares, next_squares = sums.pair_sums
    roughness, total = jnp.sum(differences), jnp.sum(sums.squares)
    return RoleStatistics(
        norms=jnp.sqrt(sums.squares),
        cosines=cosine(dots, squares, next_squares),
        roughness=roughness,
        relative_roughness=roughness / jnp.where(total == 0, 1.0, total),
    )


def _sums_of(group: Group, leaves: Sequence[Any] | Mapping[int, Any]) -> _Sums:
    """The sums of one group, over its layers that have a neighbor."""
    layers = layers_of([group], leaves)
    after = layers.shifted(1)
    # From differences, not from norms and dots: those cancel where layers agree. Where
    # there is no next layer they are left out.
    steps = after - layers
    squares, dots, differences = (
        _in_depth_order(group, x.inner(y, "param"))
        for x, y in ((layers, layers), (layers, after), (steps, steps))
    )
    in_run = np.flatnonzero(group.run_lengths > 1)
    first = np.flatnonzero(np.diff(group.run_starts) == 0)  # of a pair
    numbers = np.array(group.layers)
    pairs = zip(numbers[first].tolist(), numbers[first + 1].tolist(), strict=True)
    # Gathered and not sliced: XLA:CPU computes a sum anew for each slice of it.
    pair_sums = [dots[first], differences[first], squares[first], squares[first + 1]]
    return _Sums(
        numbers[in_run].tolist(), squares[in_run], list(pairs), jnp.stack(pair_sums)
    )


def _in_depth_order(group: Group, numbers: LayerValues) -> jax.Array:
    """A number for every layer, as one vector."""
    (member_numbers,) = numbers._arrays
    vector = jnp.concatenate([replicated(x).reshape(-1) for x in member_numbers])
    ranks = np.concatenate([member_ranks.ravel() for member_ranks in group.ranks])
    return vector[np.argsort(ranks)]


def _total(parts: Sequence[_Sums]) -> _Sums:
    """Added up by layer and by pair, in the widest dtype."""
    dtype = max((sums.squares.dtype for sums in parts), key=num_bits)
    layers = sorted(set(itertools.chain.from_iterable(s.layers for s in parts)))
    pairs = sorted(set(itertools.chain.from_iterable(s.pairs for s in parts)))
    squares = jnp.zeros(len(layers), dtype)
    pair_sums = jnp.zeros((4, len(pairs)), dtype)
    for sums in parts:
        squares = squares + _placed(sums.squares.astype(dtype), sums.layers, layers)
        added = _placed(sums.pair_sums.astype(dtype), sums.pairs, pairs)
        pair_sums = pair_sums + added
    return _Sums(layers, squares, pairs, pair_sums)


def _placed(x: jax.Array, names: Sequence[Any], among: Sequence[Any]) -> jax.Array:
    """`x`, whose last axis is over `names`, with zeros for the others of `among`."""
    if names == among:
        return x
    place = {name: i for i, name in enumerate(among)}
    index = np.array([place[name] for name in names])
    return jnp.zeros((*x.shape[:-1], len(among)), x.dtype).at[..., index].set(x)


def texts_of(kind: str, names: Iterable[Hashable]) -> dict[Hashable, str]:
    """Names as strings: keys that jax can sort."""
    texts = {name: text_of(name) for name in names}
    meant: dict[str, Hashable] = {}
    for name, text in texts.items():
        if text in meant:
            raise ValueError(
                f"`depth` has two {kind} that read {text!r}: {meant[text]!r} and "
                f"{name!r}. Give one of them another name."
            )
        meant[text] = name
    return texts
