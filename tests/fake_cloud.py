"""A Ray head with an autoscaler whose machines are processes here: Ray's fake provider, without its `ray stop --force`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
from ports import free_ports
from processes import wait_for

RAY = str(Path(sys.executable).parent / "ray")
HEAD_ID = "f" * 51 + "00000"  # fixed by the provider
STORE_BYTES = 80 * 2**20
TOKEN = "0123456789abcdef" * 4
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
EMPTY_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


@dataclass(frozen=True)
class Head:
    """A running head; `env` is what a process needs to reach it, `results` is $LIFT_RESULTS on its machines alone."""

    dashboard: str
    env: dict[str, str]
    results: Path

    def nodes(self) -> set[str]:
        """The ids of the worker nodes that are alive, as the dashboard knows them."""
        answer = requests.get(
            f"{self.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20
        )
        nodes = answer.json()["data"]["result"]["result"]
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE" and not node["is_head_node"]}

    def kill(self, node: str) -> None:
        """SIGKILL to the raylet of a node and to all that it started, as when a spot machine is gone."""
        (raylet,) = (p for p in psutil.process_iter() if _is_raylet_of(p, node))
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _is_raylet_of(process: psutil.Process, node: str) -> bool:
    with suppress(psutil.Error):
        return process.name() == "raylet" and process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node
    return False


@contextmanager
def fake_cloud(
    folder: Path, kinds: dict[str, dict[str, Any]], idle_s: float, provider: str = PROVIDER, ray_in: str = ""
) -> Iterator[Head]:
    """A head without cores, and an autoscaler that starts nodes of these kinds (`resources`, `max_workers`).

    Args:
        ray_in: a folder with another `ray` than the installed one, for the head and its nodes.
    """
    gcs, dashboard, agent, client = free_ports(4)
    (folder / "token").write_text(TOKEN)
    config: dict[str, Any] = {
        "cluster_name": "fake",
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": idle_s / 60,
        "max_workers": sum(kind["max_workers"] for kind in kinds.values()),
        "provider": {
            "type": "external",
            "module": provider,
            "asked": str(folder / "asked"),
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{gcs}",
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                name: {
                    "node_config": {},
                    "labels": {"ray.io/node-group": name},
                    **kind,
                    "resources": kind["resources"] | {"object_store_memory": STORE_BYTES},
                }
                for name, kind in kinds.items()
            },
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in EMPTY_LISTS},
    }
    (folder / "cluster.yaml").write_text(json.dumps(config))
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [
            RAY,
            "start",
            "--head",
            "--block",
            f"--port={gcs}",
            "--num-cpus=0",
            f"--object-store-memory={STORE_BYTES}",
            f"--temp-dir={folder}",
            f"--autoscaling-config={folder / 'cluster.yaml'}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            "--disable-usage-stats",
        ],
        env=env
        | {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "LIFT_RESULTS": str(folder / "results"),
            "PYTHONPATH": os.pathsep.join([ray_in, str(Path(__file__).parent)]),
        },
        stdout=(folder / "head.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    head = Head(f"http://127.0.0.1:{dashboard}", env | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}, folder / "results")
    try:
        wait_for("the head", lambda: _answers(head, started), 90)
        yield head
    finally:
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # what `ray start` leaves of the nodes that its autoscaler started
        started.wait(20)


def _answers(head: Head, started: subprocess.Popen[bytes]) -> bool:
    assert started.poll() is None, "ray start ended; see head.log"
    with suppress(requests.RequestException, KeyError, ValueError):
        head.nodes()
        return True
    return False
