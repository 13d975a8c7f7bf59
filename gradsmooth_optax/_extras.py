"""What the extras bring, imported where it is needed."""

from __future__ import annotations

import importlib
from typing import Any


def needs(module: str, extra: str, what: str) -> Any:
    """The module, or an error that says how to install what `what` needs."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # there, but broken
        raise ModuleNotFoundError(
            f"`{what}` needs {package}, which is not installed. Write "
            f'`python -m pip install "gradsmooth_optax[{extra}]"`.',
            name=package,
        ) from None
    return importlib.import_module(module)
