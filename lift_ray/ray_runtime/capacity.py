"""Resources of a trial and of a cluster, and the number of trials that fit at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lift_ray.errors import BadInput
from lift_ray.ray_runtime.autoscaler import cluster_nodes
from lift_ray.settings.search import ScaleConfig
from lift_ray.text import count


@dataclass(frozen=True)
class Need:
    """Resources of one trial: the number of its workers, and CPUs and GPUs of each."""

    workers: int
    cpus: int
    gpus: int

    def bundle(self) -> dict[str, float]:
        """Return the resources of one worker by Ray's names."""
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def __str__(self) -> str:
        gpu = f" + {self.gpus} GPU" if self.gpus else ""
        return f"{self.workers} x ({self.cpus} CPU{gpu})"


def need(scale: ScaleConfig, has_gpu: bool) -> Need:
    """Return the resources of one trial; `use_gpu: auto` takes a GPU if there is one."""
    use_gpu = has_gpu if scale.use_gpu == "auto" else scale.use_gpu
    return Need(scale.workers_per_trial, scale.cpus_per_worker, int(use_gpu))


def num_fitting(wanted: Need, nodes: list[dict[str, float]]) -> int:
    """Return how many trials fit on these nodes at once, if no worker is split between nodes.

    Args:
        wanted: resources of one trial.
        nodes: total resources of each node ({"CPU": 8.0, "GPU": 4.0}).
    """
    workers = 0
    for node in nodes:
        by_resource = [node.get(name, 0.0) // amount for name, amount in wanted.bundle().items()]
        workers += int(min(by_resource))
    return workers // wanted.workers


def num_slots(scale: ScaleConfig, nodes: list[dict[str, float]]) -> tuple[Need, int]:
    """Return the resources of a trial and the number of trials that run at once.

    Raises BadInput if not even one trial fits: the search would wait forever.
    """
    wanted = need(scale, any(node.get("GPU", 0) > 0 for node in nodes))
    fitting = num_fitting(wanted, nodes)
    if not fitting:
        total = {name: int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU")}
        raise BadInput(
            "scale",
            "a trial must fit the cluster",
            f"{wanted} for {count(len(nodes), 'node')} with {total['CPU']} CPU, {total['GPU']} GPU in all",
            "lower scale.workers_per_trial or scale.cpus_per_worker, or set scale.use_gpu=false",
        )
    return wanted, fitting if scale.max_concurrent == "auto" else min(fitting, scale.max_concurrent)


def slots_now(scale: ScaleConfig, wanted: Need) -> int:
    """Return how many trials fit the cluster now, including nodes that may be added while they wait."""
    fitting = num_fitting(wanted, cluster_nodes())
    return fitting if scale.max_concurrent == "auto" else min(fitting, scale.max_concurrent)


def gpus_here() -> int:
    """Count the NVIDIA GPUs that this machine's driver lists (in WSL at most one), without loading torch or Ray."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or int(Path("/dev/dxg").exists())
    return there if listed is None else min(there, len([name for name in listed.split(",") if name.strip()]))


def lacking(wanted: Need, node: dict[str, float]) -> str:
    """Describe the resources that one machine lacks for a trial; "" if the trial fits."""
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
