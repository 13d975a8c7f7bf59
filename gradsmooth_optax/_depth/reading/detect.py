"""`detect`: a proposal of where depth is, which says what it is not sure of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from gradsmooth_optax._arrays import inexact_dtype
from gradsmooth_optax._depth.paths import plain_path
from gradsmooth_optax._depth.reading.boxes import named_axes
from gradsmooth_optax._depth.reading.found_stack import DetectedStack, depths_of
from gradsmooth_optax._depth.reading.numbered import numbered_stacks
from gradsmooth_optax._depth.reading.stacked import perhaps_scanned, scanned_stacks
from gradsmooth_optax._depth.specs import DepthSpec, Leaves, first_match


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
    `nn.PARTITION_NAME`, never by shapes: an axis of experts or heads looks the same.
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
    if isinstance(params, DepthSpec):
        raise TypeError(
            f"`params` of `detect` must be a pytree of arrays, but is the spec "
            f"{params!r}. To see what a spec does, write `describe(spec, params)`."
        )
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = [
        (plain_path(key_path), leaf)
        for key_path, leaf in flat
        if inexact_dtype(leaf) is not None
    ]
    stacks = list(scanned_stacks((), leaves, named_axes(params)))
    left_out: list[str] = []
    stacks += numbered_stacks((), _without(leaves, stacks), left_out)
    doubts = [doubt for stack in stacks for doubt in stack.doubts]
    doubts += perhaps_scanned((), _without(leaves, stacks))
    members = _fewest_specs(stacks, leaves)
    proposal = first_match(*members) if len(members) > 1 else next(iter(members), None)
    return Detection(
        "" if proposal is None else repr(proposal),
        tuple(stack.reason for stack in stacks) or tuple(() if doubts else left_out),
        tuple(doubts),
        proposal,
        bool(accept_uncertain),
    )


def _without(leaves: Leaves, stacks: Sequence[DetectedStack]) -> Leaves:
    taken = {path for stack in stacks for path, _ in stack.leaves}
    return [(path, leaf) for path, leaf in leaves if path not in taken]


def _fewest_specs(stacks: Sequence[DetectedStack], leaves: Leaves) -> list[DepthSpec]:
    """Specs with short patterns that find these stacks and nothing else."""
    specs, left = [], list(stacks)
    while left:
        specific = map(left[0].spec, left[0].patterns)
        found = ((spec, _covered(spec, left, leaves)) for spec in specific)
        alone = (left[0].whole, [left[0]])
        spec, covered = next((pair for pair in found if pair[1]), alone)
        specs.append(spec)
        left = [stack for stack in left if stack not in covered]
    return specs


def _covered(
    spec: DepthSpec, stacks: list[DetectedStack], leaves: Leaves
) -> list[DetectedStack]:
    """The stacks that the spec finds, the first among them; [] if it finds others."""
    found = depths_of(spec, leaves)
    covered = [
        stack
        for stack in stacks
        if type(stack.whole) is type(spec) and stack.depths.items() <= found.items()
    ]
    finds_others = sum(len(stack.depths) for stack in covered) < len(found)
    return [] if finds_others or stacks[0] not in covered else covered


def _listed(items: Sequence[str]) -> str:
    return "".join(f"\n  - {item}" for item in items)
