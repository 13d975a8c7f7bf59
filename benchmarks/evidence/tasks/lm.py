"""Language modeling: the GPT of `benchmarks.pretrain` on the standard library's source.

The metric is the loss on windows spread over held-out files, in nats per byte. Windows
of the first half of their text tune, those of the second half judge.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradsmooth_optax as gs
from benchmarks.data.corpus import (
    VOCABULARY,
    load_corpus,
    sample_windows,
    spread_windows,
)
from benchmarks.evidence.task import Metric, Task, parts_of
from benchmarks.models.gpt import (
    GPT,
    init_gpt,
    mean_loss,
    next_token_loss,
    scanned_states,
)
from benchmarks.optimizers import hidden_matrices, matrices

METRICS = (Metric("validation loss", "nats/byte", lower_is_better=True),)


def build(
    layers: int,
    *,
    width: int,
    heads: int,
    context: int,
    batch: int,
    eval_windows: int,
    dtype: str = "float32",
    remat: bool = False,
    corpus: list[str] | None = None,
) -> Task:
    """Returns the task.

    Args:
      layers, width, heads, batch: of every task.
      context: bytes per window, of which a step has `batch`.
      eval_windows: windows of either half of the held-out text.
      dtype: of activations.
      remat: whether to recompute activations in the backward pass.
      corpus: text files, or None for the standard library's source.
    """
    paths = None if corpus is None else [Path(path) for path in corpus]
    text = load_corpus(paths, shortest=2 * (context + 1))
    model = GPT(
        vocabulary=VOCABULARY,
        layers=layers,
        width=width,
        heads=heads,
        context=context,
        remat=remat,
        dtype=jnp.dtype(dtype),
    )
    tuning, judging = (
        jnp.asarray(spread_windows(half, eval_windows, context))
        for half in np.array_split(text.validation, 2)
    )

    def states(params: Any, tokens: jax.Array) -> jax.Array:
        return scanned_states(model, params, tokens[:, :-1])

    depth = gs.scanned("blocks/")
    return Task(
        depth=depth,
        data=jnp.asarray(text.train),
        init=init_gpt(model),
        draw=functools.partial(sample_windows, batch=batch, context=context),
        loss=functools.partial(next_token_loss, model),
        evaluate=lambda params: {METRICS[0].name: mean_loss(model, params, judging)},
        tuned_by=lambda params: mean_loss(model, params, tuning),
        states=states,
        decayed=matrices,
        hidden=hidden_matrices,
        scopes=parts_of(depth, "attention", "mlp", "norms"),
    )
