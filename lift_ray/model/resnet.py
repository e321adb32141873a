"""CLIP's residual networks (arXiv 2103.00020) as frozen towers, with a place for a tuner after every convolution of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.errors import BadInput
from lift_ray.model.positions import resized
from lift_ray.model.sequence import SequenceTower
from lift_ray.model.tuners.base import BlockTuner
from lift_ray.model.tuners.ssf.module import ScaleShift


class FrozenStatistics(nn.BatchNorm2d):
    """A batch norm that always uses the mean and variance it was trained with, and never changes them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.eval()

    def train(self, mode: bool = True) -> FrozenStatistics:
        """Stays in evaluation mode."""
        super().train(False)
        return self


class Bottleneck(nn.Module):
    """A residual block: convolutions of 1, 3 and 1 px, the average pool of a stride before the last (arXiv 2103.00020)."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = FrozenStatistics(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = FrozenStatistics(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = FrozenStatistics(outputs)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Sequential | None = None
        self.channels = [planes, planes, outputs]
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), FrozenStatistics(outputs))
            self.channels.append(outputs)

    def forward(self, x: Tensor, tuner: BlockTuner) -> Tensor:
        """(B, C, H, W) -> (B, 4P, H / stride, W / stride)."""
        out = F.relu(tuner.conv(0, self.bn1(self.conv1(x))))
        out = F.relu(tuner.conv(1, self.bn2(self.conv2(out))))
        out = tuner.conv(2, self.bn3(self.conv3(self.pool(out))))
        if self.downsample is not None:
            x = tuner.conv(3, self.downsample(self.pool(x)))
        return F.relu(out + x)


class MeanAttentionPool(nn.Module):
    """Attention of the mean over all places: (B, C, H, W) -> (B, D). Only that query is computed."""

    def __init__(self, channels: int, width: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positions = nn.Parameter(torch.zeros(side**2 + 1, channels))
        self.q_proj, self.k_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.v_proj, self.c_proj = nn.Linear(channels, channels), nn.Linear(channels, width)
        self._resized: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        side, x = x.shape[-1], x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self._positions(side).to(x.dtype)
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (
            part.unflatten(-1, heads).transpose(1, 2)
            for part in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        feature: Tensor = self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))
        return feature

    def _positions(self, side: int) -> Tensor:
        """(1 + side^2, C): resized (bicubic) if the images have another size than the weights were trained with."""
        if side not in self._resized:
            self._resized[side] = resized(self.positions, side)
        return self._resized[side]


class SsfConv(BlockTuner):
    """Scale and shift after the batch norm of each convolution of a block (arXiv 2210.08823). Starts near the identity.

    Args:
        channels: of each convolution's output.
        norms: must not be asked for, as there are no layer norms; raises BadInput.
    """

    def __init__(self, channels: Sequence[int], norms: bool = False) -> None:
        super().__init__()
        if norms:
            raise BadInput("tuner ssf", "norms must be false for a backbone without layer norms", "true", "remove it")
        self.after = nn.ModuleList(ScaleShift(number) for number in channels)

    can_merge = True

    def merge_into(self, block: Any) -> None:
        """Fold each scale and shift into the batch norm before it."""
        norms = [block.bn1, block.bn2, block.bn3, *(block.downsample or [])[1:]]
        for norm, after in zip(norms, self.after, strict=True):
            after.fold_into(norm)  # type: ignore[operator]

    def conv(self, index: int, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        part: Any = self.after[index]
        return torch.addcmul(part.shift.to(x.dtype)[:, None, None], x, part.scale.to(x.dtype)[:, None, None])


class ResNetTower(SequenceTower):
    """A frozen residual network of CLIP with the interface of Tower; its blocks are those of all four stages.

    The feature is the attention pool's output, its last projection included, so the shared space is the feature's own.

    Args:
        layers: blocks of each stage.
        stem_width: channels of the stem; 64 for RN50.
        width: D, of the feature.
        num_heads: of the attention pool.
        resolution_px: side of the images that the position embeddings are for.
        checkpointing: compute activations again in the backward pass, to save memory.
    """

    family, make, norm = "resnet", "ModifiedResNet", "batchnorm"
    patch_px = 32

    def __init__(
        self,
        *,
        layers: Sequence[int],
        stem_width: int,
        width: int,
        num_heads: int,
        resolution_px: int,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.num_blocks = width, sum(layers)
        self.resolution_px, self.checkpointing = resolution_px, checkpointing
        half = stem_width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), FrozenStatistics(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), FrozenStatistics(half)
        self.conv3, self.bn3 = nn.Conv2d(half, stem_width, 3, padding=1, bias=False), FrozenStatistics(stem_width)
        self.blocks = nn.ModuleList()
        inputs = stem_width
        for stage, number in enumerate(layers):
            planes = stem_width << stage
            for index in range(number):
                self.blocks.append(Bottleneck(inputs, planes, 2 if stage and not index else 1))
                inputs = 4 * planes
        self.attnpool = MeanAttentionPool(inputs, width, num_heads, resolution_px // self.patch_px)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation of one image in fp32: the output of the stem, before its pool."""
        return 4 * self.conv3.out_channels * (self.resolution_px // 2) ** 2

    def stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 4, W / 4)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)

    def pool(self, x: Tensor) -> Tensor:
        """The attention pool: (B, C, H, W) -> (B, D)."""
        feature: Tensor = self.attnpool(x)
        return feature

    def make_ssf(self, index: int, **options: bool) -> SsfConv:
        """The scales and shifts of one block."""
        block: Any = self.blocks[index]
        return SsfConv(block.channels, **options)
