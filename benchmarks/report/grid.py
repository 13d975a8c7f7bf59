"""What window(0.2) does in every task with every base optimizer, in one table."""

from collections.abc import Sequence

from benchmarks.comparison import format_table
from benchmarks.report.cells import difference_text
from benchmarks.report.names import metric_text
from benchmarks.report.records import Setting
from benchmarks.report.verdicts import Outcome

_OPTIMIZERS = ("sgd", "adamw", "muon")


def grid(of_all: Sequence[Outcome]) -> str:
    """Returns the table, with a row per task and depth and a column per optimizer."""
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
    kind, verdict, _ = outcome.window
    found = None if kind is None else outcome.differences[kind]
    mark = "†" if kind in outcome.survivors else ""
    return f"{difference_text(outcome.setting.metric, found)}{mark}; {verdict.value}"
