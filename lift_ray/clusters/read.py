"""Reader of cluster files of any kind."""

from __future__ import annotations

from pathlib import Path

from lift_ray.clusters.model import Cluster
from lift_ray.settings.yaml_file import SettingsFile


def read_cluster(path: str | Path) -> Cluster:
    """Read and check a file for `ray up`, a RayCluster or RayJob of KubeRay, or a script (.sh) for Slurm, without the network.

    Raises BadInput with a line for each fault.
    """
    from lift_ray.clusters.kuberay import read_kuberay
    from lift_ray.clusters.ray_up import read_ray_up
    from lift_ray.clusters.slurm import read_slurm

    if str(path).endswith(".sh"):
        return read_slurm(path)
    file = SettingsFile.read(path)
    return read_kuberay(file) if {"apiVersion", "kind"} & file.data.keys() else read_ray_up(file)
