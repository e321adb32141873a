"""A file for `ray up` (AWS, Google Cloud, Azure, machines of one's own) as the cluster it makes."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

from lift_ray.distributed.cluster_faults import Faults, Place, no_secrets, one_exact_ray, plain_values
from lift_ray.distributed.cluster_file import Cluster, NodeType
from lift_ray.distributed.cluster_schemas import GCP_MACHINE, PROVIDERS, Schema, aws_machine, azure_machine, ray_schema
from lift_ray.errors import did_you_mean
from lift_ray.settings.files import SettingsFile

Data = dict[str, Any]


def read_ray_up(file: SettingsFile) -> Cluster:
    """Check and read it. Raises BadInput with a line for each fault."""
    faults = Faults(file)
    unchecked: tuple[str, ...] = ()
    _provider(faults)
    faults.by_schema(_schema(file.data))
    faults.end()  # what follows needs the right types
    if file.data["provider"]["type"] == "local":
        _local_machines(faults)
    else:
        unchecked = _node_types(faults)
    _commands(faults)
    plain_values(faults)
    no_secrets(faults)
    faults.end()
    return _cluster(file, _as_ray_sees(faults), unchecked)


def _provider(faults: Faults) -> None:
    provider = faults.file.data.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if isinstance(kind, str):
        if kind in PROVIDERS:
            faults.by_schema(PROVIDERS[kind], ("provider",))
        else:
            faults.add(("provider", "type"), f"unknown value '{kind}'; {did_you_mean(kind, PROVIDERS)}")


def _schema(data: Data) -> Schema:
    """Ray's, but for what it takes away or adds before it looks."""
    schema = ray_schema()
    provider = data.get("provider")
    if isinstance(provider, dict) and provider.get("type") == "local":
        schema["properties"]["min_workers"] = schema["properties"]["max_workers"]
        for name in ("available_node_types", "head_node_type"):  # Ray refuses them for machines of one's own
            del schema["properties"][name]
    else:
        schema["required"] = [*schema["required"], "available_node_types", "head_node_type", "max_workers"]
    return schema


def _local_machines(faults: Faults) -> None:
    data = faults.file.data
    number = len(data["provider"]["worker_ips"])
    for name in ("min_workers", "max_workers"):
        if data.get(name, number) != number:
            faults.add((name,), f"must be the {number} of provider.worker_ips (Ray cannot know what a machine holds before it "
                                f"runs), but got {data[name]}; write {number}")  # fmt: skip
    if data["provider"]["head_ip"] in data["provider"]["worker_ips"]:
        faults.add(("provider", "worker_ips"), "must not hold head_ip, but got "
                   f"{data['provider']['head_ip']} in both; remove it here")  # fmt: skip


def _node_types(faults: Faults) -> tuple[str, ...]:
    data, unchecked = faults.file.data, []
    types, head, ceiling = data["available_node_types"], data["head_node_type"], data["max_workers"]
    if head not in types:
        faults.add(
            ("head_node_type",), f"must be one of available_node_types, but got '{head}'; {did_you_mean(head, types)}"
        )
    provider = data["provider"]["type"]
    machine = MACHINES[provider]()
    if machine is None:
        unchecked.append("node_config (needs boto3: pip install boto3)")
    for name, kind in types.items():
        place: Place = ("available_node_types", name)
        least, most = kind.get("min_workers", 0), kind.get("max_workers", ceiling)
        if name != head and least > most:
            faults.add(
                (*place, "min_workers"), f"min_workers <= max_workers must hold, but got {least} and {most}; lower it"
            )
        if machine is not None:
            faults.by_schema(machine, (*place, "node_config"))
        if name != head and provider in ROLES and ROLES[provider] not in kind["node_config"]:
            faults.add((*place, "node_config"), f"must reach storage by role, but {ROLES[provider]} is missing; add it as "
                                                "clusters/ does (keys do not belong in this file)")  # fmt: skip
        priced = kind["node_config"].get("azure_arm_parameters", kind["node_config"])
        if not kind["resources"].get("CPU"):
            faults.add((*place, "resources"), f"must count the CPUs of the machine, but got {kind['resources']}; "
                                              f"write what a {priced.get(SIZES[provider], 'machine')} has")  # fmt: skip
    least = sum(kind.get("min_workers", 0) for name, kind in types.items() if name != head)
    if least > ceiling:
        faults.add(
            ("max_workers",), f"must be at least the sum of min_workers, but got {ceiling} and {least}; raise it"
        )
    if not any(kind.get("max_workers", ceiling) for name, kind in types.items() if name != head):
        faults.add(("available_node_types",), "must let a worker come, but every max_workers is 0; raise one")
    return tuple(unchecked)


MACHINES: dict[str, Callable[[], Schema | None]] = {
    "aws": aws_machine,
    "gcp": lambda: GCP_MACHINE,
    "azure": azure_machine,
}
ROLES = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}  # on Azure Ray gives every machine an identity
SIZES = {"aws": "InstanceType", "gcp": "machineType", "azure": "vmSize"}


def _commands(faults: Faults) -> None:
    data = faults.file.data
    installs: dict[Place, str] = {("setup_commands", i): c for i, c in enumerate(data.get("setup_commands", []))}
    one_exact_ray(faults, installs, ("setup_commands",))
    written = " ".join(installs.values())
    if "lift_ray" not in written:
        faults.add(
            ("setup_commands",), "must install lift_ray on every node, but no command does; add it as clusters/ does"
        )
    if "RAY_AUTH_MODE=token" not in written:
        faults.add(("setup_commands",), "must keep Ray's token authentication on, but no command exports "
                                        "RAY_AUTH_MODE=token; add it as clusters/ does")  # fmt: skip
    if not any(str(name).endswith(".ray/auth_token") for name in data.get("file_mounts", {})):
        faults.add(("file_mounts",), "must hand the token to every node, but ~/.ray/auth_token is missing; add "
                                     "`~/.ray/auth_token: ~/.ray/auth_token`")  # fmt: skip
    starts = enumerate(data.get("head_start_ray_commands", []))
    heads = [(i, command) for i, command in starts if "ray start" in command]
    if not heads:
        faults.add(("head_start_ray_commands",), "must start Ray with the dashboard on loopback, but no command does (Ray's "
                                                 "default opens it to the network); add it as clusters/ does")  # fmt: skip
    for i, command in heads:
        place = ("head_start_ray_commands", i)
        host = re.search(r"--dashboard-host[= ]\s*(\S+)", command)
        if host and host[1] not in ("127.0.0.1", "localhost"):
            faults.add(place, f"--dashboard-host must be 127.0.0.1 (whoever reaches the dashboard can run code), but got "
                              f"{host[1]}; write 127.0.0.1 and use `ray dashboard`")  # fmt: skip
        if "--autoscaling-config" not in command:
            faults.add(place, "ray start must get --autoscaling-config=~/ray_bootstrap_config.yaml, but does not; add it, or "
                              "no worker is ever started")  # fmt: skip


def _as_ray_sees(faults: Faults) -> Data:
    """The file with Ray's defaults, judged by Ray's own code."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.ERROR)
    try:
        prepared: Data = prepare_config(copy.deepcopy(faults.file.data))
        validate_config(prepared)
    except Exception as error:  # whatever its several modules raise
        faults.add((), f"must be what Ray accepts, but it says: {' '.join(str(error).split())[:200]}; mend the file")
    faults.end()
    return prepared


def _cluster(file: SettingsFile, prepared: Data, unchecked: tuple[str, ...]) -> Cluster:
    data = file.data
    provider = data["provider"]["type"]
    if provider == "local":
        known = {name: _numbers(data.get("metadata", {}).get(name, {})) for name in ("head", "worker")}
        number = len(data["provider"]["worker_ips"])
        worker = NodeType("worker", "", "", known["worker"], number, number)
        if not known["worker"]:
            unchecked = (*unchecked, "what the machines hold (write metadata: {worker: {CPU: ..., GPU: ...}})")
        return Cluster(
            file.source, provider, NodeType("head", "", "", known["head"], 1, 1), (worker,), number, unchecked
        )
    head = data["head_node_type"]
    types = {
        name: _node_type(name, kind, provider, name == head) for name, kind in prepared["available_node_types"].items()
    }
    workers = tuple(kind for name, kind in types.items() if name != head)
    return Cluster(file.source, provider, types[head], workers, prepared["max_workers"], unchecked)


def _numbers(resources: Any) -> dict[str, float]:
    if not isinstance(resources, dict):
        return {}
    return {name: float(amount) for name, amount in resources.items() if isinstance(amount, int | float)}


def _node_type(name: str, kind: Data, provider: str, is_head: bool) -> NodeType:
    machine = kind["node_config"].get("azure_arm_parameters", kind["node_config"])
    scheduling = machine.get("scheduling") or {}
    is_spot = (
        machine.get("priority") == "Spot"
        or machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or scheduling.get("provisioningModel") == "SPOT"
        or scheduling.get("preemptible") is True
    )
    least, most = (1, 1) if is_head else (kind["min_workers"], kind["max_workers"])
    return NodeType(name, str(machine.get(SIZES[provider], "")), "spot" if is_spot else "on-demand",
                    _numbers(kind["resources"]), least, most, kind.get("priority", 0))  # fmt: skip
