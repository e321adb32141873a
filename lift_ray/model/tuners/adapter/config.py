"""Adapter: a bottleneck after the MLP of each block (arXiv 1902.00751)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Bottleneck, BottleneckConfig
from lift_ray.registry import register_tuner


class AdapterConfig(BottleneckConfig):
    """A bottleneck after the MLP of each block (arXiv 1902.00751)."""

    kind: Literal["adapter"] = "adapter"
    bottleneck: Bottleneck = None
    """Width R; derived as 2^max(0, floor(log2(K / 2L))). A list has one for each tuned block."""


def build(tower: Any, block: int, bottleneck: int) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.adapter.module import Adapter

    return Adapter(tower.block_width(block), bottleneck)


register_tuner(AdapterConfig, build)
