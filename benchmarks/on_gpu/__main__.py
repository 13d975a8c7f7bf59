"""Times and a training on a real GPU, in one process of under six minutes.

    python -m benchmarks.on_gpu
    python -m benchmarks.on_gpu --only train --out FILE
    python -m benchmarks.on_gpu --quick

Times are medians over rounds in which all cases of a group take turns, as ratios to
`0.9 u` under the same `jit`, and to the time in which a copy moves as many bytes. The
main ones are not donated: in a training step the updates are temporaries, which nothing
takes over. The training is of a GPT, its arms paired by seed. What fails or does not
fit into the time is listed as skipped. The report is written after every group, so that
a run that is ended leaves a valid file.

`--quick` is tiny and runs anywhere: it tests this script, and says nothing of speed.
The committed result, if there is one, is benchmarks/results/cost/gpu_times.json;
`python -m benchmarks.readme` makes docs/on_gpu.md of it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradsmooth_optax as gs
from benchmarks import cli
from benchmarks.json_files import COST
from benchmarks.on_gpu import training
from benchmarks.on_gpu.report import tables
from benchmarks.on_gpu.session import Plan, Session
from benchmarks.on_gpu.times import WINDOW, take_times
from benchmarks.provenance import provenance

FULL = Plan((1024, 4096), 48, 30, 4, 45, 165, 330, None, training.FULL)
QUICK = Plan((0.25, 0.5), 3, 2, 1, 600, 900, 1200, (WINDOW,), training.QUICK)


def card() -> dict[str, str] | None:
    """Returns what the driver says of the first card, None where there is none."""
    fields = ("name", "driver_version", "memory.total")
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    first = found.splitlines()[0] if found else ""
    return dict(zip(fields, map(str.strip, first.split(",")), strict=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    parser = cli.parser("on_gpu", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, to test the script")
    parser.add_argument("--only", choices=("times", "train"), help="one part alone")
    parser.add_argument(
        "--commit", help="of this code, where git cannot be asked (default: asked)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="default: the committed result, of a part or --quick build/gpu_times.json",
    )
    given = parser.parse_args(argv)
    folder = Path("build") if given.quick or given.only else COST
    out = given.out or folder / "gpu_times.json"
    # Read when jax first looks for devices. One piece for jax, because memory that
    # grows falls into pieces too small for the training; the rest is for PyTorch.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.65")
    plan = QUICK if given.quick else FULL
    if given.only == "times":
        plan = plan._replace(seconds=plan.all_seconds)
    report: dict[str, Any] = {
        "benchmark": "on_gpu",
        "options": {"quick": given.quick, "only": given.only},
        "plan": plan._asdict() | {"training": plan.training._asdict()},
        **provenance(),
        "card": card(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "main": "not donated; what an optimizer keeps is donated",
        **{part: {} for part in ("copy", "operators", "training_step")},
        **{part: {} for part in ("optimizers", "peers", "training", "seconds")},
        "skipped": [],
    }
    if given.commit:
        report["commit"] = {"sha": given.commit, "modified": None}
    report["versions"]["gradsmooth_optax"] = gs.__version__
    out.parent.mkdir(parents=True, exist_ok=True)
    session = Session(plan, out, report)
    session.save()
    print(f"{report['card']}, {report['versions']}", flush=True)
    if given.only != "train":
        take_times(session)
    if given.only != "times":
        began = time.monotonic()
        # The times may have taken longer, but a few seeds are always trained.
        most = plan.training.seconds
        seconds = max(0.6 * most, min(most, plan.all_seconds - session.passed()))
        try:
            for result in training.train(plan.training, seconds):
                report["training"] = result
                session.save()
        except Exception as error:  # what was measured before it is kept
            session.skip("training", "all", error)
        if not report["training"]:
            session.skip("training", "all", "no seed was done")
        report["seconds"]["training"] = time.monotonic() - began
    session.save()
    print(f"\n{tables(report)}\n\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
