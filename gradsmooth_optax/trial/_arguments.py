"""The arguments of a comparison, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradsmooth_optax._checks import check_choice, shown
from gradsmooth_optax._depth.specs import as_spec
from gradsmooth_optax.trial._arms import Arm, texts_of
from gradsmooth_optax.trial._protocol import Settings


def settings_of(
    depth: Any,
    arms: Mapping[str, Arm],
    rates: Any,
    seeds: Any,
    screen_seeds: Any,
    block_rates: Any,
    metric: Any,
    tune_metric: Any,
    better: Any,
    margin: Any,
) -> Settings:
    check_choice("better", better, ("lower", "higher"))
    for name, key in (("metric", metric), ("tune_metric", tune_metric)):
        if key is not None and not isinstance(key, str):
            raise TypeError(f"`{name}` must be a name or None, but is {shown(key)}.")
    if tune_metric is not None and metric is None:
        raise ValueError(
            "`tune_metric` is given and `metric` is not. Name both: "
            f"`metric='test', tune_metric={tune_metric!r}`."
        )
    if margin is not None:
        (margin,) = _positive("margin", [margin])
    return Settings(
        rates=_positive("rates", rates),
        block_rates=_positive("block_rates", block_rates),
        seeds=whole_number("seeds", seeds, 2),
        screen_seeds=whole_number("screen_seeds", screen_seeds, 1),
        arms=texts_of(arms),
        metric=metric,
        tune_metric=tune_metric,
        better=better,
        margin=margin,
        depth=repr(as_spec(depth)),
    )


def _positive(name: str, values: Any) -> tuple[float, ...]:
    try:
        found = sorted({float(value) for value in values})
    except (TypeError, ValueError):
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        raise ValueError(
            f"`{name}` must be finite numbers above 0, but is {shown(values)}. Write "
            + {
                "margin": "`margin=0.01`.",
                "rates": "`rates=[1e-3, 2e-3, 4e-3]`.",
                "block_rates": "`block_rates=(1.0, 0.5, 0.25)`.",
            }[name]
        )
    return tuple(found)


def whole_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be a whole number from {least}, but is {shown(value)}."
        )
    return value
