"""Does coupling layers help a GPT? The question of the README, answered by `trial`.

    python -m benchmarks.pretrain
    python -m benchmarks.pretrain --layers 24 --steps 300 --seeds 16 --out runs/deep

Trains a byte-level GPT, whose layers are one scanned module, on the source of the
Python standard library, in two to four minutes on two cores. First
`diagnostics.depth_signal`: is there anything along depth to couple? Then
`trial.compare`: every arm at tuned rates, the blocks' own among them, paired seeds,
controls, and a verdict. Read it as an example: that is all that it takes. The numbers
and two pictures are in --out, and the same command goes on after Ctrl-C.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    print("Loading JAX, Flax and matplotlib ...", flush=True)

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from tqdm import tqdm

import gradsmooth_optax as gs
from benchmarks import cli
from benchmarks.data.corpus import (
    VOCABULARY,
    load_corpus,
    sample_windows,
    spread_windows,
)
from benchmarks.models.gpt import GPT, init_gpt, mean_loss, next_token_loss
from benchmarks.optimizers import matrices, warmup_cosine

DEPTH = gs.scanned("blocks/")


class Task:
    """The training that is compared: model, text, and one run."""

    def __init__(self, layers: int, width: int, context: int, batch: int, steps: int):
        self.model = GPT(VOCABULARY, layers, width, heads=2, context=context)
        self.batch, self.steps = batch, steps
        text = load_corpus(None, shortest=context + 1)
        self.text = jnp.asarray(text.train)
        # Rates are chosen by the even windows, and the verdict is about the odd ones.
        held_out = jnp.asarray(spread_windows(text.validation, 128, context))
        self.held_out = {"to tune": held_out[::2], "loss": held_out[1::2]}

    def draw(self, seed: jax.Array, step: jax.Array) -> jax.Array:
        """The batch of a step: the same in all arms."""
        key = jax.random.fold_in(jax.random.key(seed), 1)
        context = self.model.context
        return sample_windows(self.text, key, step, batch=self.batch, context=context)

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Mean cross-entropy of the next byte, in nats."""
        return next_token_loss(self.model, params, tokens)

    def init(self, seed: jax.Array) -> Any:
        """The parameters that a run begins with."""
        return init_gpt(self.model)(jax.random.key(seed))

    def train_one(self, tx: optax.GradientTransformation, seed: jax.Array) -> Any:
        """The losses on held-out text after a training."""

        def step(carry: tuple[Any, Any], index: jax.Array) -> tuple[tuple, None]:
            params, state = carry
            gradients = jax.grad(self.loss)(params, self.draw(seed, index))
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = self.init(seed)
        (params, _), _ = jax.lax.scan(
            step, (params, tx.init(params)), jnp.arange(self.steps)
        )
        return {
            name: mean_loss(self.model, params, windows)
            for name, windows in self.held_out.items()
        }

    def train(self, tx: optax.GradientTransformation, seeds: jax.Array) -> Any:
        """The same of several seeds at once."""
        return jax.vmap(functools.partial(self.train_one, tx))(seeds)

    def gradients(self, batches: int) -> Iterator[Any]:
        """Gradients of different batches at the initial parameters of seed 0."""
        params = jax.jit(self.init)(jnp.int32(0))
        gradient = jax.jit(jax.grad(self.loss))
        for step in range(batches):
            yield gradient(params, self.draw(jnp.int32(0), jnp.int32(step)))


def optimizer_of(steps: int) -> Callable[[Any, Any], optax.GradientTransformation]:
    """AdamW with warm-up and cosine decay, and with `smoothing` in its place."""

    def optimizer(smoothing: Any, rate: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.95),
            smoothing,
            optax.add_decayed_weights(0.1, matrices),
            optax.scale_by_schedule(warmup_cosine(1.0, steps // 10, steps)),
            optax.scale(-rate),
        )

    return optimizer


def say(text: str) -> None:
    """Prints now what is done next: it may take a while."""
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison with the options `argv` and returns the exit status."""
    parser = cli.parser("pretrain", __doc__)
    for name, default, about in (
        ("layers", 6, "depth"),
        ("width", 32, "residual stream"),
        ("context", 32, "bytes per window"),
        ("batch", 4, "windows per step"),
        ("steps", 50, "of a training"),
        ("seeds", 8, "that confirm; a multiple of 4"),
        ("batches", 32, "of the depth signal"),
    ):
        about += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=default, help=about)
    parser.add_argument("--alpha", type=float, default=0.5, help="of the window")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)

    say("Reading the source of the Python standard library")
    task = Task(given.layers, given.width, given.context, given.batch, given.steps)
    say(f"Compiling and taking {given.batches} gradients of {given.layers} layers")
    gradients = tqdm(task.gradients(given.batches), "gradients", given.batches)
    signal = gs.diagnostics.depth_signal(gradients, DEPTH)
    say(f"At the start of training\n\n{signal}\n")
    gs.plots.depth_signal(signal)
    plt.savefig(given.out / "depth_signal.png")

    say(f"Comparing trainings of {given.steps} steps; Ctrl-C keeps what is finished")
    result = gs.trial.compare(
        gs.trial.many_seeds(task.train, at_once=4),
        optimizer_of(given.steps),
        DEPTH,
        rates=[1.6e-2, 3.2e-2, 6.4e-2],
        seeds=given.seeds,
        arms={f"window({given.alpha:g})": gs.window(given.alpha)},
        metric="loss",
        tune_metric="to tune",
        path=given.out / "trial.json",
    )
    print(f"\n{result}")
    if not result.is_complete:
        return 130  # what a shell reports after Ctrl-C
    result.plot().savefig(given.out / "trial.png")
    plt.close("all")
    print(f"\nIn {given.out}: trial.json, trial.png, depth_signal.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
