"""The parametrization of sparse fine-tuning."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Sparse(nn.Module):
    """A parametrisation: some values of a frozen tensor are trained, at places chosen by torch's seed and the tensor's name."""

    index: Tensor

    def __init__(self, frozen: Tensor, ratio: float, name: str) -> None:
        super().__init__()
        number = max(1, round(ratio * frozen.numel()))
        # The places are not stored: they depend on the seed and the name alone, whatever else drew numbers before.
        random = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        index = torch.randperm(frozen.numel(), generator=random)[:number]
        self.register_buffer("index", index.to(frozen.device), persistent=False)
        self.values = nn.Parameter(frozen.detach().flatten()[self.index].clone())

    def forward(self, frozen: Tensor) -> Tensor:
        """The tensor with its trained values in place."""
        return frozen.flatten().index_copy(0, self.index, self.values).view_as(frozen)


NAMES = {"all": "", "attention": "attn.", "mlp": "mlp."}
"""Value of `places` -> start of the names of the linears in a block."""


def add_sparse(tower: nn.Module, blocks: Sequence[int], ratio: float, places: str = "all") -> None:
    """Train a random fraction of the weights and biases of the linears in these blocks (AFT, arXiv 2309.10019)."""
    for index in blocks:
        block: nn.Module = tower.blocks[index]  # type: ignore[index,assignment]
        linears = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear) and n.startswith(NAMES[places])]
        for at, linear in linears:
            for name in ("weight", "bias"):
                sparse = Sparse(getattr(linear, name), ratio, f"{index}.{at}.{name}")
                parametrize.register_parametrization(linear, name, sparse)
