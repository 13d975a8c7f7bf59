"""Specs: the user's depth-grouping as a value, which gives each leaf its `Depth`."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import numpy as np

from gradsmooth_optax._depth import Depth, as_tuple, integer, integers
from gradsmooth_optax._naming import reduce_by_name
from gradsmooth_optax._paths import (
    FIRST_NUMBERED_SEGMENT,
    Path,
    compile_pattern,
    layer_group,
    plain_path,
    raw,
    search,
    show_path,
)

DepthFunction: TypeAlias = Callable[[Path, Any], Depth | None]


class Assignment(NamedTuple):
    """What a spec says of one leaf.

    Attributes:
      depth: the layers that it holds.
      ranked: whether the gaps of its group are closed.
      scan: the `scanned` that placed it, whose leaves hold equally many layers.
    """

    depth: Depth
    ranked: bool = False
    scan: DepthSpec | None = None


Assignments: TypeAlias = list[Assignment | None]
Leaves: TypeAlias = Sequence[tuple[Path, Any]]


class DepthSpec:
    """A depth-grouping as a value: frozen, hashable, picklable, not callable.

    Made by `unrolled`, `scanned`, `first_match`, `ranked`, `from_tree`, `depth_fn`.
    It is deliberately not callable: `optax.inject_hyperparams` takes any callable
    argument for a schedule.

    Example:
      >>> import gradsmooth_optax as gs
      >>> depth = gs.unrolled().only_projections()
      >>> isinstance(depth, gs.DepthSpec), depth == gs.unrolled(), callable(depth)
      (True, False, False)
    """

    def assign(self, leaves: Leaves) -> Assignments:
        """One `Assignment` or None for each `(path, leaf)` of a whole tree."""
        raise NotImplementedError

    def unrestricted(self) -> DepthSpec:
        """The spec without what `only` and `only_projections` leave out."""
        return self

    def parts(self, leaves: Leaves) -> tuple[DepthSpec, ...]:
        """The specs that this one is composed of, for a tree with these leaves."""
        return ()

    def locate(self, leaves: Leaves) -> Assignments:
        """Like `assign`, and also where depth is in leaves that are left out.

        A restriction says what is coupled, not how the parameters are laid out.
        """
        assignments = self.assign(leaves)
        if (unrestricted := self.unrestricted()) == self:
            return assignments
        everywhere = unrestricted.assign(leaves)
        return [a or b for a, b in zip(assignments, everywhere, strict=True)]

    def only(self, predicate: Callable[[Path, Any], bool]) -> DepthSpec:
        """Restricts the spec to leaves for which `predicate(path, leaf)` holds.

        Args:
          predicate: gets the path as a tuple of plain segments and the leaf (or its
            `jax.ShapeDtypeStruct`). The other leaves are left untouched.

        Example:
          >>> import gradsmooth_optax as gs
          >>> attention = gs.unrolled().only(lambda path, leaf: "attn" in path)
        """
        if not callable(predicate):
            raise TypeError(
                f"`predicate` of `only` must be a function (path, leaf) -> bool, but "
                f"is {predicate!r}. Write `spec.only(lambda path, leaf: 'attn' in "
                f"path)`."
            )
        return _Only(self, predicate)

    def only_projections(self, bias: bool = True) -> DepthSpec:
        """Restricts the spec to the linear projections, the paper's "proj" scope.

        A leaf is in scope if its module (its path without the last segment) holds a
        leaf of the spec that is named as a kernel or weight, has rank 2 or more per
        layer, and is no embedding or position table.

        Args:
          bias: whether the other leaves of such a module (its bias) are in scope too,
            as in the authors' code. False keeps the matrices only.

        Example:
          >>> import gradsmooth_optax as gs
          >>> import jax.numpy as jnp
          >>> params = {
          ...     f"layers_{i}": {
          ...         "mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
          ...         "norm": {"scale": jnp.ones(2)},
          ...     }
          ...     for i in range(3)
          ... }
          >>> summary = gs.describe(gs.unrolled().only_projections(), params)
          >>> [group.role for group in summary.groups]
          ['mlp/bias', 'mlp/kernel']
        """
        return _OnlyProjections(self, bool(bias))


def unrolled(
    pattern: str | None = None, *, start: int = 0, stack: Hashable | None = None
) -> DepthSpec:
    r"""One leaf per layer, with the layer number in its path.

    Args:
      pattern: regular expression that is searched in the "/"-joined path. The layer
        number is the group `(?P<layer>..)`, else the first unnamed group; a group
        that took no part counts as 0. The default takes the first path segment that
        is an integer or ends in one. Groups `(?P<stack>..)` and `(?P<role>..)`
        override the names: by default `stack` is the path up to the number and
        `role` the path after the match.
      start: added to every layer number.
      stack: name of the stack, instead of the one taken from the path.

    Returns:
      A spec for the argument `depth`.

    Raises:
      TypeError, ValueError: at construction, for a pattern that is not a string, not
        a valid regular expression, or has no group for the layer number; at `init`
        and at trace of `update`, for a layer "number" that is not a number.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {f"layers_{i}": {"kernel": jnp.ones((2, 2))} for i in range(12)}
      >>> print(gs.describe(gs.unrolled(r"layers_(\d+)/"), params).groups[0].layers)
      (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    """
    if pattern is not None and layer_group(compile_pattern(pattern)) is None:
        raise ValueError(
            f"`pattern` of `unrolled` must say where the layer number is, but "
            f"{raw(pattern)} has no group for it. Put the number in parentheses, as in "
            f"`unrolled(r'layers_(\\d+)/')`; for layers stacked along an array axis "
            f"write `scanned({raw(pattern)}, axis=0)`."
        )
    return _Unrolled(pattern, integer("start", start), _name("stack", stack))


def scanned(
    pattern: str,
    *,
    axis: int | tuple[int, ...] = 0,
    start: int = 0,
    stride: int | tuple[int, ...] | None = None,
    stack: Hashable | None = None,
) -> DepthSpec:
    r"""Layers stacked along array axes, as `nn.scan` and `jax.lax.scan` lay them out.

    Args:
      pattern: regular expression that is searched in the "/"-joined path. A number
        group (`(?P<layer>..)`, else the first unnamed group) is the position inside
        a cycle of layers and is added to `start`. `stack` is the path up to that
        number, or up to the end of the match if there is none; `role` is the path
        after the match; `(?P<stack>..)` and `(?P<role>..)` override.
      axis: the array axis, or axes, over depth.
      start: layer number of the first layer.
      stride: depth step along each axis; default contiguous, row-major over `axis`.
      stack: name of the stack, instead of the one taken from the path. Give parts of
        one chain the same name to join them.

    Returns:
      A spec for the argument `depth`.

    Raises:
      TypeError, ValueError: as for `unrolled`; and at `init` and at trace of
        `update` for a leaf that lacks the axis.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> cycles = {f"layers_{i}": {"kernel": jnp.ones((2, 4, 2))} for i in range(6)}
      >>> spec = gs.scanned(r"layers_(\d+)/", axis=1, stride=6)
      >>> gs.describe(spec, cycles).groups[0].num_layers
      24
    """
    compile_pattern(pattern)
    axis = integers("axis", axis)
    stride = None if stride is None else integers("stride", stride)
    Depth("", "", axis=axis, stride=stride)  # their agreement is Depth's to check
    start = integer("start", start)
    return _Scanned(pattern, axis, start, stride, _name("stack", stack))


def first_match(*members: DepthSpec | DepthFunction) -> DepthSpec:
    r"""Tries several specs on each leaf; the first that is not None wins.

    Args:
      *members: specs, or functions `(path, leaf) -> Depth | None`.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gemma3 = gs.first_match(
      ...     gs.scanned(r"layers/layers_(\d+)/", axis=1, stride=6, stack="decoder"),
      ...     gs.unrolled(r"layers_remainder/layers_(\d+)/", start=60, stack="decoder"),
      ... )
    """
    if not members:
        raise ValueError(
            "`first_match` needs at least one member: `first_match(scanned('blocks/'), "
            "unrolled(r'layers_(\\d+)/'))`."
        )
    return _FirstMatch(tuple(as_spec(member, "member") for member in members))


def ranked(member: DepthSpec | DepthFunction) -> DepthSpec:
    """Couples the layers of each group in their order, as if numbered 0, 1, 2, ….

    Closes gaps on purpose, for interleaved stacks such as `nnx.Sequential` or layers
    whose shapes alternate. Only adjacency changes: block norms and statistics keep
    the true layer numbers.

    Args:
      member: a spec, or a function `(path, leaf) -> Depth | None`.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> every_second = [jnp.ones(2), None, jnp.ones(2), None, jnp.ones(2)]
      >>> gs.describe(gs.ranked(gs.unrolled()), every_second).groups[0].runs
      ((0, 2, 4),)
    """
    return _Ranked(as_spec(member, "member"))


def from_tree(tree: Any) -> DepthSpec:
    """Takes each leaf's `Depth` from a tree of the same structure as the parameters.

    Args:
      tree: a pytree with a `Depth`, or None for "leave untouched", at each leaf.

    Returns:
      A spec: see `DepthSpec`.

    Raises:
      TypeError: at construction, for a leaf that is neither a `Depth` nor None.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.ones(3), "first": jnp.ones(2), "second": jnp.ones(2)}
      >>> spec = gs.from_tree({
      ...     "embed": None,
      ...     "first": gs.Depth("mlp", "w", 0),
      ...     "second": gs.Depth("mlp", "w", 1),
      ... })
      >>> gs.describe(spec, params).groups[0].num_layers
      2
    """
    entries: dict[Path, Depth] = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for key_path, depth in flat:
        path = plain_path(key_path)
        _check_depth(depth, path, "the tree given to `from_tree`")
        if path in entries:
            raise ValueError(
                f"`tree` of `from_tree` has two leaves at {show_path(path)!r}, which "
                f"cannot be told apart: their container names its children by number "
                f"only. Register it by `jax.tree_util.register_pytree_with_keys`."
            )
        entries[path] = depth
    return _FromTree(tuple(entries.items()))


def depth_fn(function: DepthFunction) -> DepthSpec:
    """Makes a spec of a function `(path, leaf) -> Depth | None`; also a decorator.

    A plain function may be passed as `depth` directly. Wrap it where a callable
    would be misread, as in `optax.inject_hyperparams`, or to call `.only(...)`.

    Args:
      function: called once per leaf at trace time. `path` is a tuple of plain
        segments (`str` or `int`), `leaf` an array, tracer or `ShapeDtypeStruct`.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> @gs.depth_fn
      ... def blocks(path, leaf):
      ...     if path[0] == "blocks":
      ...         return gs.Depth("blocks", path[2:], layer=int(path[1]))
    """
    if isinstance(function, DepthSpec) or not callable(function):
        raise TypeError(
            f"`depth_fn` wraps a function (path, leaf) -> Depth | None, but got "
            f"{function!r}. A spec can be passed as `depth` as it is."
        )
    return _DepthFn(function)


def as_spec(depth: Any, argument: str = "depth") -> DepthSpec:
    """The spec that `depth`, a spec or a plain function, stands for."""
    if isinstance(depth, DepthSpec):
        return depth
    if callable(depth) and not isinstance(depth, type):
        return _DepthFn(cast(DepthFunction, depth))
    hint = "`unrolled(r'layers_(\\d+)/')` or `scanned('blocks/', axis=0)`"
    if isinstance(depth, str):
        hint = f"`scanned({raw(depth)}, axis=0)`"
        if "(" in depth:
            hint = f"`unrolled({raw(depth)})` or {hint}"
    elif isinstance(depth, Depth):
        hint = "`lambda path, leaf: Depth(...)`, since each leaf needs its own"
    elif hasattr(depth, "spec") and hasattr(depth, "uncertain"):
        hint = "`detect(params).spec`, which is the spec that it proposes"
    elif isinstance(depth, dict | list | tuple):
        hint = f"`from_tree(...)` for a tree of Depth, else {hint}"
    raise TypeError(
        f"`{argument}` must be a depth spec or a function (path, leaf) -> Depth | "
        f"None, but is {reprlib.repr(depth)} of type {type(depth).__name__}. To fix, "
        f"write {hint}."
    )


# -- The specs -------------------------------------------------------------------------


class _ShowsItsCall(DepthSpec):
    """`repr` is the call that makes the spec."""

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType] # every subclass is a dataclass
            value = getattr(self, field.name)
            if value == field.default:
                continue
            positional = field.name in ("pattern", "member")
            text = raw(value) if field.name == "pattern" else repr(value)
            shown.append(text if positional else f"{field.name}={text}")
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__.lstrip("_"))
        return f"{name.lower()}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Unrolled(_ShowsItsCall):
    pattern: str | None = None
    start: int = 0
    stack: Hashable | None = None

    def assign(self, leaves: Leaves) -> Assignments:
        return [self._assign_one(path) for path, _ in leaves]

    def _assign_one(self, path: Path) -> Assignment | None:
        found = search(self.pattern or FIRST_NUMBERED_SEGMENT, path, self.stack)
        if found is None:
            return None
        stack, role, number = found
        return Assignment(Depth(stack, role, self.start + number))


@dataclasses.dataclass(frozen=True, repr=False)
class _Scanned(_ShowsItsCall):
    pattern: str
    axis: int | tuple[int, ...] = 0
    start: int = 0
    stride: int | tuple[int, ...] | None = None
    stack: Hashable | None = None

    def assign(self, leaves: Leaves) -> Assignments:
        return [self._assign_one(path) for path, _ in leaves]

    def _assign_one(self, path: Path) -> Assignment | None:
        found = search(self.pattern, path, self.stack)
        if found is None:
            return None
        stack, role, number = found
        layer = self.start + number
        depth = Depth(stack, role, layer, self.axis, self.stride)
        return Assignment(depth, scan=self)


@dataclasses.dataclass(frozen=True)
class _FirstMatch(DepthSpec):
    members: tuple[DepthSpec, ...]

    def assign(self, leaves: Leaves) -> Assignments:
        assignments: Assignments = [None] * len(leaves)
        for member in self.members:
            left = [i for i, a in enumerate(assignments) if a is None]
            found = member.assign([leaves[i] for i in left])
            for i, assignment in zip(left, found, strict=True):
                assignments[i] = assignment
        return assignments

    def parts(self, leaves: Leaves) -> tuple[DepthSpec, ...]:
        return self.members

    def unrestricted(self) -> DepthSpec:
        return _FirstMatch(tuple(member.unrestricted() for member in self.members))

    def __repr__(self) -> str:
        return f"first_match({', '.join(map(repr, self.members))})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Ranked(_ShowsItsCall):
    member: DepthSpec

    def assign(self, leaves: Leaves) -> Assignments:
        assignments = self.member.assign(leaves)
        return [a and a._replace(ranked=True) for a in assignments]

    def parts(self, leaves: Leaves) -> tuple[DepthSpec, ...]:
        return (self.member,)

    def unrestricted(self) -> DepthSpec:
        return _Ranked(self.member.unrestricted())


@dataclasses.dataclass(frozen=True)
class _FromTree(DepthSpec):
    entries: tuple[tuple[Path, Depth], ...]

    def assign(self, leaves: Leaves) -> Assignments:
        depths = dict(self.entries)
        found = (depths.get(path) for path, _ in leaves)
        return [None if depth is None else Assignment(depth) for depth in found]

    def parts(self, leaves: Leaves) -> tuple[DepthSpec, ...]:
        paths = {path for path, _ in leaves}
        lost = tuple((path, d) for path, d in self.entries if path not in paths)
        return (_FromTree(lost),) if lost else ()

    def __repr__(self) -> str:
        paths = [show_path(path) for path, _ in self.entries]
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        return f"from_tree(<Depth for {', '.join(paths[:3])}{more}>)"


@dataclasses.dataclass(frozen=True)
class _DepthFn(DepthSpec):
    function: DepthFunction

    def assign(self, leaves: Leaves) -> Assignments:
        return [self._assign_one(path, leaf) for path, leaf in leaves]

    def _assign_one(self, path: Path, leaf: Any) -> Assignment | None:
        try:
            depth = self.function(path, leaf)
        except Exception as error:
            error.add_note(
                f"Raised by the `depth` function at leaf {show_path(path)}."
                if path
                else "Raised by the `depth` function for a tree that is one lone "
                "array, probably hidden by `optax.flatten`: smooth outside of it."
            )
            raise
        if depth is None:
            return None
        _check_depth(depth, path, f"the `depth` function {_function_name(self)}")
        return Assignment(depth)

    def __reduce__(self):
        return reduce_by_name(self, self.function)

    def __repr__(self) -> str:
        return f"depth_fn({_function_name(self)})"


@dataclasses.dataclass(frozen=True)
class _Only(DepthSpec):
    member: DepthSpec
    predicate: Callable[[Path, Any], bool]

    def assign(self, leaves: Leaves) -> Assignments:
        assignments = self.member.assign(leaves)
        return [
            a if a is not None and self.predicate(path, leaf) else None
            for a, (path, leaf) in zip(assignments, leaves, strict=True)
        ]

    def parts(self, leaves: Leaves) -> tuple[DepthSpec, ...]:
        return (self.member,)

    def unrestricted(self) -> DepthSpec:
        return self.member.unrestricted()

    def __repr__(self) -> str:
        return f"{self.member!r}.only({self.predicate!r})"


@dataclasses.dataclass(frozen=True)
class _OnlyProjections(DepthSpec):
    member: DepthSpec
    bias: bool = True

    def assign(self, leaves: Leaves) -> Assignments:
        assignments = self.member.assign(leaves)
        is_weight = [
            a is not None and _is_linear_weight(path, layer_rank(a.depth, leaf))
            for a, (path, leaf) in zip(assignments, leaves, strict=True)
        ]
        if self.bias:
            paths = [path for path, _ in leaves]
            modules = {p[:-1] for p, yes in zip(paths, is_weight, strict=True) if yes}
            is_weight = [path[:-1] in modules for path in paths]
        return [
            a if yes else None for a, yes in zip(assignments, is_weight, strict=True)
        ]

    def parts(self, leaves: Leaves) -> tuple[DepthSpec, ...]:
        return (self.member,)

    def unrestricted(self) -> DepthSpec:
        return self.member.unrestricted()

    def __repr__(self) -> str:
        return f"{self.member!r}.only_projections({'' if self.bias else 'bias=False'})"


def layer_rank(depth: Depth | None, leaf: Any) -> int:
    """Rank of one layer of a leaf: its rank without the depth axes."""
    return np.ndim(leaf) - len(as_tuple(depth.axis if depth else None))


_WEIGHT_NAME = re.compile(
    r"(?:^|_)(?:kernels?|weights?|w[a-z]{0,3}|lora_[ab]|einsum|linear)(?:_?\d+)?$",
    re.IGNORECASE,
)
_TABLE_NAME = re.compile(r"embed|position|^pos(?:_|$)|^w[tp]e$", re.IGNORECASE)


def _is_linear_weight(path: Path, rank: int) -> bool:
    if rank < 2 or not path or not _WEIGHT_NAME.search(str(path[-1])):
        return False
    return not any(_TABLE_NAME.search(str(segment)) for segment in path[-2:])


# -- Small checks ----------------------------------------------------------------------


def _name(argument: str, value: Hashable | None) -> Hashable | None:
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"`{argument}` must be hashable, but is {value!r}.") from None
    return value


def _check_depth(depth: Any, path: Path, source: str) -> None:
    if not isinstance(depth, Depth):
        raise TypeError(
            f"{source} gave {depth!r} of type {type(depth).__name__} for leaf "
            f"{show_path(path)}, which is not a Depth. Return `Depth(stack, role, "
            f"layer)`, or None to leave the leaf untouched."
        )


def _function_name(spec: _DepthFn) -> str:
    return getattr(spec.function, "__qualname__", repr(spec.function))
