"""The layouts of common stacks by name: what `layouts` fills, and messages propose."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ParamSpec, cast

from gradsmooth_optax._calls import shown_call
from gradsmooth_optax._checks import check_flag, hashable
from gradsmooth_optax._depth.paths import Place
from gradsmooth_optax._depth.specs import (
    PRESETS,
    Assignments,
    DepthSpec,
    checked_count,
)

P = ParamSpec("P")

# Presets, and options for them, that a message may propose if the tree fits.
TRIES: list[tuple[Callable[..., DepthSpec], Mapping[str, Any]]] = []


@dataclasses.dataclass(frozen=True, repr=False)
class _Preset(DepthSpec):
    call: str = dataclasses.field(compare=False)
    member: DepthSpec
    num_layers: int | None = None

    def assign(self, places: Sequence[Place]) -> Assignments:
        assignments = self.member.assign(places)
        if self.num_layers is None:
            return assignments
        return [a and a._replace(num_layers=self.num_layers) for a in assignments]

    def __repr__(self) -> str:
        return self.call


def preset(
    *tries: Mapping[str, Any],
) -> Callable[[Callable[P, DepthSpec]], Callable[P, DepthSpec]]:
    """Gives a layout its name; the spec that it returns shows this call.

    A layout declares `num_layers`, for its signature, and it is checked here.

    Args:
      *tries: the options with which an error may propose it, if the tree fits.
    """

    def decorate(function: Callable[P, DepthSpec]) -> Callable[P, DepthSpec]:
        parameters = inspect.signature(function)

        @functools.wraps(function)
        def named(*args: P.args, **options: P.kwargs) -> DepthSpec:
            given = _bound(function.__name__, parameters, args, options)
            for argument, value in given.items():
                if isinstance(parameters.parameters[argument].default, bool):
                    check_flag(argument, value)
                if not isinstance(value, list):  # as good as a tuple
                    hashable(argument, value)
            call = shown_call(f"layouts.{function.__name__}", args, options)
            spec = function(*args, **options)
            count = cast(int | None, options.get("num_layers"))
            member = spec.member if isinstance(spec, _Preset) else spec
            return _Preset(call, member, checked_count(count))

        PRESETS[function.__name__] = named
        TRIES.extend((named, options) for options in tries)
        return named

    return decorate


def _bound(
    name: str, signature: inspect.Signature, args: tuple, options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """{parameter: argument}, or an error that says what can be written."""
    try:
        return signature.bind(*args, **options).arguments
    except TypeError as error:
        known = [*signature.parameters]
        wrong = [option for option in options if option not in known]
        meant = [m for option in wrong for m in get_close_matches(option, known, n=1)]
        hint = f" Did you mean `{meant[0]}`?" if meant else ""
        raise TypeError(
            f"`layouts.{name}`: {error}. Its options are {', '.join(known)}.{hint}"
        ) from None


def expanded(spec: DepthSpec) -> DepthSpec:
    """The spec with the presets in it replaced by what they stand for."""
    if isinstance(spec, _Preset):
        return expanded(spec.member)
    return spec.with_parts(tuple(map(expanded, spec.parts)))
