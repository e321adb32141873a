"""Connection to a Ray cluster, or to Ray started on this machine."""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lift_ray.errors import Interrupted, RunFailed, Stopped, one_line
from lift_ray.ray_runtime.autoscaler import cluster_nodes
from lift_ray.ray_runtime.patches import listen_on_loopback, use_free_agent_port
from lift_ray.registry import PLUGINS

OBJECT_STORE_BYTES = 150 * 2**20  # workers read shards themselves, so only settings and metrics pass through it


@contextmanager
def connected(
    address: str | None = None, *, dashboard: bool = True, metadata: Mapping[str, str] | None = None
) -> Iterator[list[dict[str, float]]]:
    """Connect to the cluster at `address` or $RAY_ADDRESS; without either, start Ray here, on loopback, and stop it afterwards.

    A session that is already connected is used as it is. Yields the resources of each node that is up or may be added.

    Args:
        address: address of the cluster.
        dashboard: serve the dashboard if Ray is started here.
        metadata: metadata of this driver on the dashboard; its list of jobs shows `job_name`.

    Raises:
        RunFailed: the cluster does not answer.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    mine = not ray.is_initialized()
    if mine:
        if not address:
            listen_on_loopback()
            use_free_agent_port()
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=ray.job_config.JobConfig(runtime_env=_plugins(), metadata=dict(metadata or {})),
                **({} if address else {"include_dashboard": dashboard, "object_store_memory": OBJECT_STORE_BYTES}),
            )
        except SystemExit as error:  # from Ray's handler of SIGTERM while it starts
            raise Interrupted(signal.SIGTERM) if error.code == signal.SIGTERM else error from None
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunFailed(f"Ray at {address or 'this machine'} does not answer: {one_line(error)}") from None
        finally:
            if not address:
                # Ray writes the token readable by every user of the machine; without authentication there is none.
                with suppress(OSError):
                    (Path.home() / ".ray" / "auth_token").chmod(0o600)
    try:
        yield cluster_nodes()
    except Stopped:
        mine = False  # the process exits at once, and the Ray that it started with it
        raise
    finally:
        if mine:
            ray.shutdown()


def _plugins() -> dict[str, Any]:
    """The runtime environment in which workers import the plugins that this process imports."""
    return {"env_vars": {PLUGINS: os.environ[PLUGINS]}} if os.environ.get(PLUGINS) else {}


def meeting_point() -> tuple[str, int]:
    """Return this node's address and a free port, for a process group to meet."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), int(probe.getsockname()[1])


def dashboard_url() -> str | None:
    """Return the URL of the connected session's dashboard; None without one."""
    import ray

    url = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else None


def machine() -> dict[str, Any]:
    """Describe the hardware of a search: the driver's system, and the resources of each node of the cluster."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "nodes": nodes}
