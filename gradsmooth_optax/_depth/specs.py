"""Specs: the user's depth-grouping as a value, which gives each leaf its `Depth`."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import optax

from gradsmooth_optax._calls import raw, reduce_by_name, shown_call, shown_value
from gradsmooth_optax._checks import hashable, integer, integers, positive_int
from gradsmooth_optax._depth.depth import Depth, as_tuple
from gradsmooth_optax._depth.paths import (
    MASKED,
    Path,
    Place,
    compile_pattern,
    layer_group,
    search,
    show_path,
)
from gradsmooth_optax._depth.reading import read
from gradsmooth_optax._depth.spec_strings import called_by_name
from gradsmooth_optax._depth.words import is_linear_weight

DepthFunction: TypeAlias = Callable[[Path, Any], Depth | None]

# The layouts of common stacks by name, filled by `preset_registry`.
PRESETS: dict[str, Callable[..., DepthSpec]] = {}


class Assignment(NamedTuple):
    """What a spec says of one leaf.

    Attributes:
      depth: the layers that it holds.
      ranked: whether the gaps of its group are closed.
      scan: the `scanned` that placed it, whose leaves hold equally many layers.
      num_layers: how many layers its stack must have.
    """

    depth: Depth
    ranked: bool = False
    scan: DepthSpec | None = None
    num_layers: int | None = None


Assignments: TypeAlias = list[Assignment | None]


class DepthSpec:
    """A depth-grouping as a value: frozen, hashable, picklable, not callable.

    Made by `unrolled`, `scanned`, `first_match`, `ranked`, `depth_fn` and the presets.
    It is deliberately not callable: `optax.inject_hyperparams` takes any callable
    argument for a schedule.

    Example:
      >>> import gradsmooth_optax as gs
      >>> depth = gs.unrolled().only_projections()
      >>> isinstance(depth, gs.DepthSpec), depth == gs.unrolled(), callable(depth)
      (True, False, False)
    """

    def assign(self, places: Sequence[Place]) -> Assignments:
        """One `Assignment` or None for each place of a whole tree, masked ones too."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[DepthSpec, ...]:
        """The specs that this one is composed of."""
        fields = vars(self)
        return fields.get("members", (fields["member"],) if "member" in fields else ())

    def with_parts(self, parts: tuple[DepthSpec, ...]) -> DepthSpec:
        """The spec with others in their place."""
        if not parts:
            return self
        has_several = "members" in vars(self)
        new = {"members": parts} if has_several else {"member": parts[0]}
        return dataclasses.replace(cast(Any, self), **new)

    def unrestricted(self) -> DepthSpec:
        """The spec without what `only` and `only_projections` leave out."""
        return self.with_parts(tuple(part.unrestricted() for part in self.parts))

    def locate(self, places: Sequence[Place]) -> Assignments:
        """Like `assign`, and also where depth is in leaves that are left out.

        A restriction says what is coupled, not how the parameters are laid out.
        """
        assignments = self.assign(places)
        if (unrestricted := self.unrestricted()) == self:
            return assignments
        everywhere = unrestricted.assign(places)
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


# What every argument `depth` takes: a spec, the name of a layout, or a function.
DepthLike: TypeAlias = DepthSpec | str | DepthFunction


def unrolled(
    pattern: str | None = None,
    *,
    start: int = 0,
    stack: Hashable | None = None,
    num_layers: int | None = None,
) -> DepthSpec:
    r"""One leaf per layer, with the layer number in its path.

    Args:
      pattern: regular expression that is searched in the "/"-joined path. The layer
        number is the group `(?P<layer>..)`, else the first unnamed group; a group
        that took no part counts as 0. Groups `(?P<stack>..)` and `(?P<role>..)`
        override the names: by default `stack` is the path up to the number and
        `role` the path after the match. None takes the number that tells layers apart,
        as `detect` reads the tree: numbered siblings of equal structure such as
        `layers_3`, `h/3` or the entries of a list, and never the digit of `gpt2`,
        `Dense_1`, `wi_0`, of a stage or of one of two models. Where two numbers may be
        the layer's, that is an error that shows both calls.
      start: added to every layer number.
      stack: name of the stack, instead of the one taken from the path.
      num_layers: how many layers each stack must have; another number is an error.

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
    return _Unrolled(
        pattern,
        integer("start", start),
        stack if stack is None else hashable("stack", stack),
        checked_count(num_layers),
    )


def scanned(
    pattern: str,
    *,
    axis: int | tuple[int, ...] = 0,
    start: int = 0,
    stride: int | tuple[int, ...] | None = None,
    stack: Hashable | None = None,
    num_layers: int | None = None,
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
      num_layers: how many layers each stack must have, all its parts together; another
        number is an error.

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
    return _Scanned(
        pattern,
        axis,
        start,
        stride,
        stack if stack is None else hashable("stack", stack),
        checked_count(num_layers),
    )


def checked_count(num_layers: int | None) -> int | None:
    return None if num_layers is None else positive_int("num_layers", num_layers)


def first_match(*members: DepthLike) -> DepthSpec:
    r"""Tries several specs on each leaf; the first that is not None wins.

    Args:
      *members: specs, names of layouts, or functions `(path, leaf) -> Depth | None`.

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


def ranked(member: DepthLike) -> DepthSpec:
    """Couples the layers of each group in their order, as if numbered 0, 1, 2, ….

    Closes gaps on purpose, for interleaved stacks such as `nnx.Sequential` or layers
    whose shapes alternate. Only adjacency changes: block norms and statistics keep
    the true layer numbers.

    Args:
      member: a spec, the name of a layout, or a function `(path, leaf) -> Depth |
        None`.

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
    """The spec that `depth`, a spec, a name or a plain function, stands for."""
    if isinstance(depth, DepthSpec):
        return depth
    if isinstance(depth, str):
        calls = {f.__name__: f for f in (first_match, ranked, scanned, unrolled)}
        return called_by_name(depth, argument, PRESETS | calls)
    if callable(depth) and not isinstance(depth, type):
        return _DepthFn(cast(DepthFunction, depth))
    hint = "`unrolled(r'layers_(\\d+)/')` or `scanned('blocks/', axis=0)`"
    if isinstance(depth, Depth):
        hint = "`lambda path, leaf: Depth(...)`, since each leaf needs its own"
    elif hasattr(depth, "spec") and hasattr(depth, "uncertain"):
        hint = "`detect(params).spec`, which is the spec that it proposes"
    elif isinstance(depth, optax.GradientTransformation):
        hint = f"{hint} here, and the transformation in its own place"
    elif isinstance(depth, dict | list | tuple):
        hint = f"a function that looks the path up in your tree, else {hint}"
    raise TypeError(
        f"`{argument}` must be a depth spec, the name of a layout or a function "
        f"(path, leaf) -> Depth | None, but is {reprlib.repr(depth)} of type "
        f"{type(depth).__name__}. To fix, write {hint}."
    )


# -- The specs -------------------------------------------------------------------------


class _ShowsItsCall(DepthSpec):
    """`repr` is the call that makes the spec."""

    def __repr__(self) -> str:
        args, options = [], {}
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType] # every subclass is a dataclass
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name in ("pattern", "member", "function"):
                args.append(value)
            else:
                options[field.name] = value
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__.lstrip("_"))
        return shown_call(name.lower(), args, options)


@dataclasses.dataclass(frozen=True, repr=False)
class _Unrolled(_ShowsItsCall):
    pattern: str | None = None
    start: int = 0
    stack: Hashable | None = None

    num_layers: int | None = None

    def assign(self, places: Sequence[Place]) -> Assignments:
        if self.pattern is None:
            return self._assign_by_reading(places)
        return [self._assign_one(self.pattern, place.path) for place in places]

    def _assign_by_reading(self, places: Sequence[Place]) -> Assignments:
        stacks = [s for s in read(places).stacks if s.function == "unrolled"]
        sure = [stack for stack in stacks if not stack.rivals]
        taken = [stack for stack in sure if stack.is_named] or sure
        depths = {p: d for stack in taken for p, d in stack.depths.items()}
        found = (depths.get(place.path) for place in places)
        return [d and self._assigned(d.stack, d.role, d.layer) for d in found]

    def _assign_one(self, pattern: str, path: Path) -> Assignment | None:
        found = search(pattern, path, self.stack)
        return found and self._assigned(*found)

    def _assigned(self, stack: Hashable, role: Hashable, number: int) -> Assignment:
        stack = stack if self.stack is None else self.stack
        depth = Depth(stack, role, self.start + number)
        return Assignment(depth, num_layers=self.num_layers)


@dataclasses.dataclass(frozen=True, repr=False)
class _Scanned(_ShowsItsCall):
    pattern: str
    axis: int | tuple[int, ...] = 0
    start: int = 0
    stride: int | tuple[int, ...] | None = None
    stack: Hashable | None = None
    num_layers: int | None = None

    def assign(self, places: Sequence[Place]) -> Assignments:
        return [self._assign_one(place.path) for place in places]

    def _assign_one(self, path: Path) -> Assignment | None:
        found = search(self.pattern, path, self.stack)
        if found is None:
            return None
        stack, role, number = found
        layer = self.start + number
        depth = Depth(stack, role, layer, self.axis, self.stride)
        return Assignment(depth, scan=self, num_layers=self.num_layers)


@dataclasses.dataclass(frozen=True)
class _FirstMatch(DepthSpec):
    members: tuple[DepthSpec, ...]

    def assign(self, places: Sequence[Place]) -> Assignments:
        assignments: Assignments = [None] * len(places)
        for member in self.members:
            left = [i for i, a in enumerate(assignments) if a is None]
            found = member.assign([places[i] for i in left])
            for i, assignment in zip(left, found, strict=True):
                assignments[i] = assignment
        return assignments

    def __repr__(self) -> str:
        return shown_call("first_match", self.members)


@dataclasses.dataclass(frozen=True, repr=False)
class _Ranked(_ShowsItsCall):
    member: DepthSpec

    def assign(self, places: Sequence[Place]) -> Assignments:
        assignments = self.member.assign(places)
        return [a and a._replace(ranked=True) for a in assignments]


@dataclasses.dataclass(frozen=True, repr=False)
class _DepthFn(_ShowsItsCall):
    function: DepthFunction

    def assign(self, places: Sequence[Place]) -> Assignments:
        return [
            None if leaf is MASKED else self._assign_one(path, leaf)
            for path, leaf, _ in places
        ]

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
        _check_depth(depth, path, f"the `depth` function {shown_value(self.function)}")
        return Assignment(depth)

    def __reduce__(self):
        return reduce_by_name(self, self.function)


@dataclasses.dataclass(frozen=True)
class _Only(DepthSpec):
    member: DepthSpec
    predicate: Callable[[Path, Any], bool]

    def assign(self, places: Sequence[Place]) -> Assignments:
        assignments = self.member.assign(places)
        return [
            a if a and leaf is not MASKED and self.predicate(path, leaf) else None
            for a, (path, leaf, _) in zip(assignments, places, strict=True)
        ]

    def unrestricted(self) -> DepthSpec:
        return self.member.unrestricted()

    def __repr__(self) -> str:
        return f"{self.member!r}.only({shown_value(self.predicate)})"


@dataclasses.dataclass(frozen=True)
class _OnlyProjections(DepthSpec):
    member: DepthSpec
    bias: bool = True

    def assign(self, places: Sequence[Place]) -> Assignments:
        assignments = self.member.assign(places)
        is_weight = [
            a is not None
            and leaf is not MASKED
            and is_linear_weight(path, layer_rank(a.depth, leaf))
            for a, (path, leaf, _) in zip(assignments, places, strict=True)
        ]
        if self.bias:
            paths = [place.path for place in places]
            modules = {p[:-1] for p, yes in zip(paths, is_weight, strict=True) if yes}
            is_weight = [path[:-1] in modules for path in paths]
        return [
            a if yes else None for a, yes in zip(assignments, is_weight, strict=True)
        ]

    def unrestricted(self) -> DepthSpec:
        return self.member.unrestricted()

    def __repr__(self) -> str:
        return f"{self.member!r}.only_projections({'' if self.bias else 'bias=False'})"


def restricted_like(spec: DepthSpec, other: DepthSpec) -> DepthSpec:
    """`spec` with the restrictions of another one."""
    if isinstance(other, _Only | _OnlyProjections):
        return dataclasses.replace(other, member=restricted_like(spec, other.member))
    return spec


def is_default_unrolled(spec: DepthSpec) -> bool:
    """Whether some part of the spec takes its number from the reading of the tree."""
    if isinstance(spec, _Unrolled):
        return spec.pattern is None
    return any(map(is_default_unrolled, spec.parts))


def layer_rank(depth: Depth | None, leaf: Any) -> int:
    """Rank of one layer of a leaf: its rank without the depth axes."""
    return np.ndim(leaf) - len(as_tuple(depth.axis if depth else None))


def _check_depth(depth: Any, path: Path, source: str) -> None:
    if not isinstance(depth, Depth):
        raise TypeError(
            f"{source} gave {depth!r} of type {type(depth).__name__} for leaf "
            f"{show_path(path)}, which is not a Depth. Return `Depth(stack, role, "
            f"layer)`, or None to leave the leaf untouched."
        )
