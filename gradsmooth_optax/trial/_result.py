"""What came out: a table, a verdict in words, pictures, a paragraph for a paper."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsmooth_optax._extras import needs
from gradsmooth_optax.trial import _store
from gradsmooth_optax.trial._arms import BASE, MATCHED, PLAIN, SHUFFLED, Arm
from gradsmooth_optax.trial._protocol import (
    CONFIRM,
    SCREEN,
    Outcome,
    Run,
    Settings,
    base_to_plain,
    chosen,
    confirmed,
    contrasts_of,
    next_runs,
    screened,
    usual_runs,
)
from gradsmooth_optax.trial._search import Choice, best_point
from gradsmooth_optax.trial._statistics import (
    DEPENDS,
    DIVERGED,
    EXPLORATORY,
    FEWEST_SEEDS,
    HELP,
    NO_HELP,
    SAME,
    Contrast,
    Finding,
    contrast,
    findings,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Within this factor of 1 a block rate is none of its own.
_ALIKE = 1.1

_WITHOUT = {
    "base": "the base",
    MATCHED: "a step of its size without coupling (norm-matched)",
    SHUFFLED: "coupling layers in a random order (shuffled)",
}


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A comparison as far as it came, from `compare` or `read_result`.

    `print(result)` shows the table and the verdict; a notebook shows it as a table.

    Attributes:
      settings: what was asked for.
      arms: {name: arm}, in the order of the table.
      outcomes: {run: outcome} of all that are finished.
      notes: where it ran, and how well a run repeats.

    Example:
      >>> import gradsmooth_optax as gs
      >>> def nothing(*_): ...
      >>> result = gs.trial.compare(
      ...     nothing, nothing, gs.scanned("h/"), rates=[1e-3, 2e-3], dry_run=True)
      >>> result.is_complete, list(result.arms)[:3]
      (False, ['plain', 'base', 'window(0.2)'])
    """

    settings: Settings
    arms: Mapping[str, Arm]
    outcomes: Mapping[Run, Outcome]
    notes: Mapping[str, Any]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to run."""
        return not next_runs(self.settings, self.arms, self.outcomes)

    @property
    def choices(self) -> dict[str, Choice]:
        """{arm: what the screen chose}, once the screen is over."""
        return chosen(self.settings, self.arms, self.outcomes)

    @property
    def findings(self) -> list[Finding]:
        """What is found of every operator whose three contrasts are complete."""
        both = [
            contrasts_of(self.settings, self.arms, self.outcomes, second)
            for second in (False, True)
        ]
        return findings(both[0], both[1], self.settings.margin)

    @property
    def block_rate(self) -> Contrast | None:
        """The base against plain: what a rate of their own for the blocks brings."""
        return base_to_plain(self.settings, self.arms, self.outcomes)

    @property
    def verdict(self) -> str:
        """The result in words, a line for each operator."""
        lines = [self._of_block_rate(), *map(self._of_finding, self.findings)]
        return "\n".join(line for line in lines if line)

    # -- words -------------------------------------------------------------------------

    @property
    def _sign(self) -> float:
        return 1.0 if self.settings.better == "lower" else -1.0

    @property
    def _metric(self) -> str:
        return self.settings.metric or "the metric"

    def _amount(self, c: Contrast, sign: float | None = None) -> str:
        """The mean difference with its interval, in the metric's own sign or another.

        Args:
          c: the contrast.
          sign: of a cost, -1 for a gain; None for the metric's own.
        """
        sign = self._sign if sign is None else sign
        low, high = sorted((sign * c.low, sign * c.high))
        digits = _digits(c)
        return f"{sign * c.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def _of_block_rate(self) -> str:
        c, choices = self.block_rate, self.choices
        if c is None or c.seeds < FEWEST_SEEDS:
            return ""
        factor = f"{choices[BASE].block_rate:.3g}"
        about = f"The blocks' own rate (× {factor})"
        if any(c.diverged):
            return f"{about}: {self._of_diverged(c)}."
        if 1 / _ALIKE < choices[BASE].block_rate < _ALIKE:
            return f"{about}: one rate for all is as good."
        if c.is_better:
            base, plain = (f"{choices[name].rate:.3g}" for name in (BASE, PLAIN))
            return (
                f"{about}: better than one rate for all by {self._amount(c, -1.0)}. "
                f"Begin with both numbers, the rate {base} (instead of {plain}) and "
                f"`gs.scale_over_depth(depth, {factor})` before the weight decay."
            )
        if c.is_worse:
            return f"{about}: worse than one rate for all by {self._amount(c, 1.0)}."
        return (
            f"{about}: not told apart from one rate for all, difference "
            f"{self._amount(c)}."
        )

    def _of_diverged(self, c: Contrast) -> str:
        return (
            f"diverged in {c.diverged[0]} of {c.seeds} ({c.arm}) and "
            f"{c.diverged[1]} of {c.seeds} ({c.reference})"
        )

    def _of_finding(self, found: Finding) -> str:
        name, to_base = found.operator, found.contrasts["base"]
        if found.word == EXPLORATORY:
            return (
                f"{name}: exploratory, {to_base.seeds} seeds give no verdict "
                f"(at least {FEWEST_SEEDS}). Difference to the base "
                f"{self._amount(to_base)}."
            )
        if found.word == DIVERGED:
            told = [
                self._of_diverged(c)
                for c in found.contrasts.values()
                if any(c.diverged)
            ]
            return f"{name}: {'; '.join(told)}. No verdict on the mean."
        if found.word == HELP:
            gains = ", ".join(
                f"than {_WITHOUT[kind]} by {self._amount(c, -1.0)}"
                for kind, c in found.contrasts.items()
            )
            return f"{name}: neighbors help. It is better {gains} (p = {found.p:.2g})."
        if found.word == DEPENDS:
            return (
                f"{name}: depends on the rate. At the best rates the difference to the "
                f"base is {self._amount(to_base)}, at the second best "
                f"{self._amount(found.at_second['base'])}; a contrast changes its sign."
            )
        if found.word == SAME:
            return (
                f"{name}: does the same as the base, within ± {self.settings.margin:g} "
                f"(difference {self._amount(to_base)})."
            )
        if found.word == NO_HELP:
            return f"{name}: worse than the base by {self._amount(to_base, 1.0)}."
        return f"{name}: {self._of_unknown(found)}"

    def _of_unknown(self, found: Finding) -> str:
        to_base = found.contrasts["base"]
        if not to_base.is_better:
            room = f"{max(-to_base.low, 0):.{_digits(to_base)}f}"
            return (
                f"not told apart from the base, difference {self._amount(to_base)}. "
                f"With {to_base.seeds} seeds a gain of up to {room} is not excluded."
            )
        alike = [
            _WITHOUT[kind]
            for kind, c in found.contrasts.items()
            if kind != "base" and not c.is_better
        ]
        missing = [kind for kind in (MATCHED, SHUFFLED) if kind not in found.contrasts]
        text = f"better than the base by {self._amount(to_base, -1.0)}"
        if alike:
            text += f", but not told apart from {' or '.join(alike)}"
        elif missing:
            text += f", but it has no control of the kind {' or '.join(missing)}"
        else:
            text += ", but not after the correction for the number of operators"
        return f"{text}: that neighbors help is not shown."

    def _warnings(self) -> list[str]:
        told = []
        if self.settings.tuned_by == self.settings.metric:
            told.append(
                "Rates were chosen by the same metric as the verdict's, on other seeds "
                "but the same held-out data: give `tune_metric` one of its own."
            )
        outside = [name for name, of in self.choices.items() if not of.inside]
        if outside:
            told.append(
                f"The best rate may lie beyond those tried for {', '.join(outside)}: "
                "begin elsewhere with `rates` or `block_rates`."
            )
        failed = [of for of in self.outcomes.values() if of.error is not None]
        if failed:
            told.append(
                f"{len(failed)} runs raised and count as diverged, the last: "
                f"{failed[-1].error}"
            )
        repeat = self.notes.get("repeat")
        if repeat and repeat["values"][0] != repeat["values"][1]:
            first, again = repeat["values"]
            told.append(
                f"`train` is not deterministic: one run gave {first:.8g} and "
                f"{again:.8g}. Pairs of seeds are worth less for it."
            )
        return told

    def _state(self) -> str:
        done = {
            stage: sum(run.stage == stage for run in self.outcomes)
            for stage in (SCREEN, CONFIRM)
        }
        if self.is_complete:
            return f"{done[SCREEN]} runs to choose rates, {done[CONFIRM]} to confirm"
        screen, confirm = usual_runs(self.settings, self.arms)
        if not self.outcomes:
            return (
                f"Nothing run yet: at least about {screen} runs to choose rates, at "
                f"most {confirm} to confirm"
            )
        return (
            f"NOT COMPLETE: {done[SCREEN]} runs to choose rates so far, "
            f"{done[CONFIRM]} of at most {confirm} to confirm; the same call goes on"
        )

    # -- table -------------------------------------------------------------------------

    def table(self) -> list[dict[str, str]]:
        """A row for every arm: its rates, its metric, its difference to the base."""
        choices = self.choices
        of_arms = confirmed(self.settings, self.arms, self.outcomes)
        base = of_arms.get(BASE)
        so_far = screened(self.settings, self.arms, self.outcomes)
        rows = []
        for name in self.arms:
            row = dict.fromkeys(_COLUMNS, "")
            row["arm"] = name
            rows.append(row)
            if name not in choices:
                if so_far[name]:
                    rates, blocks = self.settings.ladders(self.arms[name])
                    i, j = best_point(so_far[name])
                    row["rate"] = f"{rates.at(i):.3g} so far"
                    row["block rate"] = f"{1.0 if blocks is None else blocks.at(j):.3g}"
                continue
            row["rate"] = f"{choices[name].rate:.3g}"
            row["block rate"] = f"{choices[name].block_rate:.3g}"
            costs = of_arms.get(name)
            if costs is None:
                continue
            finite = costs[np.isfinite(costs)] * self._sign
            if len(finite) < len(costs):
                row["metric"] = f"{len(costs) - len(finite)} of {len(costs)} diverged"
            else:
                row["metric"] = f"{finite.mean():.5g}"
            if base is None or name == BASE:
                continue
            c = contrast(name, BASE, costs, base)
            row |= self._cells(c, "minus base")
        return rows

    def contrasts(self) -> list[dict[str, str]]:
        """A row for every operator against each of its controls."""
        rows = []
        for found in self.findings:
            for kind, c in found.contrasts.items():
                if kind != "base":
                    row = {"contrast": f"{c.arm} minus {c.reference}"}
                    rows.append(row | self._cells(c, "difference"))
        return rows

    def _cells(self, c: Contrast, difference: str) -> dict[str, str]:
        """What a table says of a contrast."""
        cells = dict.fromkeys((difference, "95 %", "p"), "")
        if not math.isnan(c.mean):
            digits = _digits(c)
            ends = sorted((self._sign * c.low, self._sign * c.high))
            cells[difference] = f"{self._sign * c.mean:+.{digits}f}"
            cells["95 %"] = " to ".join(f"{end:+.{digits}f}" for end in ends)
            cells["p"] = f"{c.p:.2g}"
        floored = c.p_flip <= c.p_flip_floor * (1 + 1e-9)
        cells["p of flips"] = f"{'≤ ' if floored else ''}{c.p_flip:.2g}"
        cells["wins"] = f"{c.wins}/{c.seeds}"
        return cells

    def _tables(self) -> list[list[dict[str, str]]]:
        return [rows for rows in (self.table(), self.contrasts()) if rows]

    def _title(self) -> str:
        s, metric = self.settings, self.settings.metric or "The metric"
        return (
            f"Does coupling layers help? {metric}, {s.better} is better; {s.seeds} "
            "paired seeds."
        )

    def __str__(self) -> str:
        if not self.outcomes:
            return f"{self._title()}\n{self._state()}."
        parts = [
            self._title(),
            self._state() + ".",
            *itertools.chain(*map(_as_text, self._tables())),
        ]
        if verdict := self.verdict:
            parts += ["", verdict]
        if told := self._warnings():
            parts += ["", *(f"Note: {text}" for text in told)]
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        tables = "".join(map(_as_html, self._tables() if self.outcomes else []))
        texts = [*self.verdict.splitlines(), *(f"Note: {t}" for t in self._warnings())]
        words = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
        return (
            f"<p><b>{html.escape(self._title())}</b><br>{html.escape(self._state())}."
            f"</p>{tables}{words}"
        )

    @property
    def appendix(self) -> str:
        """A paragraph on method and result for a paper's appendix."""
        s, found = self.settings, self.findings
        told = "; ".join(
            f"{f.operator}: {f.word} (difference to the base "
            f"{self._amount(f.contrasts['base'])}, p = {f.contrasts['base'].p:.2g})"
            for f in found
        )
        operators = sum(
            a.operator is not None and not a.control for a in self.arms.values()
        )
        margin = (
            f" Equivalence is claimed only where the 90 % interval lies within "
            f"±{s.margin:g}, a margin fixed beforehand."
            if s.margin is not None
            else ""
        )
        return (
            f"For every arm the learning rate (started from "
            f"{', '.join(f'{rate:g}' for rate in s.rates)}) and, in all but the arm "
            f"`plain`, a separate factor for the blocks (started from "
            f"{', '.join(f'{rate:g}' for rate in s.block_rates)}) were searched on "
            f"{s.screen_seeds} seeds, extended until worse ones lay on all sides, and "
            f"set to the minimum of a parabola through the logarithms. All arms were "
            f"then run on {s.seeds} other seeds, paired in initialization and data. "
            f"Coupling of neighbors is credited only if it is better than the base, "
            f"than the base's updates at the norms that coupling gives, and than the "
            f"same coupling of layers in a random order, each by a two-sided paired "
            f"t-test at 5 %, with Holm's correction for {operators} operators, and if "
            f"no contrast changes its sign at the second best rate.{margin} "
            f"Result: {told or 'not complete'}."
        )

    # -- pictures and files ------------------------------------------------------------

    def plot(self) -> Figure:
        """Draws the contrasts with their intervals, and the cost of every rate tried.

        Returns:
          A matplotlib Figure of two Axes.

        Raises:
          ValueError: before the first contrast is complete.
          ImportError: without matplotlib.
        """
        rows = {
            f"{c.arm} minus {c.reference}": self._sign * c.differences
            for f in self.findings
            for c in f.contrasts.values()
        }
        if (c := self.block_rate) is not None:
            rows = {f"{c.arm} minus {c.reference}": self._sign * c.differences} | rows
        if not rows:
            raise ValueError(
                "there is no complete contrast to draw yet. Call `compare` again to go "
                "on, or `print(result)` to see how far it is."
            )
        from gradsmooth_optax import plots

        pyplot = needs("matplotlib.pyplot", "plots", "Result.plot")
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(14, 1.6 + 0.5 * len(rows)), width_ratios=(3, 2)
        )
        plots.paired_differences(rows, ax=left)
        left.set_xlabel(
            f"difference of {self._metric} ({self.settings.better} is better)"
        )
        self._draw_rates(right)
        figure.tight_layout(w_pad=10)
        return figure

    def _draw_rates(self, ax: Any) -> None:
        of_arms = screened(self.settings, self.arms, self.outcomes)
        for name, arm in self.arms.items():
            if arm.control is not None:
                continue
            costs = of_arms[name]
            rates, _ = self.settings.ladders(arm)
            best: dict[float, float] = {}
            for (i, _), cost in costs.items():
                rate = rates.at(i)
                best[rate] = min(best.get(rate, math.inf), cost)
            tried = sorted(rate for rate, cost in best.items() if math.isfinite(cost))
            style = {PLAIN: "--", BASE: "-"}.get(name, "-")
            ax.plot(
                tried,
                [self._sign * best[rate] for rate in tried],
                style,
                color="0.3" if name in (PLAIN, BASE) else None,
                marker="o",
                markersize=3,
                label=name,
            )
        ticks = sorted({rate for line in ax.get_lines() for rate in line.get_xdata()})
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks], rotation=45)
        ax.minorticks_off()
        ax.set_xlabel("rate (at its best block rate)")
        ax.set_title("screen: mean over its seeds", size="medium")
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize="small")

    def to_json(self, path: str | Path) -> None:
        """Writes the file that `read_result` reads."""
        _store.write(Path(path), self.settings, self.outcomes, self.notes)


_COLUMNS = (
    *("arm", "rate", "block rate", "metric"),
    *("minus base", "95 %", "p", "p of flips", "wins"),
)


def _filled(rows: list[dict[str, str]]) -> list[str]:
    """The columns in which something stands."""
    return [name for name in rows[0] if any(row[name] for row in rows)]


def _as_text(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a table after an empty one, its first column to the left."""
    names = _filled(rows)
    widths = {n: max(len(n), *(len(row[n]) for row in rows)) for n in names}

    def line(cells: Mapping[str, str]) -> str:
        first, *others = names
        text = [cells[first].ljust(widths[first])]
        return "  ".join([*text, *(cells[n].rjust(widths[n]) for n in others)]).rstrip()

    return ["", line({name: name for name in names}), *map(line, rows)]


def _as_html(rows: list[dict[str, str]]) -> str:
    names = _filled(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row[n])}</td>" for n in names) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _digits(c: Contrast) -> int:
    """Decimals that show two digits of the interval's half width, one of the mean."""
    sizes = ((c.high - c.low) / 2, 1), (abs(c.mean), 0)
    needed = [
        digits - math.floor(math.log10(size))
        for size, digits in sizes
        if math.isfinite(size) and size > 0
    ]
    return min(max([0, *needed]), 9) if needed else 3
