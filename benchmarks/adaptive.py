"""Operators that adapt, against a fixed window and tuned AdamW, in pretraining.

    python -m benchmarks.adaptive
    python -m benchmarks.adaptive --seeds 16 --learning-rates 4e-3 8e-3 1.6e-2

The job is that of `python -m benchmarks.pretrain` at its default size. Every method
runs at every learning rate, on the same seeds: same initialization, same data order.
At the end: a table of paired differences at every learning rate and best against best
(the best rate is that of the mean over these same seeds), and a JSON with all numbers.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradsmooth_optax as gs
from benchmarks.comparison import (
    PairedDifference,
    format_difference,
    format_table,
    paired_difference,
    relative_time,
)
from benchmarks.corpus import load_corpus
from benchmarks.interleaving import Plan, new_run
from benchmarks.json_files import write_json
from benchmarks.optimizers import depth_spec, matrices, warmup_cosine
from benchmarks.pretrain import (
    build_evaluation,
    build_model,
    compile_arms,
    summary,
    train,
)
from benchmarks.pretrain_options import Config, build_parser, parse_options
from benchmarks.provenance import provenance
from benchmarks.training import init_params, init_state

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]

BASE = "AdamW"


def methods(alpha: float) -> dict[str, Wrap]:
    """Returns what each method makes of the preconditioner; the base comes first."""
    depth = depth_spec("full")

    def then(operator: Any) -> Wrap:
        return lambda adam: optax.chain(adam, gs.apply_over_depth(depth, operator))

    window = gs.window(alpha)
    return {
        BASE: lambda adam: adam,
        f"window({alpha:g})": then(window),
        f"similarity_window({alpha:g})": then(gs.similarity_window(alpha)),
        "learn_alpha": lambda adam: gs.learn_alpha(adam, depth),
        "learn_operator": lambda adam: gs.learn_operator(adam, depth),
        f"norm_matched(window({alpha:g}))": then(gs.controls.norm_matched(window)),
        f"shuffled(window({alpha:g}))": then(gs.controls.shuffled(window, seed=0)),
    }


def optimizer(wrap: Wrap, rate: float, config: Config) -> optax.GradientTransformation:
    """Returns AdamW as in `benchmarks.pretrain`, with a wrapped preconditioner."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        wrap(optax.scale_by_adam(b2=0.95)),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(warmup_cosine(rate, config.warmup, config.steps)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with the options `argv` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--learning-rates", type=float, nargs="+", metavar="RATE")
    parser.add_argument("--alpha", type=float, default=0.2, help="of the windows")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=Path("results/adaptive.json"))
    options = parser.parse_args(argv)
    rates = tuple(sorted(options.learning_rates or (4e-3, 8e-3, 1.6e-2)))
    wraps = methods(options.alpha)
    if options.methods is not None:
        if unknown := set(options.methods) - set(wraps):
            parser.error(f"argument --methods: {unknown} are not in {list(wraps)}")
        wraps = {k: w for k, w in wraps.items() if k == BASE or k in options.methods}

    config, _ = parse_options(build_parser(""), [])
    config = dataclasses.replace(config, seeds=options.seeds)
    if options.steps is not None:
        config = dataclasses.replace(
            config, steps=options.steps, warmup=options.steps // 10
        )
    report = run(config, wraps, rates)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, options.out)
    print(f"\n{table(report)}\n\ntime per step: {times(report)}\nwrote {options.out}")
    return 0


def run(
    config: Config, wraps: Mapping[str, Wrap], rates: Sequence[float]
) -> dict[str, Any]:
    """Trains every method at every learning rate and returns what was measured."""
    began = time.perf_counter()
    corpus = load_corpus(None, shortest=config.context + 1)
    model, seeds = build_model(config), jnp.arange(config.seeds)
    params = init_params(model, seeds)
    arms = {
        f"{method} at {rate:g}": optimizer(wrap, rate, config)
        for method, wrap in wraps.items()
        for rate in rates
    }
    print(summary(config, corpus, arms, params), flush=True)
    plan = Plan(config.steps, config.chunk, config.steps)
    start = new_run(
        {name: init_state(arm, params) for name, arm in arms.items()},
        plan,
        config.seeds,
    )
    trainers = compile_arms(config, model, arms, start.states, seeds, corpus)
    evaluate = build_evaluation(config, model, corpus)
    end = train(start, plan, trainers, evaluate, None, config.steps)
    if end.step < config.steps:
        raise KeyboardInterrupt
    measured = {}
    for i, name in enumerate(arms):
        state = end.states[name].opt_state
        method = name.split(" at ")[0]
        base = list(arms).index(name.replace(method, BASE))
        measured[name] = {
            "method": method,
            "learning_rate": float(name.split(" at ")[1]),
            "validation_loss": end.curves.validation_loss[i, -1].tolist(),
            "relative_time": relative_time(
                end.curves.seconds[i, 1:], end.curves.seconds[base, 1:]
            ),
            "learned": {
                key: jax.tree.map(np.ndarray.tolist, jax.device_get(found))
                for key in ("alpha", "weights")
                if (found := optax.tree_utils.tree_get(state, key)) is not None
            },
        }
    return {
        "benchmark": "adaptive",
        "config": dataclasses.asdict(config),
        "learning_rates": list(rates),
        **provenance(),
        "total_seconds": time.perf_counter() - began,
        "arms": measured,
    }


def table(report: Mapping[str, Any]) -> str:
    """Returns the table of a report, also as read back from JSON."""
    arms, rates = report["arms"].values(), report["learning_rates"]
    losses: dict[str, dict[float, np.ndarray]] = {}
    for arm in arms:
        loss = np.array(arm["validation_loss"], float)  # null is NaN: it diverged
        losses.setdefault(arm["method"], {})[arm["learning_rate"]] = loss
    base = losses[BASE]
    best = {method: _best(of_method) for method, of_method in losses.items()}
    rows = []
    for method, of_method in losses.items():
        rows.append(
            [
                method,
                *(
                    f"{np.mean(of_method[rate]):.4f}"
                    if method == BASE
                    else _shown(paired_difference(of_method[rate], base[rate]))
                    for rate in rates
                ),
                f"{best[method]:g}",
                "base"
                if method == BASE
                else _shown(
                    paired_difference(of_method[best[method]], base[best[BASE]])
                ),
            ]
        )
    return format_table(
        [
            f"loss of {BASE}, differences of the others (wins)",
            *(f"at {rate:g}" for rate in rates),
            "best rate",
            "best against best",
        ],
        rows,
    )


def times(report: Mapping[str, Any]) -> str:
    """Returns the time per step of every method, as a ratio to the base's."""
    found: dict[str, list[float]] = {}
    for arm in report["arms"].values():
        found.setdefault(arm["method"], []).append(arm["relative_time"])
    return ", ".join(
        f"{method} {np.median(ratios):.2f}×"
        for method, ratios in found.items()
        if method != BASE
    )


def _best(of_method: Mapping[float, np.ndarray]) -> float:
    means = {rate: np.mean(loss) for rate, loss in of_method.items()}
    finite = {rate: mean for rate, mean in means.items() if np.isfinite(mean)}
    return min(finite or means, key=lambda rate: means[rate])


def _shown(difference: PairedDifference) -> str:
    return f"{format_difference(difference)} ({difference.wins}/{difference.num_seeds})"


if __name__ == "__main__":
    sys.exit(main())
