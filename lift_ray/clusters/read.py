"""Reader of cluster files of any kind."""

from __future__ import annotations

from pathlib import Path

from lift_ray.clusters.model import Cluster
from lift_ray.settings.yaml_file import SettingsFile

START = "start with `cluster_name: ...` or `apiVersion: ray.io/v1`, as the files in clusters/ do"


def read_documents(path: str | Path) -> list[SettingsFile]:
    """Read the YAML documents of a cluster file. Raises BadInput if there is none, or one is not a mapping."""
    return SettingsFile.read_all(path, START)


def read_cluster(path: str | Path) -> Cluster:
    """Read and check a file for `ray up`, a RayCluster or RayJob of KubeRay, or a script (.sh) for Slurm, without the network.

    Raises BadInput with a line for each fault.
    """
    from lift_ray.clusters.kuberay import read_kuberay
    from lift_ray.clusters.ray_up import read_ray_up
    from lift_ray.clusters.slurm import read_slurm

    if str(path).endswith(".sh"):
        return read_slurm(path)
    documents = read_documents(path)
    if any({"apiVersion", "kind"} & document.data.keys() for document in documents):
        return read_kuberay(documents)
    return read_ray_up(SettingsFile.only(documents))
