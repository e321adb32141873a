"""The rebuilt vision transformer equals open_clip's, and every name that cannot be loaded gives one line."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from lift_ray.errors import BadInput
from lift_ray.model.backbone import Backbone, load_backbone
from lift_ray.model.blocks import BlockShape
from lift_ray.model.loading import image_tower, rebuild
from lift_ray.model.rebuilt import quick_gelu
from lift_ray.model.tower import Tower
from lift_ray.model.tuners.adaptformer.module import Adaptformer
from lift_ray.model.tuners.base import BlockTuner
from lift_ray.model.tuners.lora.module import Lora

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
SIZES = {
    "one block": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "three blocks, one head": {"image_size": 24, "layers": 3, "width": 48, "head_width": 48, "patch_size": 8},
    "wide MLP": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "mlp_ratio": 3.0},
    "no first norm": {
        "image_size": 16,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-3},
    },
}


def clip_of(vision: dict[str, Any], quick: bool = False) -> open_clip.CLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(24, vision, TEXT, quick_gelu=quick).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1, so that none can be forgotten
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(size_px: int, number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("name", SIZES)
def test_the_rebuilt_tower_equals_open_clips(name: str, quick: bool) -> None:
    clip = clip_of(SIZES[name], quick)
    tower, batch = rebuild(clip.visual), images(SIZES[name]["image_size"])
    with torch.inference_mode():
        expected, got = clip.encode_image(batch), tower(batch) @ clip.visual.proj
    assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert tower.blocks[0].mlp.activation is (quick_gelu if quick else F.gelu)


class Keep(torch.nn.Module):
    """In the place of open_clip's random patch dropout: known patches."""

    def __init__(self, patches: torch.Tensor) -> None:
        super().__init__()
        self.patches = patches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.cat([row[:1], row[1:][kept]]) for row, kept in zip(x, self.patches, strict=True)])


@pytest.mark.parametrize("name", SIZES)
def test_looking_at_some_patches_equals_open_clips_patch_dropout(name: str) -> None:
    clip, batch = clip_of(SIZES[name]), images(SIZES[name]["image_size"])
    tower = rebuild(clip.visual)
    patches = torch.stack([torch.tensor([i, 3]) for i in range(3)])
    clip.visual.patch_dropout = Keep(patches)
    with torch.inference_mode():
        expected, got = clip.encode_image(batch), tower(batch, patches=patches) @ clip.visual.proj
        assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
        everything = torch.arange(tower.num_patches(tower.resolution_px)).expand(3, -1)
        assert torch.equal(tower(batch, patches=everything), tower(batch))


def test_the_two_activations_give_different_features() -> None:
    clip, batch = clip_of(SIZES["one block"], False), images(16)
    other = clip_of(SIZES["one block"], True)
    with torch.inference_mode():
        assert float((rebuild(clip.visual)(batch) - rebuild(other.visual)(batch)).abs().max()) > 1e-3


def test_a_rebuilt_tower_is_frozen_and_holds_each_weight_once() -> None:
    clip = clip_of(SIZES["one block"])
    tower = rebuild(clip.visual)
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert all(parameter.requires_grad for parameter in clip.visual.parameters())
    theirs = {parameter.data_ptr() for parameter in clip.visual.parameters()}
    assert {parameter.data_ptr() for parameter in tower.parameters()} < theirs  # all but CLIP's projection


def plain_features(tower: Tower, batch: torch.Tensor, tuners: list[BlockTuner]) -> torch.Tensor:
    """The same features with all tokens computed in every block, written out."""
    x = F.conv2d(batch, tower.patch.weight, stride=tower.patch.stride).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_token.expand(len(x), 1, -1), x], 1) + tower.positions
    x = tower.norm_pre(x)
    for block, tuner in zip(tower.blocks, tuners, strict=True):
        h = block.norm1(x)
        q, k, v = block.attn.in_proj(h).chunk(3, -1)
        q, v = tuner.query(h, q), tuner.value(h, v)
        heads = block.attn.num_heads
        size = x.shape[-1] // heads
        parts = []
        for i in range(heads):
            at = slice(i * size, (i + 1) * size)
            weights = torch.softmax(q[..., at] @ k[..., at].transpose(1, 2) / size**0.5, -1)
            parts.append(weights @ v[..., at])
        a = x + block.attn.out_proj(torch.cat(parts, -1))
        hidden = block.mlp.activation(block.mlp.in_proj(block.norm2(a)))
        x = tuner.beside_mlp(a, a + block.mlp.out_proj(hidden))
    return tower.pool(x)  # type: ignore[no-any-return]


SHAPE = BlockShape(48, num_heads=1, hidden=192, activation=F.gelu)


@pytest.mark.parametrize(
    "make", [BlockTuner, lambda: Lora(SHAPE, 3), lambda: Adaptformer(48, 3)], ids=["none", "lora", "adaptformer"]
)
def test_the_class_token_alone_gives_what_all_tokens_give(make: Callable[[], BlockTuner]) -> None:
    tower = rebuild(clip_of(SIZES["three blocks, one head"]).visual)
    tuners = [make() for _ in range(3)]
    with torch.no_grad():
        for tuner in tuners:
            for parameter in tuner.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        got, expected = tower(images(24), tuners), plain_features(tower, images(24), tuners)
    assert float((got - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-61", "openai", "backbone.model: unknown model 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        (
            "embedded:lift-smal",
            None,
            "backbone.model: unknown embedded model 'embedded:lift-smal'; did you mean 'lift-small'?",
        ),
        ("embedded:lift-small", "openai", "backbone.pretrained: must not be given with embedded:lift-small"),
        (
            "hf-hub:nobody/nothing",
            "openai",
            "backbone.pretrained: must not be given with hf-hub:nobody/nothing, but got 'openai'; remove it",
        ),
        ("ViT-B-16", None, "backbone.pretrained: must be a tag of ViT-B-16 or a weights file, but got None; known: "),
        (
            "ViT-B-16",
            "opnai",
            "backbone.pretrained: must be a tag of ViT-B-16 or a weights file, but got 'opnai'; did you mean 'openai'?",
        ),
        ("local-dir:/nowhere/at/all", None, "backbone.model: local-dir:/nowhere/at/all could not be loaded ("),
    ],
)
def test_an_unknown_backbone_gives_a_one_line_error(model: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_backbone(model, pretrained)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path, small_clip: str) -> None:
    config = Path(small_clip.removeprefix("local-dir:")) / "open_clip_config.json"
    (tmp_path / config.name).write_text(config.read_text())
    with pytest.raises(BadInput, match="Required pretrained weights"):
        load_backbone(f"local-dir:{tmp_path}", None)


@torch.inference_mode()
def test_a_clip_around_a_convolutional_model_of_timm_gives_its_embeddings() -> None:
    vision = {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}
    clip, batch = open_clip.CLIP(16, vision, TEXT).eval(), images(32)
    found = image_tower(clip.visual)
    assert (found.tower.family, found.bias) == ("stages", None)
    expected = clip.encode_image(batch)
    assert float((found.tower(batch) @ found.projection - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    "option",
    [
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
        {"ls_init_value": 0.1},
        {"act_kwargs": {"approximate": "tanh"}},
        {"block_type": "custom", "scale_attn": True},
    ],
    ids=str,
)
@torch.inference_mode()
def test_other_parts_of_a_vision_transformer_of_open_clip_give_its_embeddings(option: dict[str, Any]) -> None:
    visual, batch = clip_of({**SIZES["one block"], **option}).visual, images(16)
    found = image_tower(visual)
    assert found.tower.family == ("opaque" if "block_type" in option else "transformer")
    expected, got = visual(batch), found.tower(batch)
    got = got if found.projection is None else got @ found.projection
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_clip_for_images_that_are_not_square_is_refused() -> None:
    visual = clip_of({**SIZES["one block"], "image_size": [16, 24]}).visual
    with pytest.raises(BadInput, match="must take square images, but ViT-mine does not; use another model"):
        image_tower(visual, "ViT-mine")


@pytest.mark.parametrize(
    ("model", "tag", "quick"), [("ViT-B-16", "openai", True), ("ViT-B-16", "laion2b_s34b_b88k", False)]
)
def test_weights_trained_with_quick_gelu_get_it(
    model: str, tag: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def create_model(name: str, **options: Any) -> open_clip.CLIP:
        asked.append({"name": name, **options})
        clip = clip_of(SIZES["one block"], options["force_quick_gelu"])
        clip.visual.preprocess_cfg = {"mean": (0, 0, 0), "std": (1, 1, 1)}
        return clip

    monkeypatch.setattr(open_clip, "create_model", create_model)
    backbone = load_backbone(model, tag)
    assert asked == [
        {"name": model, "pretrained": tag, "force_quick_gelu": quick, "require_pretrained": True, "weights_only": True}
    ]
    assert backbone.tower.blocks[0].mlp.activation is (quick_gelu if quick else F.gelu)


def test_a_local_folder_loads_frozen_with_its_text_tower(small_clip: str) -> None:
    backbone = load_backbone(small_clip, None)
    assert (backbone.tower.width, backbone.tower.num_blocks, backbone.tower.resolution_px) == (64, 2, 32)
    assert (backbone.mean, backbone.std) == ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    assert backbone.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    weights = backbone.semantic_weights(["cat", "dog", "sea_horse"], "a photo of a {}.")
    assert weights.shape == (3, 64)
    assert torch.allclose(weights.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert not weights.requires_grad


def backbone_of(text: Callable[[list[str]], torch.Tensor] | None) -> Backbone:
    clip = clip_of(SIZES["one block"])
    projection = clip.visual.proj.detach() if text else None
    return Backbone("mine", rebuild(clip.visual), (0, 0, 0), (1, 1, 1), text, projection, 100.0)


def test_class_names_are_embedded_once_for_a_template() -> None:
    asked: list[list[str]] = []

    def text(lines: list[str]) -> torch.Tensor:
        asked.append(lines)
        return F.normalize(torch.arange(1.0, 24 * len(lines) + 1).view(len(lines), 24), dim=-1)

    backbone = backbone_of(text)
    one = backbone.semantic_weights(["sea_horse", "cat"], "a {}.")
    assert torch.equal(backbone.semantic_weights(("sea_horse", "cat"), "a {}."), one)
    assert asked == [["a sea horse.", "a cat."]]
    backbone.semantic_weights(["cat"], "a {}.")
    backbone.semantic_weights(["sea_horse", "cat"], "the {}.")
    assert len(asked) == 3
    assert backbone.projection is not None
    embedded = F.normalize(torch.arange(1.0, 49).view(2, 24), dim=-1)
    assert torch.allclose(one, F.normalize(embedded @ backbone.projection.T, dim=-1))


def test_only_empty_braces_of_a_template_stand_for_the_name() -> None:
    asked: list[str] = []
    backbone = backbone_of(lambda lines: (asked.extend(lines), torch.ones(len(lines), 24))[1])
    backbone.semantic_weights(["cat"], "{}: a {} of {kind} {0} {")
    assert asked == ["cat: a cat of {kind} {0} {"]
    with pytest.raises(BadInput) as caught:
        backbone.semantic_weights(["cat"], "a photo")
    assert str(caught.value) == "head.template: must contain {} for the class name, but got 'a photo'; add it"


def numbered(asked: list[list[str]]) -> Callable[[list[str]], torch.Tensor]:
    """Text embeddings that tell lines apart, and are normalised but for rounding as real ones are."""

    def text(lines: list[str]) -> torch.Tensor:
        asked.append(lines)
        rows = [torch.randn(24, generator=torch.Generator().manual_seed(zlib.crc32(line.encode()))) for line in lines]
        return F.normalize(torch.stack(rows), dim=-1)

    return text


def test_several_templates_give_the_normalised_mean_of_their_embeddings() -> None:
    asked: list[list[str]] = []
    backbone, text = backbone_of(numbered(asked)), numbered([])
    got = backbone.text_embeddings(["sea_horse", "cat"], ["a {}.", "the {}.", "{}"])
    parts = [text(["a sea horse.", "a cat."]), text(["the sea horse.", "the cat."]), text(["sea horse", "cat"])]
    expected = torch.stack(parts).mean(0)
    assert torch.allclose(got, expected / expected.norm(dim=-1, keepdim=True), atol=1e-6)
    assert torch.equal(backbone.text_embeddings(["sea_horse", "cat"], ["a {}.", "the {}.", "{}"]), got)
    assert len(asked) == 3
    assert not torch.allclose(backbone.text_embeddings(["sea_horse", "cat"], ["a {}.", "the {}."]), got, atol=1e-3)


def test_the_ensemble_is_clips_own_eighty_templates() -> None:
    asked: list[list[str]] = []
    backbone = backbone_of(numbered(asked))
    got = backbone.zero_shot_head(["sea_horse", "cat"], "ensemble").text
    assert len(asked) == 80
    assert asked[0] == ["a bad photo of a sea horse.", "a bad photo of a cat."]
    assert asked[-1] == ["a tattoo of the sea horse.", "a tattoo of the cat."]
    parts = [
        numbered([])([template(name) for name in ("sea horse", "cat")])
        for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]
    assert torch.allclose(got, F.normalize(torch.stack(parts).mean(0), dim=-1), atol=1e-6)


@pytest.mark.parametrize("template", ["a {}.", ["a {}."]])
def test_one_template_gives_the_text_towers_own_embeddings(template: str | list[str]) -> None:
    rough = torch.full((1, 24), 0.3)  # normalised again, it would change
    assert torch.equal(backbone_of(lambda lines: rough).text_embeddings(["cat"], template), rough)


def test_every_template_of_a_list_needs_a_place_for_the_name() -> None:
    asked: list[list[str]] = []
    with pytest.raises(BadInput) as caught:
        backbone_of(numbered(asked)).semantic_weights(["cat"], ["a {}.", "a photo"])
    assert str(caught.value) == "head.template: must contain {} for the class name, but got 'a photo'; add it"
    assert asked == []


@pytest.mark.parametrize("missing", ["", " ", "_"])
def test_a_class_without_a_name_cannot_start_from_names(missing: str) -> None:
    with pytest.raises(BadInput) as caught:
        backbone_of(numbered([])).semantic_weights(["cat", "dog", "cow", missing, ""], "a {}.")
    assert str(caught.value) == (
        "head.init: semantic requires a name for every class, but class 3 has none; add names or use head.init=class_mean"
    )


def test_a_tower_without_text_cannot_start_from_names() -> None:
    with pytest.raises(BadInput) as caught:
        backbone_of(None).semantic_weights(["cat"], "{}")
    assert str(caught.value) == "head.init: semantic requires a text tower, but mine has none; use head.init=class_mean"
    with pytest.raises(BadInput) as caught:
        backbone_of(None).zero_shot_head(["cat"], "{}")
    assert str(caught.value) == "tuner zero_shot: requires a text tower, but mine has none; use linear_probe"


def test_a_clip_whose_tokenizer_is_not_installed_is_refused_before_any_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: pytest.fail("it was asked for"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput) as caught:
        load_backbone("ViT-B-16-SigLIP2-256", "webli")
    assert str(caught.value) == (
        "backbone.model: ViT-B-16-SigLIP2-256 requires the package transformers, which has the tokenizer "
        "timm/ViT-B-16-SigLIP2-256, but it is not installed; pip install 'lift_ray[tokenizers]'"
    )
    with pytest.raises(pytest.fail.Exception, match="asked for"):
        load_backbone("ViT-B-16", "openai")
