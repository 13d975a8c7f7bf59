"""What a result depends on besides its options: versions, commit, machine, date."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("gradsmooth_optax", "jax", "jaxlib", "optax", "flax", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that make the numbers."""
    installed = {name: metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **installed}


def provenance() -> dict[str, Any]:
    """Returns versions, commit, machine and date, as JSON values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "backend": jax.default_backend(),
            "devices": [device.device_kind for device in jax.devices()],
        },
    }


def _commit() -> dict[str, Any] | None:
    """The commit of this checkout and whether files differ from it, if git knows."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return {
            "sha": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
