"""Frozen CLIP image towers, rebuilt from open_clip with explicit linears.

open_clip's blocks hold an nn.MultiheadAttention, whose projections cannot be changed from outside without silently having
no effect. The rebuilt tower computes the same features (a test compares them) and gives a tuner a place at every
projection.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.errors import BadInput, did_you_mean
from lift_ray.model.classifier import ZeroShotHead
from lift_ray.model.tuners import BlockTuner, Identity

EMBEDDED = "embedded:"


class Attention(nn.Module):
    """Multi-head self-attention with its projections as plain linears."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, h: Tensor, tuner: BlockTuner, class_token_only: bool) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, 1, D) when only the class token is asked for."""
        width = h.shape[-1]
        if class_token_only:
            first = h[:, :1]
            q = F.linear(first, self.in_proj.weight[:width], self.in_proj.bias[:width])
            k, v = F.linear(h, self.in_proj.weight[width:], self.in_proj.bias[width:]).split(width, dim=-1)
        else:
            first = h
            q, k, v = self.in_proj(h).split(width, dim=-1)
        q, v = tuner.query(first, q), tuner.value(h, v)
        heads = (self.num_heads, width // self.num_heads)
        out = F.scaled_dot_product_attention(
            q.unflatten(-1, heads).transpose(1, 2),
            k.unflatten(-1, heads).transpose(1, 2),
            v.unflatten(-1, heads).transpose(1, 2),
        )
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """Two linears around the activation that the weights were trained with."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, hidden)
        self.out_proj = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.out_proj(self.activation(self.in_proj(h)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block with places for a tuner."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, activation: Callable[[Tensor], Tensor], eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, h: Tensor, tuner: BlockTuner, class_token_only: bool = False) -> Tensor:
        """a = h + Attn(LN1(h)); out = a + MLP(LN2(a)) + tuner.beside_mlp(a); (B, T, D) -> (B, T or 1, D)."""
        a = (h[:, :1] if class_token_only else h) + self.attn(self.norm1(h), tuner, class_token_only)
        out: Tensor = a + self.mlp(self.norm2(a))
        return tuner.beside_mlp(a, out)


class Tower(nn.Module):
    """A frozen vision transformer.

    Only the class token of the last block reaches the classifier, so that block computes its queries, MLP and tuner for
    that token alone. Nothing below the first tuned block enters the autograd graph, because nothing there requires a
    gradient.
    """

    def __init__(
        self, *, width: int, num_blocks: int, num_heads: int, hidden: int, patch_px: int, resolution_px: int,
        activation: Callable[[Tensor], Tensor], eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.num_blocks, self.resolution_px = width, num_blocks, resolution_px
        self.patch = nn.Conv2d(3, width, patch_px, patch_px, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros((resolution_px // patch_px) ** 2 + 1, width))
        self.norm_pre = nn.LayerNorm(width, eps)
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden, activation, eps) for _ in range(num_blocks))
        self.norm_post = nn.LayerNorm(width, eps)

    @property
    def num_patches(self) -> int:
        """Patches in a picture."""
        return len(self.positions) - 1

    def forward(
        self, images: Tensor, tuners: Sequence[BlockTuner] | None = None, patches: Tensor | None = None
    ) -> Tensor:
        """Features before CLIP's projection: (B, 3, H, W) normalised images -> (B, D).

        Args:
            tuners: one for each block.
            patches: (B, P), the patches to look at; all when not given.
        """
        tuners = tuners or [Identity()] * self.num_blocks
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = x + self.positions[1:].to(x.dtype)
        if patches is not None:
            x = x.gather(1, patches[..., None].expand(-1, -1, x.shape[2]))
        first = (self.class_token + self.positions[0]).to(x.dtype)
        x = self.norm_pre(torch.cat([first.expand(len(x), 1, -1), x], dim=1))
        for index, (block, tuner) in enumerate(zip(self.blocks, tuners, strict=True)):
            x = block(x, tuner, class_token_only=index == self.num_blocks - 1)
        feature: Tensor = self.norm_post(x[:, 0])
        return feature


@dataclass
class Backbone:
    """A frozen image tower and, for CLIP, what turns class names into classifier weights.

    Args:
        name: as the settings name it.
        tower: the image tower, parameters frozen.
        mean, std: per channel, for images in [0, 1].
        text: names -> (N, E) normalised text embeddings; None for towers without text.
        projection: (D, E), from image features to the shared space; None without text.
        logit_scale: CLIP's own 1 / temperature.
    """

    name: str
    tower: Tower
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    text: Callable[[list[str]], Tensor] | None
    projection: Tensor | None
    logit_scale: float
    _embedded: dict[tuple[str, tuple[str, ...]], Tensor] = field(default_factory=dict)

    def text_embeddings(self, class_names: Sequence[str], template: str) -> Tensor:
        """Normalised text embeddings of the classes, (K, E); computed once for a list of names and a template.

        Underscores in names become spaces (arXiv 2309.10019). Raises BadInput for a tower without text and a template
        without a place for the name.
        """
        if self.text is None or self.projection is None:
            raise BadInput(f"head.init: semantic needs a text tower, but {self.name} has none; use head.init=random")
        if "{}" not in template:
            raise BadInput(f"head.template: must hold {{}} for the class name, but got {template!r}; add it")
        key = (template, tuple(class_names))
        if key not in self._embedded:
            self._embedded[key] = self.text([template.replace("{}", name.replace("_", " ")) for name in class_names])
        return self._embedded[key]

    def semantic_weights(self, class_names: Sequence[str], template: str) -> Tensor:
        """Classifier weights from class names: w_k = normalise(text_k @ projection^T), (K, D) (arXiv 2309.10019)."""
        text = self.text_embeddings(class_names, template)
        assert self.projection is not None
        return F.normalize(text @ self.projection.T, dim=-1)

    def zero_shot_head(self, class_names: Sequence[str], template: str) -> ZeroShotHead:
        """CLIP's own classifier for these classes."""
        text = self.text_embeddings(class_names, template)
        assert self.projection is not None
        return ZeroShotHead(self.projection, text, self.logit_scale)


def load_backbone(model: str, pretrained: str | None, *, device: torch.device | str = "cpu") -> Backbone:
    """Load a frozen CLIP through open_clip.

    Args:
        model: `embedded:lift-tiny`, an open_clip name, `hf-hub:...` or `local-dir:...`.
        pretrained: open_clip's tag or a local weights file, for an open_clip name.

    Raises:
        BadInput: unknown names, missing weights, or a tower this class cannot rebuild.
    """
    import open_clip

    source, quick_gelu = _source(model, pretrained)
    try:
        clip = open_clip.create_model(
            source, pretrained=pretrained, force_quick_gelu=quick_gelu, require_pretrained=True, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip raises RuntimeError, OSError, hub and safetensors errors
        raise BadInput(
            f"backbone.model: {model} could not be loaded ({' '.join(str(error).split())}); check name and network"
        ) from None
    clip.eval().requires_grad_(False)
    tower = rebuild(clip.visual, model).to(device)
    config = clip.visual.preprocess_cfg

    @torch.inference_mode()
    def text(lines: list[str]) -> Tensor:
        parts = [clip.encode_text(tokenizer(lines[i : i + 256]), normalize=True) for i in range(0, len(lines), 256)]
        return torch.cat(parts).clone()

    scale = float(clip.logit_scale.exp())
    return Backbone(model, tower, tuple(config["mean"]), tuple(config["std"]), text, clip.visual.proj.detach(), scale)


def rebuild(visual: Any, name: str = "this tower") -> Tower:
    """open_clip's VisionTransformer as a Tower with the same weights, frozen. Raises BadInput for other towers."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    plain = isinstance(visual, VisionTransformer) and all(
        type(b) is ResidualAttentionBlock for b in visual.transformer.resblocks
    )
    refused = BadInput(
        f"backbone.model: must be a plain vision transformer with a class token, but {name} is a {type(visual).__name__}"
        f"{' with other parts' if plain else ''}; use one of CLIP's ViT models"
    )
    if not plain or visual.attn_pool is not None or visual.pool_type != "tok":
        raise refused
    blocks = visual.transformer.resblocks
    act = blocks[0].mlp.gelu
    if not isinstance(act, QuickGELU) and getattr(act, "approximate", "") != "none":
        raise refused
    activation: Callable[[Tensor], Tensor] = quick_gelu if isinstance(act, QuickGELU) else F.gelu
    tower = Tower(
        width=visual.conv1.out_channels, num_blocks=len(blocks), num_heads=blocks[0].attn.num_heads,
        hidden=blocks[0].mlp.c_fc.out_features, patch_px=visual.conv1.kernel_size[0], resolution_px=visual.image_size[0],
        activation=activation, eps=visual.ln_post.eps,
    )  # fmt: skip
    renamed = {
        "conv1.": "patch.", "class_embedding": "class_token", "positional_embedding": "positions", "ln_pre.": "norm_pre.",
        "ln_post.": "norm_post.", "transformer.resblocks.": "blocks.", ".ln_1.": ".norm1.", ".ln_2.": ".norm2.",
        ".attn.in_proj_": ".attn.in_proj.", ".c_fc.": ".in_proj.", ".c_proj.": ".out_proj.",
    }  # fmt: skip
    state = {}
    for key, value in visual.state_dict().items():
        if key == "proj":
            continue
        for old, new in renamed.items():
            key = key.replace(old, new)
        state[key] = value
    try:
        tower.load_state_dict(state, strict=True)
    except RuntimeError:  # layer scale, no first norm, pictures that are not square
        raise refused from None
    return tower.eval().requires_grad_(False)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def _source(model: str, pretrained: str | None) -> tuple[str, bool]:
    """open_clip's name for a model of ours, and whether its weights were trained with QuickGELU."""
    import open_clip

    if model.startswith(EMBEDDED):
        assets = importlib.resources.files("lift_ray") / "assets"
        folder = Path(str(assets / model.removeprefix(EMBEDDED)))
        if not (folder / "open_clip_config.json").is_file():
            known = [p.parent.name for p in Path(str(assets)).glob("*/open_clip_config.json")]
            raise BadInput(f"backbone.model: unknown embedded model '{model}'; {did_you_mean(folder.name, known)}")
        model = f"local-dir:{folder}"
    if ":" in model:
        if pretrained is not None:
            raise BadInput(f"backbone.pretrained: must not be given with {model}, but got {pretrained!r}; remove it")
        return model, False
    if model not in open_clip.list_models():
        raise BadInput(f"backbone.model: unknown model '{model}'; {did_you_mean(model, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or (pretrained not in tags and not Path(pretrained).is_file()):
        raise BadInput(
            f"backbone.pretrained: must be a tag of {model} or a weights file, but got {pretrained!r}; "
            f"{did_you_mean(pretrained, tags)}"
        )
    # open_clip only warns when OpenAI's weights meet a config with plain GELU; the features would be wrong.
    return model, bool((open_clip.pretrained.get_pretrained_cfg(model, pretrained) or {}).get("quick_gelu", False))
