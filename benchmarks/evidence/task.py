"""What a task is: all of an experiment but the optimizer.

A module of a task has `METRIC`, and `build(layers, *, ...)`, which returns its `Task`
at a depth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.training import Draw, Init, Loss


class Metric(NamedTuple):
    """What arms are compared by.

    Attributes:
        name: as in a table's header.
        unit: of its values.
        lower_is_better: whether a smaller value is a better one.
    """

    name: str
    unit: str
    lower_is_better: bool


class Task(NamedTuple):
    """One model on one kind of data, at one depth. All functions are of one seed.

    Attributes:
        depth: where all parameters of the blocks are, a depth spec.
        data: arrays to train on, handed to `draw`.
        init: makes parameters from a key.
        draw: the batch of a step, a tree of arrays with a leading axis of examples; a
            function of key and step alone, so that all arms see the same.
        loss: the mean over a batch's examples.
        evaluate: the metric of parameters, on held-out data that all seeds share.
        states: the residual stream before the first and after every block, for a
            batch, of shape `(L + 1, ..., width)`.
        decayed: which leaves of the parameters have weight decay, a tree of bools.
    """

    depth: Any
    data: Any
    init: Init
    draw: Draw
    loss: Loss
    evaluate: Callable[[Any], jax.Array]
    states: Callable[[Any, Any], jax.Array]
    decayed: Callable[[Any], Any]
