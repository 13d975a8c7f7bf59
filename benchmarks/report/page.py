"""The report as Markdown."""

import json
from collections.abc import Collection, Mapping, Sequence

from benchmarks.report.comparisons import base_of, confirmed, tuned_rate
from benchmarks.report.records import Setting, Source
from benchmarks.report.summary import by_task, in_short, window_table
from benchmarks.report.tables import (
    REPLICATION_RATE,
    confirm_table,
    grouping_table,
    mechanism_table,
    other_table,
    paper_table,
    replication_table,
    screen_table,
)
from benchmarks.report.verdicts import Outcome, outcomes

THE_PICTURE = """\
Every row is a model trained by one optimizer, every point what coupling neighboring
layers by window(0.2) changes in the metric, with a 95 % interval over {seeds} paired
runs. **Left**: against the same optimizer without it (*base*). **Middle**: against
updates made as small as the window makes them, without any coupling (*norm-matched*).
**Right**: against the same coupling of layers in random order (*shuffled*). Blue is
better, orange worse, gray not told apart from 0. If coupling *neighbors* helped, the
points of a row were blue in all three."""

THE_WORDS = """\
## The words

- **Arm**: a training that differs in its smoothing alone. All arms of a setting have
  the same paired seeds: same initialization, same data (of `rl` the same problems and
  random numbers). **Base**: the arm without smoothing. Every difference is an arm minus
  another over these seeds, with a 95 % t-interval and the seeds in which it is better.
- **Screen**: every arm at several learning rates (factors of two), with a few seeds of
  its own, to find its best. **Confirmed**: run again with fresh seeds, at all rates
  that are best for one of the arms.
- **Best against best**: two arms are compared over the rates that both were confirmed
  at, each at its better one. (The mean over depth, which needs higher rates, and what
  it is compared with have each all of theirs.) This rule was made when the first cells,
  `lm` with AdamW at 6 and 12 layers, had run: a screen of few seeds confuses
  neighboring rates; the differences at the rates of the screen stand beside it in the
  tables of each setting.
- **Norm-matched**: a control. Every tensor of a layer keeps its direction and gets the
  norm that smoothing gives it: as small an update, without the coupling. That is not
  what a lower learning rate gives: the embedding, the head, weight decay and what is
  not coupled keep theirs. **Shuffled**: a control. The same operator over randomly
  permuted layers: coupling, but not of neighbors.
- **Mean over depth**: the far end of coupling, one update for all layers of a stack.
- **Bold**: the interval excludes 0. **†**: also after Holm's correction over all
  differences of main arms to the base; those to the controls are not corrected. **‡**:
  the best rate of an arm under the verdict is at an end of the rates it was tried at.
- What the intervals do not count: all arms are tuned on the held-out data that is
  shown, so levels are optimistic; there is one held-out set, one random order per depth
  and, of `rl`, one start."""

# Every task, for a reader who sees it the first time.
WHAT_IS_TRAINED = """\
## What is trained

- `lm`: a decoder-only GPT, scanned, on the source text of Python's standard library;
  loss on windows of held-out files.
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
  first version with a plain start, it gained nothing at the rates tried by hand.
- `reverse`: the encoder of the paper's one replication, scanned, which reverses random
  symbols; loss on fixed sequences."""

EVERY_SETTING = """\
## Every setting

The numbers of the picture: window(0.2) minus each, in the metric of the task, with the
seeds in which the window is better."""

PARTS = """\
## Which parameters to couple

The window(0.5) on one kind of parameters of the blocks, everything else as the base has
it: the kernels of attention, those of the MLP, the parameters of the norms, the biases
of projections; *full* is all of them. These arms have no controls: what helps here may
be smaller updates of that part. Their numbers are below, under *lm, adamw, parts* and
*vit, adamw, parts*."""

GROUPINGS = """\
## One stack or two

The window(0.2) on a U-ViT whose `in_blocks` and `out_blocks` are one stack, in the
roles that both have, without `mid_block` or with it between them, against the base and
against the window on two stacks that leaves `mid_block` alone, by the denoising loss:
lower is better."""

SHARED = """\
## Is there anything along depth to couple?

`diagnostics.depth_signal` of the blocks' raw gradients along a training of the base
(`python -m benchmarks.signals`, seed 0): what the best linear filter along depth leaves
of the error that the best single factor leaves, with the noise that a momentum of 0.9
leaves, and of single batches (raw); and the mean cosine of neighbors' signals. 1 is:
nothing to couple."""

OF_BEFORE = """\
## Where the numbers come from

The commands are those of the commits that stand with them. Since then
`benchmarks.evidence` is a caller of `gradsmooth_optax.trial`, which searches,
confirms and judges by rules of its own."""


def page(sources: Sequence[Source], figures: Collection[str], signals: str) -> str:
    """Returns the report.

    Args:
      sources: the results.
      figures: file names of the figures.
      signals: the table of `benchmarks.signals`.
    """
    settings = [setting for source in sources for setting in source.settings]
    of_all = outcomes(settings)
    return "\n\n".join(
        [
            "<!-- Written by `python -m benchmarks.report`. -->",
            "# Does depth smoothing help?",
            "![What window(0.2) changes](figures/differences.svg)",
            THE_PICTURE.format(seeds=_seeds(sources, "confirm")),
            by_task(of_all),
            in_short(of_all),
            THE_WORDS,
            WHAT_IS_TRAINED,
            f"{EVERY_SETTING}\n\n{window_table(of_all)}",
            _paper(sources),
            _replication(settings),
            f"{PARTS}\n\n![What coupling a part does](figures/parts.svg)",
            f"{GROUPINGS}\n\n{grouping_table(settings)}",
            f"{SHARED}\n\n{signals}",
            *(_source(source, of_all, figures) for source in sources),
            OF_BEFORE,
            *map(_provenance, sources),
        ]
    )


def _paper(sources: Sequence[Source]) -> str:
    full = [of for of in sources if of.settings[0].preset == "full"]
    settings = [setting for source in full for setting in source.settings]
    sizes = {
        f"{source.settings[0].task}, {', '.join(map(str, of['depths']))} layers of "
        f"width {of['width']}, {of['steps']} steps of {of['batch']} examples": None
        for source in full
        if source.settings[0].task != "reverse"
        for of in [source.config]
    }
    return (
        f"## Beside the paper's own numbers\n\n{paper_table(settings)}\n\n"
        "What differs. *Size*: the paper trains models of up to billions of "
        f"parameters to the end; here {'; '.join(sizes)}. *Data*: the metrics are "
        "alike and not the same (a Fréchet distance here is in the features of a "
        "small classifier of digits, no FID). *Seeds*: the paper's main results are "
        f"single seeds; here are {_seeds(full, 'confirm')} paired ones, with a 95 % "
        "interval. *Tuning*: the paper adds smoothing at the settings of the base "
        "optimizer; here every arm is at its own best learning rate, on the held-out "
        "data that is shown: levels are optimistic, and the intervals do not count "
        "this choice."
    )


def _replication(settings: Sequence[Setting]) -> str:
    (setting,) = (setting for setting in settings if setting.task == "reverse")
    return (
        "## The published replication\n\n"
        "An independent replication of the paper trained a 24-layer encoder to reverse "
        f"a sequence, with AdamW at {REPLICATION_RATE:g} and the window(0.2) on the "
        "projections. Evaluation loss, lower is better, at that rate:\n\n"
        f"{replication_table(setting)}\n\n"
        "The base's best rate here is "
        f"{tuned_rate(setting, base_of(setting)).rate:g}."
    )


def _source(source: Source, of_all: Sequence[Outcome], figures: Collection[str]) -> str:
    parts = [f"## {source.settings[0].run}"]
    for setting in source.settings:
        outcome = next((of for of in of_all if of.setting is setting), None)
        survivors = frozenset() if outcome is None else outcome.survivors
        parts += [
            f"### {setting.name}",
            f"{_verdicts(outcome)}Metric: {setting.metric.text}.{_before(setting)}",
            confirm_table(setting, survivors),
        ]
        if setting.others:
            parts.append(
                "By what else was measured, each at its best rate by that, of those "
                "that both ran at (no correction for this):\n\n" + other_table(setting)
            )
        parts += [
            _details("Screen: mean over seeds at every rate", screen_table(setting)),
            _details(
                "Mechanism at the end of training, at the base's best rate (gradient "
                "noise: variance over M micro-batches over the squared norm of their "
                "mean, M where all is noise)",
                mechanism_table(setting),
            ),
        ]
    for figure, title in (
        (f"{source.stem}-rates.svg", "Metric at every screened rate"),
        (f"{source.stem}-mechanism.svg", "Mechanism over training"),
    ):
        if figure in figures:
            parts.append(f"![{title}](figures/{figure})")
    return "\n\n".join(parts)


def _verdicts(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    window, best = outcome.window, outcome.best
    if best.kind == window.kind:
        return (
            "Verdict on window(0.2), which is the best screened arm too: "
            f"{window.verdict.value}. "
        )
    return (
        f"Verdict on window(0.2): {window.verdict.value}. On the best screened arm, "
        f"{best.kind.name}: {best.verdict.value}. "
    )


def _before(setting: Setting) -> str:
    """What the metrics are before training, where the base has measured it."""
    base = confirmed(setting, base_of(setting))
    before = {} if base is None else base.before
    values = (f"{name} {value:.4f}" for name, value in before.items())
    return f" Before training: {', '.join(values)}." if before else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _provenance(source: Source) -> str:
    """What a file was made with."""
    first = source.settings[0]
    lines = [
        f"**{first.run}**: `python -m benchmarks.evidence --task {first.task} "
        f"--optimizer {first.optimizer} --preset {first.preset}`\n"
    ]
    for sitting in source.sittings:
        modified = ", modified" if sitting["commit"]["modified"] else ""
        commit = f"`{sitting['commit']['sha'][:10]}`{modified}"
        lines.append(f"- {sitting['date']}, commit {commit}")
    lines += [
        f"- seeds: {_seeds([source], 'screen')} to screen, "
        f"{_seeds([source], 'confirm')} to confirm",
        f"- versions: {_pairs(source.versions)}",
        f"- machine: {_pairs(source.machine)}",
        f"- options: {_pairs(source.config)}",
    ]
    return "\n".join(lines)


def _seeds(sources: Sequence[Source], stage: str) -> str:
    settings = [setting for source in sources for setting in source.settings]
    counts = {len(arm.seeds) for of in settings for arm in getattr(of, stage)}
    return " or ".join(map(str, sorted(counts)))


def _pairs(values: Mapping[str, object]) -> str:
    def text(value: object) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return ", ".join(f"{key} {text(value)}" for key, value in values.items())
