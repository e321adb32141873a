"""Where a patch is: learned positions, rotary ones, and a bias of the attention by the distance of two patches."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def resized(positions: Tensor, side: int, num_prefix: int = 1) -> Tensor:
    """(P + n^2, D) -> (P + side^2, D): the first P rows unchanged, the rest resized as a square grid (bicubic)."""
    trained = math.isqrt(len(positions) - num_prefix)
    if side == trained:
        return positions
    grid = positions[num_prefix:].T.reshape(1, -1, trained, trained)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:num_prefix], grid.flatten(2)[0].T])


class Rotary(nn.Module):
    """Rotary positions of patches (arXiv 2104.09864), by timm's own module for the angles.

    Args:
        origin: a module with timm's `get_embed(shape)`.
    """

    def __init__(self, origin: Any) -> None:
        super().__init__()
        self.origin = origin
        self._angles: dict[int, Tensor] = {}
        self._lock = threading.Lock()  # several threads run the same tower on a CPU

    def forward(self, side: int, device: torch.device, patches: Tensor | None = None) -> Tensor:
        """Return sine and cosine of the angles (N, 2 D / H), or (blocks, 1, H, N, 2 D / H) if every block has its own.

        Args:
            side: patches on a side of the image; N is its square.
            device: of the result.
            patches: (B, P), chosen patches: the result is then (B, 1, P, ...), or (blocks, B, H, P, ...).
        """
        angles = self._angles.get(side)
        if angles is None or angles.device != device:
            angles = self._compute(side, device)
        if patches is None:
            return angles[:, None] if angles.dim() == 4 else angles
        if angles.dim() == 4:
            return angles[:, :, patches].transpose(1, 2)
        return angles[patches].unsqueeze(1)

    def _compute(self, side: int, device: torch.device) -> Tensor:
        """Return the angles (N, ...), or (blocks, H, N, ...), and keep them."""
        with self._lock, torch.no_grad(), torch.autocast(device.type, enabled=False):
            if hasattr(self.origin, "update_feat_shape"):
                self.origin.update_feat_shape([side, side])
            angles: Tensor = self.origin.get_embed(shape=[side, side]).to(device)
            self._angles[side] = angles
        return angles

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotary:
        """Nothing here is trained, so copies of a tower share it."""
        return self


def turned(x: Tensor, angles: Tensor, half: bool) -> Tensor:
    """Queries or keys with the last N of their T tokens turned by the angles of patches: (B, H, T, D / H) -> the same.

    Args:
        angles: as `Rotary` returns them, of one block.
        half: the two values that turn together are half a head apart, not neighbors.
    """
    first, patches = x.split([x.shape[-2] - angles.shape[-2], angles.shape[-2]], dim=-2)
    sine, cosine = angles.chunk(2, dim=-1)
    if half:
        one, other = patches.chunk(2, dim=-1)
        across = torch.cat([-other, one], dim=-1)
    else:
        across = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([first, (patches * cosine + across * sine).to(x.dtype)], dim=-2)


class RelativeBias(nn.Module):
    """Bias of the scores by the distance of two patches, other for the class token (BEiT, arXiv 2106.08254).

    Args:
        side: patches on a side of the images that the weights were trained with.
        num_heads: H.
    """

    def __init__(self, side: int, num_heads: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, num_heads))
        self._index: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, num_tokens: int) -> Tensor:
        """Return the bias (H, T, T) of the class token and the patches of a square image."""
        from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
        from timm.models.beit import gen_relative_position_index

        side, table = math.isqrt(num_tokens - 1), self.table
        if side != self.side:
            shape = ((2 * side - 1) ** 2 + 3, table.shape[1])
            table = resize_rel_pos_bias_table(table, (side, side), shape, (self.side, self.side))
        key = (side, table.device)
        if key not in self._index:
            self._index[key] = gen_relative_position_index((side, side), table.device)
        bias: Tensor = table[self._index[key].flatten()].unflatten(0, (num_tokens, num_tokens))
        return bias.permute(2, 0, 1)
