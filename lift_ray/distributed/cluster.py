"""Joining a Ray cluster, or starting Ray on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from lift_ray.errors import RunFailed

OBJECT_STORE_BYTES = 150 * 2**20  # shards are read by the workers themselves; only settings and figures travel


@contextmanager
def connected(address: str | None = None, *, dashboard: bool = True) -> Iterator[list[dict[str, float]]]:
    """Use the cluster at `address` or $RAY_ADDRESS; without either, start Ray here and stop it afterwards.

    A session that is already connected is used as it is. Yields the resources of each node that is alive.

    Raises:
        RunFailed: the cluster does not answer.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(
                address=address or "local", log_to_driver=False, logging_level=logging.ERROR,
                **({} if address else {"include_dashboard": dashboard, "object_store_memory": OBJECT_STORE_BYTES}),
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunFailed(
                f"Ray at {address or 'this machine'} must answer, but: {' '.join(str(error).split())[:300]}"
            ) from None
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if mine:
            ray.shutdown()


def meeting_point() -> tuple[str, int]:
    """This node's address and a free port, where a process group can form."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), int(probe.getsockname()[1])


def dashboard_url() -> str | None:
    """Where the dashboard of the connected session is served; None without one."""
    import ray

    url = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else None
