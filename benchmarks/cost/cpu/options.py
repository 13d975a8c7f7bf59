"""How fast smoothing runs and compiles, next to what it is part of and to its peers.

    python -m benchmarks.cost cpu
    python -m benchmarks.cost cpu --preset full
    python -m benchmarks.cost cpu --sections operators chains --megabytes 64

Everything is timed in one process, in turns, as medians of ratios within a turn. Prints
a page of tables, the last one with the bars that speed is held to, and writes a JSON
with all figures. PyTorch twins run where `torch` is installed.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.json_files import COST

SECTIONS = (
    "operators",
    "crossover",
    "chains",
    "steps",
    "training",
    "compile",
    "learning",
    "peers",
)

# Defaults of the options: what takes some ten minutes on two cores, and the whole grid.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "cases": ((64, "float32"), (64, "bfloat16"), (512, "float32")),
        "depths": (12, 48, 96),
        "most_seconds": 15,
    },
    "full": {
        "cases": tuple(
            (megabytes, dtype)
            for megabytes in (1, 8, 64, 512, 1024)
            for dtype in ("float32", "bfloat16")
        ),
        "depths": (12, 24, 48, 96, 200),
        "most_seconds": 60,
    },
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m benchmarks.cost cpu`."""
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        help="what to measure (default: all)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="sizes, dtypes and depths (default: %(default)s)",
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        nargs="+",
        help="of the updates of operators, in place of the preset's",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=("float32",),
        help="of the updates, with --megabytes (default: float32)",
    )
    parser.add_argument(
        "--of-chains",
        type=float,
        default=64,
        metavar="MEGABYTES",
        help="of the updates of chains, steps and crossover (default: %(default)s)",
    )
    parser.add_argument(
        "--of-peers",
        type=float,
        nargs="+",
        default=(64, 225),
        metavar="MEGABYTES",
        help="of the updates of peers (default: 64 225)",
    )
    parser.add_argument(
        "--layers", type=int, default=48, help="of these updates (default: %(default)s)"
    )
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        metavar="LAYERS",
        help="of the compile times, in place of the preset's",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        help="of every comparison, at least 30 of training (default: %(default)s)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=1, help="of compilation (default: 1)"
    )
    parser.add_argument("--out", type=Path, default=COST / "cpu.json")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a bar does not hold"
    )
