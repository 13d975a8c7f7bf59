"""Writes the numbers and the picture of README and guides, from committed results.

    python -m benchmarks.readme
    python -m benchmarks.readme --check

A page gets its tables between marks such as `<!-- evidence -->` and
`<!-- end of evidence -->`, and the table of operators its costs. Where there is a
result of `python -m benchmarks.on_gpu`, docs/on_gpu.md shows it. With `--check` nothing
is written, and the exit status is 1 if a file is not what the results say.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import signals, trial_rules
from benchmarks.comparison import format_table
from benchmarks.cost.cpu.peers import HOOK, OURS
from benchmarks.cost.cpu.updates import LAYOUTS
from benchmarks.json_files import COST, RESULTS
from benchmarks.on_gpu.report import page
from benchmarks.picture import window_svg
from benchmarks.report.comparisons import (
    base_of,
    best_against_best,
    control_of,
    is_better,
    is_worse,
    window_of,
)
from benchmarks.report.records import Kind, Setting, Source, read_sources
from benchmarks.report.verdicts import Verdict, verdict_of

ROOT = Path(__file__).parent.parent
# Of `python -m benchmarks.on_gpu`, where somebody had a card.
ON_GPU = COST / "gpu_times.json"

NOT_MEASURED = "not measured"
# A row of the table of operators, `| `gs.window(alpha)` | … | 1.3× / 1.2× | … |`.
_ROW = re.compile(r"^\| `gs\.([\w.]+)\(.*$", re.MULTILINE)
_COST = re.compile(rf"\d+\.\d× / \d+\.\d×|{NOT_MEASURED}")
_PART = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

# (case of the compile benchmarks, how the guide calls it).
_COMPILED = (
    ("window, axis 0, float32", "window, stacked, f32 or bf16, layer axis 0, 1 or 2"),
    ("norm_preserving, float32", "norm-preserving window"),
    ("tikhonov(1.0)", "tikhonov, as any matmul"),
    ("window, layers sharded", "window, layer axis over 4 devices, under `jit`"),
    ("window, layers sharded, shard_map", "the same inside `shard_map`"),
    ("step, Adam: base", "Adam step, without smoothing"),
    ("step, Adam", "Adam step with the window"),
    ("step, Adam, one leaf per layer: base", "one leaf per layer, without smoothing"),
    ("step, Adam, one leaf per layer", "one leaf per layer, with the window"),
    ("training step of a GPT: base", "training step of a 2.4B GPT, without smoothing"),
    ("training step of a GPT", "training step of a 2.4B GPT with the window"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    new = written()
    differs = False
    for path, text in new.items():
        if path.exists() and path.read_text() == text:
            print(f"{path.relative_to(ROOT)} says what the results say")
            continue
        differs = True
        if not options.check:
            path.write_text(text)
        says = "differs from the results" if options.check else "is new"
        print(f"{path.relative_to(ROOT)} {says}")
    return 1 if options.check and differs else 0


def read_reports() -> dict[str, Any]:
    """Returns {device: the committed report of `python -m benchmarks.cost`}."""
    return {
        device: json.loads((COST / f"{device}.json").read_text())
        for device in ("cpu", "tpu", "gpu")
    }


def written() -> dict[Path, str]:
    """Returns what the files have to be, by their paths."""
    reports = read_reports()
    of_tasks, of_rules = (
        json.loads((RESULTS / name).read_text())
        for name in ("signals.json", "trial_rules.json")
    )
    texts = {
        "evidence": evidence_text(read_sources(RESULTS)),
        "speed": speed_text(reports),
        "signals": f"\n{signals.table(of_tasks)}\n",
        "rules": f"\n{trial_rules.table(of_rules)}\n",
    }
    guides = ROOT / "docs" / "guides"
    pages = (ROOT / "README.md", guides / "cost.md", guides / "evidence.md")
    new = {page: with_texts(page.read_text(), texts) for page in pages}
    operators = guides / "operators.md"
    new[operators] = with_costs(operators.read_text(), costs(reports["cpu"]))
    new[ROOT / "docs" / "window.svg"] = window_svg()
    if ON_GPU.exists():
        new[ROOT / "docs" / "on_gpu.md"] = page(json.loads(ON_GPU.read_text()))
    return new


def with_texts(page: str, texts: Mapping[str, str]) -> str:
    """Returns the page with each part's text between its marks."""
    return _PART.sub(lambda part: f"{part[1]}{texts[part[2]]}\n{part[3]}", page)


def with_costs(page: str, costs: Mapping[str, str]) -> str:
    """Returns the page with a cost in every row of its table of operators.

    A row gets the first cost of an operator of that name, or what says that there is
    none yet.
    """
    found: dict[str, str] = {}
    for name, cost in costs.items():
        found.setdefault(name.partition("(")[0], cost)

    def with_cost(row: re.Match) -> str:
        return _COST.sub(found.get(row[1], NOT_MEASURED), row[0], count=1)

    return _ROW.sub(with_cost, page)


def costs(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns the cost of every operator, stacked / one leaf per layer."""
    layouts = report.get("operators", {}).get("64 MB float32", {})
    stacked, unrolled = (layouts.get(layout, {}) for layout in LAYOUTS)
    return {
        name: f"{of['median']:.1f}× / {unrolled[name]['median']:.1f}×"
        for name, of in stacked.items()
        if name in unrolled
    }


def evidence_text(sources: Sequence[Source]) -> str:
    """Returns in how many settings something beats the base optimizer."""
    settings = [
        setting
        for source in sources
        for setting in source.settings
        if not setting.is_of_parts and setting.preset == "full"
    ]
    tasks = dict.fromkeys(setting.task for setting in settings)
    rows = [
        (f"`{task}`, {_TASKS[task]}", _window, [s for s in settings if s.task == task])
        for task in tasks
    ]
    rows += [(what, kind, settings) for what, kind in _OVER_ALL.items()]
    columns = ("better", "no difference", "worse", "not finished")
    cells = [[what, *_counts(kind, of)] for what, kind, of in rows]
    # A column that only a gap in the results needs.
    shown = 5 if any(row[-1] != "0" for row in cells) else 4
    table = format_table(
        ["against the plain optimizer", *columns][:shown],
        [row[:shown] for row in cells],
    )
    verdicts = [verdict_of(setting, _window(setting)) for setting in settings]
    return (
        f"{table}\n\nThe window beats the plain optimizer *and* both of the last two "
        f"rows, as it would if neighbors were why it helps, in "
        f"{verdicts.count(Verdict.NEIGHBORS)} of {len(verdicts)} settings."
    )


def _window(setting: Setting) -> Kind:
    window = window_of(setting, 0.2)
    assert window is not None
    return window


def _control(name: str) -> Callable[[Setting], Kind | None]:
    return lambda setting: control_of(setting, _window(setting), name)


_TASKS = {
    "lm": "GPTs on source text",
    "vit": "a Vision Transformer on digits",
    "diffusion": "a U-ViT on digits",
    "rl": "GRPO on sums",
    "reverse": "an encoder that reverses symbols",
}
_OVER_ALL = {
    "`gs.window(0.2)` in **all of these**": _window,
    "updates as small, without coupling": _control("norm_matched"),
    "as much coupling, layers in random order": _control("shuffled_depth"),
}


def _counts(
    kind: Callable[[Setting], Kind | None], settings: Sequence[Setting]
) -> list[str]:
    found = [best_against_best(s, kind(s), base_of(s)) for s in settings]
    better, worse = sum(map(is_better, found)), sum(map(is_worse, found))
    open_ = sum(of is None for of in found)
    counts = (better, len(found) - better - worse - open_, worse, open_)
    return list(map(str, counts))


def speed_text(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns both tables, each with what it depends on."""
    tpu, gpu, cpu = (reports[device] for device in ("tpu", "gpu", "cpu"))
    return "\n\n".join(
        [
            compiled_table(tpu, gpu),
            f"TPU: {_first(tpu)['device']}, {_versions(tpu, 'jax', 'libtpu')}; "
            f"`python -m benchmarks.cost tpu`. GPU: {_first(gpu)['device']}, "
            f"{_versions(gpu, 'jax', 'nvidia-cuda-nvcc-cu12')}; "
            f"`python -m benchmarks.cost gpu`.",
            cpu_table(cpu),
            f"{cpu['machine']['cpus']} cores, {cpu['machine']['platform']}, "
            f"{_versions(cpu, 'jax', 'optax')}, load {cpu['load_before'][0]:.1f} "
            f"before; `python -m benchmarks.cost cpu`.",
        ]
    )


def compiled_table(tpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> str:
    """Returns what the TPU and the GPU compiler make of the main cases."""

    def cells(report: Mapping[str, Any], case: str) -> list[str]:
        result = _first(report)["cases"].get(case)
        if result is None or not result["measures"]:
            return [NOT_MEASURED if result is None else "refused", "", ""]
        measures = result["measures"]
        collectives = measures["collectives"]
        return [
            f"{measures['traffic']:.2f}",
            f"{measures['temporaries']:.2f}",
            str(collectives) if collectives else "",
        ]

    columns = ("moved", "temporaries", "collectives")
    return format_table(
        [
            "",
            *(f"{device}: {name}" for device in ("TPU", "GPU") for name in columns),
        ],
        [[name, *cells(tpu, case), *cells(gpu, case)] for case, name in _COMPILED],
    )


def cpu_table(report: Mapping[str, Any]) -> str:
    """Returns the measured times on CPU that a user asks for first."""

    def times(section: str, *places: Sequence[str], digits: int = 2) -> list[str]:
        return [_time(report, (section, *place), digits) for place in places]

    def of_operators(size: str, layouts: Sequence[str], name: str) -> list[str]:
        return times("operators", *((size, layout, name) for layout in layouts))

    def at_both_sizes(name: str) -> list[str]:
        sizes = ("64 MB float32", "512 MB float32")
        return [time for size in sizes for time in of_operators(size, LAYOUTS, name)]

    peers = (
        *(f"{OURS}: window", "optax: trace"),
        *(f"{HOOK}: window", f"{HOOK}, compiled: window"),
    )
    chains = ("scale_by_adam(), S, lr", "adamw(), S", "lion(), S", "rmsprop(), S")
    deepest = max(report.get("compile", ()), key=int, default="96")
    compiled = ("window", "norm_preserving", "directional, per block")
    (training,) = times("training", ["window"], digits=3)
    (noise,) = times("training", ["base again"], digits=3)
    rows = {
        "window, 64 MB stacked, unrolled, 512 MB stacked, unrolled / `0.9 u`": (
            at_both_sizes("window(0.2)")
        ),
        "norm-preserving, the same": at_both_sizes("window(0.2), norm_preserving"),
        "window, 64 MB bf16 stacked / `0.9 u`": of_operators(
            "64 MB bfloat16", ["stacked"], "window(0.2)"
        ),
        "smoothing after Adam, `adamw()`, `lion()`, `rmsprop()` / without": times(
            "chains", *(("stacked", chain) for chain in chains)
        ),
        "window, 225 MB, one leaf per layer: here, `optax.trace`, a PyTorch hook (in "
        "place), the same under `torch.compile` / `0.9 u`": times(
            "peers", *(("225 MB", "unrolled", who) for who in peers)
        ),
        "update of AdamW, SGD, Muon on the default GPT / without": times(
            "steps",
            *(("default GPT", name, "window") for name in ("adamw", "sgd", "muon")),
        ),
        "training step of the default GPT / without (noise)": [f"{training} ({noise})"],
        f"trace and compile, {deepest} unrolled layers: window, norm-preserving, "
        "directional per block / AdamW": times(
            "compile", *((deepest, name) for name in compiled)
        ),
    }
    return format_table(
        ["time on CPU, as ratio", "median"],
        [[what, ", ".join(found)] for what, found in rows.items()],
    )


def _time(report: Any, place: Sequence[str], digits: int) -> str:
    for key in place:
        if key not in report:
            return NOT_MEASURED
        report = report[key]
    return f"{report['median']:.{digits}f}×"


def _first(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(report["topologies"].values()))


def _versions(report: Mapping[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {report['versions'][name]}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
