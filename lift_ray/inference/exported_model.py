"""The whole classifier as one module, as it is exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lift_ray.methods.lift import Lift
from lift_ray.model.backbone import Backbone
from lift_ray.model.merging import merged
from lift_ray.model.text_head import TextHead
from lift_ray.model.tower import FrozenTower
from lift_ray.model.tuners.base import BlockTuner


class ExportedModel(nn.Module):
    """The whole classifier, from uint8 images to logits: normalization, tower, tuners, head and post-hoc adjustment.

    Args:
        behind: from the tower's features (B, D) to the head's input (B, D).
        mean, std: mean and standard deviation of each channel, for images in [0, 1].
        offset: (K,), subtracted from the logits.
    """

    mean: Tensor
    std: Tensor
    offset: Tensor

    def __init__(
        self,
        tower: FrozenTower,
        tuners: Sequence[BlockTuner],
        behind: nn.Module,
        head: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        offset: Tensor,
    ) -> None:
        super().__init__()
        self.tower, self.behind, self.head = tower, behind, head
        self.tuners: Any = nn.ModuleList(tuners)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))
        self.register_buffer("offset", offset)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) for RGB images (B, 3, H, W) in uint8."""
        x = (images.float() - self.mean) / self.std
        logits: Tensor = self.head(self.behind(self.tower(x, self.tuners)))
        return logits - self.offset


def exported_model(model: Lift, backbone: Backbone, offset: Tensor) -> ExportedModel:
    """Return the module of a trained model; tuners of blocks are merged into the weights if possible, so that they cost no time.

    A classifier by texts becomes one by their embeddings, without its text side.
    """
    tower, tuners = model.tower, model.tuner.per_block
    if all(tuner.can_merge for tuner in tuners):
        tower, tuners = merged(tower, tuners), []
    head = model.head.constant() if isinstance(model.head, TextHead) else model.head
    behind, mean, std = model.tuner.behind, backbone.mean, backbone.std
    return ExportedModel(tower, tuners, behind, head, mean=mean, std=std, offset=offset).eval()
