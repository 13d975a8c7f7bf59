"""Reversing a sequence of random symbols: the task of the paper's one replication.

An encoder of PyTorch's `TransformerEncoderLayer(norm_first=True)`, initialized as those
are, reads a sequence and says at position i the symbol at the mirrored position.
Sequences are drawn anew at every step. The metric is the cross-entropy on fixed
sequences, some that tune and others that judge, in nats per symbol; that of guessing is
ln(vocabulary).
"""

import functools
from typing import Any, cast

import jax
import optax

import gradsmooth_optax as gs
from benchmarks.evidence.task import Metric, Task
from benchmarks.models.encoder import Encoder
from benchmarks.models.gpt import scanned_states
from benchmarks.optimizers import hidden_matrices

METRICS = (Metric("evaluation loss", "nats/symbol", lower_is_better=True),)


def build(
    layers: int,
    *,
    width: int,
    heads: int,
    length: int,
    vocabulary: int,
    batch: int,
    eval_sequences: int,
) -> Task:
    """Returns the task.

    Args:
      layers, width, heads, batch: of every task.
      length: symbols in a sequence.
      vocabulary: number of symbols.
      eval_sequences: sequences that judge; as many others tune.
    """
    model = Encoder(vocabulary, layers, width, heads, length)

    def draw(data: Any, key: jax.Array, step: jax.Array) -> jax.Array:
        del data  # made here
        shape = (batch, length)
        return jax.random.randint(jax.random.fold_in(key, step), shape, 0, vocabulary)

    def loss(params: Any, symbols: jax.Array) -> jax.Array:
        logits = cast(jax.Array, model.apply({"params": params}, symbols))
        wanted = symbols[:, ::-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    # Far from the keys of any seed's data.
    far = jax.random.key(2**31 - 1)
    judging, tuning = (
        jax.random.randint(
            jax.random.fold_in(far, which), (eval_sequences, length), 0, vocabulary
        )
        for which in (0, 1)
    )
    return Task(
        depth=gs.scanned("blocks/"),
        data=None,
        init=lambda key: model.init(key, judging[:1])["params"],
        draw=draw,
        loss=loss,
        evaluate=lambda params: {METRICS[0].name: loss(params, judging)},
        tuned_by=lambda params: loss(params, tuning),
        states=functools.partial(scanned_states, model),
        # As in PyTorch's AdamW.
        decayed=lambda params: jax.tree.map(lambda _: True, params),
        hidden=hidden_matrices,
    )
