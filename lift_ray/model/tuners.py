"""The tiny trained parts inside the frozen blocks.

A tuner is one BlockTuner for each tuned block. The block asks it at fixed places; a tuner overrides the places it changes.
Parameter names in a checkpoint are `<tuner>.<block>.<parameter>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlockTuner(nn.Module):
    """Changes nothing at any place of a block. B images, T tokens, D width, R bottleneck."""

    def query(self, h: Tensor, q: Tensor) -> Tensor:
        """Normed input (B, T, D) and its query projection (B, T, D) -> queries."""
        return q

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """Normed input (B, T, D) and its value projection (B, T, D) -> values."""
        return v

    def beside_mlp(self, a: Tensor, out: Tensor) -> Tensor:
        """The MLP's input before its norm and the block's output, both (B, T, D) -> output."""
        return out


class Identity(BlockTuner):
    """For blocks without a tuner."""


class Adaptformer(BlockTuner):
    """out + s * Up(ReLU(Down(LN(a)))), s learnable (arXiv 2205.13535, as in arXiv 2309.10019).

    Starts as the identity: Up and the biases are zero, Down is Kaiming uniform.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def beside_mlp(self, a: Tensor, out: Tensor) -> Tensor:
        """Adds the bottleneck's output."""
        added: Tensor = self.scale * self.up(F.relu(self.down(self.norm(a))))
        return out + added


class LowRank(nn.Module):
    """x @ down @ up / R, zero at the start (arXiv 2106.09685 with alpha = 1)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, bottleneck))
        self.up = nn.Parameter(torch.zeros(bottleneck, width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x @ self.down @ (self.up / self.down.shape[1])


class Lora(BlockTuner):
    """Low-rank changes of the query and value projections (arXiv 2106.09685)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.q = LowRank(width, bottleneck)
        self.v = LowRank(width, bottleneck)

    def query(self, h: Tensor, q: Tensor) -> Tensor:
        """q + h A_q B_q / R."""
        changed: Tensor = q + self.q(h)
        return changed

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """v + h A_v B_v / R."""
        changed: Tensor = v + self.v(h)
        return changed


class Tuner(nn.Module):
    """The tuners of all blocks: one for each tuned block, Identity elsewhere.

    Args:
        kind: a key of BLOCK_TUNERS, or linear_probe or zero_shot, which put nothing into the blocks.
        blocks: the tuned blocks.
        options: what the kind's constructor takes beside the width, for example bottleneck.
    """

    def __init__(self, kind: str, width: int, num_blocks: int, blocks: list[int] | None = None, **options: Any) -> None:
        super().__init__()
        self.kind = kind
        make = BLOCK_TUNERS.get(kind)
        tuned = {str(i): make(width, **options) for i in blocks or []} if make else {}
        self.add_module(kind, nn.ModuleDict(tuned))
        self.per_block: list[BlockTuner] = [tuned.get(str(i), _IDENTITY) for i in range(num_blocks)]


_IDENTITY = Identity()
BLOCK_TUNERS: dict[str, Callable[..., BlockTuner]] = {"adaptformer": Adaptformer, "lora": Lora}
WITHOUT_BLOCKS = ("linear_probe", "zero_shot")
