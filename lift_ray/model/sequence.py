"""Towers that are a stem, blocks in a row and a pool, without tokens: residual networks, and towers that are hosted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lift_ray.model.tower import FrozenTower
from lift_ray.model.tuners.base import BlockTuner, Identity


class SequenceTower(FrozenTower):
    """Runs `stem`, `blocks` and `pool`, which each kind of tower has.

    Attributes:
        stem: (B, 3, H, W) -> input of the first block.
        blocks: modules that take an input and a tuner.
        pool: output of the last block -> feature (B, D).
    """

    stem: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]

    def embed(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """Input of the first block. Raises ValueError when only some patches are asked for."""
        if patches is not None:
            raise ValueError("patches: must not be given for a convolutional tower; set augment.patch_dropout=0")
        return self.stem(images)

    def blocks_until(
        self, x: Tensor, stop: int, start: int = 0, *, patches: Tensor | None = None, size_px: int | None = None
    ) -> Tensor:
        """The blocks from `start` to `stop` without tuners, which are the same for every model: (B, C, H, W) -> (B, C', H', W')."""
        for index in range(start, stop):
            x = self.blocks[index](x, _IDENTITY)
        return x

    def finish(
        self,
        x: Tensor,
        tuners: Sequence[BlockTuner] | None = None,
        start: int = 0,
        *,
        patches: Tensor | None = None,
        size_px: int | None = None,
    ) -> Tensor:
        """The blocks from `start` on, and the pool: (B, C, H, W) -> (B, D); see `Tower`, patches and size change nothing here."""
        tuners = tuners or [_IDENTITY] * self.num_blocks
        for index in range(start, self.num_blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[index], x, tuners[index], use_reentrant=False)
            else:
                x = self.blocks[index](x, tuners[index])
        return self.pool(x)


_IDENTITY = Identity()
