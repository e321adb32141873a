"""AdaptFormer: a bottleneck parallel to the MLP of each block (arXiv 2205.13535)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Blocks, Width, derived_width
from lift_ray.registry import TunerConfig, register_tuner


class AdaptformerConfig(TunerConfig):
    """A bottleneck parallel to the MLP of each block (arXiv 2205.13535)."""

    kind: Literal["adaptformer"] = "adaptformer"
    bottleneck: Width | None = None
    """Width R; derived as 2^max(0, floor(log2(K / 2L))) for K classes and L tuned blocks."""
    blocks: Blocks = None

    def derived(self, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        """The bottleneck."""
        return {"bottleneck": self.bottleneck or derived_width(num_classes, 2 * num_tuned)}


def build(tower: Any, block: int, bottleneck: int) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.adaptformer.module import Adaptformer
    from lift_ray.model.tuners.base import block_width

    return Adaptformer(block_width(tower, block), bottleneck)


register_tuner(AdaptformerConfig, build)
