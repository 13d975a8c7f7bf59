"""What to couple: which parameters of a block, and which stacks of a U-ViT as one."""

from collections.abc import Sequence

from benchmarks.comparison import format_table
from benchmarks.report.cells import NOT_RUN, difference_text, level_text
from benchmarks.report.comparisons import (
    base_of,
    best_against_best,
    best_pair,
    is_smoothed,
    kinds,
    window_of,
)
from benchmarks.report.names import metric_text, setting_name
from benchmarks.report.records import Kind, Setting


def parts(settings: Sequence[Setting]) -> str:
    """Returns what coupling one kind of parameters does, or ""."""
    if not settings:
        return ""
    names = list(dict.fromkeys(k.name for s in settings for k in part_kinds(s)))
    rows = [["base", *(_base_text(setting) for setting in settings)]]
    for name in names:
        row = [name]
        for setting in settings:
            kind = next((k for k in part_kinds(setting) if k.name == name), None)
            found = best_against_best(setting, kind, base_of(setting))
            row.append("" if kind is None else difference_text(setting.metric, found))
        rows.append(row)
    header = ["", *(_header(setting) for setting in settings)]
    return (
        "## Which parameters to couple\n\n"
        "The window(0.5) on one kind of parameters of the blocks, everything else as "
        "the base has it: the kernels of attention, those of the MLP, the parameters "
        "of the norms, the biases of projections; *full* is all of them. Minus the "
        "base, best against best. These arms have no controls: what helps here may "
        "be smaller updates of that part.\n\n"
        f"{format_table(header, rows)}"
    )


def part_kinds(setting: Setting) -> list[Kind]:
    """Returns the kinds of a setting of parts, in the order they ran."""
    return [kind for kind in kinds(setting) if is_smoothed(kind)]


def groupings(settings: Sequence[Setting]) -> str:
    """Returns one stack against two, of the settings that have both, or ""."""
    rows, metrics = [], {}
    for setting in settings:
        joined = [
            kind
            for kind in kinds(setting)
            if is_smoothed(kind) and kind.scope.startswith("joined")
        ]
        two, base = window_of(setting, 0.2), base_of(setting)
        for kind in joined:
            found = [best_against_best(setting, kind, of) for of in (base, two)]
            cells = [difference_text(setting.metric, of) for of in found]
            rows.append([setting_name(setting), kind.scope, *cells])
            metrics[metric_text(setting.metric)] = None
    if not rows:
        return ""
    header = ["setting", "grouping", "minus base", "minus two stacks"]
    return (
        "## One stack or two\n\n"
        "The window(0.2) on a U-ViT whose `in_blocks` and `out_blocks` are one stack, "
        "in the roles that both have, without `mid_block` or with it between them, "
        "against the base and against the window on two stacks that leaves "
        f"`mid_block` alone. Metric, best against best: {'; '.join(metrics)}.\n\n"
        f"{format_table(header, rows)}"
    )


def _base_text(setting: Setting) -> str:
    base = base_of(setting)
    arm, _ = best_pair(setting, base, base)
    return NOT_RUN if arm is None else level_text(setting.metric, arm)


def _header(setting: Setting) -> str:
    return f"{setting_name(setting)}: {metric_text(setting.metric)}"
