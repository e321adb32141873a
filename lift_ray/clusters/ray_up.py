"""Reader of files for `ray up` (AWS, Google Cloud, Azure, and machines of your own)."""

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
    installs_nothing,
    is_own_image,
    loopback_only,
    no_secrets,
    one_exact_ray,
    one_port,
    one_ray_image,
    plain_values,
    token_stays_on,
)
from lift_ray.clusters.model import Cluster, NodeType
from lift_ray.clusters.schemas import GCP_MACHINE, PROVIDERS, Schema, aws_machine, azure_machine, ray_schema
from lift_ray.errors import did_you_mean, one_line
from lift_ray.settings.yaml_file import SettingsFile

Data = dict[str, Any]


def read_ray_up(file: SettingsFile) -> Cluster:
    """Check a file and return its cluster. Raises BadInput with a line for each fault."""
    faults = Diagnostics(file)
    unchecked: tuple[str, ...] = ()
    _provider(faults)
    faults.by_schema(_schema(file.data))
    faults.end()  # the checks below rely on the types
    if file.data["provider"]["type"] == "local":
        _local_machines(faults)
    else:
        _open_to_the_world(faults)
        unchecked = _node_types(faults)
        _both_keys(faults)
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
            faults.add(("provider", "type"), f"unknown value '{kind}'", remedy=did_you_mean(kind, PROVIDERS))


def _schema(data: Data) -> Schema:
    """Return Ray's schema, changed by what Ray adds to or removes from a file before it validates it."""
    schema = ray_schema()
    provider = data.get("provider")
    if isinstance(provider, dict) and provider.get("type") == "local":
        schema["properties"]["min_workers"] = schema["properties"]["max_workers"]
        for name in ("available_node_types", "head_node_type"):  # Ray rejects them for machines of your own
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
                f"must be {number}, the number of provider.worker_ips (Ray cannot know a machine's resources before it runs)",
                data[name],
                f"write {number}",
            )
    if data["provider"]["head_ip"] in data["provider"]["worker_ips"]:
        faults.add(
            ("provider", "worker_ips"),
            "must not contain head_ip",
            f"{data['provider']['head_ip']} in both",
            "remove it here",
        )


def _node_types(faults: Diagnostics) -> tuple[str, ...]:
    data, unchecked = faults.file.data, []
    types, head, ceiling = data["available_node_types"], data["head_node_type"], data["max_workers"]
    if head not in types:
        faults.add(("head_node_type",), "must be one of available_node_types", f"'{head}'", did_you_mean(head, types))
    provider = data["provider"]["type"]
    machine = MACHINES[provider]()
    if machine is None:
        unchecked.append("node_config (requires boto3: pip install boto3)")
    for name, kind in types.items():
        place: Place = ("available_node_types", name)
        least, most = kind.get("min_workers", 0), kind.get("max_workers", ceiling)
        if name != head and least > most:
            faults.add(
                (*place, "min_workers"), "min_workers <= max_workers must hold", f"{least} and {most}", "lower it"
            )
        if machine is not None:
            faults.by_schema(machine, (*place, "node_config"))
        _own_key(faults, place, kind["node_config"])
        role = ROLES.get((provider, name == head))
        if role is not None and role not in kind["node_config"]:
            faults.add(
                (*place, "node_config"),
                "requires a role for access to storage",
                but=f"{role} is missing",
                remedy="add it as clusters/ does (keys do not belong in this file)",
            )
        priced = kind["node_config"].get("azure_arm_parameters", kind["node_config"])
        if not kind["resources"].get("CPU"):
            faults.add(
                (*place, "resources"),
                "must contain the number of CPUs",
                kind["resources"],
                f"write what a {priced.get(SIZES[provider], 'machine')} has",
            )
    least = sum(kind.get("min_workers", 0) for name, kind in types.items() if name != head)
    if least > ceiling:
        faults.add(("max_workers",), "must be at least the sum of min_workers", f"{ceiling} and {least}", "raise it")
    if not any(kind.get("max_workers", ceiling) for name, kind in types.items() if name != head):
        faults.add(("available_node_types",), "must allow a worker", but="every max_workers is 0", remedy="raise one")
    return tuple(unchecked)


def _own_key(faults: Diagnostics, place: Place, machine: Data) -> None:
    """Require of AWS that a machine knows the public part of auth.ssh_private_key; without one Ray makes its own keys."""
    data = faults.file.data
    if (
        data["provider"]["type"] == "aws"
        and "ssh_private_key" in data.get("auth", {})
        and not {"KeyName", "UserData"} & machine.keys()
    ):
        faults.add(
            (*place, "node_config"),
            "auth.ssh_private_key requires the name of its key pair in AWS",
            but="KeyName is missing",
            remedy="add it, or remove auth.ssh_private_key (Ray then makes a key)",
        )


def _both_keys(faults: Diagnostics) -> None:
    """Require of Azure both parts of a key, or none."""
    auth = faults.file.data.get("auth", {})
    given = {"ssh_private_key", "ssh_public_key"} & auth.keys()
    if faults.file.data["provider"]["type"] == "azure" and len(given) == 1:
        (missing,) = {"ssh_private_key", "ssh_public_key"} - given
        faults.add(("auth", *given), f"requires auth.{missing}", but="it is missing", remedy="add it, or remove both")


MACHINES: dict[str, Callable[[], Schema | None]] = {
    "aws": aws_machine,
    "gcp": lambda: GCP_MACHINE,
    "azure": azure_machine,
}
# (provider, is head) -> key of the role. Ray itself gives Google's head and every machine on Azure an identity.
ROLES = {("aws", True): "IamInstanceProfile", ("aws", False): "IamInstanceProfile", ("gcp", False): "serviceAccounts"}
SIZES = {"aws": "InstanceType", "gcp": "machineType", "azure": "vmSize"}


def _open_to_the_world(faults: Diagnostics) -> None:
    """Forbid security groups (AWS) that open any port but that of SSH to all addresses."""
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
                    "only port 22 may be open to everyone",
                    f"{first} to {last} for {wide}",
                    "remove it and use `ray dashboard`",
                )


def _sections(data: Data) -> list[tuple[Place, Data]]:
    """Return the file itself and its node types, by place."""
    kinds = data.get("available_node_types", {})
    return [((), data), *((("available_node_types", name), kind) for name, kind in kinds.items())]


def _lists_of_commands(data: Data) -> dict[Place, str]:
    """Return every command of the file by its place."""
    return {
        (*place, name, i): command
        for place, section in _sections(data)
        for name, commands in section.items()
        if name.endswith("_commands")
        for i, command in enumerate(commands)
    }


def _own_image(data: Data) -> str:
    """Return the image for all nodes, if it is the user's own and should contain lift_ray; otherwise ""."""
    image = str((data.get("docker") or {}).get("image") or "")
    return image if image and is_own_image(image) else ""


def _images(faults: Diagnostics) -> None:
    for place, section in _sections(faults.file.data):
        docker = section.get("docker") or {}
        for name in ("image", "head_image", "worker_image"):
            if docker.get(name):
                one_ray_image(faults, (*place, "docker", name), docker[name], version("ray"))


# Section, test that one of its entries must pass, and the fault if none does.
REQUIRED: tuple[tuple[str, Callable[[str], bool], str, str, str], ...] = (
    (
        "setup_commands",
        lambda command: "lift_ray" in command,
        "must install lift_ray on every node",
        "no command does",
        "add it as clusters/ does",
    ),
    (
        "setup_commands",
        lambda command: "RAY_AUTH_MODE=token" in command,
        "must keep Ray's token authentication on",
        "no command exports RAY_AUTH_MODE=token",
        "add it as clusters/ does",
    ),
    (
        "file_mounts",
        lambda path: path.endswith(".ray/auth_token"),
        "must copy the token to every node",
        "~/.ray/auth_token is missing",
        "add `~/.ray/auth_token: ~/.ray/auth_token`",
    ),
    (
        "worker_start_ray_commands",
        lambda command: "ray start" in command and "--address" in command,
        "must start Ray and join the head",
        "no command does",
        "add `ray start --address=$RAY_HEAD_IP:6379` as clusters/ does",
    ),
    (
        "head_start_ray_commands",
        lambda command: "ray start" in command,
        "must start Ray with the dashboard on loopback",
        "no command does (Ray's default opens it to the network)",
        "add it as clusters/ does",
    ),
)


def _commands(faults: Diagnostics) -> None:
    commands = _lists_of_commands(faults.file.data)
    own_image = _own_image(faults.file.data)
    if own_image:
        installs_nothing(faults, commands, own_image)
    else:
        one_exact_ray(faults, commands, ("setup_commands",))
    token_stays_on(faults, commands)
    _images(faults)
    data = {"worker_start_ray_commands": ["ray start --address"], **faults.file.data}  # the default is Ray's own
    for section, suits, rule, but, remedy in REQUIRED[1:] if own_image else REQUIRED:  # an image contains lift_ray
        if not any(suits(str(entry)) for entry in data.get(section, ())):
            faults.add((section,), rule, but=but, remedy=remedy)
    heads = {p: text for p, text in commands.items() if p[0] == "head_start_ray_commands" and "ray start" in text}
    loopback_only(faults, heads)
    one_port(faults, heads, {p: text for p, text in commands.items() if p[0] == "worker_start_ray_commands"})
    for place, command in heads.items():
        if data["provider"]["type"] == "local" and "RAY_enable_autoscaler_v2=0" not in command:
            faults.add(
                place,
                "ray start requires RAY_enable_autoscaler_v2=0 (autoscaler v2 never starts the machines of worker_ips)",
                but="it is missing",
                remedy="add it before `ray start`",
            )
        if "--autoscaling-config" not in command:
            faults.add(
                place,
                "ray start requires --autoscaling-config=~/ray_bootstrap_config.yaml",
                but="it is missing",
                remedy="add it, or no worker is ever started",
            )


def _as_ray_sees(faults: Diagnostics) -> Data:
    """Return the file with Ray's defaults, after Ray's own validation."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.ERROR)
    try:
        prepared: Data = prepare_config(copy.deepcopy(faults.file.data))
        validate_config(prepared)
    except Exception as error:  # its modules raise errors of many types
        faults.add((), f"rejected by Ray: {one_line(error, 200)}", remedy="fix the file")
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
            unchecked = (*unchecked, "resources of the machines (write metadata: {worker: {CPU: ..., GPU: ...}})")
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
