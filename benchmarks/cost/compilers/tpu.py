"""The TPU compiler, for chips that need not be there."""

from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from benchmarks.cost.compilers import hlo

TOPOLOGIES = ("v5e:2x2", "v5e:4x4")


def devices_of(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology such as `v5e:2x2`."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return described.devices


def measure(compiled: Any, case: Any) -> dict[str, float]:
    """Returns bytes, traffic, temporaries, collectives, cycles of a compiled case."""
    text = compiled.as_text()
    collectives = hlo.collectives(text)
    return {
        "bytes": (compiled.cost_analysis()["bytes accessed"] - hlo.seldom(text))
        / case.unit,
        "traffic": hlo.traffic(text) / case.unit,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / case.unit,
        "collectives": sum(collectives.values()),
        "collective-permute": collectives.get("collective-permute", 0),
        "cycles": hlo.cycles(text),
    }
