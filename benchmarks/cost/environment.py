"""The environment of a measurement, which is set before anything imports jax."""

import os
import sys

# Read by the C library and by OpenMP when a process starts.
_CPU = {
    # Without these, glibc returns large arrays to the system and their pages are
    # faulted in afresh: most of the time of every update, and all of the noise.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "30000000000",
    "MALLOC_TOP_PAD_": "67108864",
    # Otherwise PyTorch's threads spin while they wait, also when it is jax's turn.
    "OMP_WAIT_POLICY": "PASSIVE",
}

# jax and libtpu read them when they are loaded: no hardware is looked for.
_COMPILERS = {
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    },
    "gpu": {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
}


def set_environment(device: str) -> None:
    """Sets what measuring for a device needs.

    For times on the CPU the process starts anew, unless it was started so.

    Args:
      device: "cpu", "tpu" or "gpu".
    """
    if device != "cpu":
        os.environ.update(_COMPILERS[device])
    elif any(os.environ.get(name) != value for name, value in _CPU.items()):
        os.environ.update(_CPU)
        again = [sys.executable, "-m", "benchmarks.cost", *sys.argv[1:]]
        os.execv(sys.executable, again)
