"""Lets Ray's autoscaler go on to the next kind of machine when the cloud refuses one, as it does with spot that is sold out.

Ray 2.60 takes a kind as not to be had when a machine of it does not come up in time, but not when its launch fails: it asks for
the kind of the highest `priority` for ever. `python -m lift_ray.ray_runtime.patches` mends that in the installed Ray, as the
files for clouds do on every node; Ray then asks for the refused kind again ten minutes later.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lift_ray.errors import BadInput, exit_codes
from lift_ray.storage.atomic import replacing

FIXED = {
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


def fix(folder: Path) -> None:
    """Mend Ray's `instance_manager` in this folder; nothing where that is done. Raises BadInput for another Ray."""
    for name, (before, after) in FIXED.items():
        path = folder / name
        text = path.read_text()
        if after in text:
            continue
        if text.count(before) != 1:
            raise BadInput(
                f"{path}: must be of Ray 2.60.0, but is not; leave this step out, and see whether its autoscaler falls back"
            )
        with replacing(path) as new:  # a new file: the old one may be shared with other environments
            new.write_text(text.replace(before, after))


def main(argv: list[str]) -> None:
    """Mend the Ray of this environment."""
    import ray

    fix(Path(ray.__file__).parent / "autoscaler" / "v2" / "instance_manager")


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
