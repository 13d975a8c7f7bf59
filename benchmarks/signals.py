"""Is there anything along depth to couple in the tasks of the evidence?

    python -m benchmarks.signals
    python -m benchmarks.signals --task lm --optimizer adamw --steps 20 --out FILE

`diagnostics.depth_signal` of raw gradients, at the initial parameters, in the middle
and at the end of a training of each task of `benchmarks.evidence`, seed 0, by the base
optimizer at the rate its search begins with. Writes `benchmarks/results/signals.json`
after every training, goes on where it stopped, and prints the table.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from benchmarks import cli
from benchmarks.comparison import format_table
from benchmarks.evidence import presets
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.training import optimizer_of
from benchmarks.json_files import RESULTS, write_json
from benchmarks.provenance import provenance
from benchmarks.training import TrainState, data_key, init_params, train_steps
from gradsmooth_optax.diagnostics import LayerSignal, depth_signal

BATCHES, OPTIMIZERS = 64, ("adamw", "muon")
MOMENTS = {"start": 0.0, "middle": 0.5, "end": 1.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    parser = cli.parser("signals", __doc__)
    parser.add_argument("--task", choices=[*TASKS], help="one (default: all)")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, help="the base, one (default: all)"
    )
    parser.add_argument("--steps", type=int, help="of a training, if not the task's")
    parser.add_argument("--batches", type=int, default=BATCHES, help="of a signal")
    parser.add_argument("--out", type=Path, default=RESULTS / "signals.json")
    given = parser.parse_args(argv)

    report = {"batches": given.batches, **provenance(), "signals": []}
    if given.out.exists():
        report["signals"] = json.loads(given.out.read_text("utf-8"))["signals"]
    for name in [given.task] if given.task else TASKS:
        for optimizer in [given.optimizer] if given.optimizer else OPTIMIZERS:
            wanted = {"task": name, "optimizer": optimizer}
            if any(wanted.items() <= of.items() for of in report["signals"]):
                continue
            of_task = signals(name, optimizer, given.steps, given.batches)
            report["signals"] += [wanted | signal for signal in of_task]
            write_json(report, given.out, indent=None)
    print(table(report))
    return 0


def signals(
    name: str, optimizer: str, steps: int | None, batches: int
) -> Iterator[dict[str, Any]]:
    """Yields what is along depth at each moment of a training, as JSON values."""
    changes = {} if steps is None else {"steps": steps}
    options = presets.options_of(name, optimizer, "full", changes)
    job, layers = presets.job_of(optimizer, options), options["depths"]
    layers = 12 if 12 in layers else layers[0]
    task = TASKS[name].build(layers, **presets.task_options(options))
    tx = optimizer_of(job, task)(optax.identity(), options["learning_rate"]).whole
    seeds = jnp.array([0])
    params = init_params(task.init, seeds)
    state = TrainState(params, jax.vmap(tx.init)(params))
    train = train_steps(task.loss, tx, task.draw, job.steps, task.rollout)
    done = 0
    for moment, share in tqdm(MOMENTS.items(), desc=f"{name}, {optimizer}"):
        more = round(share * job.steps) - done
        if more:
            counts = jnp.int32(done), jnp.int32(more)
            state, _ = train(state, seeds, task.data, *counts)
            done += more
        one = jax.tree.map(lambda leaf: leaf[0], state.params)
        found = depth_signal(gradients(task, one, batches), task.depth)
        for stack, block in found.blocks.items():
            roles = found.roles[stack]
            yield {
                **{"layers": layers, "moment": moment, "step": done, "stack": stack},
                "block": as_json(block),
                "roles": {role: as_json(of) for role, of in roles.items()},
            }


def gradients(task: Task, params: Any, batches: int) -> Iterator[Any]:
    """Yields gradients of batches that no training of this seed draws."""
    key = data_key(jnp.int32(10**6))

    @jax.jit
    def gradient(params: Any, step: jax.Array) -> Any:
        batch = task.draw(task.data, key, step)
        if task.rollout is not None:
            batch = jax.tree.map(lambda leaf: leaf[0], task.rollout(params, batch))
        return jax.grad(task.loss)(params, batch)

    for step in range(batches):
        yield gradient(params, jnp.int32(step))


def as_json(of: LayerSignal) -> dict[str, Any]:
    """Returns shares with their intervals, and the cosines of neighbors."""

    def rounded(values: Iterable[float]) -> list[float]:
        return [round(float(value), 4) for value in values]

    return {
        "left": {name: rounded(share) for name, share in of.left.items()},
        "left_raw": {name: rounded(share) for name, share in of.left_raw.items()},
        "cosines": rounded(of.cosines),
    }


def table(report: Mapping[str, Any]) -> str:
    """Returns the Markdown table: a row for every training and stack."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for of in report["signals"]:
        about = of["task"], of["optimizer"], str(of["layers"]), of["stack"]
        left, raw = (of["block"][key]["best filter"] for key in ("left", "left_raw"))
        cosines = [x for x in map(_number, of["block"]["cosines"]) if not math.isnan(x)]
        cosine = f"{sum(cosines) / len(cosines):+.2f}" if cosines else ""
        # Such as where a head begins at 0.
        text = f"{_shown(left[0])} ({_shown(raw[0])})" if cosines else "no gradient"
        rows.setdefault(about, []).extend([text, cosine])
    header = ["task", "optimizer", "layers", "stack"]
    for moment in MOMENTS:
        header += [f"left at the {moment} (raw)", "cosine"]
    return format_table(header, [[*about, *cells] for about, cells in rows.items()])


def _shown(share: float | None) -> str:
    return "unknown" if math.isnan(_number(share)) else f"{share:.3f}"


def _number(value: float | None) -> float:
    """NaN where a file has null."""
    return math.nan if value is None else value


if __name__ == "__main__":
    sys.exit(main())
