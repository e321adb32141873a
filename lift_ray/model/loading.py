"""Towers of open_clip and timm, taken apart and rebuilt as ours with the same weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.errors import BadInput
from lift_ray.model.resnet import AnyTower, ResNetTower
from lift_ray.model.tower import Tower


def rebuild(visual: Any, name: str = "this tower") -> AnyTower:
    """A VisionTransformer of open_clip or timm, or a ModifiedResNet, as a tower with the same weights, frozen.

    It takes the tensors over as they are, but for timm's layer scales, which are multiplied into the projection before them.
    Raises BadInput for other towers.
    """
    plain = "VisionTransformer" in type(visual).__name__
    refused = BadInput(
        "backbone.model",
        "must be a plain vision transformer with a class token",
        but=f"{name} is a {type(visual).__name__}{' with other parts' if plain else ''}",
        remedy="use one of CLIP's ViT models",
    )
    with torch.device("meta"):  # weights at random would take longer than those that replace them
        found = _open_clip_vit(visual) or _open_clip_resnet(visual) or _timm_vit(visual)
    if found is None:
        raise refused
    tower, state = found
    try:
        tower.load_state_dict(state, strict=True, assign=True)
    except RuntimeError:  # layer scale in open_clip, registers, norms elsewhere, images that are not square
        raise refused from None
    return tower.eval().requires_grad_(False)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def _open_clip_vit(visual: Any) -> tuple[Tower, dict[str, Tensor]] | None:
    """The empty tower for a plain vision transformer of open_clip, and its weights under our names."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.pool_type != "tok":
        return None
    blocks = visual.transformer.resblocks
    act = blocks[0].mlp.gelu
    exact = isinstance(act, QuickGELU) or getattr(act, "approximate", "") == "none"
    if not exact or any(type(b) is not ResidualAttentionBlock for b in blocks):
        return None
    tower = Tower(
        width=visual.conv1.out_channels,
        num_blocks=len(blocks),
        num_heads=blocks[0].attn.num_heads,
        hidden=blocks[0].mlp.c_fc.out_features,
        patch_px=visual.conv1.kernel_size[0],
        resolution_px=math.isqrt(len(visual.positional_embedding) - 1) * visual.conv1.kernel_size[0],
        activation=quick_gelu if isinstance(act, QuickGELU) else F.gelu,
        eps=visual.ln_post.eps,
        norm_first=not isinstance(visual.ln_pre, nn.Identity),
    )
    tower.resolution_px = visual.image_size[0]
    renamed = {
        "conv1.": "patch.",
        "class_embedding": "class_token",
        "positional_embedding": "positions",
        "ln_pre.": "norm_pre.",
        "ln_post.": "norm_post.",
        "transformer.resblocks.": "blocks.",
        ".ln_1.": ".norm1.",
        ".ln_2.": ".norm2.",
        ".attn.in_proj_": ".attn.in_proj.",
        ".c_fc.": ".in_proj.",
        ".c_proj.": ".out_proj.",
    }
    return tower, _renamed({key: value for key, value in visual.state_dict().items() if key != "proj"}, renamed)


def _open_clip_resnet(visual: Any) -> tuple[ResNetTower, dict[str, Tensor]] | None:
    """The same for a residual network of CLIP."""
    from open_clip.modified_resnet import ModifiedResNet

    if not isinstance(visual, ModifiedResNet):
        return None
    stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    side = math.isqrt(len(visual.attnpool.positional_embedding) - 1)
    tower = ResNetTower(
        layers=[len(stage) for stage in stages],
        stem_width=visual.conv3.out_channels,
        width=visual.output_dim,
        num_heads=visual.attnpool.num_heads,
        resolution_px=side * ResNetTower.patch_px,
    )
    at = [(stage, index) for stage, blocks in enumerate(stages, 1) for index in range(len(blocks))]
    renamed = {f"layer{stage}.{index}.": f"blocks.{number}." for number, (stage, index) in enumerate(at)}
    return tower, _renamed(visual.state_dict(), {**renamed, "positional_embedding": "positions"})


def _timm_vit(vit: Any) -> tuple[Tower, dict[str, Tensor]] | None:
    """The same for a plain vision transformer of timm."""
    from timm.layers.activations import GELU, QuickGELU
    from timm.models import vision_transformer

    of: Any = vision_transformer
    if type(vit) is not of.VisionTransformer or type(vit.patch_embed) is not of.PatchEmbed or vit.pos_embed is None:
        return None
    if vit.global_pool != "token" or vit.no_embed_class or len({*vit.patch_embed.grid_size}) > 1:
        return None
    if any((type(b), type(b.attn), type(b.mlp)) != (of.Block, of.Attention, of.Mlp) for b in vit.blocks):
        return None
    act, eps = vit.blocks[0].mlp.act, {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)}
    exact = isinstance(act, QuickGELU | GELU) or getattr(act, "approximate", "") == "none"
    if not exact or len(eps) != 1:
        return None
    patch, mlp = vit.patch_embed.proj, vit.blocks[0].mlp
    tower = Tower(
        width=vit.embed_dim,
        num_blocks=len(vit.blocks),
        num_heads=vit.blocks[0].attn.num_heads,
        hidden=mlp.fc1.out_features,
        patch_px=patch.kernel_size[0],
        resolution_px=math.isqrt(vit.pos_embed.shape[1] - 1) * patch.kernel_size[0],
        activation=quick_gelu if isinstance(act, QuickGELU) else F.gelu,
        eps=eps.pop(),
        norm_first=not isinstance(vit.norm_pre, nn.Identity),
        patch_bias=patch.bias is not None,
    )
    renamed = {
        "patch_embed.proj.": "patch.",
        "cls_token": "class_token",
        "pos_embed": "positions",
        ".qkv.": ".in_proj.",
        ".attn.proj.": ".attn.out_proj.",
        ".fc1.": ".in_proj.",
        ".fc2.": ".out_proj.",
    }
    state = _renamed({k: v for k, v in vit.state_dict().items() if not k.startswith("head.")}, renamed)
    state = {f"norm_post.{k[5:]}" if k.startswith("norm.") else k: v for k, v in state.items()}
    state |= {key: state[key].flatten(0, -2).squeeze(0) for key in ("class_token", "positions")}
    for key in [key for key in state if key.endswith(".gamma")]:
        projection, gamma = key.replace("ls1.gamma", "attn").replace("ls2.gamma", "mlp") + ".out_proj", state.pop(key)
        state[f"{projection}.weight"] = gamma[:, None] * state[f"{projection}.weight"]
        state[f"{projection}.bias"] = gamma * state[f"{projection}.bias"]
    return tower, state


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The same tensors, every part of a name replaced that `names` holds."""
    out = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = value
    return out
