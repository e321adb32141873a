"""The nodes that a cluster has, and may get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

from lift_ray.ray_runtime import autoscaler
from lift_ray.ray_runtime.autoscaler import may_come
from lift_ray.ray_runtime.capacity import Need, num_slots
from lift_ray.settings.search import ScaleConfig

CLUSTERS = Path(__file__).parents[1] / "clusters"
GPU4 = {"CPU": 48, "GPU": 4}


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTERS / name).read_text())
    return config


@pytest.mark.parametrize(
    ("up", "nodes"),
    [
        ({}, 8),
        ({"head": 1}, 8),
        ({"head": 1, "gpu-spot": 3}, 5),
        ({"gpu-spot": 8}, 0),
        ({"gpu-spot": 1, "gpu-ondemand": 2}, 5),
    ],
)
def test_no_more_nodes_may_come_than_the_file_has_room_for(up: dict[str, int], nodes: int) -> None:
    assert may_come(read("aws.yaml"), up) == [GPU4] * nodes


def test_the_largest_nodes_come_first_where_there_is_no_room_for_all() -> None:
    kinds = {"head": {}, "cpu": {"resources": {"CPU": 64}}, "gpu": {"resources": GPU4, "max_workers": 1}}
    config = {"available_node_types": kinds, "head_node_type": "head", "max_workers": 3}
    assert may_come(config, {}) == [GPU4, {"CPU": 64}, {"CPU": 64}]
    assert may_come(config, {"gpu": 1, "cpu": 1}) == [{"CPU": 64}]


def test_machines_of_unknown_size_and_clusters_without_an_autoscaler_add_nothing() -> None:
    local = {"local.cluster.node": {"resources": {}, "max_workers": 2}}
    assert may_come({"available_node_types": local, "head_node_type": "head", "max_workers": 2}, {}) == []
    assert may_come({}, {"": 3}) == []


def test_a_study_on_a_cluster_without_workers_yet_takes_the_gpus_that_may_come() -> None:
    nodes = [{"CPU": 8.0, "train_driver": 16.0}, *may_come(read("aws.yaml"), {"head": 1})]
    assert num_slots(ScaleConfig(), nodes) == (Need(1, 1, 1), 32)


def test_kuberay_is_asked_for_the_cluster_that_the_pod_belongs_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = read("kuberay/raycluster.yaml")
    cluster["metadata"]["namespace"] = "default"
    asked: list[str] = []

    def get(self: object, path: str) -> dict[str, Any]:
        asked.append(path)
        return cluster

    monkeypatch.setattr(KubernetesHttpApiClient, "__init__", lambda self, namespace: None)
    monkeypatch.setattr(KubernetesHttpApiClient, "get", get)
    assert autoscaler._kuberay_config() == {}
    monkeypatch.setenv("RAY_CLUSTER_NAME", "lift")
    monkeypatch.setenv("RAY_CLUSTER_NAMESPACE", "default")
    nodes = may_come(autoscaler._kuberay_config(), {})
    assert asked == ["rayclusters/lift"]
    assert [(node["CPU"], node["GPU"]) for node in nodes] == [(12, 1)] * 10
    cluster["spec"]["enableInTreeAutoscaling"] = False
    assert autoscaler._kuberay_config() == {}


def test_a_pod_that_may_not_read_its_cluster_counts_on_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_CLUSTER_NAME", "lift")
    monkeypatch.setenv("RAY_CLUSTER_NAMESPACE", "default")
    assert autoscaler._kuberay_config() == {}
