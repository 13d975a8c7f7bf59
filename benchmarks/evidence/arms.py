"""The arms of an experiment: what is coupled, how, and the controls of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import optax

import gradsmooth_optax as gs
from benchmarks.evidence.task import Task

Operator = Literal["none", "window", "similarity_window", "mean", "learn_alpha"]
Control = Literal["norm_matched", "shuffled_depth", "full_average"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to couple the updates of a base optimizer.

    Attributes:
      name: as in tables; no two arms share one.
      operator: the operator along depth; "none" is the base.
      alpha: its strength, of the learned ones the one they start at.
      variant: of `smooth_over_depth`; its norms are per parameter.
      scope: "full" couples all parameters of the blocks, "proj" the projections;
        others are the task's own, see `Task.scopes`.
      control: what the arm is a control of, or None.
    """

    name: str
    operator: Operator = "window"
    alpha: float = 0.2
    variant: Literal["standard", "norm_preserving"] = "standard"
    scope: str = "full"
    control: Control | None = None


BASE = Arm("base", "none", 0.0)
WINDOW = Arm("window(0.2)")
WEAK_WINDOW = Arm("window(0.1)", alpha=0.1)
NORM_PRESERVING = Arm("window(0.2), norm-preserving", variant="norm_preserving")
PROJECTIONS = Arm("window(0.2), proj", scope="proj")

SMOOTHED = (
    WEAK_WINDOW,
    WINDOW,
    Arm("window(0.5)", alpha=0.5),
    PROJECTIONS,
    NORM_PRESERVING,
    Arm("similarity_window(0.2)", "similarity_window"),
    Arm("learn_alpha", "learn_alpha", 0.1),
)


def controls_of(arm: Arm) -> tuple[Arm, ...]:
    """Returns the same step without coupling, and the coupling of other layers.

    None of arms whose coupling depends on the updates, or that keep the norms anyway.
    """
    if (arm.operator, arm.variant) != ("window", "standard"):
        return ()
    return (
        dataclasses.replace(
            arm, name=f"norm-matched {arm.name}", control="norm_matched"
        ),
        dataclasses.replace(arm, name=f"shuffled {arm.name}", control="shuffled_depth"),
    )


MEAN = Arm("mean over depth", "mean", 1.0, control="full_average")
# All layers get as small an update as the mean is, each in its own direction.
NORM_MATCHED_MEAN = Arm(
    "norm-matched mean over depth", "mean", 1.0, control="norm_matched"
)


# A U-ViT's `in_blocks` and `out_blocks` as one stack, rather than two.
GROUPINGS = (
    Arm("window(0.2), joined", scope="joined"),
    Arm("window(0.2), joined with mid_block", scope="joined with mid_block"),
)


class Plan(NamedTuple):
    """Which arms there are beside the base.

    Attributes:
      screened: the arms of which the best is confirmed.
      confirmed: those of them that are confirmed in any case.
      controlled: whether there are controls and the mean over depth.
    """

    screened: tuple[Arm, ...]
    confirmed: tuple[Arm, ...]
    controlled: bool = True


FULL = Plan(SMOOTHED, (WINDOW, WEAK_WINDOW, NORM_PRESERVING))
WITH_GROUPINGS = Plan((*SMOOTHED, *GROUPINGS), (*FULL.confirmed, *GROUPINGS))


def plan_of_parts(parts: Sequence[str]) -> Plan:
    """Returns the arms that couple one kind of parameters each, and all of them."""
    arms = tuple(
        Arm(f"window(0.5), {part}", alpha=0.5, scope=part) for part in ("full", *parts)
    )
    return Plan(arms, arms, controlled=False)


def scope_of(arm: Arm, task: Task) -> Any:
    """Returns the depth spec of what an arm couples."""
    if arm.scope == "full":
        return task.depth
    if arm.scope == "proj":
        return task.depth.only_projections()
    return task.scopes[arm.scope]


class Coupled(NamedTuple):
    """An optimizer's preconditioner with an arm's coupling.

    Attributes:
      transformation: both.
      inner: `(gradient, state, params) -> updates` of the preconditioner alone, with
        the state of `transformation`.
    """

    transformation: optax.GradientTransformationExtraArgs
    inner: Callable[[Any, Any, Any], Any]


def coupled(arm: Arm, inner: optax.GradientTransformation, depth: Any) -> Coupled:
    """Returns a preconditioner with an arm's coupling.

    Args:
      arm: says how to couple.
      inner: the preconditioner.
      depth: what to couple, see `scope_of`.
    """
    if arm.operator == "learn_alpha":
        learned = gs.contrib.learn_alpha(inner, depth, alpha=arm.alpha)
        return Coupled(
            learned, lambda g, state, p: inner.update(g, state.inner_state, p)[0]
        )
    smooth = (
        optax.identity()
        if arm.operator == "none"
        else gs.smooth_over_depth(depth, _operator(arm), variant=arm.variant)
    )
    return Coupled(
        optax.chain(inner, smooth), lambda g, state, p: inner.update(g, state[0], p)[0]
    )


def _operator(arm: Arm) -> Any:
    if arm.operator == "similarity_window":
        return gs.similarity_window(arm.alpha)
    is_mean = arm.operator == "mean"
    operator = gs.mean_over_depth() if is_mean else gs.window(arm.alpha)
    if arm.control == "norm_matched":
        return gs.controls.norm_matched(operator)
    if arm.control == "shuffled_depth":
        return gs.controls.shuffled(operator, seed=0)
    return operator
