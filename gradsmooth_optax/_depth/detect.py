"""`detect`: a proposal of where depth is, which says what it is not sure of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gradsmooth_optax._checks import check_flag
from gradsmooth_optax._depth.paths import Place, places_of
from gradsmooth_optax._depth.proposals import (
    best_spec,
    call_of_rivals,
    proposed,
    why_not,
)
from gradsmooth_optax._depth.reading import read
from gradsmooth_optax._depth.specs import DepthSpec
from gradsmooth_optax._depth.stack import Stack


@dataclasses.dataclass(frozen=True)
class Detection:
    """What `detect` proposes; `str()` says it all.

    Attributes:
      code: the call to paste, or "" where nothing was found.
      reasons: what the proposal rests on; without one, what was left out.
      uncertain: what a person has to decide. Empty if the proposal is certain.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> block = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
      >>> detection = gs.detect({"layers_0": block, "layers_1": block})
      >>> detection.uncertain
      ()
      >>> detection.spec == eval(detection.code)
      True
    """

    code: str
    reasons: tuple[str, ...]
    uncertain: tuple[str, ...]
    _proposal: DepthSpec | None = dataclasses.field(repr=False)
    _accept_uncertain: bool = dataclasses.field(repr=False)

    @property
    def spec(self) -> DepthSpec:
        """The proposed spec.

        Raises:
          ValueError: if nothing was found; or if the proposal is uncertain and
            `accept_uncertain` was not set.
        """
        if self._proposal is None:
            raise ValueError(
                f"`detect` found no layers it could propose.{_listed(self.reasons)}"
                f"{_listed(self.uncertain)}\nTo fix: say where they are, as in "
                f"`unrolled(r'layers_(\\d+)/')` or `scanned('blocks/', axis=0)`."
            )
        if self.uncertain and not self._accept_uncertain:
            raise ValueError(
                f"`detect` is not sure of {self.code}:{_listed(self.uncertain)}\n"
                f"To fix: check `describe({self.code}, params)` and paste the call, "
                f"corrected if need be; or pass `accept_uncertain=True` to take it as "
                f"it is."
            )
        return self._proposal

    def __str__(self) -> str:
        lines = [self.code or "no layers found"]
        for title, items in (
            ("because", self.reasons),
            ("not sure", self.uncertain),
        ):
            if items:
                lines += ["", f"{title}:", *(f"  - {item}" for item in items)]
        return "\n".join(lines)


def detect(params: Any, *, accept_uncertain: bool = False) -> Detection:
    r"""Proposes a depth spec for a tree of parameters, never silently guessing.

    Layers with a leaf each are found by their names: numbered siblings such as
    `layers_0`, `layers_1`, … of equal structure. Stacked layers are found by the axis
    names that `nn.Partitioned` boxes and NNX variables carry where the model sets
    `nn.PARTITION_NAME`, or by their name with one size on one axis of all leaves; by
    shapes alone they are doubted, since an axis of experts or heads looks the same.
    Check the proposal with `describe` and write it into your program.

    Args:
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`s, still in its boxes.
      accept_uncertain: whether `.spec` returns a proposal that `detect` is not sure
        of, instead of raising.

    Returns:
      A `Detection` with `.spec`, `.code`, `.reasons` and `.uncertain`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> layer = {"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
      >>> params = {"embed": jnp.ones((8, 2)), "layers": [layer, layer, layer]}
      >>> detection = gs.detect(params)
      >>> print(detection)
      gs.unrolled(r'layers/(\d+)/')
      <BLANKLINE>
      because:
        - layers/0 … layers/2: 3 siblings of equal structure, named as layers
      >>> gs.describe(detection.spec, params).groups[0].num_layers
      3
    """
    check_flag("accept_uncertain", accept_uncertain)
    if isinstance(params, DepthSpec):
        raise TypeError(
            f"`params` of `detect` must be a pytree of arrays, but is the spec "
            f"{params!r}. To see what a spec does, write `describe(spec, params)`."
        )
    places, treedef = places_of(params), jax.tree.structure(params)
    reading = read(places)
    stacks = [stack for stack in reading.stacks if not stack.is_one_layer]
    doubts = [doubt for stack in stacks for doubt in _doubts(stack, places)]
    proposal = proposed(stacks, places)
    if proposal is not None and not doubts:
        tried = best_spec(stacks, reading, places, treedef)
        proposal = tried or proposal
        if tried is None:
            wrong = why_not(proposal, reading, places, treedef)
            doubts.append(f"tried on this tree: {wrong}")
    return Detection(
        "" if proposal is None else repr(proposal),
        tuple(found.reason for found in (stacks or reading.left_out)),
        tuple(doubts),
        proposal,
        accept_uncertain,
    )


def _doubts(stack: Stack, places: Sequence[Place]) -> Iterator[str]:
    yield from stack.doubts
    if stack.rivals:
        call = call_of_rivals([stack], places)
        yield (
            f"{stack.reason}; but also {stack.rivals[0].reason}. If those are the "
            f"layers, {f'write `{call!r}`' if call else 'there is nothing to couple'}"
        )


def _listed(items: Sequence[str]) -> str:
    return "".join(f"\n  - {item}" for item in items)
