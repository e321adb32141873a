"""DoRA: low-rank changes of the direction of projections, and their magnitudes (arXiv 2402.09353)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Bottleneck, BottleneckConfig
from lift_ray.registry import register_tuner


class DoraConfig(BottleneckConfig):
    """Magnitudes and low-rank changes of the directions of the query and value projections (arXiv 2402.09353)."""

    kind: Literal["dora"] = "dora"
    bottleneck: Bottleneck = None
    """Rank R; derived as 2^max(0, floor(log2(K / 4L))). A list has one for each tuned block."""
    mlp: bool = False
    """Change both projections of the MLP too."""

    divisor = 4


def build(tower: Any, block: int, bottleneck: int, mlp: bool = False) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.dora.module import Dora

    return Dora(tower.blocks[block], bottleneck, mlp)


register_tuner(DoraConfig, build)
