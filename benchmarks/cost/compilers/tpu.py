"""What the TPU compiler makes of the transformations, without a TPU.

    python -m benchmarks.tpu_compile
    python -m benchmarks.tpu_compile --quick
    python -m benchmarks.tpu_compile --topology v5p:2x2x1 --only 'step, *'

Bytes and temporaries are those of one device, per byte of its updates: one read and one
write of all updates is 2. Bytes and cycles are the compiler's own model, temporaries
and collectives are exact. Exits with 1 if a bar is broken.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

# libtpu reads them when it is loaded: no TPU is looked for.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
TOPOLOGIES = ("v5e:2x2", "v5e:4x4")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with the options `argv` and returns the exit status."""
    from benchmarks.compilers.report import build_parser, run

    options = build_parser("tpu_compile", __doc__, TOPOLOGIES).parse_args(argv)
    return run("tpu_compile", "tpu", options, TOPOLOGIES, devices_of, measure)


def devices_of(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology such as `v5e:2x2`."""
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return described.devices


def measure(compiled: Any, case: Any) -> dict[str, float]:
    """Returns bytes, traffic, temporaries, collectives, cycles of a compiled case."""
    from benchmarks.compilers import hlo

    text = compiled.as_text()
    collectives = hlo.collectives(text)
    return {
        "bytes": compiled.cost_analysis()["bytes accessed"] / case.unit,
        "traffic": hlo.traffic(text) / case.unit,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / case.unit,
        "collectives": sum(collectives.values()),
        "collective-permute": collectives.get("collective-permute", 0),
        "cycles": hlo.cycles(text),
    }


if __name__ == "__main__":
    os.environ.update(_ENVIRONMENT)
    sys.exit(main())
