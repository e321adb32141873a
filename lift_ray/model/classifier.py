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


class ZeroShotHead(nn.Module):
    """CLIP's own zero-shot classifier: z_k = logit_scale * cos(f @ projection, text_k) (arXiv 2103.00020). Not trained.

    Args:
        projection: (D, E), from features to the shared space.
        text: (K, E), normalised text embeddings of the classes.
        logit_scale: CLIP's 1 / temperature.
    """

    projection: Tensor
    text: Tensor

    def __init__(self, projection: Tensor, text: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.register_buffer("projection", projection.detach().clone().float())
        self.register_buffer("text", text.detach().clone().float())
        self.logit_scale = logit_scale

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return self.logit_scale * F.normalize(feature @ self.projection, dim=-1) @ self.text.T


def random_weights(num_classes: int, width: int) -> Tensor:
    """Kaiming-uniform (K, D) weights."""
    weight = torch.empty(num_classes, width)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight
