"""The machines a training may run on, as far as they decide what it costs."""

from dataclasses import dataclass
from typing import Literal

POSITIVE = (
    "memory_gigabytes",
    "peak_teraflops",
    "full_teraflops",
    "utilisation",
    "memory_bandwidth",
    "node_bandwidth",
    "network_bandwidth",
    "host_bandwidth",
    "disk_bandwidth",
)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Nodes of equal GPUs, one rank each; on CPU a rank is a process of one thread. Gigabytes are 10^9 bytes."""

    device: Literal["cpu", "cuda"] = "cuda"
    num_nodes: int = 1
    gpus_per_node: int = 1
    memory_gigabytes: float  # of each GPU, or of what each process may take
    peak_teraflops: float  # of each, dense products in bfloat16
    full_teraflops: float  # of each, products in FP32
    utilisation: float  # share of the peak that large products reach
    memory_bandwidth: float  # of each, gigabytes a second
    node_bandwidth: float  # out of each GPU to others of its node, gigabytes a second
    network_bandwidth: float  # out of each GPU to other nodes
    host_bandwidth: float  # from each GPU to its node's memory
    disk_bandwidth: float  # of rank 0, gigabytes a second
    launch_microseconds: float  # that starting one operation takes where it is done sooner than the next can start
    latency_microseconds: float  # of an exchange between all ranks of a group, however little it carries
    price_per_gpu_hour: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. Raise it.")
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive. Raise it.")
        if self.utilisation > 1:
            raise ValueError(f"utilisation={self.utilisation}: is a share of the peak. Choose one of at most 1.")
        for name in ("launch_microseconds", "latency_microseconds", "price_per_gpu_hour"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative. Use 0.")

    @property
    def num_ranks(self) -> int:
        """One for each GPU."""
        return self.num_nodes * self.gpus_per_node
