"""The GPU compiler, for an H100 that need not be there."""

from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from benchmarks.cost.compilers import hlo

TOPOLOGIES = ("1x1x4",)

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices_of(topology: str) -> Sequence[Any]:
    """Returns H100s: hosts × processes × devices, such as `1x1x4`."""
    described = topologies.get_topology_desc(
        "topology", "cuda", target_config=_H100, topology=topology
    )
    return described.devices


def measure(compiled: Any, case: Any) -> dict[str, float]:
    """Returns traffic, temporaries, kernels and collectives of a compiled case."""
    text = compiled.as_text()
    collectives = hlo.collectives(text)
    return {
        "traffic": hlo.traffic(text) / case.unit,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / case.unit,
        "kernels": len(hlo.kernels(text)),
        "collectives": sum(collectives.values()),
        "collective-permute": collectives.get("collective-permute", 0),
        "custom calls": hlo.custom_calls(text),
    }
