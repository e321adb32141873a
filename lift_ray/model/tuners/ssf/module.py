"""The module of SSF."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lift_ray.model.blocks import BlockShape
from lift_ray.model.tuners.base import BlockTuner


class ScaleShift(nn.Module):
    """x * scale + shift; scale from N(1, 0.02), shift from N(0, 0.02) (arXiv 2210.08823)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.02 * torch.randn(width))
        self.shift = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """(..., D) -> (..., D), with a part of the channels when x has only those."""
        return torch.addcmul(self.shift[part].to(x.dtype), x, self.scale[part].to(x.dtype))

    def fold_into(self, layer: Any) -> None:
        """(W x + b) s + t = (s W) x + (s b + t), for a linear and for a norm."""
        layer.weight.mul_(self.scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.mul_(self.scale).add_(self.shift)


class Ssf(BlockTuner):
    """Scale and shift after each projection, on request after the norms too (arXiv 2210.08823). Starts near the identity."""

    def __init__(self, shape: BlockShape, norms: bool = False) -> None:
        super().__init__()
        width = shape.width
        self.width, self.norms = width, norms
        # a shift needs a bias to become part of, which RMS norms lack
        self.can_merge = not norms or getattr(shape.norm(1), "bias", None) is not None
        self.attn_in, self.attn_out = ScaleShift(3 * width), ScaleShift(width)
        self.mlp_1, self.mlp_2 = ScaleShift(shape.mlp_inputs), ScaleShift(width)
        if norms:
            self.after_norm1, self.after_norm2 = ScaleShift(width), ScaleShift(width)

    def merge_into(self, block: Any) -> None:
        """Fold each scale and shift into the layer before it."""
        self.attn_in.fold_into(block.attn.in_proj)
        self.attn_out.fold_into(block.attn.out_proj)
        self.mlp_1.fold_into(block.mlp.in_proj)
        self.mlp_2.fold_into(block.mlp.out_proj)
        if self.norms:
            self.after_norm1.fold_into(block.norm1)
            self.after_norm2.fold_into(block.norm2)

    def query(self, h: Tensor, q: Tensor) -> Tensor:
        """The first third of the attention's input projection."""
        changed: Tensor = self.attn_in(q, slice(0, self.width))
        return changed

    def key(self, h: Tensor, k: Tensor) -> Tensor:
        """The second third."""
        changed: Tensor = self.attn_in(k, slice(self.width, 2 * self.width))
        return changed

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """The last third."""
        changed: Tensor = self.attn_in(v, slice(2 * self.width, None))
        return changed

    def attention_out(self, out: Tensor) -> Tensor:
        """After the attention's output projection."""
        changed: Tensor = self.attn_out(out)
        return changed

    def mlp_in(self, h: Tensor, inner: Tensor) -> Tensor:
        """After the MLP's first projection."""
        changed: Tensor = self.mlp_1(inner)
        return changed

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """After the MLP's second projection."""
        changed: Tensor = self.mlp_2(out)
        return changed

    def norm1(self, h: Tensor) -> Tensor:
        """After the first norm."""
        return self.after_norm1(h) if self.norms else h

    def norm2(self, h: Tensor) -> Tensor:
        """After the second norm."""
        return self.after_norm2(h) if self.norms else h
