"""Image towers of open_clip and timm, taken apart and rebuilt as ours with the same weights, or hosted as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lift_ray.model.hosted import host, timm_projection
from lift_ray.model.rebuild_open_clip import rebuild_resnet, rebuild_vit
from lift_ray.model.rebuild_timm import rebuild_timm
from lift_ray.model.tower import FrozenTower


@dataclass(frozen=True)
class ImageTower:
    """A frozen tower, and its projection into the space that images and texts share.

    Attributes:
        projection: (D, E); None if the feature is in that space already.
        bias: (E,) of the projection; None without.
    """

    tower: FrozenTower
    projection: Tensor | None = None
    bias: Tensor | None = None


def image_tower(visual: Any) -> ImageTower:
    """Return the tower of a model of timm, or of the image half of a CLIP of open_clip, frozen, with its projection.

    The feature of a model of timm is that before its classifier.
    """
    if hasattr(visual, "trunk"):  # of open_clip, around a model of timm
        projection, bias, tail = timm_projection(visual)
        if tail is not None:
            return ImageTower(host(visual, type(visual.trunk).__name__))
        return ImageTower(rebuild(visual.trunk), projection, bias)
    found = rebuild_resnet(visual) or rebuild_vit(visual) or rebuild_timm(visual)
    tower = found.filled() if found else None
    if tower is None:
        return ImageTower(host(visual, type(visual).__name__))
    return ImageTower(tower, visual.proj.detach() if hasattr(visual, "proj") else None)


def rebuild(visual: Any) -> FrozenTower:
    """Return the tower of `image_tower`."""
    return image_tower(visual).tower
