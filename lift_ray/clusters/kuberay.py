"""Reader of RayCluster and RayJob files for KubeRay (API version ray.io/v1)."""

from __future__ import annotations

import copy
import re
import shlex
from importlib.metadata import version
from typing import Any

from lift_ray.clusters.diagnostics import (
    SECRET_NAME,
    Diagnostics,
    Place,
    installs_nothing,
    is_own_image,
    no_secrets,
    one_exact_ray,
    one_ray_image,
    plain_values,
    token_stays_on,
)
from lift_ray.clusters.kubernetes import check_objects, volume_exists
from lift_ray.clusters.model import Cluster, NodeType
from lift_ray.clusters.schemas import KUBERAY
from lift_ray.errors import BadInput, did_you_mean, one_line
from lift_ray.settings.yaml_file import SettingsFile

# The operator appends up to ten characters to a cluster's name (-serve-svc), and six more to that of a job; a label holds 63.
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47}


def read_kuberay(documents: list[SettingsFile]) -> Cluster:
    """Check the documents of a file, and return the cluster that one of them describes.

    Raises BadInput with a line for each fault.
    """
    file = _described(documents)
    faults = Diagnostics(file)
    others = [document for document in documents if document is not file]
    for other in others:
        found = Diagnostics(other)
        check_objects(found)
        no_secrets(found)
        faults.include(found)
    kind = str(file.data.get("kind"))
    if kind not in KUBERAY:
        faults.add(("kind",), f"unknown value '{kind}'", remedy=did_you_mean(kind, KUBERAY))
        faults.end()
    faults.by_schema(KUBERAY[kind])
    check_objects(faults)
    faults.end()  # the checks below rely on the types
    spec: Place = ("spec",) if kind == "RayCluster" else ("spec", "rayClusterSpec")
    data = file.data["spec"] if kind == "RayCluster" else file.data["spec"]["rayClusterSpec"]
    _name(faults, kind)
    _safety(faults, data, spec)
    _groups(faults, data, spec)
    if kind == "RayJob":
        _job(faults, file.data["spec"])
    plain_values(faults)
    no_secrets(faults)
    faults.end()
    unchecked = [
        f"{other.data.get('kind')}, line {other.first_line} (kubectl apply --dry-run=server)" for other in others
    ]
    return _cluster(faults, data, tuple(unchecked))


def _described(documents: list[SettingsFile]) -> SettingsFile:
    """Return the document of Ray among those of a file; the first one if there is none."""
    found = [document for document in documents if str(document.data.get("apiVersion")).startswith("ray.io/")]
    if len(found) > 1:
        raise BadInput(
            found[1].where(("kind",)), "a file must describe one cluster", len(found), "write a file for each"
        )
    return found[0] if found else documents[0]


def _name(faults: Diagnostics, kind: str) -> None:
    name, longest = faults.file.data["metadata"]["name"], LONGEST_NAME[kind]
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        rule = f"must be at most {longest} lower-case letters, digits and '-', and start with a letter (KubeRay)"
        faults.add(("metadata", "name"), rule, f"'{name}'", "rename it")


def _job(faults: Diagnostics, spec: dict[str, Any]) -> None:
    """Check what a RayJob runs, which is text with text inside, and when its cluster ends."""
    entrypoint, place = spec["entrypoint"], ("spec", "entrypoint")
    token_stays_on(faults, {place: entrypoint})
    try:
        shlex.split(entrypoint)
    except ValueError as error:
        but = f"there is {one_line(error).lower()}"
        faults.add(place, "must be a shell command", but=but, remedy="fix its quotes")
    _runtime_env(faults, spec.get("runtimeEnvYAML", ""))
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        faults.add(
            ("spec", "ttlSecondsAfterFinished"),
            "requires shutdownAfterJobFinishes: true",
            but="it is not set",
            remedy="add it, or the cluster outlives the job",
        )


def _runtime_env(faults: Diagnostics, text: str) -> None:
    """Check a runtime environment with Ray's own class; a folder in it is one of the pod, so it is not looked for."""
    from ray.runtime_env import RuntimeEnv

    place = ("spec", "runtimeEnvYAML")
    if not text.strip():
        return
    try:
        found = SettingsFile.parse(text, "line").data
    except BadInput as error:
        faults.add(place, f"{error.rule} in {error.place.replace(':', ' ')}", error.got, "fix the text")
        return
    known = [key for key in RuntimeEnv.known_fields if not key.startswith("_")]
    for key in found.keys() - known:
        faults.add(place, f"unknown key '{key}'", remedy=did_you_mean(key, known))
    try:
        RuntimeEnv(**{key: value for key, value in found.items() if "://" in str(value) or key not in FOLDERS})
    except Exception as error:  # its checks raise errors of many types
        faults.add(place, f"rejected by Ray: {one_line(error, 200)}", remedy="fix the text")
    variables = found.get("env_vars")
    for name, value in variables.items() if isinstance(variables, dict) else ():
        _variable(faults, place, str(name), value)


FOLDERS = ("working_dir", "py_modules", "py_executable")


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
    _autoscaler_mounts(faults, data, spec)
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


def _autoscaler_mounts(faults: Diagnostics, data: dict[str, Any], spec: Place) -> None:
    """Require the volumes that the autoscaler mounts: it is a container of the head's pod."""
    known = [volume["name"] for volume in data["headGroupSpec"]["template"]["spec"].get("volumes", [])]
    for i, mount in enumerate(data.get("autoscalerOptions", {}).get("volumeMounts") or []):
        volume_exists(faults, (*spec, "autoscalerOptions", "volumeMounts", i), mount.get("name"), known)


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
    elif is_own_image(container["image"]):
        installs_nothing(faults, commands, container["image"])
    for i, variable in enumerate(container.get("env", [])):
        _variable(faults, (*first, "env", i), variable["name"], variable.get("value"))


def _variable(faults: Diagnostics, place: Place, name: str, value: object) -> None:
    """Forbid a variable that turns authentication off, or is a secret; None is one whose value comes from elsewhere."""
    token_stays_on(faults, {place: f"{name}={value or ''}"})
    if value is not None and SECRET_NAME.search(name):
        faults.add(
            place,
            f"{name} does not belong in a file",
            remedy="take it from a secret (valueFrom: {secretKeyRef: ...}), or give the pods a role",
        )


def _cluster(faults: Diagnostics, data: dict[str, Any], unchecked: tuple[str, ...]) -> Cluster:
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
        unchecked,
    )


def _is_spot(selector: dict[str, Any]) -> bool:
    """Return True for a selector with one of the labels that Karpenter, GKE and AKS give spot nodes."""
    return any("spot" in f"{name}={value}" and value != "false" for name, value in selector.items())
