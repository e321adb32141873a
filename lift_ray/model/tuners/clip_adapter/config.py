"""CLIP-Adapter: a bottleneck behind the tower (arXiv 2110.04544)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lift_ray.model.tuners.config import Width
from lift_ray.registry import TunerConfig, register_tuner


class ClipAdapterConfig(TunerConfig):
    """A bottleneck behind the tower, mixed with the tower's own feature (arXiv 2110.04544). All blocks stay frozen."""

    kind: Literal["clip_adapter"] = "clip_adapter"
    bottleneck: Width | None = None
    """Width R; derived as D / 4 for a tower of width D."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Weight of the bottleneck's output; the tower's feature has the rest."""

    def derived(self, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        """The bottleneck."""
        return {"bottleneck": self.bottleneck or max(1, width // 4)}


def behind(tower: Any, bottleneck: int, ratio: float = 0.2) -> Any:
    """The module behind the tower."""
    from lift_ray.model.tuners.clip_adapter.module import ClipAdapter

    return ClipAdapter(tower.width, bottleneck, ratio)


register_tuner(ClipAdapterConfig, behind=behind)
