"""What a trial needs, what a cluster has, and how many trials fit at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lift_ray.errors import BadInput
from lift_ray.ray_runtime.autoscaler import cluster_nodes
from lift_ray.settings.search import ScaleConfig


@dataclass(frozen=True)
class Need:
    """The bundles of one trial: as many as it has workers."""

    workers: int
    cpus: int
    gpus: int

    def bundle(self) -> dict[str, float]:
        """One worker's resources in Ray's words."""
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def __str__(self) -> str:
        gpu = f" + {self.gpus} GPU" if self.gpus else ""
        return f"{self.workers} x ({self.cpus} CPU{gpu})"


def need(scale: ScaleConfig, has_gpu: bool) -> Need:
    """What one trial asks for; `use_gpu: auto` takes a GPU when there is one."""
    use_gpu = has_gpu if scale.use_gpu == "auto" else scale.use_gpu
    return Need(scale.workers_per_trial, scale.cpus_per_worker, int(use_gpu))


def num_fitting(wanted: Need, nodes: list[dict[str, float]]) -> int:
    """How many trials fit on these nodes at once, each worker whole on one node.

    Args:
        nodes: for each node its total resources ({"CPU": 8.0, "GPU": 4.0}).
    """
    workers = 0
    for node in nodes:
        by_resource = [node.get(name, 0.0) // amount for name, amount in wanted.bundle().items()]
        workers += int(min(by_resource))
    return workers // wanted.workers


def num_slots(scale: ScaleConfig, nodes: list[dict[str, float]]) -> tuple[Need, int]:
    """What a trial needs and how many run at once.

    Raises BadInput, before anything starts, when not even one fits: a search would wait for ever.
    """
    wanted = need(scale, any(node.get("GPU", 0) > 0 for node in nodes))
    fitting = num_fitting(wanted, nodes)
    if not fitting:
        total = {name: int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU")}
        raise BadInput(
            f"scale: a trial must fit the cluster, but got {wanted} for {len(nodes)} node(s) with {total['CPU']} CPU, "
            f"{total['GPU']} GPU in all; lower scale.workers_per_trial or scale.cpus_per_worker, or set scale.use_gpu=false"
        )
    return wanted, fitting if scale.max_concurrent == "auto" else min(fitting, scale.max_concurrent)


def slots_now(scale: ScaleConfig, wanted: Need) -> int:
    """How many trials fit the cluster as it is at the moment, and as it may become while they wait."""
    fitting = num_fitting(wanted, cluster_nodes())
    return fitting if scale.max_concurrent == "auto" else min(fitting, scale.max_concurrent)


def gpus_here() -> int:
    """NVIDIA GPUs of this machine, as its driver lists them (in WSL at most one); neither torch nor Ray is loaded for it."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or int(Path("/dev/dxg").exists())
    return there if listed is None else min(there, len([name for name in listed.split(",") if name.strip()]))


def lacking(wanted: Need, node: dict[str, float]) -> str:
    """What one machine lacks for a trial; "" when it fits."""
    if num_fitting(wanted, [node]):
        return ""
    needed = {name: int(amount * wanted.workers) for name, amount in wanted.bundle().items()}
    short = [
        f"{amount - int(node.get(name, 0))} {name}" for name, amount in needed.items() if node.get(name, 0) < amount
    ]
    return (
        f"{int(node.get('CPU', 0))} CPU, {int(node.get('GPU', 0))} GPU: lacks {' and '.join(short)} for a trial; "
        "run on a cluster (clusters/), or change scale"
    )
