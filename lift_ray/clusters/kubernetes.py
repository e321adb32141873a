"""Rules of Kubernetes that hold in any of its files: names, labels, requests and limits, volumes.

They replace a schema of every kind of object: a server-side dry run (`kubectl apply --dry-run=server`) checks the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from lift_ray.clusters.diagnostics import Diagnostics, Place
from lift_ray.errors import did_you_mean

Data = dict[str, Any]

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
PARTS_OF_PODS = ("containers", "initContainers", "ephemeralContainers", "volumes")
OWN_RESOURCES = ("cpu", "memory", "ephemeral-storage", "storage")


def check_objects(faults: Diagnostics) -> None:
    """Add a fault for everything in the file that the API server refuses in any kind of object."""
    for place, found in mappings(faults.file.data):
        _names(faults, place, found)
        for key in ("labels", "matchLabels", "nodeSelector"):
            if isinstance(found.get(key), dict) and (key != "labels" or place[-1:] == ("metadata",)):
                _labels(faults, (*place, key), found[key])
        amounts = found.get("resources")
        if isinstance(amounts, dict) and {"requests", "limits"} & amounts.keys():
            _resources(faults, (*place, "resources"), amounts)
        if isinstance(found.get("containers"), list):
            _volumes(faults, place, found)


def mappings(data: Any, place: Place = ()) -> Iterator[tuple[Place, Data]]:
    """Yield every mapping of a file with its place, the outer ones first."""
    if isinstance(data, dict):
        yield place, data
    if isinstance(data, dict | list):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from mappings(value, (*place, name))


def _names(faults: Diagnostics, place: Place, found: Data) -> None:
    """Require names as Kubernetes allows them: of an object, of the parts of a pod, of the groups of a cluster."""
    within = next((name for name in reversed(place) if isinstance(name, str)), "")
    is_role = str(faults.file.data.get("apiVersion")).startswith("rbac.")  # whose names may be anything
    if within in PARTS_OF_PODS:
        _name(faults, (*place, "name"), found.get("name"))
    if within == "metadata" and not is_role:
        _name(faults, (*place, "name"), found.get("name"), with_dots=True)
    for key in ("groupName", "namespace"):
        _name(faults, (*place, key), found.get(key))
    _name(faults, (*place, "serviceAccountName"), found.get("serviceAccountName"), with_dots=True)


def _name(faults: Diagnostics, place: Place, name: Any, with_dots: bool = False) -> None:
    allowed, longest = (rf"{LABEL}(\.{LABEL})*", 253) if with_dots else (LABEL, 63)
    if isinstance(name, str) and not (re.fullmatch(allowed, name) and len(name) <= longest):
        meant = re.sub(r"[^a-z0-9]+", "-", name.lower())[:63].strip("-")
        others = "digits, '-' and '.'" if with_dots else "digits and '-'"
        rule = f"must be at most {longest} lower-case letters, {others} (Kubernetes)"
        faults.add(place, rule, f"'{name}'", f"write '{meant}'" if meant else "rename it")


def _labels(faults: Diagnostics, place: Place, labels: Data) -> None:
    for key, value in labels.items():
        if not isinstance(value, str):
            faults.add((*place, key), "must be text", value, f'write "{str(value).lower()}" in quotes')
        elif not LABEL_VALUE.fullmatch(value) or len(value) > 63:
            faults.add(
                (*place, key),
                "must be a label of at most 63 letters, digits, '-', '_' and '.'",
                f"'{value}'",
                "change it",
            )


def _resources(faults: Diagnostics, place: Place, amounts: Data) -> None:
    """Check requests against limits: at most as large, and for devices such as GPUs the same whole number in both."""
    requests, limits = (_amounts(faults, (*place, kind), amounts.get(kind)) for kind in ("requests", "limits"))
    for name, asked in requests.items():
        most, same = limits.get(name), _is_device(name)
        rule, got = "", f"requests {amounts['requests'][name]}"
        if most is None and same:
            rule, got, remedy = f"{name} must be in limits too (Kubernetes)", f"{got} and no limit", "add it to limits"
        elif most is not None and (asked != most if same else asked > most):
            rule = f"requests and limits of {name} must be equal" if same else "requests must not exceed limits"
            got, remedy = f"{got} and limits {amounts['limits'][name]}", "change one"
        if rule:
            faults.add((*place, "requests", name), rule, got, remedy)


def _is_device(name: str) -> bool:
    """Return True for a resource that is not shared: a device such as nvidia.com/gpu, or huge pages."""
    return "/" in name or name.startswith("hugepages-")


def _amounts(faults: Diagnostics, place: Place, amounts: Any) -> dict[str, Decimal]:
    """Return the amounts that can be read, with a fault for each of the others."""
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    found = {}
    for name, amount in amounts.items() if isinstance(amounts, dict) else ():
        try:
            quantity = parse_quantity(amount)
            if not quantity.is_finite():
                raise ValueError(quantity)
        except (ValueError, ArithmeticError):
            faults.add((*place, name), "must be a quantity", f"'{amount}'", 'write it as "8" or 32Gi')
            continue
        found[name] = quantity
        if not _is_device(name) and name not in OWN_RESOURCES:
            faults.add((*place, name), f"unknown resource '{name}'", remedy=_meant(name))
        elif quantity < 0:
            faults.add((*place, name), "must be at least 0", amount, "change it")
        elif _is_device(name) and quantity % 1:
            faults.add((*place, name), "must be a whole number", amount, "change it")
    return found


def _meant(name: str) -> str:
    return "did you mean 'nvidia.com/gpu'?" if "gpu" in name.lower() else did_you_mean(name, OWN_RESOURCES)


def _volumes(faults: Diagnostics, place: Place, pod: Data) -> None:
    """Require a volume for each mount of a pod's containers, and names that are used once."""
    volumes = _parts(pod, "volumes")
    known = [volume.get("name") for volume in volumes]
    kinds = ("initContainers", "containers")
    containers = [(kind, i, container) for kind in kinds for i, container in enumerate(_parts(pod, kind))]
    _once(faults, [((*place, kind, i, "name"), container.get("name")) for kind, i, container in containers])
    _once(faults, [((*place, "volumes", i, "name"), name) for i, name in enumerate(known)])
    for kind, i, container in containers:
        at = (*place, kind, i)
        mounts = _parts(container, "volumeMounts")
        _once(
            faults, [((*at, "volumeMounts", j, "mountPath"), mount.get("mountPath")) for j, mount in enumerate(mounts)]
        )
        for use in ("volumeMounts", "volumeDevices"):
            for j, mount in enumerate(_parts(container, use)):
                volume_exists(faults, (*at, use, j, "name"), mount.get("name"), known)


def volume_exists(faults: Diagnostics, place: Place, name: Any, known: list[Any]) -> None:
    """Require a volume of this name among those of the pod."""
    if name not in known:
        remedy = did_you_mean(name, known) if known else f"add {{name: {name}, emptyDir: {{}}}} to its volumes"
        faults.add(place, f"no volume '{name}' in this pod", remedy=remedy)


def _parts(data: Data, key: str) -> list[Data]:
    found = data.get(key)
    return [part if isinstance(part, dict) else {} for part in found] if isinstance(found, list) else []


def _once(faults: Diagnostics, found: list[tuple[Place, Any]]) -> None:
    names = [name for _, name in found]
    for place, name in found:
        if name is not None and names.count(name) > 1:
            faults.add(place, "must be unique", f"'{name}' twice", "rename one")
