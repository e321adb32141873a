"""Reader of RayCluster and RayJob files for KubeRay (API version ray.io/v1)."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

from lift_ray.clusters.diagnostics import (
    SECRET_NAME,
    Diagnostics,
    Place,
    no_secrets,
    one_exact_ray,
    one_ray_image,
    plain_values,
    token_stays_on,
)
from lift_ray.clusters.model import Cluster, NodeType
from lift_ray.clusters.schemas import KUBERAY
from lift_ray.errors import did_you_mean, one_line
from lift_ray.settings.yaml_file import SettingsFile


def read_kuberay(file: SettingsFile) -> Cluster:
    """Check a file and return its cluster. Raises BadInput with a line for each fault."""
    faults = Diagnostics(file)
    kind = str(file.data.get("kind"))
    if kind not in KUBERAY:
        faults.add(("kind",), f"unknown value '{kind}'", remedy=did_you_mean(kind, KUBERAY))
        faults.end()
    faults.by_schema(KUBERAY[kind])
    faults.end()  # the checks below rely on the types
    spec: Place = ("spec",) if kind == "RayCluster" else ("spec", "rayClusterSpec")
    data = file.data["spec"] if kind == "RayCluster" else file.data["spec"]["rayClusterSpec"]
    _safety(faults, data, spec)
    _groups(faults, data, spec)
    token_stays_on(faults, {("spec", "entrypoint"): file.data["spec"].get("entrypoint", "")})
    if (
        kind == "RayJob"
        and file.data["spec"].get("ttlSecondsAfterFinished")
        and not file.data["spec"].get("shutdownAfterJobFinishes")
    ):
        faults.add(
            ("spec", "ttlSecondsAfterFinished"),
            "requires shutdownAfterJobFinishes: true",
            but="it is not set",
            remedy="add it, or the cluster outlives the job",
        )
    plain_values(faults)
    no_secrets(faults)
    faults.end()
    return _cluster(faults, data)


def _safety(faults: Diagnostics, data: dict[str, Any], spec: Place) -> None:
    if data.get("authOptions", {}).get("mode") != "token":
        faults.add(
            (*spec, "authOptions"),
            "Ray's token authentication must be on",
            but="it is not",
            remedy="write `authOptions: {mode: token}`",
        )
    head = data["headGroupSpec"]
    of_service = (head.get("headService") or {}).get("spec") or {}
    for place, service in (
        (("serviceType",), head.get("serviceType")),
        (("headService", "spec", "type"), of_service.get("type")),
    ):
        if service not in (None, "ClusterIP"):
            faults.add(
                (*spec, "headGroupSpec", *place),
                "must be ClusterIP (anyone who reaches the dashboard can run code)",
                service,
                "write ClusterIP and use `kubectl port-forward`",
            )
    if head.get("enableIngress"):
        faults.add(
            (*spec, "headGroupSpec", "enableIngress"),
            "must be false (anyone who reaches the dashboard can run code)",
            "true",
            "use `kubectl port-forward`",
        )


def _groups(faults: Diagnostics, data: dict[str, Any], spec: Place) -> None:
    here, ray = version("ray"), data["rayVersion"]
    if ray != here:
        faults.add((*spec, "rayVersion"), f"must be the Ray of this machine, {here}", f"'{ray}'", f'write "{here}"')
    never_restarts = data.get("autoscalerOptions", {}).get("version") == "v2"
    _pod(faults, (*spec, "headGroupSpec"), data["headGroupSpec"], never_restarts)
    names = [group["groupName"] for group in data["workerGroupSpecs"]]
    for i, group in enumerate(data["workerGroupSpecs"]):
        place: Place = (*spec, "workerGroupSpecs", i)
        _pod(faults, place, group, never_restarts)
        if names.count(names[i]) > 1:
            faults.add((*place, "groupName"), "must be unique", f"'{names[i]}' twice", "rename one")
        least, start, most = group["minReplicas"], group.get("replicas", group["minReplicas"]), group["maxReplicas"]
        if not least <= start <= most:
            faults.add(
                (*place, "maxReplicas"),
                "minReplicas <= replicas <= maxReplicas must hold",
                f"{least}, {start} and {most}",
                "change one",
            )


def _pod(faults: Diagnostics, group: Place, data: dict[str, Any], never_restarts: bool) -> None:
    """Check the pod template of a group, and its first container, which runs Ray."""
    place: Place = (*group, "template", "spec")
    pod = data["template"]["spec"]
    if never_restarts and pod.get("restartPolicy") != "Never":
        faults.add(
            (*place, "restartPolicy"),
            "must be Never with autoscaler v2",
            but="it is not",
            remedy="write `restartPolicy: Never`",
        )
    if "serviceAccountName" not in pod:
        faults.add(
            place,
            "requires a role for access to storage",
            but="serviceAccountName is missing",
            remedy="add it (keys do not belong in this file)",
        )
    container, first = pod["containers"][0], (*place, "containers", 0)
    one_ray_image(faults, (*first, "image"), container["image"], version("ray"))
    if not container.get("resources", {}).get("limits", {}).get("cpu"):
        faults.add(
            (*first, "resources"),
            "must have limits with cpu, which tell Ray the size of a node",
            but="there are none",
            remedy="add them",
        )
    commands: dict[Place, str] = {(*first, name): " ".join(container.get(name, [])) for name in ("command", "args")}
    token_stays_on(faults, commands)
    if "/ray:" in container["image"]:
        one_exact_ray(faults, commands, first)
    for i, variable in enumerate(container.get("env", [])):
        token_stays_on(faults, {(*first, "env", i): f"{variable['name']}={variable.get('value', '')}"})
        if "value" in variable and SECRET_NAME.search(variable["name"]):
            faults.add(
                (*first, "env", i),
                f"{variable['name']} does not belong in a file",
                remedy="take it from a secret (valueFrom: {secretKeyRef: ...}), or give the pods a role",
            )


def _cluster(faults: Diagnostics, data: dict[str, Any]) -> Cluster:
    """Return the cluster as Ray's autoscaler reads it, with the autoscaler's own code."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    metadata = {"name": faults.file.data["metadata"]["name"], "namespace": "default"}
    derived: dict[str, Any] = {}
    try:
        derived = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": copy.deepcopy(data)})
    except Exception as error:  # its modules raise errors of many types
        faults.add(
            ("spec",),
            f"rejected by Ray: {one_line(error, 200)}",
            remedy="fix the file",
        )
    faults.end()
    types = derived["available_node_types"]
    head = types.pop(derived["head_node_type"])
    selectors = {g["groupName"]: g["template"]["spec"].get("nodeSelector", {}) for g in data["workerGroupSpecs"]}
    workers = tuple(
        NodeType(
            name,
            "pod",
            "spot" if _is_spot(selectors[name]) else "on-demand",
            kind["resources"],
            kind["min_workers"],
            kind["max_workers"],
            kind.get("priority", 0),
        )
        for name, kind in types.items()
    )
    return Cluster(
        faults.file.source,
        "kuberay",
        NodeType("head", "pod", "on-demand", head["resources"], 1, 1),
        workers,
        derived["max_workers"],
    )


def _is_spot(selector: dict[str, Any]) -> bool:
    """Return True for a selector with one of the labels that Karpenter, GKE and AKS give spot nodes."""
    return any("spot" in f"{name}={value}" and value != "false" for name, value in selector.items())
