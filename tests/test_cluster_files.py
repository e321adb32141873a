"""Ray and AWS accept the cluster files, which agree with pyproject.toml and open no port to the world."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]  # Ray reads these files with PyYAML, so this is what they mean
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "clusters").glob("*.yaml"))
STORES = {"aws": "s3://", "azure": "az://", "gcp": "gs://", "local": "/"}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)

RAY_REQUIREMENT = re.compile(r"\bray(?:\[[\w,]*\])?\s*(?:[=<>~!]=|[<>@])[^'\"\s]*")
AWS_KEY = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|aws_(?:access_key_id|secret_access_key|session_token)", re.IGNORECASE
)


def read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def as_ray_sees(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with Ray's defaults. Raises what `ray up` raises for an unknown key or type."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def aws_complaints(node_config: dict[str, Any]) -> str:
    """Return botocore's objections to launching such a machine; empty if it would send the request."""
    from botocore.session import Session  # type: ignore[import-untyped]
    from botocore.validate import ParamValidator  # type: ignore[import-untyped]

    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report: str = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, shape).generate_report()
    return report


def commands(config: dict[str, Any]) -> list[str]:
    """Return every shell command of the configuration, in the order of its keys."""
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


def options_of_ray_start(commands: list[str]) -> list[str]:
    """Return the words of the one `ray start` among these commands."""
    (start,) = (command for command in commands if "ray start" in command)
    return shlex.split(start[start.index("ray start") :])


def aws_node_types() -> list[Any]:
    return [
        pytest.param(kind["node_config"], id=f"{path.name}:{name}")
        for path in FILES
        if (config := read(path))["provider"]["type"] == "aws"
        for name, kind in config["available_node_types"].items()
    ]


def the_pin() -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    return pin


def test_there_is_a_cluster_file_for_aws() -> None:
    assert ROOT / "clusters" / "aws.yaml" in FILES
    assert len(aws_node_types()) >= 3


@every_file
def test_ray_accepts_the_file(path: Path) -> None:
    as_ray_sees(read(path))


@pytest.mark.parametrize(
    ("where", "wrong", "right"),
    [
        ((), "idle_timeout_minuts", 10),
        (("available_node_types", "gpu-spot"), "max_wrokers", 8),
        (("auth",), "shh_user", "ubuntu"),
    ],
)
def test_ray_refuses_a_misspelt_key(where: tuple[str, ...], wrong: str, right: object) -> None:
    config = read(ROOT / "clusters" / "aws.yaml")
    section = config
    for key in where:
        section = section[key]
    section[wrong] = right
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        as_ray_sees(config)


@pytest.mark.parametrize("node_config", aws_node_types())
def test_aws_would_launch_the_machine(node_config: dict[str, Any]) -> None:
    assert aws_complaints(node_config) == ""


def test_a_misspelt_machine_setting_is_found() -> None:
    assert "InstnceType" in aws_complaints({"InstnceType": "g6.12xlarge"})


@pytest.mark.parametrize("node_config", aws_node_types())
def test_every_aws_machine_names_its_image_and_reaches_s3_by_role(node_config: dict[str, Any]) -> None:
    assert node_config["ImageId"].startswith("ami-")
    assert node_config["IamInstanceProfile"]


@every_file
def test_every_node_gets_one_exact_ray_inside_the_projects_pin(path: Path) -> None:
    """The version is exact, because a node with another patch release cannot join a running cluster."""
    pin = the_pin()
    prepared = as_ray_sees(read(path))
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"]
    assert not any("worker_setup_commands" in kind for kind in prepared["available_node_types"].values())
    asked = [Requirement(text) for text in RAY_REQUIREMENT.findall(" ".join(prepared["head_setup_commands"]))]
    assert len(asked) == 1, "Ray must be installed once, from one requirement"
    (exact,) = asked[0].specifier
    assert exact.operator == "=="
    assert "*" not in exact.version
    assert pin.specifier.contains(exact.version), (
        f"{path.name} installs Ray {exact.version}, pyproject.toml wants {pin}"
    )
    assert asked[0].extras == pin.extras


@every_file
def test_the_versions_named_in_comments_are_the_one_installed(path: Path) -> None:
    text = path.read_text()
    assert {Requirement(found).specifier for found in RAY_REQUIREMENT.findall(text)} == {
        Requirement(found).specifier for found in RAY_REQUIREMENT.findall("\n".join(commands(read(path))))
    }


@pytest.mark.parametrize(
    "text",
    ["pip install 'ray[default]==3.0.0'", "pip install -U 'ray @ https://example.org/ray-3.0.0.dev0.whl'", "ray>=2.60"],
)
def test_any_way_to_ask_for_ray_is_noticed(text: str) -> None:
    assert RAY_REQUIREMENT.search(text)


@every_file
def test_the_dashboard_listens_on_loopback_only(path: Path) -> None:
    config = as_ray_sees(read(path))
    assert "--dashboard-host=127.0.0.1" in options_of_ray_start(config["head_start_ray_commands"])
    assert not any("0.0.0.0" in command for command in commands(config))


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "onprem"], ids=lambda path: path.name)
def test_the_head_trains_nothing_and_workers_come_and_go(path: Path) -> None:
    config = as_ray_sees(read(path))
    kinds = dict(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    assert head["resources"]["GPU"] == 0
    assert head["resources"]["train_driver"] > 0
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in kinds.values())
    assert config["idle_timeout_minutes"] > 0


def test_aws_asks_for_spot_first_and_falls_back_to_the_same_machine_on_demand() -> None:
    config = read(ROOT / "clusters" / "aws.yaml")
    spot, ondemand = config["available_node_types"]["gpu-spot"], config["available_node_types"]["gpu-ondemand"]
    assert spot["priority"] > ondemand["priority"]
    assert spot["resources"] == ondemand["resources"]
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["node_config"] == ondemand["node_config"]
    assert "InstanceMarketOptions" not in config["available_node_types"]["head"]["node_config"]
    assert config["provider"]["cache_stopped_nodes"] is False


@every_file
def test_the_file_holds_no_aws_key(path: Path) -> None:
    assert not AWS_KEY.search(path.read_text())


def test_an_aws_key_would_be_noticed() -> None:
    assert AWS_KEY.search("AKIA" + "A" * 16)
    assert AWS_KEY.search("aws_secret_access_key: x")


@every_file
def test_bash_reads_every_command(path: Path) -> None:
    subprocess.run(["bash", "-n"], input="\n".join(commands(as_ray_sees(read(path)))), text=True, check=True)


@every_file
def test_later_commands_see_what_the_setup_exports(path: Path, tmp_path: Path) -> None:
    """Run only the lines that write the environment, in an empty home."""
    writing = [command for command in read(path)["setup_commands"] if "lift_env" in command]
    for command in writing * 2:  # `ray up` again runs them again
        subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=False)
    shown = subprocess.run(
        ["bash", "-c", '. ~/.bashrc; echo "$LIFT_RAY|$LIFT_DATA|$LIFT_RESULTS"'],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    what, data, results = shown.strip().split("|")
    assert Requirement(what).name == "lift_ray"
    store = STORES[read(path)["provider"]["type"]]
    assert data.startswith(store)
    assert results.startswith(store)
    assert (tmp_path / ".bashrc").read_text().count("lift_env") == 1


RAY_JOB_SUBMIT = f"""#!{sys.executable}
import os, shlex, subprocess, sys
entrypoint = shlex.join(sys.argv[sys.argv.index("--") + 1 :])  # as Ray's command does
subprocess.run(["/bin/bash", "-c", entrypoint], env=os.environ | {{"LIFT_RESULTS": "s3://b/results"}}, check=True)
"""


@pytest.fixture
def head(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a laptop whose `ray job submit` runs the job on a head; only the head knows $LIFT_RESULTS."""
    for name, script in {"ray": RAY_JOB_SUBMIT, "python": '#!/bin/sh\necho "python $@"\n'}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin"}


DOCUMENTED = [*FILES, ROOT / "clusters" / "kuberay" / "raycluster.yaml", ROOT / "docs" / "how-to" / "clusters.md"]


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: path.name)
def test_the_documented_submit_sends_results_where_the_cluster_says(path: Path, head: dict[str, str]) -> None:
    lines = re.sub(r"\\\n#?\s*", "", path.read_text())
    (command,) = re.findall(r"^#?\s*(ray job submit --address.*)$", lines, re.MULTILINE)
    done = subprocess.run(["bash", "-c", command], env=head, capture_output=True, text=True, check=True)
    assert done.stdout == "python -m lift_ray.tune inat.yaml --out s3://b/results/inat2018\n"


def test_the_pod_that_submits_a_rayjob_leaves_the_variables_to_the_head(head: dict[str, str]) -> None:
    job = read(ROOT / "clusters" / "kuberay" / "rayjob.yaml")
    command = f"ray job submit --address http://x --no-wait -- {job['spec']['entrypoint']} ;"  # as KubeRay's operator writes it
    done = subprocess.run(["bash", "-c", command], env=head, capture_output=True, text=True, check=True)
    assert done.stdout == "python -m lift_ray.tune search_spaces/inat.yaml --out s3://b/results/inat2018\n"
