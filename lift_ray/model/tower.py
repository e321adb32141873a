"""Frozen image towers: the interface of all, and vision transformers.

The blocks of open_clip hold an nn.MultiheadAttention, whose projections cannot be changed from outside without silently having
no effect. Ours (`blocks.py`) compute the same features, which tests compare.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lift_ray.model.blocks import Block, BlockShape
from lift_ray.model.positions import Rotary, resized
from lift_ray.model.tuners.base import BlockTuner, Identity


class SharedWeights(nn.Module):
    """A frozen module, copies of which share its tensors."""

    def with_own(self, names: Iterable[str]) -> Self:
        """The same module with copies of the named parameters to train; all other tensors are shared."""
        own = set(names)
        shared: dict[int, Tensor] = {id(b): b for b in self.buffers()}
        for name, p in self.named_parameters():
            shared[id(p)] = nn.Parameter(p.detach().clone()) if name in own else p
        return copy.deepcopy(self, shared)


class FrozenTower(SharedWeights):
    """Interface of all towers: `embed`, then `blocks_until` and `finish`, which each kind implements.

    Attributes:
        family: transformer, resnet, stages or opaque: which tuners have a place in it.
        make: name of the architecture, for messages.
        norm: the kind of tuner that trains the norms of the blocks; "" without norms.
        blocks: that tuners can change.
        width: D, of the feature.
        patch_px: side of a patch; of the square that a place of the last stage stands for, if it is convolutional.
        resolution_px: side of the images.
        can_drop_patches: images can be looked at in part.
        overflows_in_fp16: its activations are too large for fp16.
        origin_names: our name of each tensor -> its name in the origin; None if some were joined or scaled.
    """

    family: str
    make: str
    norm: str
    num_blocks: int
    blocks: nn.ModuleList
    checkpointing: bool
    width: int
    patch_px: int
    resolution_px: int
    embed: Callable[..., Tensor]
    blocks_until: Callable[..., Tensor]
    finish: Callable[..., Tensor]
    origin_names: dict[str, str] | None = None
    can_drop_patches = False
    overflows_in_fp16 = False

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: nothing in a frozen tower is random or follows the batch."""
        return super().train(False)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation of one image in fp32."""
        raise NotImplementedError(type(self).__name__)

    def block_width(self, index: int) -> int:
        """Return the width of a block's output."""
        raise NotImplementedError(type(self).__name__)

    def num_patches(self, resolution_px: int) -> int:
        """Number of patches in an image of this side; for a residual network, of places that its attention pool sees."""
        return (resolution_px // self.patch_px) ** 2

    def forward(
        self, images: Tensor, tuners: Sequence[BlockTuner] | None = None, patches: Tensor | None = None
    ) -> Tensor:
        """Features before CLIP's projection: (B, 3, H, W) normalised images -> (B, D).

        Args:
            tuners: one for each block.
            patches: (B, P), the patches to look at; all when not given.
        """
        return self.finish(self.embed(images, patches), tuners, patches=patches, size_px=images.shape[-1])


class Pool(nn.Module):
    """From the tokens after the last block, (B, T, D), to the feature: the class token, or the mean of the patches.

    Args:
        kind: of the two.
        norm: of the tokens before; of the feature if `norm_last`.
        first_patch: number of tokens before the patches that the mean leaves out, without prompts.
    """

    def __init__(self, kind: Literal["class", "mean"], norm: nn.Module, norm_last: bool = False, first_patch: int = 1):
        super().__init__()
        self.kind, self.norm, self.norm_last, self.first_patch = kind, norm, norm_last, first_patch

    @property
    def needs_class_token_only(self) -> bool:
        """True if no other token changes the feature."""
        return self.kind == "class"

    def forward(self, x: Tensor, num_prompts: int = 0) -> Tensor:
        """(B, T, D), of which `num_prompts` are prompts -> (B, D)."""
        if self.kind == "class":
            feature: Tensor = self.norm(x[:, 0])
            return feature
        x = x[:, self.first_patch + num_prompts :]
        mean: Tensor = self.norm(x.mean(1)) if self.norm_last else self.norm(x).mean(1)
        return mean


class AttentionPool(nn.Module):
    """Attention of learned queries over all tokens, the origin's own module: (B, T, D) -> (B, D') (SigLIP, PE, CoCa).

    Args:
        pool: (B, T, D) -> (B, D').
        norm: of the tokens before.
        norm_last: of the feature.
        first_patch: tokens that it leaves out, without prompts: all before the patches, or none.
    """

    needs_class_token_only = False

    def __init__(self, pool: nn.Module, norm: nn.Module, norm_last: nn.Module, first_patch: int = 0) -> None:
        super().__init__()
        self.pool, self.norm, self.norm_last, self.first_patch = pool, norm, norm_last, first_patch

    def forward(self, x: Tensor, num_prompts: int = 0) -> Tensor:
        """(B, T, D) -> (B, D'); prompts are left out with what stands before the patches."""
        x = x[:, self.first_patch + num_prompts :] if self.first_patch else x
        feature: Tensor = self.norm_last(self.pool(self.norm(x)))
        return feature


class Tower(FrozenTower):
    """A frozen vision transformer.

    If only the class token of the last block reaches the classifier, that block computes its queries, MLP and tuner for
    that token alone, and no keys and values unless a tuner changes those. Nothing below the first tuned block enters the
    autograd graph, because nothing there requires a gradient.

    Args:
        shape: of the blocks.
        patch_px, resolution_px: sides of a patch and of the images.
        patch: images (B, 3, H, W) -> patches (B, D, H', W') or (B, N, D); by default a convolution without bias.
        pool: from the tokens after the last block to the feature; by default the class token after a norm.
        feature_width: of that.
        class_token: there is one.
        num_registers: tokens after the class token that are learned as it is.
        positions: which tokens have a learned position: all, the patches, or none.
        norm_first: a norm before the first block (CLIP).
        rotary: rotary positions of the patches.
        checkpointing: compute activations again in the backward pass, to save memory.
    """

    family, make, norm = "transformer", "VisionTransformer", "layernorm"

    def __init__(
        self,
        shape: BlockShape,
        *,
        num_blocks: int,
        patch_px: int,
        resolution_px: int,
        patch: nn.Module | None = None,
        pool: Pool | AttentionPool | None = None,
        feature_width: int | None = None,
        class_token: bool = True,
        num_registers: int = 0,
        positions: Literal["all", "patches", "none"] = "all",
        norm_first: bool = True,
        rotary: Rotary | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.num_blocks, self.patch_px, self.resolution_px = shape, num_blocks, patch_px, resolution_px
        self.width, self.checkpointing = feature_width or shape.width, checkpointing
        self.patch = patch or nn.Conv2d(3, shape.width, patch_px, patch_px, bias=False)
        self.class_token = nn.Parameter(torch.zeros(shape.width)) if class_token else None
        self.registers = nn.Parameter(torch.zeros(num_registers, shape.width)) if num_registers else None
        self.num_prefix = int(class_token) + num_registers
        self.prefix_positions = self.num_prefix if positions == "all" else 0
        rows = (resolution_px // patch_px) ** 2 + self.prefix_positions
        self.positions = None if positions == "none" else nn.Parameter(torch.zeros(rows, shape.width))
        self.norm_pre: nn.Module = shape.norm(shape.width) if norm_first else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(num_blocks))
        self.pool = pool or Pool("class", shape.norm(shape.width))
        self.rotary = rotary
        self.can_drop_patches = not shape.relative_side  # a bias by distance is for whole images
        self._resized: dict[int, Tensor] = {}

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation of one image in fp32: between the two linears of an MLP."""
        return 4 * self.shape.mlp_inputs * (self.num_patches(self.resolution_px) + self.num_prefix)

    @property
    def prompts_at(self) -> int:
        """Number of the token before which prompts are put: after the class token, or at the start."""
        return int(self.class_token is not None)

    def block_width(self, index: int) -> int:
        """D, of every block."""
        return self.shape.width

    def embed(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """Input of the first block: (B, 3, H, W) -> (B, T, D)."""
        x = self.patch(images)
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        positions = self._positions(images.shape[-1] // self.patch_px, x.dtype)
        if positions is not None:
            x = x + positions[self.prefix_positions :]
        if patches is not None:
            x = x.gather(1, patches[..., None].expand(-1, -1, x.shape[2]))
        if self.num_prefix:
            parts = [self.class_token[None] if self.class_token is not None else None, self.registers]
            first = torch.cat([part for part in parts if part is not None]).to(x.dtype)
            if positions is not None and self.prefix_positions:
                first = first + positions[: self.prefix_positions]
            x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
        out: Tensor = self.norm_pre(x)
        return out

    def blocks_until(
        self, x: Tensor, stop: int, start: int = 0, *, patches: Tensor | None = None, size_px: int | None = None
    ) -> Tensor:
        """The blocks from `start` to `stop` without tuners, which are the same for every model: (B, T, D) -> (B, T or 1, D).

        Args:
            patches, size_px: as for `finish`.
        """
        angles = self._angles(x, patches, size_px)
        for index in range(start, stop):
            x = self.blocks[index](x, _IDENTITY, self._is_last(index), _of_block(angles, index))
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
        """The blocks from `start` on, and the pool: (B, T, D) -> (B, D).

        Args:
            tuners: one for each block.
            start: x is the output of the blocks below this one.
            patches: (B, P), the patches that `embed` looked at; all when not given.
            size_px: side of the images; by default that whose patches are in x.
        """
        tuners = tuners or [_IDENTITY] * self.num_blocks
        num_prompts, angles = 0, self._angles(x, patches, size_px)
        for index in range(start, self.num_blocks):
            tuner, last = tuners[index], self._is_last(index)
            x, num_prompts = tuner.tokens(x, num_prompts)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[index], x, tuner, last, _of_block(angles, index), use_reentrant=False)
            else:
                x = self.blocks[index](x, tuner, last, _of_block(angles, index))
        feature: Tensor = self.pool(x, num_prompts)
        return feature

    def _is_last(self, index: int) -> bool:
        """Return True for the block of which only the class token is needed."""
        return index == self.num_blocks - 1 and self.pool.needs_class_token_only

    def _angles(self, x: Tensor, patches: Tensor | None, size_px: int | None) -> Tensor | None:
        """Rotary angles of the patches in x, before any prompts: as `Rotary`, or (B, ...) of those that were chosen."""
        if self.rotary is None:
            return None
        side = size_px // self.patch_px if size_px else math.isqrt(x.shape[1] - self.num_prefix)
        angles: Tensor = self.rotary(side, x.device, patches)
        return angles

    def _positions(self, side: int, dtype: torch.dtype) -> Tensor | None:
        """(P + side^2, D): resized (bicubic) if the images have another size than the weights were trained with."""
        if self.positions is None:
            return None
        if side not in self._resized:
            self._resized[side] = resized(self.positions, side, self.prefix_positions)
        positions: Tensor = self._resized[side].to(dtype)
        return positions


def _of_block(angles: Tensor | None, index: int) -> Tensor | None:
    """Return the angles of a block: its own if every block has some, (blocks, H, N, ...), else those of all."""
    return angles[index] if angles is not None and angles.dim() == 5 else angles


_IDENTITY = Identity()
