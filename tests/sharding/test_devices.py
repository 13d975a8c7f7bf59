"""Depth split over six devices gives what it gives on one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "group",
    ["by hand", pytest.param("by the compiler", marks=pytest.mark.core)],
)
def test_on_six_devices_it_is_what_it_is_on_one(group):
    done = subprocess.run(
        [sys.executable, HERE / "devices.py", group],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            "--xla_force_host_platform_device_count=6",
            "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent))),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert len(outcome) >= 40
    wrong = [f"{name}: {error}" for name, error in outcome.items() if error]
    assert not wrong, "\n".join(wrong)
