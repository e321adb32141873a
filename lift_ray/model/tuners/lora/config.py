"""LoRA: low-rank changes of projections (arXiv 2106.09685)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Bottleneck, BottleneckConfig
from lift_ray.registry import register_tuner


class LoraConfig(BottleneckConfig):
    """Low-rank changes of the query and value projections (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    bottleneck: Bottleneck = None
    """Rank R; derived as 2^max(0, floor(log2(K / 4L))). A list has one for each tuned block."""
    mlp: bool = False
    """Change both projections of the MLP too."""

    divisor = 4


def build(tower: Any, block: int, bottleneck: int, mlp: bool = False) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.lora.module import Lora

    return Lora(tower.shape, bottleneck, mlp)


register_tuner(LoraConfig, build)
