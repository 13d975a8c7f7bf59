"""What is compared: the base, the operators, and the controls of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from gradsmooth_optax import controls
from gradsmooth_optax._checks import shown
from gradsmooth_optax._operators.operator import Operator
from gradsmooth_optax._operators.smoothers import as_operator, window
from gradsmooth_optax._transforms.scale import scale_over_depth
from gradsmooth_optax._transforms.smooth import smooth_over_depth

PLAIN, BASE = "plain", "base"
MATCHED, SHUFFLED = "norm-matched", "shuffled"

DEFAULT: Mapping[str, Operator] = MappingProxyType(
    {"window(0.2)": window(0.2), "window(0.5)": window(0.5)}
)


class Arm(NamedTuple):
    """One way to treat the updates of the blocks.

    Attributes:
      name: as in tables; "norm-matched window(0.2)" is a control of "window(0.2)".
      operator: what couples layers, or None.
      control: of what kind it is, or None.
    """

    name: str
    operator: Any = None
    control: str | None = None

    @property
    def tunes_block_rate(self) -> bool:
        return self.name != PLAIN


def all_arms(operators: Any) -> dict[str, Arm]:
    """{name: arm}: plain, base, and every operator with its controls.

    An operator without a matrix has no shuffled control.
    """
    if not isinstance(operators, Mapping) or not operators:
        raise TypeError(
            f"`arms` must be {{name: operator}} with at least one operator, but is "
            f"{shown(operators)}. Write `arms={{'window(0.2)': gs.window(0.2)}}`."
        )
    arms = {PLAIN: Arm(PLAIN), BASE: Arm(BASE)}
    for name, given in operators.items():
        if not isinstance(name, str) or not name.strip():
            raise TypeError(
                f"`arms` must have names as keys, but has the key {shown(name)}."
            )
        if name in arms or name.startswith((MATCHED + " ", SHUFFLED + " ")):
            raise ValueError(
                f"`arms` has the name {name!r}, which is taken: {PLAIN!r}, {BASE!r} "
                f"and the controls ({MATCHED!r} and {SHUFFLED!r} before the name of "
                "an operator) are added by `compare` itself. Use another name."
            )
        operator = as_operator(given)
        arms[name] = Arm(name, operator)
        kinds = (MATCHED, SHUFFLED) if operator.has_matrix else (MATCHED,)
        for kind in kinds:
            control = control_name(kind, name)
            arms[control] = Arm(control, operator, kind)
    return arms


def texts_of(arms: Mapping[str, Arm]) -> dict[str, str]:
    """{name: operator as text}, as a file holds them."""
    return {name: repr(arm.operator) for name, arm in arms.items()}


def arms_of(texts: Mapping[str, str]) -> dict[str, Arm]:
    """The arms of a file: as `all_arms`, with texts in the place of operators."""
    arms = {}
    for name, text in texts.items():
        kinds = [k for k in (MATCHED, SHUFFLED) if name.startswith(f"{k} ")]
        operator = None if name in (PLAIN, BASE) else text
        arms[name] = Arm(name, operator, *kinds)
    return arms


def control_name(kind: str, operator: str) -> str:
    return f"{kind} {operator}"


def smoothing_of(
    arm: Arm, depth: Any, block_rate: Any, seed: int
) -> optax.GradientTransformationExtraArgs:
    """The transformation of an arm: coupled first, then scaled by the block rate.

    Args:
      arm: what couples, if anything.
      depth: where depth is.
      block_rate: factor of the blocks' updates; may be traced.
      seed: of a shuffled order of the layers.
    """
    parts = []
    if arm.operator is not None:
        operator = arm.operator
        if arm.control == MATCHED:
            operator = controls.norm_matched(operator)
        elif arm.control == SHUFFLED:
            operator = controls.shuffled(operator, seed)
        parts.append(smooth_over_depth(depth, operator))
    if arm.tunes_block_rate:
        parts.append(scale_over_depth(depth, block_rate))
    if not parts:
        return optax.with_extra_args_support(optax.identity())
    return optax.chain(*parts)
