"""The base optimizers of the benchmarks, each with smoothing in its right place."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

import gradsmooth_optax as gs

# Peak learning rates at which the base optimizer does well at the default size.
DEFAULT_LEARNING_RATES = {"adamw": 8e-3, "sgd": 1.0, "muon": 1.6e-2}


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


def depth_spec(scope: str) -> Any:
    """Returns where depth is in the models here, whose blocks are scanned.

    Args:
      scope: "full" couples all parameters of the blocks, "proj" only the linear
        projections.
    """
    blocks = gs.scanned("blocks/")
    return blocks if scope == "full" else blocks.only_projections()


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


def muon_numbers(hidden: Callable[[Any], Any], params: Any) -> Any:
    """Returns Muon's dimension numbers, None for what is Adam's.

    Args:
      hidden: says which leaves are Muon's, a tree of bools; the last two axes of
        these are inputs and outputs.
      params: parameters.
    """
    numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(
        lambda is_hidden: numbers if is_hidden else None, hidden(params)
    )


def _in_blocks(path: tuple) -> bool:
    return any(getattr(entry, "key", None) == "blocks" for entry in path)


def preconditioner(
    name: str, depth: Any, hidden: Callable[[Any], Any], b2: float = 0.95
) -> optax.GradientTransformation:
    """Returns what a base optimizer does before smoothing, decay and learning rate.

    Args:
      name: "adamw", "sgd" or "muon", as in `smoothed_optimizer`.
      depth: where the parameters of the blocks are, a depth spec.
      hidden: says which leaves are Muon's, a tree of bools.
      b2: Adam's decay of squared gradients, in Muon of what it leaves to Adam.
    """
    if name == "adamw":
        return optax.scale_by_adam(b2=b2)
    if name == "sgd":
        return optax.trace(0.9)
    if name == "muon":
        # At this rate its updates are those of the partition inside.
        return gs.muon(-1.0, depth, optax.identity(), adam_b2=b2, **_muon(hidden))
    raise _unknown(name)


def smoothed_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    alpha: float,
    *,
    scope: str = "full",
    variant: Any = "standard",
    norm_scope: Any = "param",
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Returns a base optimizer with window smoothing of strength `alpha`.

    With `alpha=0.0` smoothing leaves every update untouched: the base arm.

    Args:
      name: "adamw", "sgd" (momentum 0.9) or "muon" (the matrices of the blocks;
        everything else by Adam).
      learning_rate: scalar or schedule.
      alpha: strength of the window, in [0, 1].
      scope: "full" or "proj", see `depth_spec`.
      variant: "standard", "norm_preserving" or "directional".
      norm_scope: "param" or "block", the granularity of the variant's norms.
      weight_decay: decoupled, on matrices only, outside the smoothing.
      clip: largest global norm of the gradient, or None.
    """
    smoothing = gs.smooth_over_depth(
        depth_spec(scope), alpha, variant=variant, norm_scope=norm_scope
    )
    if name == "adamw":
        optimizer = gs.adamw(
            learning_rate,
            smoothing,
            b2=0.95,
            weight_decay=weight_decay,
            mask=matrices,
        )
    elif name == "sgd":
        optimizer = optax.chain(
            gs.with_depth_smoothing(optax.trace(0.9), smoothing),
            optax.scale_by_learning_rate(learning_rate),
        )
    elif name == "muon":
        optimizer = gs.muon(
            learning_rate,
            depth_spec("full"),
            smoothing,
            adam_b2=0.95,
            **_muon(hidden_matrices),
            weight_decay=weight_decay,
            weight_decay_mask=matrices,
        )
    else:
        raise _unknown(name)
    if clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"there is no optimizer {name!r}; use one of {[*DEFAULT_LEARNING_RATES]}"
    )


def _muon(hidden: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        # Updates as large as Adam's, so that both parts share the learning rate.
        "consistent_rms": 0.2,
        "muon_weight_dimension_numbers": functools.partial(muon_numbers, hidden),
    }
