"""The options of `python -m benchmarks.pretrain`, checked before anything runs."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.optimizers import DEFAULT_LEARNING_RATES, DEFAULT_WEIGHT_DECAY


@dataclasses.dataclass(frozen=True)
class Config:
    """What the numbers of a run depend on: the options of the same names."""

    corpus: tuple[str, ...] | None
    layers: int
    width: int
    heads: int
    context: int
    positions: str
    untied: bool
    dtype: str
    remat: bool
    optimizer: str
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    alpha: tuple[float, ...]
    variant: str
    norm_scope: str
    scope: str
    seeds: int
    steps: int
    batch: int
    chunk: int
    eval_every: int
    eval_windows: int


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a run reads and writes its files; no number depends on it."""

    out: Path | None
    checkpoint_dir: Path | None
    checkpoint_every: int


def build_parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--corpus",
        nargs="+",
        metavar="PATH",
        help="text files; whole files are held out for validation, of a lone file its "
        "end (default: the source of the Python standard library)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--layers", type=_positive, default=12, help="depth (default: %(default)s)"
    )
    model.add_argument(
        "--width",
        type=_positive,
        default=48,
        help="residual stream (default: %(default)s)",
    )
    model.add_argument(
        "--heads", type=_positive, default=2, help="of attention (default: %(default)s)"
    )
    model.add_argument(
        "--context",
        type=_positive,
        default=64,
        help="bytes per window (default: %(default)s)",
    )
    model.add_argument(
        "--positions",
        choices=("rotary", "learned"),
        default="rotary",
        help="encoding (default: %(default)s)",
    )
    model.add_argument(
        "--untied", action="store_true", help="head apart from the embedding"
    )
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of activations; parameters are float32 (default: %(default)s)",
    )
    model.add_argument(
        "--remat", action="store_true", help="recompute activations to save memory"
    )

    optimizer = parser.add_argument_group("optimizer, the same for all arms")
    optimizer.add_argument(
        "--optimizer",
        choices=[*DEFAULT_LEARNING_RATES],
        default="adamw",
        help="base (default: %(default)s)",
    )
    optimizer.add_argument(
        "--learning-rate",
        type=_above_zero,
        help=f"peak (default: {_by_optimizer(DEFAULT_LEARNING_RATES)})",
    )
    optimizer.add_argument(
        "--warmup",
        type=_not_negative,
        help="steps of linear rise before the cosine decay to 10 %% "
        "(default: a tenth of --steps)",
    )
    optimizer.add_argument(
        "--weight-decay",
        type=_zero_or_more,
        help="decoupled, of matrices only "
        f"(default: {_by_optimizer(DEFAULT_WEIGHT_DECAY)})",
    )
    optimizer.add_argument(
        "--clip",
        type=_zero_or_more,
        default=1.0,
        help="largest gradient norm over all, 0 for no limit (default: %(default)s)",
    )

    smoothing = parser.add_argument_group("smoothing, one arm per alpha")
    smoothing.add_argument(
        "--alpha",
        type=_unit_interval,
        nargs="+",
        default=(0.0, 0.1, 0.2),
        help="strengths in [0, 1]; the base arm 0 is added where it is missing "
        "(default: 0 0.1 0.2)",
    )
    smoothing.add_argument(
        "--variant",
        choices=("standard", "norm_preserving", "directional"),
        default="standard",
        help="of the smoothing (default: %(default)s)",
    )
    smoothing.add_argument(
        "--norm-scope",
        choices=("param", "block"),
        default="param",
        help="granularity of the variant's norms (default: %(default)s)",
    )
    smoothing.add_argument(
        "--scope",
        choices=("full", "proj"),
        default="full",
        help="all of the blocks, or their linear projections (default: %(default)s)",
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "--seeds",
        type=_positive,
        default=4,
        help="paired, vmapped (default: %(default)s)",
    )
    run.add_argument(
        "--steps",
        type=_positive,
        default=300,
        help="of every arm (default: %(default)s)",
    )
    run.add_argument(
        "--batch",
        type=_positive,
        default=4,
        help="windows per step (default: %(default)s)",
    )
    run.add_argument(
        "--chunk",
        type=_positive,
        default=10,
        help="steps of one arm's turn, one compiled call (default: %(default)s)",
    )
    run.add_argument(
        "--eval-every",
        type=_positive,
        default=50,
        help="steps between evaluations (default: %(default)s)",
    )
    run.add_argument(
        "--eval-windows",
        type=_positive,
        default=128,
        help="of the validation set (default: %(default)s)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        help="directory for pretrain.json and pretrain.png "
        "(default: a new one under runs/)",
    )
    output.add_argument(
        "--checkpoint-dir",
        type=Path,
        help="save there and, if it holds a checkpoint of this run, go on from it",
    )
    output.add_argument(
        "--checkpoint-every",
        type=_positive,
        default=100,
        help="steps between checkpoints (default: %(default)s)",
    )
    return parser


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[Config, Places]:
    """Returns the options in `argv`, or reports what is wrong with them and exits."""
    given = parser.parse_args(argv)
    if given.learning_rate is None:
        given.learning_rate = DEFAULT_LEARNING_RATES[given.optimizer]
    if given.weight_decay is None:
        given.weight_decay = DEFAULT_WEIGHT_DECAY[given.optimizer]
    if given.warmup is None:
        given.warmup = given.steps // 10
    # The base comes first: all differences and relative times are to it.
    given.alpha = tuple(dict.fromkeys((0.0, *given.alpha)))
    given.corpus = None if given.corpus is None else tuple(given.corpus)

    config = Config(**_fields(Config, given))
    for problem in _problems(config):
        parser.error(problem)
    return config, Places(**_fields(Places, given))


def _fields(kind: type, given: argparse.Namespace) -> dict[str, Any]:
    return {
        field.name: getattr(given, field.name) for field in dataclasses.fields(kind)
    }


def _problems(config: Config) -> Iterator[str]:
    """What is wrong with options that are fine one by one."""
    if config.width % config.heads:
        yield (
            f"argument --heads: {config.heads} heads do not divide --width "
            f"{config.width}; with these heads use --width "
            f"{math.ceil(config.width / config.heads) * config.heads}"
        )
    elif config.positions == "rotary" and config.width // config.heads % 2:
        yield (
            "argument --heads: rotary positions turn pairs, and --width "
            f"{config.width} / --heads {config.heads} is the odd number "
            f"{config.width // config.heads}; change one of them, or use "
            "--positions learned"
        )
    if config.warmup >= config.steps:
        yield (
            f"argument --warmup: {config.warmup} steps of warm-up leave none of "
            f"--steps {config.steps} for the decay; use at most --warmup "
            f"{config.steps - 1}"
        )
    if config.optimizer == "sgd" and config.weight_decay:
        yield (
            "argument --weight-decay: sgd has no decoupled weight decay; leave the "
            "option out, or use --optimizer adamw or muon"
        )


def _positive(text: str) -> int:
    return int(_number(text, int, lambda number: number >= 1, "a whole number from 1"))


def _not_negative(text: str) -> int:
    return int(_number(text, int, lambda number: number >= 0, "a whole number from 0"))


def _above_zero(text: str) -> float:
    return _number(
        text, float, lambda number: 0 < number < math.inf, "a number above 0"
    )


def _zero_or_more(text: str) -> float:
    return _number(
        text, float, lambda number: 0 <= number < math.inf, "a number from 0"
    )


def _unit_interval(text: str) -> float:
    return _number(text, float, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def _number(
    text: str,
    kind: Callable[[str], float],
    is_valid: Callable[[float], bool],
    wanted: str,
) -> float:
    with contextlib.suppress(ValueError):
        if is_valid(number := kind(text)):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def _by_optimizer(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
