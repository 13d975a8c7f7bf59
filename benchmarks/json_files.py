"""JSON files that every reader takes, and where the committed ones are."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COST = RESULTS / "cost"  # of `python -m benchmarks.cost`
TRIALS = RESULTS / "trials"  # of `python -m benchmarks.evidence`


def write_json(value: Any, path: Path) -> None:
    """Writes JSON that every reader takes: what is not finite becomes null."""
    path.write_text(
        json.dumps(_finite(value), indent=1, allow_nan=False) + "\n", "utf-8"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
