"""Every image tower that open_clip and timm can build without a network, compared with ours; writes docs/reference/towers.md.

Architectures are compared at full width with two blocks (one block a stage) and small images, on random weights. At full depth they
are rebuilt without memory, on the meta device: names and shapes of all tensors must fit.

    python tests/every_tower.py             # the table, into docs/reference/towers.md; some minutes
    python tests/every_tower.py ViT-B-16    # only print what is said of these
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower

from lift_ray.model.hosted import StagedTower
from lift_ray.model.loading import ImageTower, image_tower
from lift_ray.model.resnet import ResNetTower
from lift_ray.model.tower import FrozenTower, Pool, Tower
from lift_ray.text import count

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "towers.md"
TIMM = [  # an architecture of each kind that people choose; all other models of timm are tried in the same way when they are loaded
    "vit_base_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_7b_patch16_dinov3",
    "vit_large_patch16_dinov3_qkvb",
    "deit3_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "eva02_base_patch14_448",
    "eva_giant_patch14_224",
    "vit_base_patch16_siglip_224",
    "vit_so400m_patch16_siglip_512",
    "vit_pe_core_base_patch16_224",
    "vit_pe_spatial_large_patch14_448",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "aimv2_large_patch14_224",
    "vit_base_patch16_rope_mixed_224",
    "vit_so150m2_patch16_reg1_gap_256",
    "convnext_base",
    "convnextv2_base",
    "resnet50",
    "fastvit_mci2",
    "swin_base_patch4_window7_224",
    "swinv2_base_window8_256",
    "regnety_008",
    "maxvit_tiny_tf_224",
]
PLAIN = ("VisionTransformer", "Eva", "Beit", "VisionTransformerDistilled", "VisionTransformerRelPos")
LARGE = 100_000_000  # parameters
STAGES = {"ConvNeXt": "depths", "FastVit": "layers", "ResNet": "layers"}


@dataclass(frozen=True)
class Compared:
    """A tower beside its origin.

    Attributes:
        kind: what it is, in words.
        blocks: number of blocks that tuners can change, at full depth.
        needs: what its text half needs beyond open_clip.
        difference: largest difference of the embeddings, by the largest absolute value of the origin's; None for a large tower that
            runs as it is, in one piece, where there is nothing to compare.
    """

    name: str
    family: str
    kind: str
    blocks: int
    resolution_px: int
    needs: str
    difference: float | None


def shake(module: torch.nn.Module) -> None:
    """Move norms, scales, biases and statistics away from 0 and 1, so that none can be forgotten."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)
                tensor.add_(0.1 * noise if tensor.ndim < 2 else 0.02 * noise)


def kind_of(tower: FrozenTower) -> str:
    """Say in words what a tower is made of."""
    if isinstance(tower, ResNetTower):
        return "CLIP's ResNet"
    if isinstance(tower, StagedTower):
        return f"{tower.make}, by stages" if tower.family == "stages" else f"{tower.make}, in one piece"
    assert isinstance(tower, Tower)
    pool = tower.pool
    words = [
        f"{pool.kind} {'token' if pool.kind == 'class' else 'pooling'}"
        if isinstance(pool, Pool)
        else "attention pooling"
    ]
    words += ["rotary positions"] if tower.rotary is not None else []
    words += ["bias by distance"] if tower.shape.relative_side else []
    words += [count(len(tower.registers), "register")] if tower.registers is not None else []
    words += ["gated MLP"] if tower.shape.gated_mlp else []
    words += ["norms behind"] if tower.shape.post_norm else []
    return ", ".join(words)


@contextmanager
def shallow(make: Callable[..., Any], module: Any) -> Iterator[None]:
    """Let a module's `timm.create_model` build two blocks, for small images where the size is free."""

    def create(name: str, **options: Any) -> Any:
        with torch.device("meta"):
            whole = make(name, **options)
        return make(name, **options, **smaller(whole))

    original = module.create_model
    module.create_model = create
    try:
        yield
    finally:
        module.create_model = original


def smaller(whole: Any) -> dict[str, Any]:
    """Return options of timm with which a model of this class has few blocks and small images."""
    kind = type(whole).__name__
    if kind in STAGES:
        return {
            STAGES[kind]: (1,)
            * len([name for name, _ in whole.named_children() if name.startswith("layer")] or whole.stages)
        }
    if kind not in PLAIN:
        return {}
    embed = getattr(whole, "patch_embed", None)
    is_hybrid = type(embed).__name__ != "PatchEmbed"
    is_free = not is_hybrid and kind != "VisionTransformerRelPos"
    size = {"img_size": 4 * embed.patch_size[0]} if is_free and embed is not None else {}
    return {} if is_hybrid and len(whole.blocks) > 12 else {"depth": 2, **size}


def compare(ours: ImageTower, theirs: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return the largest difference of the embeddings of random images, by the largest value."""
    px = ours.tower.resolution_px
    images = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = theirs(images), ours.tower(images)
        got = got if ours.projection is None else got @ ours.projection
        got = got if ours.bias is None else got + ours.bias
    assert float(expected.std(0).max()) > 1e-4 * float(expected.abs().max()), "the images are not told apart"
    return float((got - expected).abs().max() / expected.abs().max())


def of_open_clip(name: str) -> Compared:
    """Compare an architecture of open_clip: its image tower alone, so that no text tower is looked for in the network."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        full = image_tower(_visual(name, config["vision_cfg"]), name).tower
    text, needs = config.get("text_cfg", {}), ""
    for key, what in (
        ("hf_tokenizer_name", "a tokenizer of Hugging Face"),
        ("hf_model_name", "a text tower of Hugging Face"),
    ):
        needs = what if text.get(key) else needs
    is_large = sum(p.numel() for p in full.parameters()) > LARGE
    key = json.dumps([config["vision_cfg"] | {"image_size": 0}, config["embed_dim"], config.get("quick_gelu")])
    difference = None if full.family == "opaque" and is_large else _difference_of(key, name)
    px = int(config["vision_cfg"]["image_size"])
    return Compared(name, full.family, kind_of(full), full.num_blocks, px, needs, difference)


_differences: dict[str, float] = {}


def _difference_of(key: str, name: str) -> float:
    """Compare a small version of an architecture; those with the same key differ in the size of the images at most."""
    if key not in _differences:
        torch.manual_seed(0)
        visual = _small_visual(name)
        shake(visual)
        _differences[key] = compare(image_tower(visual, name), visual)
    return _differences[key]


def _visual(name: str, vision: dict[str, Any]) -> Any:
    config = open_clip.get_model_config(name)
    return _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**vision), config.get("quick_gelu", False)).eval()


def _small_visual(name: str) -> Any:
    vision = open_clip.get_model_config(name)["vision_cfg"]
    if "timm_model_name" not in vision:
        is_resnet = isinstance(vision["layers"], list)
        layers, px = ([1, 1, 1, 1], 64) if is_resnet else (2, 4 * vision["patch_size"])
        return _visual(name, {**vision, "layers": layers, "image_size": px, "output_tokens": False})
    with shallow(timm.create_model, open_clip.timm_model.timm):
        visual = _visual(name, vision)
    if type(visual.trunk).__name__ in STAGES:
        visual.image_size = (64, 64)
    else:
        visual.image_size = getattr(getattr(visual.trunk, "patch_embed", None), "img_size", None) or visual.image_size
    return visual


def of_timm(name: str) -> Compared:
    """Compare an architecture of timm by the feature before its classifier."""
    with torch.device("meta"):
        whole = timm.create_model(name).eval()
        full = image_tower(whole, name).tower
    torch.manual_seed(0)
    origin = timm.create_model(name, **smaller(whole)).eval()
    shake(origin)
    found = compare(
        image_tower(origin, name), lambda x: origin.forward_head(origin.forward_features(x), pre_logits=True)
    )
    return Compared(f"timm:{name}", full.family, kind_of(full), full.num_blocks, full.resolution_px, "", found)


INTRODUCTION = """# Backbones

For people who choose a backbone. `python tests/every_tower.py` writes this page: it builds every architecture that open_clip {version}
knows, and some of timm {timm}, and compares each with ours.

| you have | take |
|---|---|
| photos of things that have names | `ViT-B-16` with `openai` or `laion2b_s34b_b88k`; DFN: `ViT-B-16-quickgelu` with `dfn2b` |
| class names in other languages | SigLIP 2: `ViT-B-16-SigLIP2-256` with `webli` |
| species | BioCLIP 2: `hf-hub:imageomics/bioclip-2` |
| classes without useful names (defects, findings) | DINOv3: `timm:vit_base_patch16_dinov3` with `head.init: class_mean` |
| a phone as the target | MobileCLIP 2: `MobileCLIP2-S2` |
| the best features, at any cost | PE: `PE-Core-L-14-336`; SigLIP 2: `ViT-SO400M-16-SigLIP2-384` |

These are the weights that people publish good results with; none was measured here.

**Of {total} architectures of open_clip, {accepted} are accepted, and {places} of them have places for tuners in every block.**

* Every kind: all tuners of [the settings](settings.md).
* By stages: bottlenecks (`adaptformer`, `adapter`), own weights (`bitfit`, norms, `full`, `partial`), and what is behind the tower.
* In one piece, or behind the tower: `linear_probe`, `zero_shot` and `clip_adapter`.

The difference is the largest of the embeddings on random weights in fp32, by the largest absolute value. Towers by stages and in one
piece run the origin's own modules, so theirs is 0.

Names after `hf-hub:` and `local-dir:` are accepted if their architecture is. Text towers and tokenizers of Hugging Face need
`pip install 'lift_ray[tokenizers]'`.
"""
TUNERS = {
    "transformer": "every kind",
    "resnet": "`ssf`, own weights",
    "stages": "bottlenecks, own weights",
    "opaque": "behind the tower",
}


def page(towers: list[Compared]) -> str:
    """Return the page: an introduction, and a table with a line for each kind of tower."""
    clips = [tower for tower in towers if not tower.name.startswith("timm:")]
    text = INTRODUCTION.format(
        version=open_clip.__version__,
        timm=timm.__version__,
        total=len(open_clip.list_models()),
        accepted=len(clips),
        places=sum(tower.family != "opaque" for tower in clips),
    )
    for title, some in (("open_clip", clips), ("timm", [tower for tower in towers if tower not in clips])):
        text += f"\n## {title}\n\n| tower | tuners | models | text needs | difference |\n|---|---|---|---|---|\n"
        groups: dict[tuple[str, str, str], list[Compared]] = {}
        for tower in some:
            groups.setdefault((tower.kind, tower.family, tower.needs), []).append(tower)
        for (kind, family, needs), those in sorted(groups.items(), key=lambda item: -len(item[1])):
            worst = max((tower.difference or 0.0 for tower in those), default=0.0)
            names = ", ".join(f"`{tower.name}`" for tower in those)
            text += f"| {kind} | {TUNERS[family]} | {names} | {needs or '-'} | {f'{worst:.1e}' if worst else '0'} |\n"
    return text


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or [*open_clip.list_models(), *(f"timm:{name}" for name in TIMM)]
    towers = []
    for name in names:
        towers.append(of_timm(name.removeprefix("timm:")) if name.startswith("timm:") else of_open_clip(name))
        print(towers[-1], flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(towers))
        print(PAGE)


if __name__ == "__main__":
    main()
