"""AdaptFormer: a bottleneck parallel to the MLP of each block (arXiv 2205.13535)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Bottleneck, BottleneckConfig
from lift_ray.registry import register_tuner


class AdaptformerConfig(BottleneckConfig):
    """A bottleneck parallel to the MLP of each block (arXiv 2205.13535)."""

    kind: Literal["adaptformer"] = "adaptformer"
    bottleneck: Bottleneck = None
    """Width R; derived as 2^max(0, floor(log2(K / 2L))) for K classes and L tuned blocks. A list has one for each tuned block."""


def build(tower: Any, block: int, bottleneck: int) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.adaptformer.module import Adaptformer

    return Adaptformer(tower.block_width(block), bottleneck)


register_tuner(AdaptformerConfig, build)
