"""Writes what the README says of speed and of evidence, from the committed results.

    python -m benchmarks.readme
    python -m benchmarks.readme --check

Replaces the costs in the table of operators, and what is between
`<!-- speed -->` and `<!-- end of speed -->`, and between the same marks of evidence.
With `--check` nothing is written, and the exit status is 1 if the README says something
else than the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison import format_table
from benchmarks.json_files import RESULTS
from benchmarks.report.grid import LEGEND, grid
from benchmarks.report.headline import in_short
from benchmarks.report.records import Source, read_sources
from benchmarks.report.verdicts import outcomes
from benchmarks.speed.peers import HOOK, OURS

ROOT = Path(__file__).parent.parent

# The rows of the table of operators, by their names in the results.
OPERATORS = (
    "window(0.2)",
    "gaussian(1.0)",
    "tikhonov(1.0)",
    "ema(0.5)",
    "laplacian(0.2)",
    "mean_over_depth()",
    "similarity_window(0.2)",
    "repeat(window(0.2), 8)",
    "controls.norm_matched(window(0.2))",
    "controls.shuffled(window(0.2), 0)",
)
_COST = re.compile(r"\d+\.\d× / \d+\.\d×")
_PARTS = {
    part: re.compile(f"(<!-- {part} -->\n).*?(<!-- end of {part} -->)", re.DOTALL)
    for part in ("speed", "evidence")
}

# (case of the compile benchmarks, how the README calls it).
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
    path = ROOT / "README.md"
    old = path.read_text()
    reports = {
        name: json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("speed", "tpu_compile", "gpu_compile")
    }
    new = written(old, reports, read_sources(RESULTS))
    if new == old:
        print("README.md says what the results say")
        return 0
    if not options.check:
        path.write_text(new)
    print(f"README.md {'differs from the results' if options.check else 'is new'}")
    return 1 if options.check else 0


def written(
    readme: str, reports: Mapping[str, Mapping[str, Any]], sources: Sequence[Source]
) -> str:
    """Returns the README with what the reports and sources say in its places."""
    found = costs(reports["speed"])
    before, heading, rest = readme.partition("## Which operator\n")
    section, next_heading, after = rest.partition("\n## ")
    cells = iter(found[name] for name in OPERATORS)
    section = _COST.sub(lambda _: next(cells), section)
    if next(cells, None) is not None:
        raise ValueError("README.md has fewer rows with a cost than there should be")
    readme = before + heading + section + next_heading + after
    texts = {"speed": speed_text(reports), "evidence": evidence_text(sources)}
    for part, text in texts.items():
        readme = _PARTS[part].sub(
            lambda at, text=text: f"{at[1]}{text}\n{at[2]}", readme
        )
    return readme


def costs(speed: Mapping[str, Any]) -> dict[str, str]:
    """Returns the cost of every operator, stacked / one leaf per layer."""
    stacked, unrolled = speed["operators"]["64 MB float32"].values()
    return {
        name: f"{of['median']:.1f}× / {unrolled[name]['median']:.1f}×"
        for name, of in stacked.items()
    }


def evidence_text(sources: Sequence[Source]) -> str:
    """Returns the verdict of the report in short, and the whole grid."""
    settings = [setting for source in sources for setting in source.settings]
    of_all = outcomes([setting for setting in settings if not setting.is_of_parts])
    return f"{in_short(of_all)}\n\n{LEGEND}\n\n{grid(of_all)}"


def speed_text(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns both tables, each with what it depends on."""
    tpu, gpu, cpu = (reports[k] for k in ("tpu_compile", "gpu_compile", "speed"))
    return "\n\n".join(
        [
            compiled_table(tpu, gpu),
            f"TPU: {_first(tpu)['device']}, {_versions(tpu, 'jax', 'libtpu')}; "
            f"`python -m benchmarks.tpu_compile`. GPU: {_first(gpu)['device']}, "
            f"{_versions(gpu, 'jax', 'nvidia-cuda-nvcc-cu12')}; "
            f"`python -m benchmarks.gpu_compile`.",
            cpu_table(cpu),
            f"{cpu['machine']['cpus']} cores, {cpu['machine']['platform']}, "
            f"{_versions(cpu, 'jax', 'optax')}, load {cpu['load_before'][0]:.1f} "
            f"before; `python -m benchmarks.speed`.",
        ]
    )


def compiled_table(tpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> str:
    """Returns what the TPU and the GPU compiler make of the main cases."""

    def cells(report: Mapping[str, Any], case: str) -> list[str]:
        measures = _first(report)["cases"][case]["measures"]
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


def cpu_table(speed: Mapping[str, Any]) -> str:
    """Returns the measured times on CPU that a user asks for first."""
    small, large = (speed["operators"][f"{size} MB float32"] for size in (64, 512))
    half = speed["operators"]["64 MB bfloat16"]["stacked"]
    chains, steps = speed["chains"]["stacked"], speed["steps"]["default GPT"]
    peers = speed["peers"]["225 MB"]["unrolled"]
    deepest = max(speed["compile"], key=int)
    compiled = speed["compile"][deepest]
    preserving = "window(0.2), norm_preserving"
    training, noise = speed["training"], speed["training"]["base again"]

    def times(*figures: Mapping[str, Any]) -> str:
        return ", ".join(f"{figure['median']:.2f}×" for figure in figures)

    both = [size[k] for size in (small, large) for k in ("stacked", "unrolled")]
    rows = {
        "window, 64 MB stacked, unrolled, 512 MB stacked, unrolled / `0.9 u`": times(
            *(layout["window(0.2)"] for layout in both)
        ),
        "norm-preserving, the same": times(*(layout[preserving] for layout in both)),
        "window, 64 MB bf16 stacked / `0.9 u`": times(half["window(0.2)"]),
        "smoothing after Adam, `adamw()`, `lion()`, `rmsprop()` / without": times(
            *(chains[k] for k in ("scale_by_adam(), S, lr", "adamw(), S")),
            *(chains[k] for k in ("lion(), S", "rmsprop(), S")),
        ),
        "window, 225 MB, one leaf per layer: here, `optax.trace`, a PyTorch hook (in "
        "place), the same under `torch.compile` / `0.9 u`": times(
            *(peers[who] for who in (f"{OURS}: window", "optax: trace")),
            *(peers[who] for who in (f"{HOOK}: window", f"{HOOK}, compiled: window")),
        ),
        "update of AdamW, SGD, Muon on the default GPT / without": times(
            *(steps[k]["window"] for k in ("adamw", "sgd", "muon"))
        ),
        "training step of the default GPT / without (noise)": (
            f"{training['window']['median']:.3f}× ({noise['median']:.3f}×)"
        ),
        f"trace and compile, {deepest} unrolled layers: window, norm-preserving, "
        "directional per block / AdamW": times(
            *(compiled[k] for k in ("window", "norm_preserving")),
            compiled["directional, per block"],
        ),
    }
    return format_table(["time on CPU, as ratio", "median"], list(rows.items()))


def _first(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(report["topologies"].values()))


def _versions(report: Mapping[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {report['versions'][name]}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
