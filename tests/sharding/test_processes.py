"""Two real processes, each with half of the layers, train as one process does."""

import collections
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import two_processes

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.slow

TIMEOUT = 180  # Seconds.


class Processes:
    """Two running processes and what they have printed so far."""

    def __init__(self, directory, killed_after=0):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.running, self.outputs = [], []
        for process in range(two_processes.PROCESSES):
            arguments = port, process, directory, killed_after
            out, err = (directory / f"{process}.{name}" for name in ("out", "err"))
            with out.open("w") as stdout, err.open("w") as stderr:
                started = subprocess.Popen(
                    [sys.executable, HERE / "two_processes.py", *map(str, arguments)],
                    env={**os.environ, "PYTHONPATH": f"{HERE.parents[1]}"},
                    stdout=stdout,
                    stderr=stderr,
                )
            self.running.append(started)
            self.outputs.append((out, err))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()

    def printed(self):
        return [out.read_text() for out, _ in self.outputs]

    def errors(self):
        return "\n".join(err.read_text()[-3000:] for _, err in self.outputs)

    def wait_for(self, text):
        """Until both have printed it; skips where they cannot start."""
        until = time.monotonic() + TIMEOUT
        while not all(text in out for out in self.printed()):
            ended = [p.poll() for p in self.running]
            late = time.monotonic() > until
            if late or any(code not in (None, 0) for code in ended):
                why = "took too long" if late else f"ended with {ended}"
                self.kill()
                if not all(two_processes.STARTED in out for out in self.printed()):
                    pytest.skip(
                        f"two jax processes cannot be started here: they {why}: "
                        f"{last_error(self.errors())}"
                    )
                pytest.fail(f"the processes {why}:\n{self.errors()}")
            time.sleep(0.05)


def last_error(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\w*(Error|Exception)\b", line)]
    return (named or lines or ["no message"])[-1][:300]


def finished(directory):
    """What two processes hold at the end: {name: array}; and where they began."""
    with Processes(directory) as processes:
        processes.wait_for("done")
        begins = [re.search(r"after step (\d+)", out) for out in processes.printed()]
        codes = [process.wait(TIMEOUT) for process in processes.running]
        assert codes == [0, 0], processes.errors()
    parts = collections.defaultdict(dict)
    for process in range(two_processes.PROCESSES):
        with np.load(directory / f"{process}.npz") as held:
            for name, part in held.items():
                key, first = name.split("@")
                parts[key][int(first)] = part
            firsts = {int(name.split("@")[1]) for name in held if "bias" in name}
            assert firsts == {4 * process, 4 * process + 2}  # Half of the layers.
    whole = {
        key: np.concatenate([some[i] for i in sorted(some)])
        if len(some) > 1
        else some[0]
        for key, some in parts.items()
    }
    return whole, [int(begin[1]) for begin in begins]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_two_processes_killed_and_restarted_train_as_one_that_never_stopped(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    with Processes(tmp_path, killed_after=3) as processes:
        processes.wait_for("waits to be killed")
        processes.kill()
        codes = [process.returncode for process in processes.running]
        assert codes == [-signal.SIGKILL] * 2
    assert not list(tmp_path.glob("*.npz"))
    got, begins = finished(tmp_path)
    assert begins == [2, 2]  # The newest checkpoint.

    tx = two_processes.optimizers()["jit"]
    step = jax.jit(two_processes.train_step({"alone": tx.update}))
    first = two_processes.new_params()
    run = {"alone": (first, tx.init(first))}
    for number in range(1, two_processes.STEPS + 1):
        run = step(run, number)
    for how in ("jit", "shard_map"):
        for keys, want in jax.tree.leaves_with_path({how: run["alone"]}):
            part = got[jax.tree_util.keystr(keys)]
            np.testing.assert_allclose(part, want, rtol=1e-4, atol=1e-5)
    # They have moved, by far more than that.
    last, _ = run["alone"]
    moved = last["blocks"]["kernel"] - first["blocks"]["kernel"]
    assert np.abs(moved).max() > 1e-2
