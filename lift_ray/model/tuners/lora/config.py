"""LoRA: low-rank changes of projections (arXiv 2106.09685)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Blocks, Width, derived_width
from lift_ray.registry import TunerConfig, register_tuner


class LoraConfig(TunerConfig):
    """Low-rank changes of the query and value projections (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    bottleneck: Width | None = None
    """Rank R; derived as 2^max(0, floor(log2(K / 4L)))."""
    mlp: bool = False
    """Change both projections of the MLP too."""
    blocks: Blocks = None

    def derived(self, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        """The rank."""
        return {"bottleneck": self.bottleneck or derived_width(num_classes, 4 * num_tuned)}


def build(tower: Any, block: int, bottleneck: int, mlp: bool = False) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.lora.module import Lora

    return Lora(tower.shape, bottleneck, mlp)


register_tuner(LoraConfig, build)
