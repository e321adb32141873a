"""Connection to a Ray cluster, or to Ray started on this machine."""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lift_ray.errors import BadInput, Interrupted, RunFailed, Stopped, one_line
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
        BadInput: Ray cannot put its files into the temporary folder.
        RunFailed: the cluster does not answer.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    mine = not ray.is_initialized()
    if mine:
        if not address:
            check_temporary_folder()
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
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise BadInput(
                _temporary_folder()[0],
                "must be a folder that Ray can write to",
                but=one_line(error),
                remedy="set RAY_TMPDIR to another folder",
            ) from None
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


def check_temporary_folder() -> None:
    """Raise BadInput if the paths of Ray's Unix sockets in its temporary folder would be too long; Ray says so in a traceback."""
    variable, folder = _temporary_folder()
    length = len(os.fsencode(f"{folder}/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"))
    longest = 103 if sys.platform == "darwin" else 107
    if length > longest:
        raise BadInput(
            variable,
            f"must be a shorter path, because paths of Ray's Unix sockets in it are limited to {longest} bytes",
            but=f"{folder} gives paths of {length} bytes",
            remedy="set RAY_TMPDIR=/tmp, or another short path",
        )


def _temporary_folder() -> tuple[str, str]:
    """Return the environment variable that sets Ray's temporary folder, and the folder."""
    names = ("RAY_TMPDIR",) if sys.platform == "darwin" else ("RAY_TMPDIR", "TMPDIR")
    name = next((name for name in names if name in os.environ), "RAY_TMPDIR")
    return name, os.environ.get(name, "/tmp")


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
