"""What smoothing costs: times on the CPU, and what other devices' compilers make of it.

    python -m benchmarks.cost cpu
    python -m benchmarks.cost cpu --only operators chains --check
    python -m benchmarks.cost tpu --quick
    python -m benchmarks.cost gpu --only 'window*'

`cpu` times everything in one process, in turns, as medians of ratios within a turn, and
its last table has the bars that speed is held to. PyTorch twins run where `torch` is
installed. `tpu` and `gpu` compile for chips that need not be there: bytes (by the TPU
compiler's own model), traffic (what kernels read and write) and temporaries of one
device are per byte of its updates, so that one read and one write of all updates is 2;
they exit with 1 if a bar is broken. The committed results are
benchmarks/results/cost/{cpu,tpu,gpu}.json.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cli
from benchmarks.json_files import COST

# The sections of `cpu`.
SECTIONS = ("operators", "crossover", "chains", "steps", "training", "compile")
SECTIONS += ("learning", "peers")
# The cases of `--quick` of a compiler: enough to see a regression, in seconds.
QUICK = (
    *("window, axis 0, float32", "norm_preserving, float32"),
    *("window, layers sharded", "window, layers sharded, shard_map"),
    *("step, Adam: base", "step, Adam", "step, Adam, small: base", "step, Adam, small"),
)

_ENVIRONMENT = {
    # Read by the C library and by OpenMP when a process starts.
    "cpu": {
        # Without these, glibc returns large arrays to the system and their pages are
        # faulted in afresh: most of the time of every update, and all of the noise.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "30000000000",
        "MALLOC_TOP_PAD_": "67108864",
        # Otherwise PyTorch's threads spin while they wait, also when it is jax's turn.
        "OMP_WAIT_POLICY": "PASSIVE",
    },
    # Read by jax and libtpu when they are loaded: no hardware is looked for.
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    },
    "gpu": {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    return run(build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options, with a command for each device."""
    parser = cli.parser("cost", __doc__)
    devices = parser.add_subparsers(dest="device", required=True)

    def add(device: str, about: str, quick: str) -> argparse.ArgumentParser:
        of_device = devices.add_parser(device, help=about, description=about)
        of_device.add_argument("--quick", action="store_true", help=quick)
        of_device.add_argument(
            "--out",
            type=Path,
            help=f"JSON (default of a whole run: {COST.name}/{device}.json)",
        )
        return of_device

    cpu = add("cpu", "times on the CPU", "tiny, to test the command")
    cpu.add_argument("--only", nargs="+", choices=SECTIONS, help="sections")
    cpu.add_argument("--check", action="store_true", help="exit with 1 if a bar fails")
    for device in ("tpu", "gpu"):
        about = f"what the {device.upper()} compiler makes of it, without a chip"
        compiler = add(device, about, f"only: {'; '.join(QUICK)}")
        compiler.add_argument(
            "--only", default="*", metavar="PATTERN", help="cases, as 'step, Adam*'"
        )
        compiler.add_argument(
            "--topology", action="append", help="to compile for; may be repeated"
        )
    return parser


def run(given: argparse.Namespace) -> int:
    """Runs the command with parsed options and returns the exit status."""
    # These import jax, which reads the environment.
    if given.device == "cpu":
        from benchmarks.cost.cpu import command
    else:
        from benchmarks.cost.compilers import command
    return command.run(given)


def set_environment(device: str) -> None:
    """Sets what a device needs; for `cpu` the process starts anew, unless it has it."""
    wanted = _ENVIRONMENT[device]
    is_set = all(os.environ.get(name) == value for name, value in wanted.items())
    os.environ.update(wanted)
    if device == "cpu" and not is_set:
        again = [sys.executable, "-m", "benchmarks.cost", *sys.argv[1:]]
        os.execv(sys.executable, again)


if __name__ == "__main__":
    parsed = build_parser().parse_args()
    set_environment(parsed.device)
    sys.exit(run(parsed))
