"""The tables of a run on a GPU, also of a report read back from JSON."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.comparison import format_table


def page(report: Mapping[str, Any]) -> str:
    """Returns the page of the docs: what ran where and when, and all tables."""
    card = report["card"] or {"name": ", ".join(report["machine"]["devices"])}
    commit = report["commit"] or {"sha": "unknown"}
    packages = ("jax", "jaxlib", "optax", "torch")
    versions = [
        f"{name} {report['versions'][name]}"
        for name in packages
        if name in report["versions"]
    ]
    said = [card["name"]]
    said += [f"driver {card['driver_version']}"] if "driver_version" in card else []
    said += [report["date"][:10], *versions, f"commit `{commit['sha'][:10]}`"]
    return (
        "<!-- Written by `python -m benchmarks.readme`. -->\n\n# Measured on a GPU\n\n"
        f"One process on one card: {', '.join(said)}; `python -m benchmarks.on_gpu`. "
        "Times are medians, in turns with what they are compared with. Donated are the "
        "parameters and states of optimizers, and updates only where that is said.\n\n"
        f"{tables(report)}\n"
    )


def tables(report: Mapping[str, Any]) -> str:
    """Returns Markdown tables of what the report has."""
    return "\n\n".join(_tables(report))


def _tables(report: Mapping[str, Any]) -> Iterator[str]:
    speeds = [
        f"{size} {found['gigabytes_per_second']:,.0f} GB/s"
        for size, found in report["copy"].items()
        if found
    ]
    if speeds:
        yield f"A copy, bytes read and written: {', '.join(speeds)}."
    for case, of_layout in report["operators"].items():
        yield _side_by_side(f"updates of {case}", "/ 0.9 u", of_layout)
    if any(report["peers"].values()):
        yield _side_by_side("beside PyTorch, float32", "/ 0.9 u", report["peers"])
    if any(report["optimizers"].values()):
        yield _side_by_side("optimizer, float32", "/ its base", report["optimizers"])
    if report["training_step"]:
        yield _training_step(report["training_step"])
    if report["training"]:
        yield _training(report["training"])
    if report["skipped"]:
        rows = [[of["group"], of["case"], of["why"]] for of in report["skipped"]]
        yield format_table(["skipped", "case", "why"], rows)


def _side_by_side(
    title: str, ratio: str, columns: Mapping[str, Mapping[str, Any]]
) -> str:
    """One row for each case of any column: its time and what that is compared with."""
    columns = {name: found for name, found in columns.items() if found}
    header, cells = [title], []
    for name, found in columns.items():
        against_copy = any("over_limit" in of for of in found.values())
        header += [f"{name}: ms", ratio, *(["/ copy"] if against_copy else [])]
        cells.append((found, 3 if against_copy else 2))
    rows = []
    for case in dict.fromkeys(name for found in columns.values() for name in found):
        row = [case]
        for found, width in cells:
            row += _times(found[case])[:width] if case in found else [""] * width
        rows.append(row)
    return format_table(header, rows)


def _times(of: Mapping[str, Any]) -> list[str]:
    return [
        f"{of['milliseconds']['median']:.3f}",
        f"{of['ratio']['median']:.2f}",
        f"{of['over_limit']:.2f}" if "over_limit" in of else "",
    ]


def _training_step(found: Mapping[str, Any]) -> str:
    """The training step, whose ratios are close to 1, with their quartiles."""
    rows = []
    for name, of in found.items():
        low, high = of["ratio"]["quartiles"]
        quartiles = f"{low:.3f}-{high:.3f}"
        ratio = f"{of['ratio']['median']:.3f}"
        rows.append([name, _times(of)[0], ratio, quartiles])
        rows[-1].append(f"{of['tokens_per_second']:,.0f}")
    header = ["training step of the GPT", "ms", "/ base", "quartiles", "tokens/s"]
    return format_table(header, rows)


def _training(training: Mapping[str, Any]) -> str:
    """Held-out losses of all arms, and the paired differences."""
    losses, pairs = training["validation_bits_per_byte"], training["differences"]
    rows = [
        [arm, "nan" if None in of else f"{sum(of) / len(of):.4f}"]
        for arm, of in losses.items()
    ]
    seeds, steps = len(training["seeds"]), training["steps"]
    title = f"exploratory: rates untuned, {seeds} seeds, {steps} steps"
    means = format_table([title, "held-out bits per byte"], rows)
    rows = [
        [f"{of['arm']} minus {of['against']}", of["shown"], f"{of['wins']}/{seeds}"]
        for of in pairs
    ]
    header = ["paired by seed", "difference, 95 % t-interval", "seeds it is lower in"]
    return f"{means}\n\n{format_table(header, rows)}"
