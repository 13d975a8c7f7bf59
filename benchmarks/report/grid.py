"""What window(0.2) does in every task with every base optimizer, in one table."""

from collections.abc import Sequence

from benchmarks.comparison import format_table
from benchmarks.report.cells import difference_text
from benchmarks.report.names import metric_text
from benchmarks.report.records import Setting
from benchmarks.report.verdicts import Outcome, Verdict

LEGEND = """\
Window(0.2) minus the base over paired seeds, each at its best learning rate, with a
95 % interval and the seeds in which the window is better. **Bold**: the interval
excludes 0; †: also after Holm's correction over all comparisons; ‡: a rate under the
verdict is at an end of those tried. A verdict looks at both controls as well."""

_OPTIMIZERS = ("sgd", "adamw", "muon")


def grid(of_all: Sequence[Outcome]) -> str:
    """Returns the table, with a row per task and depth and a column per optimizer."""
    if not of_all:
        return ""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in of_all:
        setting = outcome.setting
        row = rows.setdefault((_task_text(setting), metric_text(setting.metric)), {})
        row[setting.optimizer] = _cell(outcome)
    return format_table(
        ["task", "metric", *_OPTIMIZERS],
        [
            [*names, *(cells.get(optimizer, "") for optimizer in _OPTIMIZERS)]
            for names, cells in rows.items()
        ],
    )


def _task_text(setting: Setting) -> str:
    preset = "" if setting.preset == "full" else f", {setting.preset}"
    return f"{setting.task}{preset}, {setting.layers} layers"


def _cell(outcome: Outcome) -> str:
    kind, verdict, untuned = outcome.window
    found = None if kind is None else outcome.differences[kind]
    mark = "†" if kind in outcome.survivors else ""
    text = f"{difference_text(outcome.setting.metric, found)}{mark}; {verdict.value}"
    is_settled = verdict is not Verdict.UNFINISHED
    return text + ("‡" if is_settled and untuned else "")
