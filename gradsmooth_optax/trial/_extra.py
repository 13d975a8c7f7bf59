"""What the extras bring, imported where it is needed."""

from __future__ import annotations

import importlib
from typing import Any


def needs(module: str, extra: str = "trial") -> Any:
    """The module, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`gradsmooth_optax.trial` needs {error.name}, which is not installed. "
            f"Write `pip install 'gradsmooth_optax[{extra}]'`.",
            name=error.name,
        ) from None
