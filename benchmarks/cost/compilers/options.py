"""The options of the compile benchmarks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

# Enough to see a regression, in seconds.
QUICK = (
    "window, axis 0, float32",
    "norm_preserving, float32",
    "window, layers sharded",
    "window, layers sharded, shard_map",
    "step, Adam: base",
    "step, Adam",
    "step, Adam, small: base",
    "step, Adam, small",
)


def add_options(
    parser: argparse.ArgumentParser, compiler: str, topologies: Sequence[str]
) -> None:
    """Adds the options of `python -m benchmarks.cost` for a compiler.

    Args:
      parser: to add them to.
      compiler: "tpu" or "gpu".
      topologies: those that are compiled for by default.
    """
    parser.add_argument(
        "--topology",
        action="append",
        help=f"to compile for; may be repeated (default: {' '.join(topologies)})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="only: " + "; ".join(QUICK)
    )
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="cases, such as 'step, Adam*'"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"JSON (default of a whole run: benchmarks/results/cost/{compiler}.json)",
    )
