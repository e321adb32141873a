"""A file for `ray up` (AWS, Google Cloud, Azure, machines of one's own) as the cluster it makes."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from lift_ray.clusters.diagnostics import (
    Diagnostics,
    Place,
    loopback_only,
    no_secrets,
    one_exact_ray,
    one_ray_image,
    plain_values,
    token_stays_on,
)
from lift_ray.clusters.model import Cluster, NodeType
from lift_ray.clusters.schemas import GCP_MACHINE, PROVIDERS, Schema, aws_machine, azure_machine, ray_schema
from lift_ray.errors import did_you_mean
from lift_ray.settings.yaml_file import SettingsFile

Data = dict[str, Any]


def read_ray_up(file: SettingsFile) -> Cluster:
    """Check and read it. Raises BadInput with a line for each fault."""
    faults = Diagnostics(file)
    unchecked: tuple[str, ...] = ()
    _provider(faults)
    faults.by_schema(_schema(file.data))
    faults.end()  # what follows needs the right types
    if file.data["provider"]["type"] == "local":
        _local_machines(faults)
    else:
        _open_to_the_world(faults)
        unchecked = _node_types(faults)
    _commands(faults)
    plain_values(faults)
    no_secrets(faults)
    faults.end()
    return _cluster(file, _as_ray_sees(faults), unchecked)


def _provider(faults: Diagnostics) -> None:
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


def _local_machines(faults: Diagnostics) -> None:
    data = faults.file.data
    number = len(data["provider"]["worker_ips"])
    for name in ("min_workers", "max_workers"):
        if data.get(name, number) != number:
            faults.add(
                (name,),
                f"must be the {number} of provider.worker_ips (Ray cannot know what a machine holds before it "
                f"runs), but got {data[name]}; write {number}",
            )
    if data["provider"]["head_ip"] in data["provider"]["worker_ips"]:
        faults.add(
            ("provider", "worker_ips"),
            f"must not hold head_ip, but got {data['provider']['head_ip']} in both; remove it here",
        )


def _node_types(faults: Diagnostics) -> tuple[str, ...]:
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
        role = ROLES.get((provider, name == head))
        if role is not None and role not in kind["node_config"]:
            faults.add(
                (*place, "node_config"),
                f"must reach storage by role, but {role} is missing; add it as "
                "clusters/ does (keys do not belong in this file)",
            )
        priced = kind["node_config"].get("azure_arm_parameters", kind["node_config"])
        if not kind["resources"].get("CPU"):
            faults.add(
                (*place, "resources"),
                f"must count the CPUs of the machine, but got {kind['resources']}; "
                f"write what a {priced.get(SIZES[provider], 'machine')} has",
            )
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
# by provider, and whether it is the head: Ray gives Google's head and every machine on Azure an identity itself
ROLES = {("aws", True): "IamInstanceProfile", ("aws", False): "IamInstanceProfile", ("gcp", False): "serviceAccounts"}
SIZES = {"aws": "InstanceType", "gcp": "machineType", "azure": "vmSize"}


def _open_to_the_world(faults: Diagnostics) -> None:
    """AWS: whoever writes a security group may open SSH with it, and nothing else, to all addresses."""
    place: Place = ("provider", "security_group", "IpPermissions")
    for i, rule in enumerate((faults.file.data["provider"].get("security_group") or {}).get("IpPermissions") or []):
        ranges = [r.get("CidrIp") for r in rule.get("IpRanges", [])] + [
            r.get("CidrIpv6") for r in rule.get("Ipv6Ranges", [])
        ]
        first, last = rule.get("FromPort", 0), rule.get("ToPort", 65535)
        for wide in (text for text in map(str, ranges) if re.search(r"/[0-7]$", text)):
            if (first, last) != (22, 22):
                faults.add(
                    (*place, i),
                    f"only port 22 may be open to everyone, but got {first} to {last} for {wide}; remove it and "
                    "use `ray dashboard`",
                )


def _lists_of_commands(data: Data) -> dict[Place, str]:
    """Every command of the file by its place."""
    sections: list[tuple[Place, Data]] = [((), data)]
    sections += [(("available_node_types", name), kind) for name, kind in data.get("available_node_types", {}).items()]
    return {
        (*place, name, i): command
        for place, section in sections
        for name, commands in section.items()
        if name.endswith("_commands")
        for i, command in enumerate(commands)
    }


def _images(faults: Diagnostics) -> None:
    data = faults.file.data
    sections: list[tuple[Place, Data]] = [(("docker",), data.get("docker") or {})]
    sections += [
        (("available_node_types", name, "docker"), kind.get("docker") or {})
        for name, kind in data.get("available_node_types", {}).items()
    ]
    for place, section in sections:
        for name in ("image", "head_image", "worker_image"):
            if section.get(name):
                one_ray_image(faults, (*place, name), section[name], version("ray"))


def _commands(faults: Diagnostics) -> None:
    data = faults.file.data
    commands = _lists_of_commands(data)
    one_exact_ray(faults, commands, ("setup_commands",))
    token_stays_on(faults, commands)
    _images(faults)
    written = " ".join(data.get("setup_commands", []))
    if "lift_ray" not in written:
        faults.add(
            ("setup_commands",), "must install lift_ray on every node, but no command does; add it as clusters/ does"
        )
    if "RAY_AUTH_MODE=token" not in written:
        faults.add(
            ("setup_commands",),
            "must keep Ray's token authentication on, but no command exports "
            "RAY_AUTH_MODE=token; add it as clusters/ does",
        )
    if not any(str(name).endswith(".ray/auth_token") for name in data.get("file_mounts", {})):
        faults.add(
            ("file_mounts",),
            "must hand the token to every node, but ~/.ray/auth_token is missing; add "
            "`~/.ray/auth_token: ~/.ray/auth_token`",
        )
    workers = data.get("worker_start_ray_commands", ["ray start --address"])  # or Ray's own
    if not any("ray start" in command and "--address" in command for command in workers):
        faults.add(
            ("worker_start_ray_commands",),
            "must start Ray and join the head, but no command does; add `ray start "
            "--address=$RAY_HEAD_IP:6379` as clusters/ does",
        )
    starts = enumerate(data.get("head_start_ray_commands", []))
    heads = [(i, command) for i, command in starts if "ray start" in command]
    if not heads:
        faults.add(
            ("head_start_ray_commands",),
            "must start Ray with the dashboard on loopback, but no command does (Ray's "
            "default opens it to the network); add it as clusters/ does",
        )
    loopback_only(faults, {("head_start_ray_commands", i): command for i, command in heads})
    for i, command in heads:
        place = ("head_start_ray_commands", i)
        if data["provider"]["type"] == "local" and "RAY_enable_autoscaler_v2=0" not in command:
            faults.add(
                place,
                "ray start must get RAY_enable_autoscaler_v2=0 (the second autoscaler never starts the machines of "
                "worker_ips), but does not; add it before `ray start`",
            )
        if "--autoscaling-config" not in command:
            faults.add(
                place,
                "ray start must get --autoscaling-config=~/ray_bootstrap_config.yaml, but does not; add it, or "
                "no worker is ever started",
            )


def _as_ray_sees(faults: Diagnostics) -> Data:
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
    return NodeType(
        name,
        str(machine.get(SIZES[provider], "")),
        "spot" if is_spot else "on-demand",
        _numbers(kind["resources"]),
        least,
        most,
        kind.get("priority", 0),
    )
