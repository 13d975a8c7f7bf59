"""What a task is: all of an experiment but the optimizer.

A module of a task has `METRICS`, by the first of which arms are judged, and
`build(layers, *, width, heads, batch, ...)`, which returns its `Task` at a depth: so
many blocks, of a residual stream of that width with so many heads of attention, trained
on so many examples per step; and options of its own.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from benchmarks.training import Draw, Init, Loss, Rollout


class Metric(NamedTuple):
    """What arms are compared by.

    Attributes:
      name: as in a table's header.
      unit: of its values, or "".
      lower_is_better: whether a smaller value is a better one.
    """

    name: str
    unit: str
    lower_is_better: bool


class Task(NamedTuple):
    """One model on one kind of data, at one depth. All functions are of one seed.

    Attributes:
      depth: where the parameters of the blocks are, a depth spec; an arm of the
        scope "full" couples all of it.
      data: arrays to train on, handed to `draw`.
      init: makes parameters from a key.
      draw: the batch of a step, a tree of arrays with a leading axis of examples; a
        function of key and step alone, so that all arms see the same.
      loss: the mean over a batch's examples.
      evaluate: {name of a metric: its value} of parameters, on held-out data that all
        seeds share.
      tuned_by: the first metric of parameters, on other held-out data: rates are chosen
        by it, so that what judges an arm has chosen nothing.
      states: the residual stream before the first and after every block, for a
        batch, of shape `(L + 1, ..., width)`.
      decayed: which leaves of the parameters have weight decay, a tree of bools.
      hidden: which are matrices of the blocks, and so Muon's, a tree of bools.
      scopes: {name: depth spec} of other things that an arm may couple.
      rollout: what a policy makes of a drawn batch, or None where the batch itself is
        trained on; see `benchmarks.training`.
    """

    depth: Any
    data: Any
    init: Init
    draw: Draw
    loss: Loss
    evaluate: Callable[[Any], Mapping[str, jax.Array]]
    tuned_by: Callable[[Any], jax.Array]
    states: Callable[[Any, Any], jax.Array]
    decayed: Callable[[Any], Any]
    hidden: Callable[[Any], Any]
    scopes: Mapping[str, Any] = MappingProxyType({})
    rollout: Rollout | None = None


# In "/"-joined paths, of tasks that call the parts of their blocks so.
_PARTS = {
    "attention": r"(^|/)attention/.*kernel$",
    "mlp": r"(^|/)mlp_(in|out)/kernel$",
    "norms": r"norm/(scale|bias)$",
    "biases": r"(^|/)(?!\w*norm/)\w+/bias$",
}


def parts_of(depth: Any, *parts: str) -> dict[str, Any]:
    """Returns {part: depth spec} of the kinds of parameters that blocks have.

    The kernels of attention, those of the MLP, the norms' parameters, and the biases of
    projections.

    Args:
      depth: where the parameters of the blocks are.
      parts: those that there are, if not all.
    """

    def only(pattern: str) -> Any:
        found = re.compile(pattern)
        return depth.only(
            lambda path, leaf: found.search("/".join(map(str, path))) is not None
        )

    return {part: only(_PARTS[part]) for part in parts or _PARTS}


def leaves_matching(pattern: str, params: Any) -> Any:
    """Returns which leaves have a "/"-joined path that matches, a tree of bools."""

    def matches(path: tuple, _: Any) -> bool:
        joined = jax.tree_util.keystr(path, simple=True, separator="/")
        return re.search(pattern, joined) is not None

    return jax.tree_util.tree_map_with_path(matches, params)
