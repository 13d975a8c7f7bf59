"""What all commands share: a parser whose description is the module's docstring."""

import argparse


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m benchmarks.<command>`."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
