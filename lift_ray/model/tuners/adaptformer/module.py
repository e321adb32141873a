"""The module of AdaptFormer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lift_ray.model.tuners.base import Bottleneck


class Adaptformer(Bottleneck):
    """out + s * Up(ReLU(Down(LN(a)))), s learnable (arXiv 2205.13535, as in arXiv 2309.10019)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__(width, bottleneck)
        self.scale = nn.Parameter(torch.ones(()))

    def beside_mlp(self, a: Tensor, out: Tensor) -> Tensor:
        """Adds the bottleneck's output; s scales the small weights and not the large output."""
        # (R, D): products with (D, R) are slow in the backward pass
        up = (self.scale * self.up.weight).t().contiguous()
        inner = self.inner(a).flatten(0, -2)
        return out + torch.addmm(self.scale * self.up.bias, inner, up).view_as(out)
