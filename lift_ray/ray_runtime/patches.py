"""Everything that changes Ray: three patches of this process, and one of the installed autoscaler.

They are tested with Ray 2.56 to 2.60. On another version a patch of the process is skipped, with a warning that says what is missing
then, because an attribute of the same name may mean something else there.

`python -m lift_ray.ray_runtime.patches` patches the autoscaler of the installed Ray. The cluster files for AWS, Azure and Google Cloud
run it on every node.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partialmethod
from pathlib import Path

from lift_ray.errors import BadInput, run_and_exit
from lift_ray.storage.atomic import replacing

OLDEST_RAY, NEWEST_RAY = (2, 56), (2, 60)
SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
AUTOSCALER_FIX = {
    "reconciler.py": (
        'new_instance_status=IMInstance.ALLOCATION_FAILED,\n                details=f"launch failed',
        "new_instance_status=IMInstance.ALLOCATION_FAILED,\n                instance_type=im_instance.instance_type,\n"
        '                details=f"launch failed',
    ),
    "subscribers/cloud_resource_monitor.py": (
        "if event.new_instance_status == Instance.ALLOCATION_TIMEOUT:",
        "if event.new_instance_status == Instance.ALLOCATION_TIMEOUT or (\n"
        "                event.new_instance_status == Instance.ALLOCATION_FAILED and event.instance_type\n            ):",
    ),
}


@cache
def _applies(without: str) -> bool:
    """Return True if the patches are tested with this Ray; otherwise warn once what happens without the patch."""
    import ray

    if OLDEST_RAY <= tuple(map(int, ray.__version__.split(".")[:2])) <= NEWEST_RAY:
        return True
    logging.getLogger(__name__).warning("Ray %s is not %s: %s", ray.__version__, _known_ray(), without)
    return False


def _known_ray() -> str:
    return f"{OLDEST_RAY[0]}.{OLDEST_RAY[1]} to {NEWEST_RAY[0]}.{NEWEST_RAY[1]}"


def listen_on_loopback() -> None:
    """Make the Ray that this process starts listen on 127.0.0.1 only.

    Without it, Ray's processes listen on every interface, and the node's metrics are served without a token.

    Changes `ray._private.ray_constants.ENABLE_RAY_CLUSTER`, the switch that Ray itself uses on macOS and Windows; it is read by
    `ray._private.services.get_node_ip_address`.
    """
    if _applies("the Ray started here may listen on every network interface"):
        from ray._private import ray_constants

        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for drivers that are started from here
        ray_constants.ENABLE_RAY_CLUSTER = False  # was read from the environment at import


@cache
def use_free_agent_port() -> None:
    """Let the agent of the node that this process starts listen on any free port.

    Without it, the agent takes port 52365. If another Ray on the machine has that port, the agent serves nothing: there are no jobs
    and no job logs.

    Changes the default of `dashboard_agent_listen_port` in `ray._private.parameter.RayParams`, which `ray.init` does not offer
    (ray-project/ray pull request 34886, closed).
    """
    if _applies("jobs and job logs may be missing if another Ray runs on this machine"):
        from ray._private.parameter import RayParams

        RayParams.__init__ = partialmethod(RayParams.__init__, dashboard_agent_listen_port=0)


@contextmanager
def aws_keys_stay_here() -> Iterator[None]:
    """Keep AWS keys out of the runtime environment of Tune's actors while the context is open; they use those of their node.

    Without it, Tune copies the driver's keys there, and the dashboard and Ray's logs show them.

    Changes `ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE`.
    """
    if not _applies("the dashboard may show the AWS keys of this process"):
        yield
        return
    from ray.tune.execution import class_cache

    removed = class_cache.ENV_VARS_TO_PROPAGATE & SECRETS
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(SECRETS)
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE.update(removed)


def fix_autoscaler(folder: Path) -> None:
    """Let the autoscaler try the next kind of machine when the cloud refuses one, for example because spot capacity is sold out.

    Without it, Ray asks for the kind with the highest `priority` forever: it counts a kind as unavailable when a machine does not
    come up in time, but not when its launch fails. With it, Ray asks for the refused kind again after ten minutes.

    Changes two files of `ray.autoscaler.v2.instance_manager` in place (CloudResourceMonitor came with ray-project/ray pull request
    58623). A second call changes nothing.

    Args:
        folder: `instance_manager` of a Ray installation.

    Raises BadInput for another version of Ray.
    """
    for name, (before, after) in AUTOSCALER_FIX.items():
        path = folder / name
        text = path.read_text()
        if after in text:
            continue
        if text.count(before) != 1:  # stricter than the version: another fix may be installed
            raise BadInput(
                str(path),
                f"must be of Ray {_known_ray()}",
                but="is not",
                remedy="skip this step, and check that its autoscaler falls back",
            )
        with replacing(path) as new:  # a new file: other environments may share the old one
            new.write_text(text.replace(before, after))


def main(argv: list[str]) -> None:
    """Fix the autoscaler of the Ray in this environment."""
    import ray

    fix_autoscaler(Path(ray.__file__).parent / "autoscaler" / "v2" / "instance_manager")


if __name__ == "__main__":
    run_and_exit(main)
