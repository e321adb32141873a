"""An AWS account on loopback (moto's server), `ray up` in it, and what came of its calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import requests
import yaml  # type: ignore[import-untyped]
from fake_cloud import RAY, TOKEN
from ports import free_ports
from processes import wait_for

REGION = "us-west-2"
# What the head's autoscaler does for trials that wait, with the file that `ray up` gives it.
LAUNCH_WORKERS = """\
import sys, yaml
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
config = _bootstrap_config(yaml.safe_load(open(sys.argv[1])))
provider = _get_node_provider(config["provider"], config["cluster_name"])
for kind, settings in config["available_node_types"].items():
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: kind, TAG_RAY_LAUNCH_CONFIG: "x"}
    if kind != config["head_node_type"]:
        provider.create_node(settings["node_config"], tags, 1)
"""


@dataclass(frozen=True)
class Account:
    """`env` is what a process needs to work with it; `home` is where its keys go; `file` is the cluster's."""

    env: dict[str, str]
    home: Path
    file: Path

    def client(self, service: str) -> Any:
        """Of boto3."""
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",  # pragma: allowlist secret
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the account."""
        return subprocess.run(
            command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )

    def ray_up(self) -> str:
        """What `ray up` says, which ends where the head would have to answer."""
        done = self.run(RAY, "up", "-y", "--no-config-cache", str(self.file))
        assert done.returncode == 1, done.stdout
        return done.stdout

    def launch_workers(self) -> None:
        """One of each kind."""
        done = self.run(sys.executable, "-c", LAUNCH_WORKERS, str(self.file))
        assert done.returncode == 0, done.stdout

    def instances(self) -> dict[str, dict[str, Any]]:
        """What was launched, by node type, with `Tags` as a dict."""
        found = [i for r in self.client("ec2").describe_instances()["Reservations"] for i in r["Instances"]]
        found = [i | {"Tags": {tag["Key"]: tag["Value"] for tag in i["Tags"]}} for i in found]
        by_kind = {instance["Tags"]["ray-user-node-type"]: instance for instance in found}
        assert len(by_kind) == len(found)
        return by_kind


@contextmanager
def fake_aws(folder: Path, cluster_file: Path) -> Iterator[Account]:
    """An account that has the file's instance profiles; the file gets an image of this account, and an ssh that reaches nobody."""
    (port,) = free_ports(1)
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(TOKEN)
    env = os.environ | {
        "HOME": str(folder),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",  # pragma: allowlist secret
        "AWS_DEFAULT_REGION": REGION,
        "AUTOSCALER_NODE_START_WAIT_S": "3",
    }
    account = Account(env, folder, folder / "aws.yaml")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for("moto", lambda: _answers(env["AWS_ENDPOINT_URL"]), 60)
        config = yaml.safe_load(cluster_file.read_text())
        image = account.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        kinds = [kind["node_config"] for kind in config["available_node_types"].values()]
        for kind in kinds:
            kind["ImageId"] = image
        for name in {kind["IamInstanceProfile"]["Name"] for kind in kinds}:
            account.client("iam").create_instance_profile(InstanceProfileName=name)
        config["cluster_name"] = f"test-{os.getpid()}"
        config["auth"]["ssh_proxy_command"] = "false"  # moto's addresses belong to others
        account.file.write_text(json.dumps(config))
        yield account
    finally:
        server.kill()
        server.wait(20)


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/moto-api/data.json", timeout=5).ok
    except requests.RequestException:
        return False
