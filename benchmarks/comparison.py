"""Paired comparison of arms that share their seeds, and the table that shows it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class PairedDifference(NamedTuple):
    """What one arm's metric is minus the base's, over paired seeds.

    Attributes:
      mean: mean of the differences; negative where a lower metric is better means
        that the arm is better.
      half_width: of the two-sided t-interval around `mean`; NaN for a single seed.
      wins: seeds in which the arm is lower; a diverged run loses to a finite one.
      num_seeds: number of pairs.
    """

    mean: float
    half_width: float
    wins: int
    num_seeds: int


def paired_difference(
    arm: np.ndarray, base: np.ndarray, confidence: float = 0.95
) -> PairedDifference:
    """Compares two arms seed by seed.

    Seeds that diverged (not finite) are not dropped: they make the mean and its
    interval NaN, since no number describes such a difference.

    Args:
      arm: metric of every seed, lower is better, shape `(S,)`.
      base: the same of the base arm, in the same order of seeds.
      confidence: coverage of the interval.
    """
    arm, base = np.asarray(arm, np.float64), np.asarray(base, np.float64)
    num_seeds = arm.size
    wins = int(np.sum(np.isfinite(arm) & ((arm < base) | ~np.isfinite(base))))
    if not (np.isfinite(arm).all() and np.isfinite(base).all()):
        return PairedDifference(math.nan, math.nan, wins, num_seeds)

    differences = arm - base
    mean = float(np.mean(differences))
    if num_seeds < 2:
        return PairedDifference(mean, math.nan, wins, num_seeds)
    standard_error = np.std(differences, ddof=1) / math.sqrt(num_seeds)
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, num_seeds - 1)
    return PairedDifference(mean, float(quantile * standard_error), wins, num_seeds)


def format_difference(difference: PairedDifference) -> str:
    """Returns the difference for people, such as `-0.0210 ± 0.0055`."""
    if math.isnan(difference.mean):
        return "nan"
    if math.isnan(difference.half_width):
        return f"{difference.mean:+.4f} (one seed)"
    return f"{difference.mean:+.4f} ± {difference.half_width:.4f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns, the first one to the left."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [
        "-" * width if i == 0 else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([line(header), line(rule), *map(line, rows)])
