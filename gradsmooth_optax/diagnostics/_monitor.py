"""`monitor_depth`: statistics along depth, kept in the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradsmooth_optax._checks import check_flag, positive_int, transformation
from gradsmooth_optax._depth.checked_groups import coupled_groups
from gradsmooth_optax._depth.groups import Group
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax._transforms.states import with_checked_state
from gradsmooth_optax.diagnostics._statistics import DepthStatistics, statistics_of

_LAST_COUNT = 2**31 - 1  # counts are int32


class DepthRecord(NamedTuple):
    """What `monitor_depth` recorded last.

    Attributes:
      step: scalar int32, the number of updates before the recorded one; -1 while
        nothing is recorded, and all statistics are 0.
      before: {stack: DepthStatistics} of what went into the inner transformation.
      after: the same of what came out.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> depth = gs.scanned("blocks/")
      >>> tx = gs.diagnostics.monitor_depth(gs.smooth_over_depth(depth, 0.5), depth)
      >>> updates = {"blocks": {"w": jnp.array([[2.0], [0.0]])}}
      >>> record = gs.diagnostics.monitored(tx.update(updates, tx.init(updates))[1])
      >>> int(record.step), record.after["blocks"].norms.tolist()
      (0, [1.5, 0.5])
    """

    step: jax.Array
    before: dict[str, DepthStatistics]
    after: dict[str, DepthStatistics]


class MonitorDepthState(NamedTuple):
    """State of `monitor_depth`.

    Attributes:
      count: scalar int32, the number of updates so far.
      record: the last `DepthRecord`.
      inner_state: state of the wrapped transformation.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> depth = gs.scanned("blocks/")
      >>> tx = gs.diagnostics.monitor_depth(optax.scale_by_adam(), depth)
      >>> state = tx.init({"blocks": {"w": jnp.ones((3, 2))}})
      >>> int(state.count), type(state.inner_state).__name__
      (0, 'ScaleByAdamState')
    """

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride] # optax's name for it
    record: DepthRecord
    inner_state: optax.OptState


def monitor_depth(
    inner: optax.GradientTransformation,
    depth: DepthLike,
    *,
    every: int = 1,
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Records `depth_statistics` before and after `inner`, and changes nothing.

    In updates 0, `every`, 2 · `every`, … the statistics of the updates that go into
    `inner` and of those that come out are written into the state; the others keep the
    last record. Read it by `monitored(opt_state)`, outside of jit or inside: as output
    of a step under `jax.lax.scan` it becomes a history. No callback, and nothing is
    sent to the host.

    Put it around the smoothing, in the smoothing's place:
    `chain(scale_by_adam(), monitor_depth(smooth_over_depth(depth, 0.2), depth),
    scale_by_learning_rate(lr))`. (Around all of `gs.adamw(...)` it would compare
    gradients with final steps.) Around `optax.identity()` it records one place of any
    chain. Updates and inner state are those of `inner`; the state grows by a few
    numbers per layer and role.

    With `every` over 1 a step without a record costs little: what goes into `inner` has
    to be in memory. One with a record runs `inner` twice. On CPU it needs memory for
    about three more copies of the updates. Under `jax.vmap` every step
    computes the record. Under `jit` statistics are of whole layers, however the updates
    are sharded; it is not for `jax.shard_map` and `jax.pmap`, where it would see what
    one device holds.

    Args:
      inner: the transformation to look at, such as `smooth_over_depth(...)`.
      depth: where depth is, as in `smooth_over_depth`.
      every: number of updates from one record to the next, an int ≥ 1.
      strict: as in `smooth_over_depth`. False also permits that nothing matches.

    Returns:
      A transformation with a `MonitorDepthState`.

    Raises:
      TypeError: at construction, for an argument of the wrong kind; at trace of
        `update`, for a state that other settings have made.
      ValueError: at construction for `every` out of range; at `init` and at trace of
        `update` for a grouping that does not fit the tree, as `smooth_over_depth`; at
        trace of `update` for a state of other stacks, and for an `inner` that returns
        other stacks, roles or layers than it was given.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> depth = gs.scanned("blocks/")
      >>> smooth = gs.smooth_over_depth(depth, 0.5)
      >>> tx = optax.chain(gs.diagnostics.monitor_depth(smooth, depth), optax.scale(-1))
      >>> updates = {"blocks": {"w": jnp.array([[4.0], [0.0], [0.0]])}}
      >>> _, state = tx.update(updates, tx.init(updates))
      >>> record = gs.diagnostics.monitored(state)
      >>> before, after = record.before["blocks"], record.after["blocks"]
      >>> float(before.roughness), after.norms.tolist()
      (16.0, [3.0, 1.0, 0.0])
    """
    inner = transformation(
        "inner", inner, "monitor_depth(optax.scale_by_adam(), depth)"
    )
    spec = as_spec(depth)
    every = positive_int("every", every)
    if every > _LAST_COUNT:
        raise ValueError(f"`every` must be at most {_LAST_COUNT}, but is {every}.")
    check_flag("strict", strict)

    def coupled_in(updates: Any) -> _Coupled:
        grouping = coupled_groups(spec, updates, strict)
        groups = grouping.coupled
        places = {member.leaf for group in groups for member in group.members}
        # Not the whole tree: a leaf that is no array would stop `jax.eval_shape`.
        arrays = {place: grouping.leaves[place] for place in sorted(places)}
        return _Coupled(groups, arrays, not grouping.paths)

    def init_fn(params):
        coupled = coupled_in(params)
        # `optax.tree_map_params` compares the state with that of a leafless
        # placeholder, in which one leaf may stand for all statistics.
        shapes: Any = jax.ShapeDtypeStruct((), jnp.float32)
        if not coupled.is_leafless:
            shapes = jax.eval_shape(
                lambda arrays: statistics_of(coupled.groups, arrays), coupled.arrays
            )

        def zeros() -> Any:  # buffers of its own: a state may be donated
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        record = DepthRecord(jnp.full((), -1, jnp.int32), zeros(), zeros())
        return MonitorDepthState(jnp.zeros((), jnp.int32), record, inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        def passed():
            return inner.update(updates, state.inner_state, params, **extra_args)

        after, inner_state = passed()
        count = optax.safe_increment(state.count)
        going_in = coupled_in(updates)
        if going_in.is_leafless and not isinstance(state.record.before, dict):
            return after, MonitorDepthState(count, state.record, inner_state)

        def record(after: Any) -> DepthRecord:
            before, after_inner = (
                statistics_of(coupled.groups, coupled.arrays)
                for coupled in (going_in, coupled_in(after))
            )
            _check_recorded(before, state.record.before)
            _check_kept(after_inner, before)
            new = DepthRecord(state.count, before, after_inner)
            return jax.tree.map(lambda x, old: x.astype(old.dtype), new, state.record)

        if every == 1:
            new = record(after)
        else:
            # `inner` runs again in here: what the branch takes from outside has to be
            # in memory at every step, and `after` need not be.
            new = jax.lax.cond(
                state.count % every == 0,
                lambda: record(passed()[0]),
                lambda: state.record,
            )
        return after, MonitorDepthState(count, new, inner_state)

    return with_checked_state("monitor_depth", init_fn, update_fn)


class _Coupled(NamedTuple):
    """What of a tree is coupled along depth.

    Attributes:
      groups: with neighbors.
      arrays: {position of leaf: leaf}, those of the groups.
      is_leafless: whether the tree has no leaves at all.
    """

    groups: Sequence[Group]
    arrays: dict[int, Any]
    is_leafless: bool


def monitored(state: Any) -> DepthRecord:
    """The record of the one `monitor_depth` in a state, however deep it is nested.

    Its arrays are those of the state: where the next step donates the state, copy them
    by `jax.device_get`, or return `monitored(state)` from the jitted step.

    Args:
      state: of an optimizer, or any tree that holds one, such as a train state; also
        one that was stacked by `jax.lax.scan` or `jax.vmap`. Of a `flax.nnx.Optimizer`
        its `opt_state`.

    Returns:
      Its `DepthRecord`.

    Raises:
      ValueError: if there is none, or several: pass the part that holds one.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> import optax
      >>> depth = gs.scanned("blocks/")
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(),
      ...     gs.diagnostics.monitor_depth(optax.identity(), depth, every=100),
      ... )
      >>> state = tx.init({"blocks": {"w": jnp.ones((3, 2))}})
      >>> int(gs.diagnostics.monitored(state).step)  # nothing yet
      -1
    """
    found = _monitors(state)
    if len(found) == 1:
        # `flax.nnx.Optimizer` wraps every array in a reference, whose value the next
        # step changes: each is taken out, as a tree of one leaf.
        return jax.tree.map(
            lambda number: jax.tree.leaves(number)[0],
            found[0][1].record,
            is_leaf=lambda part: not isinstance(part, dict | tuple),
        )
    if not found:
        raise ValueError(
            f"`state`, a {type(state).__name__}, holds no MonitorDepthState: no part "
            f"of the optimizer is a `monitor_depth`. Put one around the smoothing: "
            f"`monitor_depth(smooth_over_depth(depth, alpha), depth)`. Of a "
            f"`flax.nnx.Optimizer` pass `optimizer.opt_state`."
        )
    places = ", ".join(f"`monitored(state{path})`" for path, _ in found)
    raise ValueError(
        f"`state` holds {len(found)} monitors. Pass the part with the one that you "
        f"mean: {places}."
    )


def _monitors(state: Any, prefix: str = "") -> list[tuple[str, MonitorDepthState]]:
    """(where, state) of all monitors, also of those inside of others."""
    found = []
    for path, part in jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, MonitorDepthState)
    ):
        if isinstance(part, MonitorDepthState):
            at = prefix + jax.tree_util.keystr(path)
            found.append((at, part))
            found += _monitors(part.inner_state, f"{at}.inner_state")
    return found


def _check_recorded(found: Any, recorded: Any) -> None:
    """Raises if a record has other stacks, roles or layers than the updates."""
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, recorded):
        raise ValueError(
            f"the state records {_layers(recorded)}, but the updates have "
            f"{_layers(found)}. It was probably made for other parameters or another "
            f"`depth`: make it anew by `init(params)`. Or `update` runs inside "
            f"`jax.shard_map` or `jax.pmap`, where `monitor_depth` would see the "
            f"layers of one device: take it out of the chain there."
        )


def _check_kept(after: Any, before: Any) -> None:
    """Raises if other stacks, roles or layers come out of `inner` than went in."""
    if jax.tree.map(jnp.shape, after) != jax.tree.map(jnp.shape, before):
        raise ValueError(
            f"`inner` of `monitor_depth` was given {_layers(before)}, but returned "
            f"{_layers(after)}. It probably drops leaves or changes dtypes. Put "
            f"`monitor_depth` around the smoothing alone: "
            f"`monitor_depth(smooth_over_depth(depth, alpha), depth)`."
        )


def _layers(statistics: Any) -> str:
    if not isinstance(statistics, dict) or not statistics:
        return "no stack"
    return ", ".join(
        f"{stack!r} ({_size(of)}: "
        f"{'; '.join(f'{role}, {_size(one)}' for role, one in of.roles.items())})"
        for stack, of in statistics.items()
    )


def _size(of: Any) -> str:
    layers, pairs = jnp.shape(of.norms)[0], jnp.shape(of.cosines)[0]
    return f"{layers} layers, {pairs} pairs of neighbors"
