"""Vision transformers of timm, taken apart: plain ones, EVA and its relatives (EVA-02, DINOv3, PE), and BEiT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lift_ray.model.blocks import BlockShape
from lift_ray.model.positions import Rotary
from lift_ray.model.rebuilt import Rebuilt, activation_of, adopted, norm_like, rebuilt
from lift_ray.model.tower import AttentionPool, Pool, Tower

RENAMED = {
    "patch_embed.": "patch.embedding.",
    "patch.embedding.proj.": "patch.",  # of a plain patch embedding; undone below for others
    "cls_token": "class_token",
    "reg_token": "registers",
    "pos_embed": "positions",
    "rope.": "rotary.origin.",
    "attn_pool.": "pool.pool.",
    ".relative_position_bias_table": ".relative.table",
    ".qkv.": ".in_proj.",
    ".attn.proj.": ".attn.out_proj.",
    ".fc1.": ".in_proj.",
    ".fc2.": ".out_proj.",
    ".gamma_1": ".attn.gamma",
    ".gamma_2": ".mlp.gamma",
    ".ls1.gamma": ".attn.gamma",
    ".ls2.gamma": ".mlp.gamma",
}


class _Patches(nn.Module):
    """A patch embedding of timm that is more than a convolution, with the patches in rows: (B, 3, H, W) -> (B, N, D)."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        x: Tensor = self.embedding(images)
        return x.flatten(1, 2) if x.dim() == 4 else x


def rebuild_timm(vit: Any) -> Rebuilt | None:
    """Return the parts of a vision transformer of timm up to the feature before its classifier; None if it has others."""
    blocks: list[Any] = list(getattr(vit, "blocks", ()))
    shape = _shape(vit, blocks) if blocks and _is_known(vit, blocks) else None
    pool = _pool(vit) if shape else None
    if shape is None or pool is None or vit.patch_embed.grid_size[0] != vit.patch_embed.grid_size[1]:
        return None
    patches: Any = adopted(vit.patch_embed)
    patches.strict_img_size = False
    is_plain = type(patches).__name__ == "PatchEmbed" and isinstance(patches.norm, nn.Identity)
    side = patches.grid_size[0]
    patch_px = patches.img_size[0] // side
    has_class_token, rotary = vit.cls_token is not None, getattr(vit, "rope", None)
    positions = "none" if vit.pos_embed is None else "patches" if getattr(vit, "no_embed_class", False) else "all"
    if positions != "none":  # those of a file may be for another size of images
        side = math.isqrt(vit.pos_embed.shape[1] - (vit.num_prefix_tokens if positions == "all" else 0))
    with torch.device("meta"):
        tower = Tower(
            shape,
            num_blocks=len(blocks),
            patch=patches.proj if is_plain else _Patches(patches),
            patch_px=patch_px,
            resolution_px=side * patch_px,
            pool=pool,
            class_token=has_class_token,
            num_registers=vit.num_prefix_tokens - has_class_token,
            positions=positions,  # type: ignore[arg-type]
            norm_first=not isinstance(getattr(vit, "norm_pre", nn.Identity()), nn.Identity),
            rotary=None if rotary is None else Rotary(adopted(rotary)),
        )
    tower.make = type(vit).__name__
    tower.overflows_in_fp16 = type(rotary).__name__ == "RotaryEmbeddingDinoV3"  # facebookresearch/dinov3, issue 181
    renamed = RENAMED if is_plain else {old: new for old, new in RENAMED.items() if old != "patch.embedding.proj."}
    return Rebuilt(tower, rebuilt(tower, _state(vit, blocks, pool), renamed).state, {})


def _is_known(vit: Any, blocks: Sequence[Any]) -> bool:
    """Return True if a model, its blocks and their parts are of kinds that the towers compute."""
    from timm.layers import attention, mlp
    from timm.models import beit, eva
    from timm.models import vision_transformer as plain

    known: dict[type, tuple[type, ...]] = {
        plain.VisionTransformer: (plain.Block, plain.ResPostBlock),
        eva.Eva: (eva.EvaBlock, eva.EvaBlockPostNorm),
        beit.Beit: (beit.Block,),
    }
    attentions = (attention.Attention, attention.AttentionRope, eva.EvaAttention, beit.Attention)
    mlps = (mlp.Mlp, mlp.GluMlp, mlp.SwiGLU)
    return type(vit) in known and all(
        type(block) in known[type(vit)]
        and type(block.attn) in attentions
        and getattr(block.attn, "gate", None) is None
        and getattr(block.attn, "num_kv_groups", 1) == 1
        and block.attn.proj.in_features == vit.embed_dim
        and type(block.mlp) in mlps
        for block in blocks
    )


def _shape(vit: Any, blocks: Sequence[Any]) -> BlockShape | None:
    """Return the shape of the blocks, whose classes are known; None if the blocks differ, or for an unknown norm or activation."""
    first = blocks[0]
    attn, mlp = first.attn, first.mlp
    makers = {
        str(norm_like(m)) for b in [*blocks, getattr(vit, "norm_pre", None)] if b for m in b.modules() if _is_norm(m)
    }
    norm, activation = norm_like(first.norm1), activation_of(mlp.act)
    if len(makers) != 1 or norm is None or activation is None or len({type(b) for b in blocks}) != 1:
        return None
    return BlockShape(
        width=vit.embed_dim,
        num_heads=attn.num_heads,
        hidden=mlp.fc2.in_features,
        activation=activation,
        norm=norm,
        post_norm="Post" in type(first).__name__,
        query_norm=_is_norm(getattr(attn, "q_norm", None)),
        inner_norm=_is_norm(getattr(attn, "norm", None)),
        gated_mlp=type(mlp).__name__ != "Mlp",
        mlp_norm=_is_norm(mlp.norm),
        rotary_half=getattr(attn, "rotate_half", False),
        relative_side=attn.window_size[0] if getattr(attn, "window_size", None) else 0,
    )


def _is_norm(module: Any) -> bool:
    return "Norm" in type(module).__name__ and hasattr(module, "weight")


def _pool(vit: Any) -> Pool | AttentionPool | None:
    """Return the pool with its norms, the origin's own; None for one that the towers do not know."""
    norms = [norm for norm in (vit.norm, vit.fc_norm) if not isinstance(norm, nn.Identity)]
    if vit.global_pool == "map":
        takes_all = getattr(vit, "pool_include_prefix", True)  # EVA has no such setting
        return AttentionPool(
            adopted(vit.attn_pool), adopted(vit.norm), adopted(vit.fc_norm), 0 if takes_all else vit.num_prefix_tokens
        )
    kinds = {"token": "class", "avg": "mean"}
    if vit.global_pool not in kinds or len(norms) > 1:
        return None
    norm_last = norms == [vit.fc_norm]
    first_patch = 0 if getattr(vit, "pool_include_prefix", False) else vit.num_prefix_tokens
    return Pool(kinds[vit.global_pool], adopted(norms[0]) if norms else nn.Identity(), norm_last, first_patch)  # type: ignore[arg-type]


def _state(vit: Any, blocks: Sequence[Any], pool: Pool | AttentionPool) -> dict[str, Tensor]:
    """Return the tensors of a model, with one input projection in each attention and MLP, and final norms named for the pool."""
    last = "pool.norm." if isinstance(pool, Pool) else "pool.norm_last."
    state: dict[str, Tensor] = {}
    for key, value in vit.state_dict().items():
        if not key.startswith("head."):
            key = f"pool.{key}" if key.startswith("norm.") else key
            state[last + key.removeprefix("fc_norm.") if key.startswith("fc_norm.") else key] = value
    for index, block in enumerate(blocks):
        _join_attention(state, f"blocks.{index}.attn.")
        _join_mlp(state, f"blocks.{index}.mlp.", block.mlp)
    for name in ("cls_token", "reg_token", "pos_embed"):
        if name in state:
            state[name] = state[name].flatten(0, -2) if name != "cls_token" else state[name].flatten()
    return state


def _join_attention(state: dict[str, Tensor], at: str) -> None:
    """Join separate projections of queries, keys and values; their bias where keys have none is zero there."""
    if f"{at}q_proj.weight" in state:
        weights = [state.pop(f"{at}{part}_proj.weight") for part in "qkv"]
        state[f"{at}qkv.weight"] = torch.cat(weights)
        names = [f"{at}{part}_proj.bias" for part in "qkv"]
    else:
        names = [f"{at}{part}_bias" for part in "qkv"]
    if names[0] in state:
        biases = {name: state.pop(name) for name in names if name in state}
        zeros = torch.zeros_like(biases[names[0]])
        state[f"{at}qkv.bias"] = torch.cat([biases.get(name, zeros) for name in names])


def _join_mlp(state: dict[str, Tensor], at: str, mlp: Any) -> None:
    """Put the gate of a gated MLP before its values, in one projection."""
    for kind in ("weight", "bias"):
        if f"{at}fc1_g.{kind}" in state:
            state[f"{at}fc1.{kind}"] = torch.cat([state.pop(f"{at}fc1_{part}.{kind}") for part in "gx"])
        elif getattr(mlp, "gate_last", False) and f"{at}fc1.{kind}" in state:
            state[f"{at}fc1.{kind}"] = torch.cat(state[f"{at}fc1.{kind}"].chunk(2)[::-1])
