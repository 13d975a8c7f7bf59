"""Results that no verdict can come from, told as soon as they show."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gradsmooth_optax.trial._arms import PLAIN, Arm
from gradsmooth_optax.trial._protocol import (
    SCREEN,
    Outcome,
    Run,
    Settings,
    value_of,
)


def check_sense(
    settings: Settings, arms: Mapping[str, Arm], outcomes: Mapping[Run, Outcome]
) -> None:
    """Raises for results that no verdict can come from, as soon as they show."""
    *others, latest = outcomes.values()
    for name in (settings.metric, settings.tune_metric):
        _check_key(name, latest)
    if others and latest.metrics:
        earlier = next((of for of in others if of.metrics), latest)
        if earlier.metrics.keys() != latest.metrics.keys():
            raise ValueError(
                f"`train` returned the metrics {sorted(latest.metrics)} now, but "
                f"{sorted(earlier.metrics)} before. Return the same keys every time."
            )
    if settings.metric is None and len(latest.metrics) > 1:
        keys = sorted(latest.metrics)
        raise ValueError(
            f"`train` returns several metrics, {keys}: say which the verdict is about, "
            f"as in `metric={keys[0]!r}`."
        )
    run = [*outcomes][-1]
    alike = [
        value_of(of, settings.tuned_by)
        for other, of in outcomes.items()
        if other[:-1] == run[:-1] and not of.stopped
    ]
    enough = len(settings.seeds_of(run.stage))
    if len(alike) == enough > 1 and math.isfinite(alike[0]) and len(set(alike)) == 1:
        raise ValueError(
            f"`train` returned {alike[0]:.8g} for all of {enough} seeds of {run.arm!r} "
            f"at rate {run.rate:g}: it seems to ignore `seed`, and then more seeds say "
            "nothing. Seed the parameters and the data by it, as in "
            "`jax.random.key(seed)`."
        )
    of_plain = [
        (run, of)
        for run, of in outcomes.items()
        if run.arm == PLAIN and run.stage == SCREEN
    ]
    if len(of_plain) != len(settings.rates) * settings.screen_seeds:
        return
    values = {
        run: value_of(of, settings.tuned_by) for run, of in of_plain if not of.stopped
    }
    if not any(map(math.isfinite, values.values())):
        raise ValueError(
            f"`train` returned nothing finite at any of `rates` {settings.rates}, for "
            f"{settings.screen_seeds} seeds each. They are probably too high, or the "
            f"training is broken at the start; begin with lower ones in another `path`."
        )


def _check_key(name: str | None, outcome: Outcome) -> None:
    if name is not None and outcome.metrics and name not in outcome.metrics:
        raise ValueError(
            f"`train` returned no metric {name!r}, but {sorted(outcome.metrics)}. "
            "Return it in a dict, or name another by `metric` or `tune_metric`."
        )
