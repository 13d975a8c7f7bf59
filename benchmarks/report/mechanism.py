"""What was recorded over training, and of which arms it is shown."""

from collections.abc import Sequence

from benchmarks.report.comparisons import (
    arm_at,
    base_of,
    best_rate,
    kinds,
)
from benchmarks.report.records import Arm, Setting

# The order in which quantities are shown; others follow.
_ORDER = (
    *("roughness, before", "roughness, after"),
    *("adjacent_cosine, before", "adjacent_cosine, after"),
    *("line_shape_score", "residual_alignment", "gradient_noise"),
)


def mechanism_arms(setting: Setting) -> list[Arm]:
    """Returns the confirmed arms that recorded a mechanism at the base's best rate.

    Before there is a confirmation, those of the screen.
    """
    base = base_of(setting)
    best = None if base is None else best_rate(setting, base)
    if best is None:
        return []
    for stage in (setting.confirm, setting.screen):
        arms = [arm_at(stage, kind, best.rate) for kind in kinds(setting)]
        recorded = [arm for arm in arms if arm is not None and quantities([arm])]
        if recorded:
            return recorded
    return []


def quantities(arms: Sequence[Arm]) -> list[str]:
    """Returns the names of what was recorded of any of the arms over training."""
    found = {name for arm in arms for name in arm.mechanism} - {"steps"}
    known = [name for name in _ORDER if name in found]
    return known + sorted(found.difference(known))
