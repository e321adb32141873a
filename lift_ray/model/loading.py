"""Image towers of open_clip and timm, taken apart and rebuilt as ours with the same weights, or hosted as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lift_ray.model.hosted import OpaqueTower, host, timm_projection
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


def image_tower(visual: Any, name: str = "this tower") -> ImageTower:
    """Return the tower of a model of timm, or of the image half of a CLIP of open_clip, frozen, with its projection.

    The feature of a model of timm is that before its classifier.

    Args:
        name: as the settings name it, for error messages.

    Raises BadInput for a module that does not turn square images into one feature.
    """
    if hasattr(visual, "trunk"):  # of open_clip, around a model of timm
        head = timm_projection(visual)
        return ImageTower(_tower(visual.trunk, name, visual.image_size[0], head.tail), head.projection, head.bias)
    tower = _tower(visual, name)
    is_projected = isinstance(tower, OpaqueTower) or not hasattr(visual, "proj")
    return ImageTower(tower, None if is_projected else visual.proj.detach())


def _tower(visual: Any, name: str, resolution_px: int | None = None, tail: nn.Module | None = None) -> FrozenTower:
    """Return the tower, rebuilt if its parts are known, else hosted; with what follows up to the feature, if anything."""
    found = (rebuild_resnet(visual) or rebuild_vit(visual) or rebuild_timm(visual)) if tail is None else None
    tower = found.filled() if found else None
    return host(visual, name, resolution_px=resolution_px, tail=tail) if tower is None else tower


def rebuild(visual: Any, name: str = "this tower") -> FrozenTower:
    """Return the tower of `image_tower`."""
    return image_tower(visual, name).tower
