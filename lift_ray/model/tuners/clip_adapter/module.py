"""The module of CLIP-Adapter."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ClipAdapter(nn.Module):
    """ratio * ReLU(Up(ReLU(Down(f)))) + (1 - ratio) * f, without biases (arXiv 2110.04544).

    In the paper f is the image embedding in CLIP's shared space. Here it is the tower's feature before CLIP's projection, which the
    classifiers of LIFT take, so that towers without a shared space can have one too. Both products start as nn.Linear does, as in
    the paper's code; so this is not the identity at the start.
    """

    def __init__(self, width: int, bottleneck: int, ratio: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)
        self.ratio = ratio

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        adapted = F.relu(self.up(F.relu(self.down(feature))))
        return self.ratio * adapted + (1 - self.ratio) * feature
