"""Arbitrary sparse fine-tuning: a random part of the weights (arXiv 2309.10019)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lift_ray.model.tuners.config import TOWER_WEIGHTS, Blocks
from lift_ray.registry import TunerConfig, register_tuner


class SparseConfig(TunerConfig):
    """Arbitrary sparse fine-tuning: a random part of the weights, chosen once by the seed (arXiv 2309.10019)."""

    kind: Literal["sparse"] = "sparse"
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the weights; derived as K / (L (12 D + 9)), as many values as the classifier has. With
    `places: attention` the divisor is L (4 D + 4), with `places: mlp` L (8 D + 5)."""
    places: Annotated[Literal["all", "attention", "mlp"], Field(exclude_if=lambda places: places == "all")] = "all"
    """Choose from the weights of attention and MLP, or of one of them."""
    blocks: Blocks = None

    def derived(self, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        """The fraction, for an MLP that is 4 D wide."""
        of_block = {"all": 12 * width + 9, "attention": 4 * width + 4, "mlp": 8 * width + 5}  # values, divided by D
        return {"ratio": self.ratio or min(1.0, num_classes / (num_tuned * of_block[self.places]))}


register_tuner(SparseConfig, prepare="lift_ray.model.tuners.sparse.module:add_sparse", owns=TOWER_WEIGHTS)
