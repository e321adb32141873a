"""Kinds that train parameters which the tower has already: its biases, its norms, or all of some blocks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lift_ray.model.tuners.config import TOWER_WEIGHTS, Blocks
from lift_ray.registry import TunerConfig, register_tuner


class BitfitConfig(TunerConfig):
    """The biases of the blocks (arXiv 2106.10199)."""

    kind: Literal["bitfit"] = "bitfit"
    blocks: Blocks = None


class LayernormConfig(TunerConfig):
    """The layer norms of the blocks."""

    kind: Literal["layernorm"] = "layernorm"
    blocks: Blocks = None


class BatchnormConfig(TunerConfig):
    """Weights and biases of the batch norms of a convolutional tower; their statistics stay as they are."""

    kind: Literal["batchnorm"] = "batchnorm"
    blocks: Blocks = None


class FullConfig(TunerConfig):
    """All parameters of the blocks: the heavy fine-tuning that hurts rare classes."""

    kind: Literal["full"] = "full"
    blocks: Blocks = None


class PartialConfig(TunerConfig):
    """All parameters of the last blocks."""

    kind: Literal["partial"] = "partial"
    last: Annotated[int, Field(ge=1)] = 1
    """Number of blocks."""

    def problem(self, num_blocks: int) -> str:
        """More blocks than there are."""
        if self.last <= num_blocks:
            return ""
        return f"last: must be at most the tower's {num_blocks} blocks, but got {self.last}; lower it"

    def options(self, num_blocks: int) -> dict[str, Any]:
        """The last blocks by number."""
        return {"blocks": list(range(num_blocks - self.last, num_blocks))}


register_tuner(BitfitConfig, trains=lambda name, norm: name.endswith("bias"), owns=TOWER_WEIGHTS)
register_tuner(LayernormConfig, trains=lambda name, norm: norm, owns=TOWER_WEIGHTS)
register_tuner(
    BatchnormConfig,
    trains=lambda name, norm: norm,
    owns=TOWER_WEIGHTS,
    not_in_text="use layernorm, as it has layer norms",
)
register_tuner(FullConfig, trains=lambda name, norm: True, owns=TOWER_WEIGHTS)
register_tuner(PartialConfig, trains=lambda name, norm: True, owns=TOWER_WEIGHTS)
