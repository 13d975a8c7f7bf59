"""Language-model pretraining with and without depth smoothing.

    python -m benchmarks.pretrain
    python -m benchmarks.pretrain --optimizer muon --alpha 0 0.2 --layers 24

Trains a byte-level GPT on the source of the Python standard library, or on --corpus,
in one arm per --alpha. The arms share initialization, data order and learning rate,
seed by seed; all seeds of an arm train at once, and the arms take turns. At the end: a
table, a JSON with all numbers and a PNG with the curves.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from benchmarks import checkpoints
from benchmarks.corpus import (
    VOCABULARY,
    Corpus,
    CorpusError,
    load_corpus,
    sample_windows,
    spread_windows,
    unigram_entropy,
)
from benchmarks.gpt import GPT, init_gpt
from benchmarks.interleaving import Evaluate, Plan, Run, Train, new_run, train_in_turns
from benchmarks.json_files import write_json
from benchmarks.next_token import mean_loss, next_token_loss
from benchmarks.optimizers import smoothed_optimizer, warmup_cosine
from benchmarks.pretrain_figures import learning_curves
from benchmarks.pretrain_options import Config, Places, build_parser, parse_options
from benchmarks.pretrain_report import arm_results, results_table
from benchmarks.provenance import provenance, versions
from benchmarks.training import (
    TrainState,
    init_params,
    init_state,
    train_steps,
)

# What a shell reports for a program that Ctrl-C ended.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with the options `argv` and returns the exit status."""
    parser = build_parser(__doc__ or "")
    config, places = parse_options(parser, argv)
    try:
        return run_benchmark(config, places)
    except CorpusError as error:
        parser.error(f"argument --corpus: {error}")
    except checkpoints.CheckpointMismatch as error:
        parser.error(
            f"argument --checkpoint-dir: {error}. Go on with the old options, or name "
            "another directory"
        )
    except UnusableDirectory as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; steps since the last checkpoint are lost")
        return _INTERRUPTED


def run_benchmark(config: Config, places: Places) -> int:
    """Trains all arms, prints the table, writes JSON and PNG; returns the exit status.

    Raises:
      CorpusError: if the corpus cannot be trained on.
      CheckpointMismatch: if the checkpoints are of a run with other options.
      UnusableDirectory: if a directory in `places` cannot be made.
    """
    began = time.perf_counter()
    paths = None if config.corpus is None else [Path(path) for path in config.corpus]
    corpus = load_corpus(paths, shortest=config.context + 1)
    out = places.out or Path(f"runs/pretrain-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    arms = build_arms(config)
    with opened_checkpoints(places.checkpoint_dir) as manager:
        identity = run_identity(config, corpus)
        if manager is not None:
            checkpoints.check_options(manager, identity)
        # Before training, which a place that cannot be written would waste.
        make_directory(out, "--out")

        model = build_model(config)
        seeds = jnp.arange(config.seeds)
        params = init_params(init_gpt(model), seeds)
        print(summary(config, corpus, arms, params), flush=True)

        plan = Plan(config.steps, config.chunk, config.eval_every)
        states = {name: init_state(arm, params) for name, arm in arms.items()}
        run = new_run(states, plan, config.seeds)
        notes: dict[str, Any] = {"versions": versions(), "resumed_at": []}
        save = None
        if manager is not None:
            run, notes = resumed(manager, run, notes)
            save = functools.partial(
                checkpoints.save, manager, options=identity, notes=notes
            )
        trainers = compile_arms(config, model, arms, run.states, seeds, corpus)
        evaluate = build_evaluation(config, model, corpus)
        run = train(run, plan, trainers, evaluate, save, places.checkpoint_every)

    if run.step < config.steps:
        print(
            f"stopped at step {run.step} of {config.steps}: "
            + (
                "the same command goes on from there"
                if manager is not None
                else "nothing is saved; with --checkpoint-dir it could go on from there"
            )
        )
        return _INTERRUPTED
    report = {
        "benchmark": "pretrain",
        "config": dataclasses.asdict(config),
        "corpus": about_corpus(corpus),
        "parameters": num_parameters(params),
        **provenance(),
        # The total is this process's; several took the times of a resumed run.
        "resumed_at": notes["resumed_at"],
        "total_seconds": time.perf_counter() - began,
        "arms": [
            result | {"alpha": alpha}
            for result, alpha in zip(
                arm_results(list(arms), run.curves, plan), config.alpha, strict=True
            )
        ],
    }
    write_results(report, out)
    return 0


def write_results(report: Mapping[str, Any], out: Path) -> None:
    """Prints the table and writes `pretrain.json` and `pretrain.png`."""
    config, arms = report["config"], report["arms"]
    entropy = report["corpus"]["unigram_bits_per_byte"]
    write_json(report, out / "pretrain.json")
    title = (
        f"{config['layers']}-layer GPT on bytes, {config['optimizer']} at "
        f"{config['learning_rate']:g}, {config['seeds']} seeds, {config['variant']} "
        f"window, {config['scope']} scope"
    )
    learning_curves(arms, title, entropy).savefig(out / "pretrain.png")
    print(
        f"\n{results_table(arms)}\n\n"
        f"{config['seeds']} seeds at one learning rate are a look and no evidence: "
        f"smoothing also shrinks the step. Compare at tuned rates, over 16 seeds or "
        f"more.\n"
        f"unigram entropy {entropy:.4f} bits/byte; {report['total_seconds']:.0f} s in "
        f"all\nwrote {out / 'pretrain.json'} and {out / 'pretrain.png'}"
    )


def summary(
    config: Config, corpus: Corpus, arms: Mapping[str, Any], params: Any
) -> str:
    """Returns what is about to run, for people."""
    norms = f", norms per {config.norm_scope}" if config.variant != "standard" else ""
    about = about_corpus(corpus)
    return (
        f"corpus: {about['files']} files, {about['train_bytes']:,} bytes to train on, "
        f"{about['validation_bytes']:,} held out, "
        f"unigram entropy {about['unigram_bits_per_byte']:.3f} bits/byte\n"
        f"model: {config.layers} layers, {num_parameters(params):,} parameters, "
        f"{config.dtype}\n"
        f"arms: {', '.join(arms)}; {config.seeds} seeds each; "
        f"{config.variant} window, {config.scope} scope{norms}"
    )


def about_corpus(corpus: Corpus) -> dict[str, Any]:
    """Returns what the JSON says of a corpus; its entropy is of the validation part."""
    return {
        "files": corpus.num_files,
        "train_bytes": corpus.train.size,
        "validation_bytes": corpus.validation.size,
        "sha256": corpus.sha256,
        "unigram_bits_per_byte": unigram_entropy(corpus.validation),
    }


def num_parameters(params: Any) -> int:
    """Returns the number of parameters of one seed, given those of all seeds."""
    return sum(leaf[0].size for leaf in jax.tree.leaves(params))


class UnusableDirectory(ValueError):
    """A directory that an option names cannot be made; the message says why."""


def make_directory(path: Path, option: str) -> None:
    """Makes a directory and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableDirectory(
            f"argument {option}: {str(path)!r} cannot be used as a directory: "
            f"{error.strerror}; name another one"
        ) from None


def build_model(config: Config) -> GPT:
    """Returns the model that the options ask for."""
    return GPT(
        vocabulary=VOCABULARY,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        context=config.context,
        rotary=config.positions == "rotary",
        tied=not config.untied,
        remat=config.remat,
        dtype=jnp.dtype(config.dtype),
    )


def build_arms(config: Config) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizer of every arm, by the arm's name; the base comes first."""
    schedule = warmup_cosine(config.learning_rate, config.warmup, config.steps)
    return {
        f"α = {alpha}" if alpha else config.optimizer: smoothed_optimizer(
            config.optimizer,
            schedule,
            alpha,
            scope=config.scope,
            variant=config.variant,
            norm_scope=config.norm_scope,
            weight_decay=config.weight_decay,
            clip=config.clip or None,
        )
        for alpha in config.alpha
    }


def run_identity(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Returns what two runs must share for one to go on from the other's checkpoint.

    The corpus counts by its bytes: its files may have moved.
    """
    options = {
        f"--{name.replace('_', '-')}": value
        for name, value in dataclasses.asdict(config).items()
    }
    options["--corpus"] = f"sha256 {corpus.sha256}"
    # As they come back from a checkpoint: tuples as lists.
    return json.loads(json.dumps(options))


@contextlib.contextmanager
def opened_checkpoints(directory: Path | None) -> Iterator[CheckpointManager | None]:
    """Opens the checkpoints of --checkpoint-dir, or nothing where it is not given."""
    if directory is None:
        yield None
        return
    make_directory(directory, "--checkpoint-dir")
    with checkpoints.open_checkpoints(directory) as manager:
        yield manager


def resumed(
    manager: CheckpointManager, run: Run, notes: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    """Returns the newest saved run and its notes, or those given if none is saved."""
    restored = checkpoints.restore(manager, run)
    if restored is None:
        return run, notes
    run, saved = restored
    print(f"resumed at step {run.step}", flush=True)
    if saved["versions"] != notes["versions"]:
        print(
            f"note: the checkpoint was written with {saved['versions']}, this is "
            f"{notes['versions']}: the numbers may differ from an uninterrupted run's"
        )
    return run, notes | {"resumed_at": [*saved["resumed_at"], run.step]}


def compile_arms(
    config: Config,
    model: GPT,
    arms: Mapping[str, optax.GradientTransformation],
    states: Mapping[str, TrainState],
    seeds: jax.Array,
    corpus: Corpus,
) -> dict[str, Train]:
    """Returns what trains each arm, compiled, so that turns take only training time."""
    text = jnp.asarray(corpus.train)
    draw = functools.partial(sample_windows, batch=config.batch, context=config.context)
    loss = functools.partial(next_token_loss, model)

    def compiled(name: str) -> Train:
        steps = train_steps(loss, arms[name], draw, config.chunk)
        executable = steps.lower(
            states[name], seeds, text, np.int32(0), np.int32(0)
        ).compile()
        return lambda state, start, num_steps: executable(
            state, seeds, text, np.int32(start), np.int32(num_steps)
        )

    return {name: compiled(name) for name in tqdm(arms, desc="compiling", leave=False)}


def build_evaluation(config: Config, model: GPT, corpus: Corpus) -> Evaluate:
    """Returns the validation losses of one arm, on windows that all arms share."""
    windows = jnp.asarray(
        spread_windows(corpus.validation, config.eval_windows, config.context)
    )
    return jax.jit(jax.vmap(lambda params: mean_loss(model, params, windows)))


def train(
    run: Run,
    plan: Plan,
    trainers: Mapping[str, Train],
    evaluate: Evaluate,
    save: Callable[[Run], None] | None,
    save_every: int,
) -> Run:
    """Trains to the end, or until Ctrl-C, behind a progress bar.

    Args:
      run: where to start.
      plan: of the whole run.
      trainers: from `compile_arms`.
      evaluate: the validation losses of one arm's parameters.
      save: keeps a run, if anything does.
      save_every: steps between calls of `save`; the last run is always saved.

    Returns:
      The run as far as it came.
    """
    total = plan.steps * len(trainers)
    done = run.step * len(trainers)
    with (
        stop_on_interrupt() as stop_requested,
        tqdm(total=total, initial=done, unit="step", desc="training") as bar,
    ):

        def show(arm: str, steps: int, loss: float) -> None:
            stopping = ", stopping after this round" if stop_requested() else ""
            bar.set_postfix_str(f"{arm}: loss {loss:.3f}{stopping}", refresh=False)
            bar.update(steps)

        before = run.step
        for latest in train_in_turns(run, plan, trainers, evaluate, show):
            run = latest
            stopping = stop_requested()
            due = run.step // save_every > before // save_every
            if save is not None and (due or stopping or run.step == plan.steps):
                save(run)
            if stopping:
                break
            before = run.step
    return run


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a request, which the body asks for.

    So a run stops where all arms have done the same steps. A second Ctrl-C acts at
    once.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set  # Signals reach the main thread only.
        return

    def request(signum: int, frame: Any) -> None:
        requested.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
