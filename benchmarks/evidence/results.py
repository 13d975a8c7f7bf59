"""The result file of a task and optimizer: read, checked, written trial by trial."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.search import Trial
from benchmarks.evidence.trials import Job, Measured
from benchmarks.pretrain_report import thinned

# Points that a curve keeps, and digits of what is no metric.
_POINTS, _DIGITS = 20, 5


class ResultsMismatch(ValueError):
    """The result file is of other options, or in use; the message says what to do."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from the result file at `path`, whatever ends this one.

    Raises:
      ResultsMismatch: if another process has it.
    """
    if path.is_dir():
        raise ResultsMismatch(f"{str(path)!r} is a directory: name a file with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(held.fileno()), os.stat(lock)):
                raise BlockingIOError  # its last holder removed it, another made it
        except (BlockingIOError, FileNotFoundError):
            raise ResultsMismatch(
                f"another process writes {str(path)!r}: wait for it, or name another "
                "file with --out"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def read_finished(
    path: Path, header: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the arms and the sittings of a result file, none where there is no file.

    Raises:
      ResultsMismatch: if they are of another task, optimizer, preset or other
        options than those in `header`.
    """
    if not path.exists():
        return [], []
    try:
        saved = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultsMismatch(
            f"{str(path)!r} is not JSON ({error}); name another file with --out, or "
            "remove this one"
        ) from None
    if not isinstance(saved, dict) or not {"task", "arms", "sittings"} <= saved.keys():
        raise ResultsMismatch(
            f"{str(path)!r} is not a result file of this command: name another file "
            "with --out"
        )
    before, now = (
        {**{key: of[key] for key in ("task", "optimizer", "preset")}, **of["config"]}
        for of in (saved, header)
    )
    different = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        # One file may hold the depths of several sittings.
        if key != "depths" and before.get(key) != now.get(key)
    ]
    if different:
        raise ResultsMismatch(
            f"{str(path)!r} is of a run with other options: {'; '.join(different)}. "
            "Name another file with --out, or remove this one"
        )
    return saved["arms"], saved["sittings"]


def arm_result(
    trial: Trial,
    seeds: list[int],
    job: Job,
    measured: Measured,
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Returns what a result file says of a trial, as JSON values.

    Args:
      trial: what ran.
      seeds: its seeds.
      job: how it was trained.
      measured: what was measured.
      metrics: their names, the one that arms are judged by first.
    """
    arm = trial.arm
    first, *others = metrics
    before = {
        name: _numbers(of.mean(keepdims=True))[0]
        for name, of in measured.before.items()
    }
    steps, losses = thinned(measured.train_loss.mean(axis=1)[:, None], _POINTS)
    mechanism = {
        name: _of_seeds(values) for name, values in sorted(measured.mechanism.items())
    }
    return {
        "name": arm.name,
        "stage": trial.stage,
        "layers": trial.layers,
        "operator": arm.operator,
        "alpha": arm.alpha,
        "variant": arm.variant,
        "scope": arm.scope,
        "control": arm.control,
        "learning_rate": trial.learning_rate,
        "seeds": seeds,
        "metric_per_seed": _numbers(measured.metrics[first], 8),
        "other_metrics_per_seed": {
            name: _numbers(measured.metrics[name], 8) for name in others
        },
        **({"metrics_before": before} if before else {}),
        "diverged": (~np.isfinite(measured.metrics[first])).tolist(),
        "curve": {"steps": steps.tolist(), "train_loss": _numbers(losses[:, 0])},
        "mechanism": {"steps": job.probed, **mechanism},
        "seconds_per_step": _numbers(np.array([measured.seconds_per_step]))[0],
    }


def write_results(header: Mapping[str, Any], arms: list[Any], path: Path) -> None:
    """Writes a result file, whole or not at all, with one line for each arm."""
    lines = [f" {json.dumps(key)}: {json.dumps(header[key])}," for key in header]
    of_arms = ",\n".join(f"  {json.dumps(arm, allow_nan=False)}" for arm in arms)
    text = "\n".join(["{", *lines, ' "arms": [', of_arms, " ]", "}", ""])
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def _of_seeds(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _of_seeds(of_name) for name, of_name in values.items()}
    return _numbers(values.mean(axis=-1))


def _numbers(values: np.ndarray, digits: int = _DIGITS) -> list[float | None]:
    """Rounded; null, as JSON has no other word, for what is not finite."""
    return [
        float(f"{value:.{digits}g}") if np.isfinite(value) else None
        for value in values.tolist()
    ]
