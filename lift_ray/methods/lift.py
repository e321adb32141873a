"""LIFT: a frozen tower, a tiny tuner in its blocks and a cosine classifier (arXiv 2309.10019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lift_ray.model.tower import FrozenTower
from lift_ray.model.tuners.base import Tuner, first_block, with_own_weights

FROZEN = ("tower.", "head.tower.")  # names of what a checkpoint does not hold unless it is trained


class Lift(nn.Module):
    """The tower with its tuners and classifier.

    All trials of a process share the tower, which never changes. Kinds that train its own parameters get copies of those
    parameters only. A checkpoint stores the trained parameters and the head.

    Args:
        parts: options of each kind of tuner (model.tuners.base.Tuner); kinds that train the tower's own parameters take `blocks`.
        head: from features to logits.
    """

    def __init__(self, tower: FrozenTower, parts: dict[str, dict[str, Any]], head: nn.Module) -> None:
        super().__init__()
        self.first_tuned = min((first_block(kind, options, tower.num_blocks) for kind, options in parts.items()))
        self.tower = with_own_weights(tower, parts)
        self.tuner, self.head = Tuner(parts, tower), head
        if "zero_shot" in parts:
            head.requires_grad_(False)

    def feature(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) normalized images, (B, P) patches to look at (all if None) -> (B, D) before CLIP's projection."""
        return self._behind(self.tower(images, self.tuner.per_block, patches))

    def forward(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) images and optional (B, P) patches -> (B, K) raw logits in fp32, also if the tower computes in less."""
        return self.classify(self.feature(images, patches))

    def from_frozen(self, activations: Tensor, patches: Tensor | None = None, size_px: int | None = None) -> Tensor:
        """(B, K) raw logits from the activations that `frozen_part` returned, of patches that it looked at."""
        return self.classify(self.feature_from_frozen(activations, patches, size_px))

    def feature_from_frozen(
        self, activations: Tensor, patches: Tensor | None = None, size_px: int | None = None
    ) -> Tensor:
        """(B, D) features from the activations that `frozen_part` returned."""
        if self.first_tuned == self.tower.num_blocks:
            return self._behind(activations)
        tuners, first = self.tuner.per_block, self.first_tuned
        return self._behind(self.tower.finish(activations, tuners, first, patches=patches, size_px=size_px))

    def _behind(self, feature: Tensor) -> Tensor:
        """Features of the tower (B, D) -> the classifier's input (B, D)."""
        out: Tensor = self.tuner.behind(feature)
        return out

    def frozen_part(self, images: Tensor, stop: int | None = None) -> Tensor:
        """Activations of images (B, T, D) after the blocks below `stop`; features (B, D) after all blocks.

        Args:
            stop: the first tuned block by default, or one below it.
        """
        return self.continue_frozen(self.tower.embed(images), 0, self.first_tuned if stop is None else stop)

    def continue_frozen(
        self,
        activations: Tensor,
        start: int,
        stop: int,
        patches: Tensor | None = None,
        size_px: int | None = None,
    ) -> Tensor:
        """Return `frozen_part` for `stop` from that for `start`; at block 0 from what `tower.embed` returned.

        Args:
            patches, size_px: as for `tower.finish`.
        """
        if stop == self.tower.num_blocks and start < stop:
            return self.tower.finish(activations, start=start, patches=patches, size_px=size_px)
        return self.tower.blocks_until(activations, stop, start, patches=patches, size_px=size_px)

    def classify(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, K) raw logits in fp32."""
        with torch.autocast(feature.device.type, enabled=False):
            logits: Tensor = self.head(feature.float())
        return logits

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def stored(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint holds: the trained parameters and the head, also if the head is not trained; no frozen tower."""
        trained = self.trained()
        return {n: value for n, value in self.state_dict().items() if n in trained or not n.startswith(FROZEN)}

    def load_stored(self, state: dict[str, Tensor]) -> None:
        """Load a checkpoint's tensors, strictly. Raises ValueError that names what is missing or too much."""
        expected = self.stored()
        wrong = set(expected) ^ set(state) or {n for n in expected if expected[n].shape != state[n].shape}
        if wrong:
            raise ValueError(f"the checkpoint does not fit the model: {', '.join(sorted(wrong)[:4])}")
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(state[name])
