"""Tuners folded into the weights of a tower, and a CLIP of open_clip that holds them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lift_ray.model.backbone import TIMM, clip_of
from lift_ray.model.positions import resized
from lift_ray.model.tower import FrozenTower
from lift_ray.model.tuners.base import BlockTuner

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"  # as `local-dir:` wants them


@torch.no_grad()
def merged(tower: FrozenTower, tuners: Sequence[BlockTuner]) -> FrozenTower:
    """A copy of the tower that computes without tuners what this one does with them.

    Args:
        tower: may be parametrised (`model.tuners.sparse`), or hold trained parameters of its own.
        tuners: one for each block; each with `can_merge`.
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
        tuner.merge_into(block)
    return own.requires_grad_(False).eval()


def write_open_clip(
    model: str,
    pretrained: str | None,
    tower: FrozenTower,
    folder: Path,
    *,
    quickgelu: bool | None = None,
    interpolation: str | None = None,
) -> None:
    """Write the whole CLIP, with this tower in place of its own: `open_clip.create_model("local-dir:FOLDER")` loads it.

    Args:
        model, pretrained, quickgelu: where the tower came from, as `backbone.load_backbone` takes them; not of timm.
        folder: an empty one.
        interpolation: of the images that the tower was tuned on; by default that of its weights.

    Raises BadInput as `load_backbone`.
    """
    import open_clip
    from safetensors.torch import save_file

    clip, source, quick_gelu = clip_of(model, pretrained, quickgelu)
    state, ours = clip.state_dict(), _at_its_size(tower)
    assert tower.origin_names is not None, "the caller checks that"
    for name, theirs in tower.origin_names.items():
        state[f"visual.{theirs}"] = ours[name]
    config: dict[str, Any] = open_clip.get_model_config(source)
    config["vision_cfg"]["image_size"] = tower.resolution_px
    if quick_gelu:
        config["quick_gelu"] = True
    preprocess = {name: clip.visual.preprocess_cfg[name] for name in ("mean", "std", "interpolation", "resize_mode")}
    preprocess["interpolation"] = interpolation or preprocess["interpolation"]
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n")


def _at_its_size(tower: FrozenTower) -> dict[str, Tensor]:
    """The tower's tensors, with the position embeddings of its image size."""
    side, prefix = tower.resolution_px // tower.patch_px, getattr(tower, "prefix_positions", 1)
    return {
        name: resized(value, side, prefix) if name.endswith("positions") else value
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


LICENCES = {
    "embedded:lift-small": "MIT (image tower), Apache-2.0 (text tower)",
    "openai": "MIT",
    "laion": "MIT",
    "datacomp": "MIT",
    "hf-hub:laion/": "MIT",
}
"""Start of a name or tag of open_clip -> the license that its publisher states for the weights."""
