"""Adapter: a bottleneck after the MLP of each block (arXiv 1902.00751)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Blocks, Width, derived_width
from lift_ray.registry import TunerConfig, register_tuner


class AdapterConfig(TunerConfig):
    """A bottleneck after the MLP of each block (arXiv 1902.00751)."""

    kind: Literal["adapter"] = "adapter"
    bottleneck: Width | None = None
    """Width R; derived as 2^max(0, floor(log2(K / 2L)))."""
    blocks: Blocks = None

    def derived(self, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        """The bottleneck."""
        return {"bottleneck": self.bottleneck or derived_width(num_classes, 2 * num_tuned)}


def build(tower: Any, block: int, bottleneck: int) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.adapter.module import Adapter
    from lift_ray.model.tuners.base import block_width

    return Adapter(block_width(tower, block), bottleneck)


register_tuner(AdapterConfig, build)
