"""How often do the rules of `gradsmooth_optax.trial` err? Simulated, selection inside.

    python -m benchmarks.trial_rules
    python -m benchmarks.trial_rules --simulations 200 --out /tmp/rules.json

Draws whole comparisons from known truths (every arm's loss a parabola in the logarithms
of the rate and of the blocks' own rate, a part of the noise shared by the runs of a
seed), lets `trial`'s own functions search, choose and judge, and counts how often it
says that neighbors help. Beside it stand other rules on the same draws, which one might
have used instead. Writes `benchmarks/results/trial_rules.json` and prints the table.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from tqdm import tqdm

from benchmarks import cli
from benchmarks.comparison import format_table
from benchmarks.json_files import RESULTS, write_json
from benchmarks.provenance import provenance
from gradsmooth_optax.trial._search import Choice, Ladder, choice, points_of_all
from gradsmooth_optax.trial._statistics import (
    HELP,
    LEVEL,
    SAME,
    Contrast,
    contrast,
    findings,
    holm,
)

RATES, BLOCKS = Ladder((0.5, 1.0, 2.0)), Ladder((0.25, 0.5, 1.0))
SCREEN_SEEDS, SEEDS = 4, 12
WINDOWS = ("window(0.2)", "window(0.5)")
KINDS = ("base", "norm-matched", "shuffled")
# Half the width of *the same*, in standard deviations of a run's own noise.
MARGIN = 1.0


class Truth(NamedTuple):
    """What the arms really are; in standard deviations of a run's own noise.

    Attributes:
      about: in words.
      gains: of the windows over the base, of their norm-matched and of their shuffled
        controls over it.
      shift: factors of 2 by which the windows' best rate lies off the base's.
      tails: degrees of freedom of Student's t of the noise.
      diverging: share of the windows' runs that diverge: the worst of them.
      helps: whether neighbors help.
    """

    about: str
    gains: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shift: float = 0.0
    tails: float = math.inf
    diverging: float = 0.0
    helps: bool = False


TRUTHS = (
    Truth("all alike"),
    Truth("all alike, other best rates", shift=0.5),
    Truth("all alike, heavy tails (t, 3)", tails=3),
    Truth("all alike, the windows' worst runs (1 of 10) diverge", diverging=0.1),
    Truth("a smaller step helps: all but the base gain 1.5", (1.5, 1.5, 1.5)),
    Truth("any coupling helps: window and shuffled gain 1.5", (1.5, 0.0, 1.5)),
    Truth("its norms help: window and norm-matched gain 1.5", (1.5, 1.5, 0.0)),
    Truth("neighbors help by 1", (1.0, 0.0, 0.0), helps=True),
    Truth("neighbors help by 1.5", (1.5, 0.0, 0.0), helps=True),
    Truth("neighbors help by 2", (2.0, 0.0, 0.0), helps=True),
    Truth("neighbors help by 3", (3.0, 0.0, 0.0), helps=True),
    Truth("neighbors help by 2, heavy tails", (2.0, 0.0, 0.0), tails=3, helps=True),
)


class Drawn:
    """The runs of one comparison; a run is drawn when it is asked for."""

    def __init__(self, truth: Truth, rng: np.random.Generator):
        self.truth, self.rng = truth, rng
        self.of_seeds = 2 * self._noise(SCREEN_SEEDS + SEEDS)

    def _noise(self, n: int) -> np.ndarray:
        if math.isinf(self.truth.tails):
            return self.rng.normal(size=n)
        # Of variance 1.
        scale = math.sqrt((self.truth.tails - 2) / self.truth.tails)
        return scale * self.rng.standard_t(self.truth.tails, size=n)

    def runs(
        self, arm: str, rate: float, block_rate: float, seeds: slice
    ) -> np.ndarray:
        """Costs of some seeds of an arm."""
        kind, _, name = arm.rpartition(" ")
        is_window = name in WINDOWS
        gain = self.truth.gains[("", *KINDS[1:]).index(kind)] if is_window else 0.0
        best = self.truth.shift if is_window and not kind else 0.0
        of_all = math.log2(rate) - best
        of_blocks = math.log2(rate * block_rate) - best + 1
        mean = 2 * of_all**2 + 3 * of_blocks**2 - gain
        shared = self.of_seeds[seeds]
        own = self._noise(len(shared))
        share = self.truth.diverging if is_window and not kind else 0.0
        diverged = own > -scipy.special.ndtri(share)
        return np.where(diverged, np.inf, mean + shared + own)


def searched(drawn: Drawn, arms: Sequence[str]) -> dict[str, Choice]:
    """Searches the rates of all arms."""
    costs: dict[str, dict[tuple[int, int], float]] = {arm: {} for arm in arms}
    blocks = dict.fromkeys(arms, BLOCKS)
    while any((points := points_of_all(costs, RATES, blocks)).values()):
        for arm, of_arm in points.items():
            for i, j in of_arm:
                runs = drawn.runs(arm, RATES.at(i), BLOCKS.at(j), slice(SCREEN_SEEDS))
                costs[arm][i, j] = float(np.mean(runs))
    return {arm: choice(costs[arm], RATES, BLOCKS) for arm in arms}


class Comparison(NamedTuple):
    """One simulated comparison: {operator: {kind: contrast}} at two rates."""

    at_best: Mapping[str, Mapping[str, Contrast]]
    at_second: Mapping[str, Mapping[str, Contrast]]


def compared(drawn: Drawn) -> Comparison:
    """Simulates one comparison from the search to the contrasts."""
    names = ["base", *(f"{k} {w}".strip() for w in WINDOWS for k in ("", *KINDS[1:]))]
    confirm = slice(SCREEN_SEEDS, None)
    at_best, at_second = {}, {}
    for name, found in searched(drawn, names).items():
        at_best[name] = drawn.runs(name, found.rate, found.block_rate, confirm)
        second = found.rate if found.second_rate is None else found.second_rate
        at_second[name] = drawn.runs(name, second, found.block_rate, confirm)

    def contrasts(costs: Mapping[str, np.ndarray]) -> Any:
        return {
            window: {
                kind: contrast(window, other, costs[window], costs[other])
                for kind, other in zip(
                    KINDS,
                    ("base", *(f"{kind} {window}" for kind in KINDS[1:])),
                    strict=True,
                )
            }
            for window in WINDOWS
        }

    return Comparison(contrasts(at_best), contrasts(at_second))


def ours(of: Comparison) -> bool:
    """Says that neighbors help: the rules of `trial`."""
    return any(f.word == HELP for f in findings(of.at_best, of.at_second, None))


def the_same(of: Comparison) -> bool:
    """Says of the first operator that it does the same, within the margin."""
    return findings(of.at_best, of.at_second, MARGIN)[0].word == SAME


def significant_against_base(of: Comparison) -> bool:
    """Says so where a window is significant against the base and no control is."""
    names = [(window, kind) for window in WINDOWS for kind in ("window", *KINDS[1:])]
    values = []
    for window, kind in names:
        to_base = of.at_best[window]["base"].differences
        to_kind = of.at_best[window][kind if kind in KINDS else "base"].differences
        with np.errstate(invalid="ignore"):
            control_to_base = to_base - to_kind
        values.append(_one_sided(to_base if kind == "window" else control_to_base))
    adjusted = dict(zip(names, holm(values), strict=True))
    return any(
        adjusted[window, "window"] < LEVEL
        and all(adjusted[window, kind] >= LEVEL for kind in KINDS[1:])
        for window in WINDOWS
    )


def better_than_base(of: Comparison) -> bool:
    """Says so where a window is better than the base, whatever the controls do."""
    p = holm([_one_sided(of.at_best[w]["base"].differences) for w in WINDOWS])
    return min(p) < LEVEL


def diverged_dropped(of: Comparison) -> bool:
    """As the rule before, but pairs in which a run diverged are left out."""
    to_base = [of.at_best[window]["base"].differences for window in WINDOWS]
    return min(holm([_one_sided(d[np.isfinite(d)]) for d in to_base])) < LEVEL


def stopped_early(of: Comparison) -> bool:
    """As ours, looked at after every seed from the 4th on, and ended when it holds."""
    for n in range(4, SEEDS + 1):
        p = [
            max(_one_sided(c.differences[:n]) for c in of.at_best[window].values())
            for window in WINDOWS
        ]
        if min(holm(p)) < LEVEL:
            return True
    return False


def _one_sided(differences: np.ndarray) -> float:
    """Two-sided p of the paired t-test, 1 where the mean does not point down."""
    if not np.isfinite(differences).all() or len(differences) < 3:
        return 1.0
    mean = differences.mean()
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    if not mean < 0:
        return 1.0
    return float(2 * scipy.special.stdtr(len(differences) - 1, mean / error))


RULES = {
    "trial": ours,
    "significant against the base, controls not": significant_against_base,
    "better than the base": better_than_base,
    "diverged pairs dropped": diverged_dropped,
    "stopped when significant": stopped_early,
    "does the same (± 1)": the_same,
}


def simulate(truth: Truth, simulations: int, seed: int) -> dict[str, float]:
    """{rule: share of simulated comparisons in which it says so}."""
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(RULES, 0)
    for _ in range(simulations):
        comparison = compared(Drawn(truth, rng))
        for name, rule in RULES.items():
            counts[name] += rule(comparison)
    return {name: count / simulations for name, count in counts.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    parser = cli.parser("trial_rules", __doc__)
    parser.add_argument("--simulations", type=int, default=2000, help="of each truth")
    parser.add_argument("--out", type=Path, default=RESULTS / "trial_rules.json")
    given = parser.parse_args(argv)
    rows = []
    for index, truth in enumerate(tqdm(TRUTHS, unit="truth")):
        shares = simulate(truth, given.simulations, index)
        rows.append(truth._asdict() | {"tails": str(truth.tails), "shares": shares})
    report = {
        "simulations": given.simulations,
        "seeds": SEEDS,
        "screen_seeds": SCREEN_SEEDS,
        **provenance(),
        "truths": rows,
    }
    write_json(report, given.out)
    print(table(report))
    return 0


def table(report: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a report: how often each rule says so."""
    body = [
        [row["about"], *(f"{row['shares'][rule]:.3f}" for rule in RULES)]
        for row in report["truths"]
    ]
    return format_table(["what is true", *RULES], body)


if __name__ == "__main__":
    sys.exit(main())
