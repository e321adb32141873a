"""Tuners folded into the weights of a tower, and a CLIP of open_clip that holds them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lift_ray.model.backbone import TIMM, _source
from lift_ray.model.loading import _open_clip_resnet, _open_clip_vit
from lift_ray.model.resnet import AnyTower, SsfConv
from lift_ray.model.tower import resized
from lift_ray.model.tuners import BlockTuner, Both, Identity, Lora, LowRank, ScaleShift, Ssf

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"  # as `local-dir:` wants them


def can_merge(tuners: Sequence[BlockTuner]) -> bool:
    """Whether what these tuners do is a change of the tower's weights: low rank, or scale and shift."""
    return all(can_merge(tuner.parts) if isinstance(tuner, Both) else type(tuner) in MERGE for tuner in tuners)


@torch.no_grad()
def merged(tower: AnyTower, tuners: Sequence[BlockTuner]) -> AnyTower:
    """A copy of the tower that computes without tuners what this one does with them.

    Args:
        tower: may be parametrised (`tuners.Sparse`), or hold trained parameters of its own.
        tuners: one for each block; `can_merge` must hold.
    """
    own = copy.deepcopy(tower)
    for at, layer in list(own.named_modules()):
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer):
            # removing the parametrisation of a copy would break the class that it shares with the original
            plain = nn.Linear(layer.in_features, layer.out_features)
            plain.weight.copy_(layer.weight)
            assert plain.bias is not None
            plain.bias.copy_(layer.bias)
            parent, _, name = at.rpartition(".")
            setattr(own.get_submodule(parent), name, plain)
    for block, tuner in zip(own.blocks, tuners, strict=True):
        _merge(block, tuner)
    return own.requires_grad_(False).eval()


def _merge(block: Any, tuner: BlockTuner) -> None:
    if isinstance(tuner, Both):
        for part in tuner.parts:
            _merge(block, part)
    else:
        MERGE[type(tuner)](block, tuner)


def _lora(block: Any, tuner: Any) -> None:
    """W + (A B / R)^T."""

    def change(low_rank: LowRank) -> Tensor:
        return (low_rank.down @ low_rank.up / low_rank.down.shape[1]).T

    weight = block.attn.in_proj.weight
    width = weight.shape[1]
    weight[:width] += change(tuner.q)
    weight[2 * width :] += change(tuner.v)
    if tuner.mlp:
        block.mlp.in_proj.weight += change(tuner.fc1)
        block.mlp.out_proj.weight += change(tuner.fc2)


def _ssf(block: Any, tuner: Any) -> None:
    _scale(block.attn.in_proj, tuner.attn_in)
    _scale(block.attn.out_proj, tuner.attn_out)
    _scale(block.mlp.in_proj, tuner.mlp_1)
    _scale(block.mlp.out_proj, tuner.mlp_2)
    if tuner.norms:
        _scale(block.norm1, tuner.after_norm1)
        _scale(block.norm2, tuner.after_norm2)


def _ssf_conv(block: Any, tuner: Any) -> None:
    norms = [block.bn1, block.bn2, block.bn3, *(block.downsample or [])[1:]]
    for norm, after in zip(norms, tuner.after, strict=True):
        _scale(norm, after)


def _scale(layer: Any, by: ScaleShift) -> None:
    """(W x + b) s + t = (s W) x + (s b + t), for a linear as for a norm."""
    layer.weight.mul_(by.scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.mul_(by.scale).add_(by.shift)


def write_open_clip(model: str, pretrained: str | None, tower: AnyTower, folder: Path) -> None:
    """Write the whole CLIP, with this tower in place of its own: `open_clip.create_model("local-dir:FOLDER")` loads it.

    Args:
        model, pretrained: where the tower came from, as `backbone.load_backbone` takes them; not of timm.
        folder: an empty one.

    Raises BadInput as `load_backbone`.
    """
    import open_clip
    from safetensors.torch import save_file

    source, quick_gelu = _source(model, pretrained)
    clip = open_clip.create_model(
        source, pretrained=pretrained, force_quick_gelu=quick_gelu, require_pretrained=True, weights_only=True
    )
    found = _open_clip_vit(clip.visual) or _open_clip_resnet(clip.visual)
    assert found is not None, "it was rebuilt before"
    theirs = [name for name in clip.visual.state_dict() if name != "proj"]
    state, ours = clip.state_dict(), _at_its_size(tower)
    for name, renamed in zip(theirs, found[1], strict=True):
        state[f"visual.{name}"] = ours[renamed]
    config: dict[str, Any] = open_clip.get_model_config(source)
    config["vision_cfg"]["image_size"] = tower.resolution_px
    if quick_gelu:
        config["quick_gelu"] = True
    preprocess = {name: clip.visual.preprocess_cfg[name] for name in ("mean", "std", "interpolation", "resize_mode")}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n")


def _at_its_size(tower: AnyTower) -> dict[str, Tensor]:
    """The tower's tensors, positions as they are for its size of pictures."""
    side = tower.resolution_px // tower.patch_px
    return {
        name: resized(value, side) if name.endswith("positions") else value
        for name, value in tower.state_dict().items()
    }


def licence(model: str, pretrained: str | None) -> str:
    """The licence of a backbone's weights as far as it is known; "unknown" else."""
    if model.startswith(TIMM):
        import timm

        name = model.removeprefix(TIMM)
        known = timm.is_model(name.partition(".")[0])
        config = timm.get_pretrained_cfg(name, allow_unregistered=False) if known and pretrained is None else None
        return str(getattr(config, "license", None) or "unknown")
    return next(
        (
            found
            for start, found in LICENCES.items()
            if f"{model} {pretrained or ''}".startswith(start)
            or (":" not in model and (pretrained or "").startswith(start))
        ),
        "unknown",
    )


MERGE: dict[type[BlockTuner], Callable[[Any, Any], None]] = {
    Identity: lambda block, tuner: None,
    Lora: _lora,
    Ssf: _ssf,
    SsfConv: _ssf_conv,
}
LICENCES = {
    "embedded:lift-tiny": "Apache-2.0",
    "openai": "MIT",
    "laion": "MIT",
    "datacomp": "MIT",
    "hf-hub:laion/": "MIT",
}
"""How a name or a tag of open_clip begins -> the licence that its publisher states for the weights."""
