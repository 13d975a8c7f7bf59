"""What a result depends on besides its options: versions, commit, machine, date."""

import contextlib
import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
    *("gradsmooth_optax", "jax", "jaxlib", "optax", "flax", "numpy"),
    *("scikit-learn", "torch"),
    *("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "jax-cuda13-plugin"),
)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages here that make the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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
        command = ["git", *arguments]
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
        ).strip()

    # Results that grow while they are measured are no changed code.
    where = (":/", ":(exclude,top)benchmarks/results")
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *where)
        return {"sha": git("rev-parse", "HEAD"), "modified": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None
