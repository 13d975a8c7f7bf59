"""The base optimizers of the benchmarks, each with smoothing in its right place."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

import gradsmooth_optax as gs

OPTIMIZERS = ("adamw", "sgd", "muon")


def warmup_cosine(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Returns a schedule that rises linearly for `warmup` steps, then falls to 10 %.

    Args:
      peak: the highest learning rate.
      warmup: steps of the rise; the first step already has `peak / warmup`.
      steps: all steps of the run.
    """
    decay = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=0.1)
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, decay], [warmup])


def matrices(params: Any) -> Any:
    """Returns a tree of bools: which leaves of `params` are matrices in every layer.

    A leaf of the scanned blocks has one more axis than the parameter of a layer has, so
    its stacked norm scales `(L, width)` are no matrices.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim - _in_blocks(path) >= 2, params
    )


def hidden_matrices(params: Any) -> Any:
    """Returns a tree of bools: which leaves are matrices of the scanned blocks.

    They are Muon's; embeddings, the head and norm scales are Adam's.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _in_blocks(path) and leaf.ndim == 3, params
    )


def _in_blocks(path: tuple) -> bool:
    return any(getattr(entry, "key", None) == "blocks" for entry in path)


def preconditioner(
    name: str, depth: Any, hidden: Callable[[Any], Any], b2: float = 0.95
) -> optax.GradientTransformation:
    """Returns what a base optimizer does before smoothing, decay and learning rate.

    Args:
      name: "adamw", "sgd" (momentum 0.9) or "muon" (the matrices of the blocks;
        everything else by Adam).
      depth: where the parameters of the blocks are, a depth spec.
      hidden: says which leaves are Muon's, a tree of bools; their last two axes are
        inputs and outputs.
      b2: Adam's decay of squared gradients, in Muon of what it leaves to Adam.
    """
    if name == "adamw":
        return optax.scale_by_adam(b2=b2)
    if name == "sgd":
        return optax.trace(0.9)
    if name != "muon":
        raise ValueError(f"there is no optimizer {name!r}; use one of {OPTIMIZERS}")
    numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return gs.muon(
        -1.0,  # at this rate its updates are those of the partition inside
        depth,
        optax.identity(),
        adam_b2=b2,
        # Updates as large as Adam's, so that both parts share the learning rate.
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda is_hidden: numbers if is_hidden else None, hidden(params)
        ),
    )


def smoothed_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    smoothing: optax.GradientTransformation | None = None,
    *,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Returns a base optimizer of scanned models, with smoothing in its place.

    Args:
      name: as in `preconditioner`.
      learning_rate: scalar or schedule.
      smoothing: of the updates, None for the base alone.
      weight_decay: decoupled, on matrices only, outside the smoothing.
      clip: largest global norm of the gradient, or None.
    """
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        preconditioner(name, gs.scanned("blocks/"), hidden_matrices),
        optax.identity() if smoothing is None else smoothing,
        optax.add_decayed_weights(weight_decay, matrices)
        if weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )
