"""What a cluster file makes: node types, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lift_ray.settings.files import SettingsFile


@dataclass(frozen=True)
class NodeType:
    """One kind of machine or pod.

    Attributes:
        machine: the cloud's name of it; "" where there is none.
        market: spot, on-demand or "".
        resources: what Ray counts on one ({"CPU": 48, "GPU": 4}).
        least, most: how many are up when nothing runs, and at most.
    """

    name: str
    machine: str
    market: str
    resources: dict[str, float]
    least: int
    most: int
    priority: int = 0


@dataclass(frozen=True)
class Cluster:
    """What a cluster file makes.

    Attributes:
        source: the file.
        most_workers: of all worker types together.
        unchecked: what could not be looked at here, a line each.
    """

    source: str
    provider: str
    head: NodeType
    workers: tuple[NodeType, ...]
    most_workers: int
    unchecked: tuple[str, ...] = ()


def read_cluster(path: str | Path) -> Cluster:
    """Read and check a file for `ray up`, a RayCluster or RayJob of KubeRay, or a script (.sh) for Slurm. No network.

    Raises BadInput with a line for each fault.
    """
    from lift_ray.distributed.cluster_kuberay import read_kuberay
    from lift_ray.distributed.cluster_ray_up import read_ray_up
    from lift_ray.distributed.cluster_slurm import read_slurm

    if str(path).endswith(".sh"):
        return read_slurm(path)
    file = SettingsFile.read(path)
    return read_kuberay(file) if {"apiVersion", "kind"} & file.data.keys() else read_ray_up(file)
