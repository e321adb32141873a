"""Image towers of open_clip's own code, taken apart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lift_ray.model.blocks import BlockShape
from lift_ray.model.rebuilt import OPEN_CLIP_BLOCKS, Rebuilt, activation_of, adopted, norm_like, rebuilt
from lift_ray.model.resnet import ResNetTower
from lift_ray.model.tower import AttentionPool, Pool, Tower


class _FirstQuery(nn.Module):
    """CoCa's attention pool for its first query, the only one that the feature needs: (B, T, D) -> (B, D')."""

    def __init__(self, pooler: Any) -> None:
        super().__init__()
        self.query, self.attn, self.ln_q, self.ln_k = pooler.query, pooler.attn, pooler.ln_q, pooler.ln_k

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, D')."""
        seen = self.ln_k(x)
        query = self.ln_q(self.query[:1]).expand(len(x), 1, -1)
        out: Tensor = self.attn(query, seen, seen, need_weights=False)[0]
        return out[:, 0]


def rebuild_vit(visual: Any) -> Rebuilt | None:
    """Return the parts of a VisionTransformer of open_clip; None if it has others."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if not isinstance(visual, VisionTransformer):
        return None
    blocks = visual.transformer.resblocks
    act, norm = activation_of(blocks[0].mlp.gelu), norm_like(blocks[0].ln_1)
    pool = _pool_of(visual)
    if act is None or norm is None or pool is None or any(type(b) is not ResidualAttentionBlock for b in blocks):
        return None
    patch_px, side = visual.conv1.kernel_size[0], math.isqrt(len(visual.positional_embedding) - 1)
    with torch.device("meta"):
        shape = BlockShape(
            width=visual.conv1.out_channels,
            num_heads=blocks[0].attn.num_heads,
            hidden=blocks[0].mlp.c_fc.out_features,
            activation=act,
            norm=norm,
        )
        tower = Tower(
            shape,
            num_blocks=len(blocks),
            patch=adopted(visual.conv1),
            patch_px=patch_px,
            resolution_px=side * patch_px,
            pool=pool,
            feature_width=visual.ln_post.normalized_shape[0],
            norm_first=not isinstance(visual.ln_pre, nn.Identity),
        )
    tower.resolution_px = visual.image_size[0]
    renamed = {
        "conv1.": "patch.",
        "class_embedding": "class_token",
        "positional_embedding": "positions",
        "ln_pre.": "norm_pre.",
        "ln_post.": "pool.norm_last." if visual.attn_pool is not None else "pool.norm.",
        "attn_pool.": "pool.pool.",
        **OPEN_CLIP_BLOCKS,
    }
    return rebuilt(tower, {key: value for key, value in visual.state_dict().items() if key != "proj"}, renamed)


def _pool_of(visual: Any) -> Pool | AttentionPool | None:
    """Return the pool of a vision transformer with its norm; None for one that the towers do not know."""
    if visual.attn_pool is not None:
        if visual.attn_pool_contrastive is not None or visual.pool_type != "tok":
            return None
        return AttentionPool(_FirstQuery(adopted(visual.attn_pool)), nn.Identity(), adopted(visual.ln_post))
    kinds = {"tok": "class", "avg": "mean"}
    if visual.pool_type not in kinds:
        return None
    return Pool(kinds[visual.pool_type], adopted(visual.ln_post), norm_last=visual.final_ln_after_pool)  # type: ignore[arg-type]


def rebuild_resnet(visual: Any) -> Rebuilt | None:
    """Return the parts of a residual network of CLIP; None if it is none."""
    from open_clip.modified_resnet import ModifiedResNet

    if not isinstance(visual, ModifiedResNet):
        return None
    stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    side = math.isqrt(len(visual.attnpool.positional_embedding) - 1)
    with torch.device("meta"):
        tower = ResNetTower(
            layers=[len(stage) for stage in stages],
            stem_width=visual.conv3.out_channels,
            width=visual.output_dim,
            num_heads=visual.attnpool.num_heads,
            resolution_px=side * ResNetTower.patch_px,
        )
    at = [(stage, index) for stage, blocks in enumerate(stages, 1) for index in range(len(blocks))]
    renamed = {f"layer{stage}.{index}.": f"blocks.{number}." for number, (stage, index) in enumerate(at)}
    return rebuilt(tower, visual.state_dict(), {**renamed, "positional_embedding": "positions"})
