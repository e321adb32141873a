"""(IA)^3: learned scales of keys, values and the MLP's inner activations (arXiv 2205.05638)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Blocks
from lift_ray.registry import TunerConfig, register_tuner


class Ia3Config(TunerConfig):
    """Learned scales of keys, values and the MLP's inner activations, (IA)^3 (arXiv 2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    blocks: Blocks = None


def build(tower: Any, block: int) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.ia3.module import Ia3

    return Ia3(tower.block_width(block), tower.blocks[block].mlp.out_proj.weight)


register_tuner(Ia3Config, build)
