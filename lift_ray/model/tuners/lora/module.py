"""The module of LoRA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lift_ray.model.blocks import BlockShape
from lift_ray.model.tuners.base import BlockTuner


class LowRank(nn.Module):
    """x @ down @ up / R, zero at the start (arXiv 2106.09685 with alpha = 1)."""

    def __init__(self, width: int, bottleneck: int, out_width: int | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, bottleneck))
        self.up = nn.Parameter(torch.zeros(bottleneck, out_width or width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        return x @ self.down @ (self.up / self.down.shape[1])

    def change(self) -> Tensor:
        """The same as a change of a linear's weight, (D', D)."""
        return (self.down @ self.up / self.down.shape[1]).T


class Lora(BlockTuner):
    """Low-rank changes of the query and value projections, on request of the MLP's too (arXiv 2106.09685)."""

    def __init__(self, shape: BlockShape, bottleneck: int, mlp: bool = False) -> None:
        super().__init__()
        self.q = LowRank(shape.width, bottleneck)
        self.v = LowRank(shape.width, bottleneck)
        if mlp:
            self.fc1 = LowRank(shape.width, bottleneck, shape.mlp_inputs)
            self.fc2 = LowRank(shape.hidden, bottleneck, shape.width)
        self.mlp = mlp

    can_merge = True

    def merge_into(self, block: Any) -> None:
        """W + (A B / R)^T, for the weights of queries and values, and of the MLP."""
        weight = block.attn.in_proj.weight
        width = weight.shape[1]
        weight[:width] += self.q.change()
        weight[2 * width :] += self.v.change()
        if self.mlp:
            block.mlp.in_proj.weight += self.fc1.change()
            block.mlp.out_proj.weight += self.fc2.change()

    def query(self, h: Tensor, q: Tensor) -> Tensor:
        """q + h A_q B_q / R."""
        changed: Tensor = q + self.q(h)
        return changed

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """v + h A_v B_v / R."""
        changed: Tensor = v + self.v(h)
        return changed

    def mlp_in(self, h: Tensor, inner: Tensor) -> Tensor:
        """The same at the MLP's first projection."""
        return inner + self.fc1(h) if self.mlp else inner

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """The same at the MLP's second projection."""
        return out + self.fc2(inner) if self.mlp else out
