"""A tuner in one file: a learned gain for each channel of a block's output."""

from typing import Any, Literal

from lift_ray.model.tuners.config import Blocks
from lift_ray.registry import TunerConfig, register_tuner


class GainConfig(TunerConfig):
    """A learned gain for each channel of a block's output."""

    kind: Literal["gain"] = "gain"
    start: float = 1.0
    """Value of the gains before training."""
    blocks: Blocks = None


def build(tower: Any, block: int, start: float = 1.0) -> Any:
    """The tuner of one block; torch is imported here, in the worker that trains."""
    import torch
    from torch import Tensor, nn

    from lift_ray.model.tuners.base import BlockTuner

    class Gain(BlockTuner):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((tower.block_width(block),), start))

        def beside_mlp(self, a: Tensor, out: Tensor) -> Tensor:
            """Scale the block's output (B, T, D)."""
            return out * self.gain

    return Gain()


register_tuner(GainConfig, build)
