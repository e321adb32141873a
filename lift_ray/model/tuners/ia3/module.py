"""The module of (IA)^3."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.model.tuners.base import BlockTuner


class Ia3(BlockTuner):
    """Scales of keys, values and the MLP's activations, which start at one (arXiv 2205.05638).

    Args:
        second: frozen weight of the MLP's second projection (D, H), H = its hidden width.
    """

    second: Tensor

    def __init__(self, width: int, second: Tensor) -> None:
        super().__init__()
        self.k, self.v = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.inner = nn.Parameter(torch.ones(second.shape[1]))
        self.register_buffer("second", second.detach(), persistent=False)  # the tower's own, not a copy

    can_merge = True

    def merge_into(self, block: Any) -> None:
        """Scale the rows of keys and values, their biases, and the columns of the MLP's second projection."""
        width = len(self.k)
        for index, scale in ((1, self.k), (2, self.v)):
            rows = slice(index * width, (index + 1) * width)
            block.attn.in_proj.weight[rows] *= scale[:, None]
            block.attn.in_proj.bias[rows] *= scale
        block.mlp.out_proj.weight += self.second * (self.inner - 1)

    def key(self, h: Tensor, k: Tensor) -> Tensor:
        """l_k * k."""
        return k * self.k.to(k.dtype)

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """l_v * v."""
        return v * self.v.to(v.dtype)

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """W (l * inner) + b = (W inner + b) + W ((l - 1) * inner).

        The sum keeps to what this tuner changes, so that another tuner of the same projection can be merged in any order.
        """
        return out + F.linear(inner * (self.inner - 1).to(inner.dtype), self.second)
