"""Checks of `--dry-run` beyond the space file: faults that would otherwise end a search after it has started."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lift_ray.errors import BadInput
from lift_ray.ray_runtime.capacity import gpus_here, need
from lift_ray.searching.driver_lock import check_can_resume, check_is_new
from lift_ray.searching.samplers import check_sampler
from lift_ray.settings.checks import NUM_CHECK_DRAWS
from lift_ray.settings.run import BackboneConfig
from lift_ray.settings.space import SpaceFile, seeded_draws
from lift_ray.storage.output import Output
from lift_ray.tracking.services import check_service
from lift_ray.training.backbone_check import check_backbone


def check_before_start(
    space: SpaceFile, dataset: str, *, out: str | None, storage: str | None, resume: bool, log_to: Sequence[str]
) -> None:
    """Raise BadInput with a line for each problem. Nothing is downloaded, written or started.

    Args:
        dataset: absolute URI.
        out: folder or URL for the results; a URL is not contacted.
        storage: URL of Optuna's database, which is not contacted either.
    """
    problems: list[BadInput] = []

    def look(check: object, *args: object, **options: object) -> None:
        try:
            check(*args, **options)  # type: ignore[operator]
        except BadInput as error:
            problems.extend(error.faults)

    look(check_sampler, space.search.sampler)
    for service in dict.fromkeys(log_to):
        look(check_service, service)
    if out and "://" not in out:
        if resume:
            look(check_can_resume, Output(out), space, dataset, url=storage)
        else:
            look(check_is_new, Output(out))
    for backbone in backbones_of(space):
        look(_check_precision, space, backbone)
        look(check_backbone, backbone)
    if problems:
        raise BadInput.of({str(problem): problem for problem in problems}.values())


def backbones_of(space: SpaceFile) -> list[BackboneConfig]:
    """Return every backbone that a trial may use, as far as the check's draws of the space show."""
    points = [*space.baseline_values(), *seeded_draws(space.space, NUM_CHECK_DRAWS)]
    found: list[BackboneConfig] = []
    for config in (space.config(point) for point in points):
        for run in config.members().values() or [config]:
            if run.backbone not in found:
                found.append(run.backbone)
    return found


def _check_precision(space: SpaceFile, backbone: BackboneConfig) -> None:
    """Raise BadInput if a worker without a GPU would compute in another precision than fp32.

    On a cluster elsewhere, `use_gpu: auto` is decided there, so nothing is checked.
    """
    elsewhere = space.scale.use_gpu == "auto" and "RAY_ADDRESS" in os.environ
    if backbone.precision == "fp32" or elsewhere or need(space.scale, has_gpu=gpus_here() > 0).gpus:
        return
    why = "this machine has none" if space.scale.use_gpu == "auto" else "scale.use_gpu is false"
    raise BadInput(
        "backbone.precision",
        f"{backbone.precision} requires a GPU",
        but=why,
        remedy="set base.backbone.precision=fp32, or scale.use_gpu=true and run on a cluster",
    )
