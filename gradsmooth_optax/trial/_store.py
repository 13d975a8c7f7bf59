"""The file of a comparison: whole after every run, held by one process at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradsmooth_optax._checks import shown
from gradsmooth_optax._extras import needs
from gradsmooth_optax.trial._protocol import Outcome, Run, Settings

_FORMAT = 1


class OtherSettings(ValueError):
    """The file is of another comparison; the message has the differences.

    Example:
      >>> import gradsmooth_optax as gs
      >>> issubclass(gs.trial.OtherSettings, ValueError)
      True
    """


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from the file, until this one is done or dead."""
    filelock = needs("filelock", "trial", "trial.compare")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{path}.lock", timeout=0)
    try:
        with lock:
            yield
    except filelock.Timeout:
        raise RuntimeError(
            f"another process is writing `path` {str(path)!r} (it holds "
            f"{lock.lock_file!r}). Wait for it, or write `path='another.json'`."
        ) from None


def write(
    path: Path,
    settings: Settings,
    outcomes: Mapping[Run, Outcome],
    notes: Mapping[str, Any],
) -> None:
    """Writes the file, whole or not at all, with a line for every run."""
    head = {"format": _FORMAT, "settings": settings._asdict(), "notes": notes}
    lines = [f" {json.dumps(key)}: {_dumps(value)}," for key, value in head.items()]
    runs = ",\n".join(
        f"  {_dumps(run._asdict() | outcome._asdict())}"
        for run, outcome in outcomes.items()
    )
    text = "\n".join(["{", *lines, ' "runs": [', *([runs] if runs else []), " ]", "}"])
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def read(path: Path) -> tuple[Settings, dict[Run, Outcome], dict[str, Any]]:
    """Settings, outcomes and notes of a file.

    Raises:
      FileNotFoundError: without one.
      ValueError: for a file of another kind.
    """
    text = path.read_text(encoding="utf-8")
    try:
        saved = json.loads(text)
        if saved["format"] != _FORMAT:
            raise ValueError(f"format {saved['format']!r}")
        raw = saved["settings"]
        settings = Settings(
            **raw
            | {key: tuple(raw[key]) for key in ("rates", "block_rates")}
            | {"arms": dict(raw["arms"])}
        )
        outcomes = dict(map(_loaded, saved["runs"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`path` {str(path)!r} holds no comparison of "
            f"`gradsmooth_optax.trial` ({type(error).__name__}: {error}). Write "
            "`path='another.json'`, or move that file away."
        ) from None
    return settings, outcomes, saved["notes"]


def check_same(path: Path, saved: Settings, now: Settings) -> None:
    """Raises where a file is of other settings."""
    different = [
        f"  {name}: there {shown(there)}, now {shown(here)}"
        for name, there, here in zip(Settings._fields, saved, now, strict=True)
        if there != here
    ]
    if different:
        raise OtherSettings(
            f"`path` {str(path)!r} is of a comparison with other settings:\n"
            + "\n".join(different)
            + "\nSeeds or arms that are added after a look at the results would make "
            "its p-values too small. To fix: call `compare` as before to go on with "
            "it, or write `path='another.json'` for a new one."
        )


def _dumps(value: Any) -> str:
    """As JSON; what is not finite as a word, since JSON has no such numbers."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _loaded(entry: dict[str, Any]) -> tuple[Run, Outcome]:
    run = Run(*(entry.pop(name) for name in Run._fields))
    entry["metrics"] = {name: float(of) for name, of in entry["metrics"].items()}
    entry["curve"] = tuple(map(float, entry["curve"]))
    entry["seconds"] = float(entry["seconds"])
    return run, Outcome(**entry)
