"""LIFT: a frozen tower, a tiny tuner in its blocks and a cosine classifier (arXiv 2309.10019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lift_ray.model.backbone import Tower
from lift_ray.model.classifier import CosineHead, ZeroShotHead
from lift_ray.model.tuners import Tuner

if TYPE_CHECKING:
    from lift_ray.settings.run import Optim


class Lift(nn.Module):
    """The tower with its tuner and classifier.

    The tower is shared by all trials of a process and never changes; only `tuner` and `head` are trained and stored.
    """

    def __init__(self, tower: Tower, tuner: Tuner, head: CosineHead | ZeroShotHead) -> None:
        super().__init__()
        self.tower, self.tuner, self.head = tower, tuner, head
        if tuner.kind == "zero_shot":
            head.requires_grad_(False)

    def feature(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) normalised images, (B, P) patches to look at (None for all) -> (B, D) before CLIP's projection."""
        feature: Tensor = self.tower(images, self.tuner.per_block, patches)
        return feature

    def forward(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """As `feature`, to (B, K) raw logits, in fp32 also when the tower computes in less."""
        feature = self.feature(images, patches).float()
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.head(feature)
        return logits

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; the tower has none."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds: tuner and head, also when the head is not trained."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("tower.")}

    def load_stored(self, state: dict[str, Tensor]) -> None:
        """Load a checkpoint's tensors, strictly. Raises ValueError that names what is missing or too much."""
        expected = self.stored()
        wrong = set(expected) ^ set(state) or {n for n in expected if expected[n].shape != state[n].shape}
        if wrong:
            raise ValueError(f"the checkpoint does not fit the model: {', '.join(sorted(wrong)[:4])}")
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(state[name])


def make_optimizer(trained: dict[str, nn.Parameter], optim: Optim) -> torch.optim.SGD:
    """SGD with momentum over all trained parameters, as in LIFT; one fused update a step."""
    return torch.optim.SGD(
        trained.values(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
    )
