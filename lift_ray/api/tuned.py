"""A backbone with a tuner, as a plain module for one's own training loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lift_ray.errors import BadInput
from lift_ray.methods.lift import Lift
from lift_ray.model.backbone import Backbone, check_tuner
from lift_ray.model.heads import CosineHead, random_weights
from lift_ray.registry import TunerConfig
from lift_ray.settings.tuners import resolve_tuner

TEMPLATE = "a photo of a {}."


def add_tuner(
    backbone: Backbone,
    tuner: TunerConfig,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    template: str = TEMPLATE,
) -> Lift:
    """Return a module from normalized images (B, 3, H, W) to logits (B, K), or to features (B, D) without classes.

    `backbone.mean` and `backbone.std` normalize images in [0, 1]. Only the tuner and the classifier have `requires_grad`
    (`module.trained()` names them); the backbone is shared and stays as it is. The initial weights are those of torch's current seed.

    Args:
        backbone: from `load_backbone`.
        tuner: as LoraConfig(bottleneck=8).
        class_names: names of the K classes, from which the cosine classifier starts (arXiv 2309.10019).
        num_classes: K, for a cosine classifier with random weights.
        template: text with {} for the class name.

    Raises BadInput for a tuner or blocks that the backbone has no place for, and for a width that would be derived from K without
    classes.
    """
    tower, names = backbone.tower, list(class_names or ())
    check_tuner(tower, tuner.kind)
    number = len(names) or num_classes
    try:
        resolved = resolve_tuner(tuner, "tuner", number or 2, tower.num_blocks, tower.width)
        if not number and resolved != resolve_tuner(tuner, "tuner", 10**6, tower.num_blocks, tower.width):
            raise ValueError("tuner.bottleneck: is derived from the number of classes, but there are none; set it")
    except ValueError as error:
        raise BadInput(str(error)) from None
    head: nn.Module = nn.Identity()
    if number:
        head = CosineHead(backbone.semantic_weights(names, template) if names else random_weights(number, tower.width))
    options = resolved.options(tower.num_blocks)
    return Lift(tower, {tuner.kind: options}, head).to(next(tower.parameters(), torch.empty(0)).device)
