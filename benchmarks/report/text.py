"""The report as Markdown, but for its verdict."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.comparison import (
    format_table,
)
from benchmarks.report.cells import NOT_RUN, difference_text, level_text, rate_text
from benchmarks.report.choices import groupings, parts
from benchmarks.report.comparisons import (
    arm_at,
    at_base_rate,
    at_screened_rates,
    base_of,
    best_against_best,
    best_pair_by,
    confirmed,
    control_of,
    difference,
    is_base,
    kinds,
    mean_of,
    preserving_of,
    tuned_rate,
    window_of,
)
from benchmarks.report.grid import grid
from benchmarks.report.headline import headline
from benchmarks.report.mechanism import mechanism_arms, quantities
from benchmarks.report.names import metric_text, run_name, setting_name
from benchmarks.report.published import paper, replication
from benchmarks.report.records import Kind, Setting, Source
from benchmarks.report.verdicts import CONTROLS, Judgment, Outcome, Verdict, outcomes


def report(sources: Sequence[Source], figures: Iterable[str], signals: str = "") -> str:
    """Returns the text of the report.

    Args:
      sources: the results.
      figures: file names of the figures there are.
      signals: the table of `benchmarks.signals`.
    """
    settings = [s for source in sources for s in source.settings]
    judged = [setting for setting in settings if not setting.is_of_parts]
    of_all = outcomes(judged)
    figures = set(figures)
    found = [
        "<!-- Written by `python -m benchmarks.report`. -->",
        "# Does depth smoothing help?",
        headline(of_all),
        "## Every setting",
        WHAT_IS_TRAINED,
        HOW_TO_READ,
        grid(of_all),
        summary(of_all),
        _figure("differences.svg", "Best against best, with intervals", figures),
        mean_over_depth(judged),
        paper(sources),
        replication(judged),
        parts([setting for setting in settings if setting.is_of_parts]),
        _figure("parts.svg", "What coupling a part does, with intervals", figures),
        groupings(judged),
        what_is_shared(signals),
        *(_source_part(source, of_all, figures) for source in sources),
        "## Where the numbers come from",
        OF_BEFORE,
        provenance(sources),
    ]
    return "\n\n".join(part for part in found if part) + "\n"


def what_is_shared(signals: str) -> str:
    """Returns what is along depth to couple, or nothing where it was not measured."""
    if not signals:
        return ""
    return f"{SHARED}\n\n{signals}"


SHARED = """\
## Is there anything along depth to couple?

`diagnostics.depth_signal` of the blocks' raw gradients along a training of the base
(`python -m benchmarks.signals`, seed 0): what the best linear filter along depth leaves
of the error that the best single factor leaves, with the noise that a momentum of 0.9
leaves, and of single batches (raw); and the mean cosine of neighbors' signals. 1 is:
nothing to couple."""

OF_BEFORE = """\
The commands are those of the commits that stand with them. Since then
`benchmarks.evidence` is a caller of `gradsmooth_optax.trial`, which searches,
confirms and judges by rules of its own."""

WHAT_IS_TRAINED = """\
- `lm`: a decoder-only GPT, scanned, on the source text of Python's standard library;
  loss on windows of held-out files.
- `reverse`: the encoder of the paper's one replication, scanned, which reverses random
  symbols; loss on fixed sequences.
- `vit`: a Vision Transformer in Flax NNX, one module per layer, on scikit-learn's 8 × 8
  digits, half of them shifted by a pixel; loss and accuracy on held-out digits.
- `diffusion`: a U-ViT with long skips, one module per layer, that predicts the noise in
  these digits; loss on held-out digits, and the Fréchet distance to them of images by a
  deterministic sampler, in the features of a fixed small classifier. After so short a
  training these are strokes, few of them digits. Its layers are two stacks and a block
  between them, which is coupled only where an arm says so.
- `rl`: GRPO of a GPT on sums of octal numbers with a checked answer; the probability
  that an answer to a held-out problem is right, and the mean reward. All seeds begin at
  one model, which learned by supervision from part of the problems and then imitated
  careless answers. That was chosen so that there is something for GRPO to gain: in a
  first version with a plain start, it gained nothing at the rates tried by hand."""

HOW_TO_READ = """\
Every difference is an arm minus the base optimizer without smoothing, over fresh paired
seeds (same initialization, same data; of `rl` the same problems and random numbers),
with a 95 % t-interval and the seeds in which the arm is better. *Best against best*: a
screen on other seeds finds every arm's best learning rate (factors of two), the arms
are run at all rates that are best for one of them, and two arms are compared over the
rates that both ran at, each at its better one. (The mean over depth, which needs higher
rates, and what it is compared with have each all of theirs.) This rule was made when
the first cells, `lm` with AdamW at 6 and 12 layers, had run: a screen of few seeds
confuses neighboring rates; the differences at the rates of the screen stand beside it
in the tables of each setting. All arms are tuned on the held-out data that is shown, so
levels are optimistic. The intervals count neither this choice, nor that there is one
held-out set, one random order per depth and, of `rl`, one start. **Bold**: the interval
excludes 0. †: also after Holm's correction over all differences of the table of
settings; those to the controls are not corrected. A verdict is on one arm against the
base, against its *norm-matched* control (every tensor of a layer keeps its direction
and gets the norm that smoothing gives it: as small an update, without the coupling) and
against its *shuffled* control (the same operator over randomly permuted layers:
coupling, but not of neighbors). Smaller updates of the blocks are not what a lower
learning rate gives: the embedding, the head, weight decay and what is not coupled keep
theirs. ‡: the best rate of an arm under the verdict is at an end of the rates it was
tried at."""


# ── the summary ──────────────────────────────────────────────────────────────


def summary(of_all: Sequence[Outcome]) -> str:
    """Returns the table with one row per setting."""
    if not of_all:
        return ""
    metrics = {outcome.setting.metric for outcome in of_all}
    header = [
        "setting",
        *(["metric"] if len(metrics) > 1 else []),
        "base (rate)",
        "window(0.1)",
        "window(0.2)",
        "norm-preserving",
        "mean over depth",
        "verdict on window(0.2)",
        "best screened arm",
    ]
    rows = []
    for outcome in of_all:
        name, *cells = _summary_row(outcome)
        metric = [metric_text(outcome.setting.metric)] if len(metrics) > 1 else []
        rows.append([name, *metric, *cells])
    table = format_table(header, rows)
    if len(metrics) > 1:
        return table
    return f"Metric: {metric_text(of_all[0].setting.metric)}.\n\n{table}"


def _summary_row(outcome: Outcome) -> list[str]:
    setting = outcome.setting
    base = base_of(setting)
    level = level_text(setting.metric, confirmed(setting, base))
    if base is not None and level != NOT_RUN:
        level += f" ({rate_text(setting, base)})"
    columns = (
        *(window_of(setting, 0.1), window_of(setting, 0.2)),
        *(preserving_of(setting), mean_of(setting)),
    )
    return [
        setting_name(setting),
        level,
        *(_difference_text(outcome, kind) for kind in columns),
        _verdict_text(outcome.window),
        _best_text(outcome, columns),
    ]


def _difference_text(outcome: Outcome, kind: Kind | None) -> str:
    found = None if kind is None else outcome.differences[kind]
    mark = "†" if kind in outcome.survivors else ""
    return difference_text(outcome.setting.metric, found) + mark


def _verdict_text(judgment: Judgment) -> str:
    is_settled = judgment.verdict is not Verdict.UNFINISHED
    return judgment.verdict.value + ("‡" if is_settled and judgment.untuned else "")


def _best_text(outcome: Outcome, columns: Sequence[Kind | None]) -> str:
    """The arm, its difference if no column has it, and its verdict if none has it."""
    best = outcome.best.kind
    if best is None:
        return NOT_RUN
    if best == outcome.window.kind:
        return best.name
    parts = [] if best in columns else [_difference_text(outcome, best)]
    if parts != [NOT_RUN]:
        parts.append(_verdict_text(outcome.best))
    return f"{best.name}: {'; '.join(parts)}"


def mean_over_depth(settings: Sequence[Setting]) -> str:
    """Returns what the far end does, where no layer has an update of its own, or ""."""
    rows = []
    for setting in settings:
        base, mean = base_of(setting), mean_of(setting)
        control = control_of(setting, mean, "norm_matched")
        pairs = ((mean, base), (mean, control), (control, base))
        if best_against_best(setting, mean, base) is not None:
            found = (best_against_best(setting, *pair) for pair in pairs)
            cells = (difference_text(setting.metric, of) for of in found)
            rows.append([setting_name(setting), *cells])
    if not rows:
        return ""
    header = ["setting", "mean over depth minus base", "minus norm-matched"]
    return (
        "## The mean over depth\n\n"
        "The far end of coupling: one update for all layers of a stack. Its norm-"
        "matched control has updates as small, each layer in its own direction.\n\n"
        f"{format_table([*header, 'norm-matched minus base'], rows)}"
    )


# ── one file ─────────────────────────────────────────────────────────────────


def _source_part(source: Source, of_all: Sequence[Outcome], figures: set[str]) -> str:
    first = source.settings[0]
    found = [f"## {run_name(first)}"]
    for setting in source.settings:
        verdicts = [f"{_verdicts(o)} " for o in of_all if o.setting is setting]
        found += [
            f"### {setting_name(setting)}",
            f"{''.join(verdicts)}Metric: {metric_text(setting.metric)}."
            f"{_before(setting)}",
            confirm_table(setting),
            other_table(setting),
            _details(
                "Screen: mean over its seeds at every rate", screen_table(setting)
            ),
            _details(
                "Mechanism at the end of training, at the base's best rate (gradient "
                "noise: variance over M micro-batches over the squared norm of their "
                "mean, M where all is noise)",
                mechanism_table(setting),
            ),
        ]
    found += [
        _figure(f"{source.stem}-rates.svg", "Metric at every screened rate", figures),
        _figure(f"{source.stem}-mechanism.svg", "Mechanism over training", figures),
        _figure(
            f"{source.stem}-samples.png",
            "Digits that were held out, and samples of trained models from the same "
            "noise (python -m benchmarks.samples)",
            figures,
        ),
    ]
    return "\n\n".join(part for part in found if part)


def _before(setting: Setting) -> str:
    """What the metrics are before training, where the base has measured it."""
    base = confirmed(setting, base_of(setting))
    if base is None or not base.before:
        return ""
    values = (
        f"{name} {'not finite' if value is None else f'{value:.4f}'}"
        for name, value in base.before.items()
    )
    return f" Before training: {', '.join(values)}."


def _verdicts(outcome: Outcome) -> str:
    window, best = outcome.window, outcome.best
    if best.kind is None:
        return f"Verdict on window(0.2): {window.verdict.value}."
    if best.kind == window.kind:
        return (
            "Verdict on window(0.2), which is the best screened arm too: "
            f"{window.verdict.value}."
        )
    return (
        f"Verdict on window(0.2): {window.verdict.value}. On the best screened arm, "
        f"{best.kind.name}: {best.verdict.value}."
    )


def confirm_table(setting: Setting) -> str:
    """Returns the table of the confirmed arms, or why there is none."""
    if not setting.confirm:
        return "The confirmation has not run."
    base = base_of(setting)
    header = ["arm", "best rate", "metric there", "minus base at base's best rate"]
    header += ["at the screen's rates", "best against best"]
    header += ["against norm-matched", "against shuffled"]
    there = {arm.kind for arm in setting.confirm}
    metric, rows = setting.metric, []
    for kind in filter(there.__contains__, kinds(setting)):
        row = [kind.name, rate_text(setting, kind)]
        row += [level_text(metric, confirmed(setting, kind))]
        if not is_base(kind):
            found = [at_base_rate(setting, kind), at_screened_rates(setting, kind)]
            found += [best_against_best(setting, kind, base)]
            row += [difference_text(metric, of) for of in found]
            row += [_control_text(setting, kind, control) for control in CONTROLS]
        rows.append(row + [""] * (len(header) - len(row)))
    return format_table(header, rows)


def other_table(setting: Setting) -> str:
    """Returns the same arms by the metrics that they were not tuned by, or ""."""
    if not setting.others or not setting.confirm:
        return ""
    base, there = base_of(setting), {arm.kind for arm in setting.confirm}
    rows = []
    for kind in filter(there.__contains__, kinds(setting)):
        row = [kind.name]
        for metric in setting.others:
            arm, of_base = best_pair_by(setting, kind, base, metric)
            rates = [f"{of.learning_rate:g}" for of in (arm, of_base) if of is not None]
            row += [level_text(metric, arm), " and ".join(dict.fromkeys(rates)), ""]
            if not is_base(kind):
                row[-1] = difference_text(metric, difference(arm, of_base))
        rows.append(row)
    header = ["arm"]
    for metric in setting.others:
        header += [metric_text(metric), "at rate (and the base's)", "minus base"]
    return (
        "By what else was measured, each at its best rate by that, of those that both "
        f"ran at (no correction for this):\n\n{format_table(header, rows)}"
    )


def _control_text(setting: Setting, kind: Kind, control: str) -> str:
    """A kind against its own control, or shuffled against norm-matched, else empty."""
    other = control_of(setting, kind, control)
    found = best_against_best(setting, kind, other)
    # Controls need not share a rate.
    if other is None or (found is None and kind.control is not None):
        return ""
    return difference_text(setting.metric, found)


def screen_table(setting: Setting) -> str:
    """Returns the mean of every screened arm at every rate, the best in bold."""
    rates = sorted({arm.learning_rate for arm in setting.screen})
    rows = []
    for kind in kinds(setting):
        tuned = tuned_rate(setting, kind)
        cells = []
        for rate in rates:
            arm = arm_at(setting.screen, kind, rate)
            text = "" if arm is None else level_text(setting.metric, arm)
            is_best = tuned is not None and tuned.rate == rate
            cells.append(f"**{text}**" if is_best else text)
        if any(cells):
            end = "yes" if tuned is not None and tuned.at_an_end else ""
            rows.append([kind.name, *cells, end])
    if not rows:
        return ""
    header = ["arm", *(f"{rate:g}" for rate in rates), "best at an end of its rates"]
    return format_table(header, rows)


def mechanism_table(setting: Setting) -> str:
    """Returns what was last recorded of every arm at the base's best rate."""
    arms = mechanism_arms(setting)
    names = quantities(arms)
    rows = [
        [arm.kind.name, *(_last(arm.mechanism.get(name)) for name in names)]
        for arm in arms
    ]
    header = ["arm", *(name.replace("_", " ") for name in names)]
    return format_table(header, rows) if names else ""


def _last(values: np.ndarray | None) -> str:
    if values is None or not values.size or not math.isfinite(values[-1]):
        return ""
    return f"{values[-1]:.3g}"


# ── provenance ───────────────────────────────────────────────────────────────


def provenance(sources: Sequence[Source]) -> str:
    """Returns what every file was made with."""
    return "\n\n".join(_provenance(source) for source in sources)


def _sitting(sitting: Mapping[str, Any]) -> str:
    commit = "unknown"
    if sitting["commit"] is not None:
        modified = ", modified" if sitting["commit"]["modified"] else ""
        commit = f"`{sitting['commit']['sha'][:10]}`{modified}"
    return f"{sitting['date']}, commit {commit}"


def _provenance(source: Source) -> str:
    first = source.settings[0]
    lines = [
        f"**{run_name(first)}**: `python -m benchmarks.evidence --task {first.task} "
        f"--optimizer {first.optimizer} --preset {first.preset}`",
        *(f"- {_sitting(sitting)}" for sitting in source.sittings),
        f"- seeds: {_seeds(source, 'screen')} to screen, "
        f"{_seeds(source, 'confirm')} to confirm",
        f"- versions: {_pairs(source.versions)}",
        f"- machine: {_pairs(source.machine)}",
        f"- options: {_pairs(source.config)}",
    ]
    return "\n".join([lines[0], "", *lines[1:]])


def _seeds(source: Source, stage: str) -> str:
    counts = {
        len(arm.seeds) for setting in source.settings for arm in getattr(setting, stage)
    }
    return " or ".join(map(str, sorted(counts))) or "none yet"


def _pairs(values: Mapping[str, object]) -> str:
    def text(value: object) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return ", ".join(f"{key} {text(value)}" for key, value in values.items())


# ── parts ────────────────────────────────────────────────────────────────────


def _details(title: str, body: str) -> str:
    if not body:
        return ""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _figure(file: str, title: str, figures: set[str]) -> str:
    return f"![{title}](figures/{file})" if file in figures else ""
