"""Classifier heads on frozen features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """z_k = scale * cos(f, w_k) (arXiv 2309.10019).

    Args:
        weight: (K, D), the start of the trained weights, for example from the class names.
        scale: 25 in LIFT.
    """

    def __init__(self, weight: Tensor, scale: float = 25.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone().float())
        self.scale = scale

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return self.scale * F.linear(F.normalize(feature, dim=-1), F.normalize(self.weight, dim=-1))


def random_weights(num_classes: int, width: int) -> Tensor:
    """Kaiming-uniform (K, D) weights."""
    weight = torch.empty(num_classes, width)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight
