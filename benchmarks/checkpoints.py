"""Checkpoints of a whole run with Orbax, tied to the options that made them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.interleaving import Run


class CheckpointMismatch(ValueError):
    """The checkpoints are of a run with other options; the message lists them."""


def open_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """Returns the manager of the checkpoints in `directory`, which need not exist."""
    return ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            # The newest, and one to fall back on.
            max_to_keep=2,
            # Training donates its buffers, so they must be on disk before it goes on.
            enable_async_checkpointing=False,
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    run: Run,
    options: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> None:
    """Saves `run` under its step.

    Args:
      manager: from `open_checkpoints`.
      run: all arms after the same step.
      options: what the run's numbers depend on, as JSON values.
      notes: what else to keep, as JSON values.
    """
    manager.save(
        run.step,
        args=ocp.args.Composite(
            arrays=ocp.args.StandardSave(_arrays(run)),
            about=ocp.args.JsonSave({"options": dict(options), "notes": dict(notes)}),
        ),
    )


def check_options(manager: ocp.CheckpointManager, options: Mapping[str, Any]) -> None:
    """Checks that what is saved, if anything, is of a run with these options.

    Raises:
      CheckpointMismatch: if the saved run had other options.
    """
    step = manager.latest_step()
    if step is None:
        return
    if different := _differences(_about(manager, step)["options"], options):
        raise CheckpointMismatch(
            f"the checkpoints in {str(manager.directory)!r} are of a run with other "
            f"options: {'; '.join(different)}"
        )


def restore(
    manager: ocp.CheckpointManager, like: Run
) -> tuple[Run, dict[str, Any]] | None:
    """Returns the newest saved run and its notes, or None where there is none.

    Args:
      manager: from `open_checkpoints`.
      like: a run of the same options, such as a new one.
    """
    step = manager.latest_step()
    if step is None:
        return None
    restored = manager.restore(
        step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(_arrays(like)))
    )
    arrays = restored["arrays"]
    # Writable, since the run goes on filling them.
    curves = jax.tree.map(np.array, arrays["curves"])
    return Run(step, arrays["states"], curves), _about(manager, step)["notes"]


def _about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(about=ocp.args.JsonRestore())
    return manager.restore(step, args=args)["about"]


def _arrays(run: Run) -> dict[str, Any]:
    return {"states": run.states, "curves": run.curves}


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = sorted(saved.keys() | now.keys())
    return [
        f"{name} was {saved.get(name)!r}, now {now.get(name)!r}"
        for name in names
        if saved.get(name) != now.get(name)
    ]
