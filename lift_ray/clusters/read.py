"""Reader of cluster files of any kind."""

from __future__ import annotations

import re
from pathlib import Path

from lift_ray.clusters.model import Cluster
from lift_ray.errors import BadInput
from lift_ray.settings.yaml_file import SettingsFile

START = "start with `cluster_name: ...` or `apiVersion: ray.io/v1`, as the files in clusters/ do"


def read_documents(path: str | Path) -> list[SettingsFile]:
    """Read the YAML documents of a cluster file. Raises BadInput if there is none, or one is not a mapping."""
    _one_image(Path(path))
    return SettingsFile.read_all(path, START)


def _one_image(path: Path) -> None:
    """Require one image per KubeRay cluster. A file in which only half of the change to an own image was made is invalid YAML, and the
    error of the YAML reader would not say what to do."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return  # the reader says so
    set_at: list[int] = []  # lines of this document
    for number, line in enumerate(lines, 1):
        if line.startswith("---"):
            set_at = []
        elif re.match(r" *image: &image\b", line):
            set_at.append(number)
        place = f"{path}:{number}"
        if len(set_at) > 1:
            remedy = (
                "delete the lines from '>>> installation' to '<<< installation', or comment out the image of your own"
            )
            raise BadInput(place, "must set one image", but=f"line {set_at[0]} sets it too", remedy=remedy)
        if not set_at and re.match(r" *image: \*image\b", line):
            remedy = "uncomment the lines of 'CHANGE, optional', or restore those of the installation"
            raise BadInput(place, "must have an image", but="no line has `image: &image`", remedy=remedy)


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
