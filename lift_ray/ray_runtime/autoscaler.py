"""The nodes of a cluster, and those that its autoscaler may add.

A driver cannot ask Ray for the second kind, so the configuration of the autoscaler is read: the file that `ray up` writes, or the
RayCluster that KubeRay serves. Both are visible from the head, where `ray job submit` and `ray exec` run the driver. From elsewhere
only nodes that are up count.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # Ray reads this file with PyYAML, so this is what it means

MOST_NODES = 1000  # of one kind; KubeRay's default for a group without a limit is 2^31 - 1
KIND = "ray.io/node-group"  # label with the kind of a node


def cluster_nodes() -> list[dict[str, float]]:
    """Return the resources of each live node of the connected cluster, then of each node that may be added."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    up = Counter(node["Labels"].get(KIND, "") for node in alive)
    return [node["Resources"] for node in alive] + may_come(autoscaler_config(), up)


def may_come(config: Mapping[str, Any], up: Mapping[str, int]) -> list[dict[str, float]]:
    """Return the resources of each node that an autoscaler may still start, those with the most GPUs first.

    Args:
        config: a configuration as in the files of `ray up`: available_node_types, max_workers, head_node_type. Empty without an
            autoscaler.
        up: number of running nodes of each kind.
    """
    kinds = {
        name: kind for name, kind in config.get("available_node_types", {}).items() if name != config["head_node_type"]
    }
    room = config.get("max_workers", 0)
    nodes = [
        kind["resources"]
        for name, kind in kinds.items()
        for _ in range(min(kind.get("max_workers", room), room, MOST_NODES) - up.get(name, 0))
        if kind["resources"]  # Ray does not know the size of a local machine (provider: local) before it is up
    ]
    nodes.sort(key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), reverse=True)
    return nodes[: max(0, room - sum(up.get(name, 0) for name in kinds))]


def autoscaler_config() -> dict[str, Any]:
    """Return the configuration of the connected cluster's autoscaler; empty without one, or away from the head."""
    import psutil  # type: ignore[import-untyped]  # comes with Ray
    import ray

    address = ray.get_runtime_context().gcs_address
    for process in psutil.process_iter(["cmdline"]):
        options = dict(word.split("=", 1) for word in process.info["cmdline"] or [] if "=" in word)
        if options.get("--gcs-address") == address and "--autoscaling-config" in options:
            found: dict[str, Any] = yaml.safe_load(Path(options["--autoscaling-config"]).expanduser().read_text())
            return found
    return _kuberay_config()


def _kuberay_config() -> dict[str, Any]:
    """Return the configuration from Kubernetes, which lets the head's pod of an autoscaling cluster read its RayCluster."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), os.environ.get("RAY_CLUSTER_NAMESPACE")
    if not name or not namespace:
        return {}
    import requests
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        cluster = KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    except (OSError, requests.RequestException):  # a worker's pod, or a cluster without an autoscaler, may not read it
        return {}
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return {}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    return config
