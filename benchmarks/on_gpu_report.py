"""The tables of a run on a GPU, also of a report read back from JSON."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.comparison import format_table


def tables(report: Mapping[str, Any]) -> str:
    """Returns a page of tables of what the report has."""
    return "\n\n".join(_tables(report))


def _tables(report: Mapping[str, Any]) -> Iterator[str]:
    for size, found in report["copy"].items():
        if found:
            yield f"A copy of {size}: {found['gigabytes_per_second']:,.0f} GB/s."
    for case, of_layout in report["operators"].items():
        for layout, found in of_layout.items():
            yield _times(f"{case}, {layout}", "/ 0.9 u", found)
    for where, found in report["optimizers"].items():
        yield _times(f"optimizer, {where}", "/ its base", found)
    for where, found in report["peers"].items():
        yield _times(f"beside PyTorch, {where}", "/ 0.9 u", found)
    if report["training_step"]:
        yield _times("training step", "/ base", report["training_step"])
    if report["training"]:
        yield _training(report["training"])
    if report["skipped"]:
        rows = [[of["group"], of["case"], of["why"]] for of in report["skipped"]]
        yield format_table(["skipped", "case", "why"], rows)


def _times(title: str, ratio: str, found: Mapping[str, Any]) -> str:
    """Times of one group; columns that it does not have are left out."""
    columns = {
        "ms": lambda of: f"{of['milliseconds']['median']:.3f}",
        ratio: lambda of: f"{of['ratio']['median']:.2f}",
        "quartiles": lambda of: "{:.2f}-{:.2f}".format(*of["ratio"]["quartiles"]),
    }
    cases = [*found.values()]
    if any("over_limit" in of for of in cases):
        columns["/ copy"] = lambda of: f"{of['over_limit']:.2f}"
    if any("tokens_per_second" in of for of in cases):
        columns["tokens/s"] = lambda of: f"{of['tokens_per_second']:,.0f}"
    return format_table(
        [title, *columns],
        [
            [name, *(cell(of) for cell in columns.values())]
            for name, of in found.items()
        ],
    )


def _training(training: Mapping[str, Any]) -> str:
    """Held-out losses of all arms and their paired differences."""
    losses = training["validation_bits_per_byte"]
    rows = []
    for arm, of_seeds in losses.items():
        against = {
            pair["against"]: pair["shown"]
            for pair in training["differences"]
            if pair["arm"] == arm
        }
        mean = sum(of_seeds) / len(of_seeds) if None not in of_seeds else float("nan")
        shown = "; ".join(f"{other}: {text}" for other, text in against.items())
        rows.append([arm, f"{mean:.4f}", shown])
    title = (
        f"exploratory: rates untuned, {len(training['seeds'])} seeds, "
        f"{training['steps']} steps"
    )
    return format_table(
        [title, "held-out bits per byte", "minus another arm, 95 % t-interval"], rows
    )
