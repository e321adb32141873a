"""Checks of a backbone's name and weights before anything starts. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from lift_ray.settings.run import BackboneConfig
from lift_ray.text import say


def check_backbone(wanted: BackboneConfig) -> None:
    """Raise BadInput for a backbone that cannot be loaded, as far as that shows without a network."""
    from lift_ray.model.backbone import check_source

    if not wanted.is_embedded:
        say(f"looking up {wanted.model} ...")  # open_clip and torch take seconds to load
    check_source(wanted.model, wanted.pretrained, wanted.quickgelu)


def check_weights_file(wanted: BackboneConfig) -> None:
    """Call `check_backbone` for a weights file on this machine, or with `quickgelu`; loading checks all other weights."""
    if wanted.quickgelu is not None or (wanted.pretrained and Path(wanted.pretrained).is_file()):
        check_backbone(wanted)
