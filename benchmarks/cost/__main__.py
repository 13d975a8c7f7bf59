"""What smoothing costs: times on the CPU, and what other devices' compilers make of it.

    python -m benchmarks.cost cpu
    python -m benchmarks.cost tpu --quick
    python -m benchmarks.cost gpu --only 'window*'

`python -m benchmarks.cost cpu --help` says what is measured, and lists the options. The
committed results are benchmarks/results/cost/{cpu,tpu,gpu}.json.
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from benchmarks.cost.compilers import gpu, tpu
from benchmarks.cost.compilers import options as compiler_options
from benchmarks.cost.cpu import options as cpu_options
from benchmarks.cost.environment import set_environment

_COMPILERS = {"tpu": tpu, "gpu": gpu}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    return run(build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options, with a command for each device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    devices = parser.add_subparsers(dest="device", required=True)

    def described_by(module: ModuleType, device: str) -> argparse.ArgumentParser:
        description = module.__doc__ or ""
        return devices.add_parser(
            device,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    cpu_options.add_options(described_by(cpu_options, "cpu"))
    for device, compiler in _COMPILERS.items():
        compiler_options.add_options(
            described_by(compiler, device), device, compiler.TOPOLOGIES
        )
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs the command with parsed options and returns the exit status."""
    # These import jax.
    if options.device == "cpu":
        from benchmarks.cost.cpu import command

        return command.run(options)
    from benchmarks.cost.compilers import command

    compiler = _COMPILERS[options.device]
    return command.run(
        options.device,
        options,
        compiler.TOPOLOGIES,
        compiler.devices_of,
        compiler.measure,
    )


if __name__ == "__main__":
    parsed = build_parser().parse_args()
    set_environment(parsed.device)
    sys.exit(run(parsed))
