"""A small training and a cluster of two nodes, for tests of what is forecast of them."""

from shodh.model.transformer import TransformerConfig
from shodh.planning.arrangement import Workload
from shodh.planning.cluster import ClusterConfig
from shodh.training.engine import EngineConfig
from shodh.training.objectives import ForecastConfig
from shodh.training.schedule import ScheduleConfig

MODEL = TransformerConfig(width=64, depth=3, num_heads=4, num_experts=8, hidden=128)
CLUSTER = ClusterConfig(
    num_nodes=2,
    gpus_per_node=4,
    memory_gigabytes=80.0,
    peak_teraflops=989.0,
    full_teraflops=67.0,
    utilisation=0.5,
    memory_bandwidth=3350.0,
    node_bandwidth=450.0,
    network_bandwidth=50.0,
    host_bandwidth=20.0,
    disk_bandwidth=1.0,
    launch_microseconds=5.0,
    latency_microseconds=20.0,
    price_per_gpu_hour=2.0,
)


def make_workload(model=MODEL, unroll=(), lead=(), num_steps=100, **engine) -> Workload:
    return Workload(
        model=model,
        objective=ForecastConfig(unroll=unroll, lead=lead),
        engine=EngineConfig(**({"batch_size": 64, "zero_stage": 0} | engine)),
        schedule=ScheduleConfig(num_steps=num_steps, learning_rate=1e-3),
        checkpoint_interval=10,
        grid=(8, 8, 8),
    )
