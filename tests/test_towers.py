"""timm's vision transformers and CLIP's residual networks as towers: the same features, and the tuners that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

from lift_ray.errors import BadInput
from lift_ray.methods.lift import Lift
from lift_ray.model.backbone import check_precision, check_source, check_tuner, load_backbone
from lift_ray.model.heads import CosineHead, random_weights
from lift_ray.model.loading import rebuild
from lift_ray.model.rebuilt import quick_gelu
from lift_ray.model.resnet import FrozenStatistics, ResNetTower, SsfConv
from lift_ray.model.tower import Tower
from lift_ray.model.tuners.base import Both

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
SMALL = {"img_size": 48, "depth": 2}
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 2], "width": 8, "head_width": 64, "patch_size": None}
ALL = list(range(6))
LABELS = torch.arange(4) % 3
FITTING = {
    "bitfit": {"blocks": ALL},
    "batchnorm": {"blocks": ALL},
    "full": {"blocks": ALL},
    "partial": {"blocks": [4, 5]},
    "ssf": {"blocks": [1, 3, 5]},
    "clip_adapter": {"bottleneck": 6},
    "linear_probe": {},
}


def images(size_px: int, number: int = 4) -> torch.Tensor:
    return torch.randn(number, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


def shaken(model: torch.nn.Module) -> Any:
    """Norms, scales, biases and statistics away from 0 and 1, so that none can be forgotten."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * (torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)))
    return model.eval()


def vit_of(**options: Any) -> Any:
    torch.manual_seed(0)
    return shaken(timm.create_model("test_vit", **{**SMALL, **options}))


def resnet_clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    clip = shaken(open_clip.CLIP(24, RESNET, TEXT))
    clip.visual.preprocess_cfg = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    return clip


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert float(expected.std(0).max()) > 1e-3  # the images are told apart
    assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.fixture(scope="module")
def resnet() -> ResNetTower:
    return rebuild(resnet_clip().visual)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.3},
        {"pre_norm": True, "norm_layer": torch.nn.LayerNorm},
        {"act_layer": "quick_gelu"},
        {"act_layer": "gelu", "num_heads": 4},
        {"dynamic_img_size": False, "num_classes": 0},
        {"depth": 1, "mlp_ratio": 2},
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_tower_from_timm_gives_timms_class_token(options: dict[str, Any]) -> None:
    vit = vit_of(**options)
    tower = rebuild(vit)
    assert_close(tower(images(48)), vit.forward_features(images(48))[:, 0])
    assert tower.blocks[0].mlp.activation is (quick_gelu if options.get("act_layer") == "quick_gelu" else F.gelu)
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"reg_tokens": 2},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "map"},
        {"qk_norm": True},
        {"scale_mlp_norm": True},
        {"mlp_layer": SwiGLU},
        {"norm_layer": "rmsnorm"},
        {"act_layer": "gelu_tanh"},
        {"act_layer": "relu"},
        {"no_embed_class": True},
        {"qkv_bias": False},
        {"fc_norm": True},
        {"final_norm": False},
        {"block_fn": ResPostBlock},
        {"pos_embed": "none"},
        {"embed_norm_layer": "layernorm"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_other_parts_of_a_timm_vision_transformer_are_rebuilt(options: dict[str, Any]) -> None:
    vit = vit_of(**options)
    tower = rebuild(vit)
    assert tower.family == "transformer"
    assert_close(tower(images(48)), vit.forward_head(vit.forward_features(images(48)), pre_logits=True))


@pytest.mark.parametrize("options", [{"attn_layer": "diff"}, {"block_fn": ParallelScalingBlock}], ids=str)
@torch.inference_mode()
def test_a_timm_vision_transformer_with_unknown_parts_is_one_piece(options: dict[str, Any]) -> None:
    vit = vit_of(**options)
    tower = rebuild(vit)
    assert tower.family == "opaque"
    assert_close(tower(images(48)), vit.forward_head(vit.forward_features(images(48)), pre_logits=True))


def test_a_tower_for_images_that_are_not_square_is_refused() -> None:
    with pytest.raises(BadInput, match=r"backbone\.model: must take square images, but timm:test_vit does not"):
        rebuild(vit_of(img_size=(16, 64)), "timm:test_vit")


@torch.inference_mode()
def test_a_file_for_another_size_loads_and_resizes_its_positions(tmp_path: Path) -> None:
    path, vit = tmp_path / "weights.safetensors", vit_of(depth=6)
    halves = {name: tensor.half() for name, tensor in vit.state_dict().items()}
    save_file(halves, path)
    vit.load_state_dict(halves)
    trained = load_backbone("timm:test_vit", str(path))
    assert (trained.tower.resolution_px, trained.tower.positions.dtype) == (48, torch.float32)
    assert (trained.mean, trained.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (trained.text, trained.projection) == (None, None)
    assert_close(trained.tower(images(48)), vit.forward_features(images(48))[:, 0])

    other = load_backbone("timm:test_vit", str(path), resolution_px=80, checkpointing=True).tower
    assert (other.resolution_px, other.num_patches(80), other.checkpointing) == (80, 25, True)
    large = vit_of(depth=6, img_size=80)
    grid = vit.pos_embed[:, 1:].reshape(1, 3, 3, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(5, 5), mode="bicubic").flatten(2).transpose(1, 2)
    large.load_state_dict({**vit.state_dict(), "pos_embed": torch.cat([vit.pos_embed[:, :1], grid], dim=1)})
    assert_close(other(images(80)), large.forward_features(images(80))[:, 0])
    assert torch.equal(other(images(48)), trained.tower(images(48)))


def test_without_a_file_timm_is_asked_for_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    vit = vit_of()
    monkeypatch.setattr(timm, "create_model", lambda name, **options: (asked.append((name, options)), vit)[1])
    assert_close(load_backbone("timm:test_vit.r160_in1k", None).tower(images(48)), rebuild(vit)(images(48)))
    assert asked == [("test_vit.r160_in1k", {"pretrained": True})]  # another num_classes would make timm's loading lax


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"cls_token": None}, "without cls_token"),
        ({"mask_token": 1}, "with mask_token"),
        ({"norm.weight": 5}, "with another shape of norm.weight"),
        ({"pos_embed": 7}, "with another shape of pos_embed"),
        ({"norm.bias": None, "z": 1}, "without norm.bias and with z"),
    ],
)
def test_a_file_of_another_model_gives_a_one_line_error(
    change: dict[str, int | None], found: str, tmp_path: Path
) -> None:
    state, path = vit_of(depth=6).state_dict(), tmp_path / "weights.safetensors"
    state |= {name: torch.zeros(1, size or 0, 64) for name, size in change.items()}
    save_file({name: tensor for name, tensor in state.items() if change.get(name, 1) is not None}, path)
    with pytest.raises(BadInput) as caught:
        load_backbone("timm:test_vit", str(path))
    assert str(caught.value) == (
        f"backbone.pretrained: must contain the tensors of timm:test_vit, but got {path} {found}; use a file of this model"
    )


def test_a_pickle_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    pickled, missing = tmp_path / "weights.safetensors", tmp_path / "none.safetensors"
    torch.save(vit_of(depth=6).state_dict(), pickled)
    for path, message in (
        (missing, f"must be an existing safetensors file, but got '{missing}'; check the path"),
        (
            pickled,
            f"must be a safetensors file, but {pickled} is a file of torch.save; "
            "save its tensors as safetensors, because lift_ray runs no code of a file",
        ),
    ):
        for refuses in (load_backbone, check_source):
            with pytest.raises(BadInput) as caught:
                refuses("timm:test_vit", str(path))
            assert str(caught.value) == f"backbone.pretrained: {message}"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "timm:vit_base_patch16_242",
            "backbone.model: unknown model 'timm:vit_base_patch16_242'; did you mean 'vit_base_patch16_224'?",
        ),
        (
            "timm:vit_base_patch16_224.augrec_in21k",
            "backbone.model: unknown model 'timm:vit_base_patch16_224.augrec_in21k'; "
            "did you mean 'vit_base_patch16_224.augreg_in21k'?",
        ),
        (
            "timm:hf-hub:vit_tiny_patch16_224",
            "backbone.model: unknown model 'timm:hf-hub:vit_tiny_patch16_224'; did you mean 'vit_tiny_patch16_224'?",
        ),
    ],
)
def test_a_name_unknown_to_timm_gives_a_one_line_error(model: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_backbone(model, None)
    assert str(caught.value) == message


@torch.inference_mode()
def test_a_resnet_equals_open_clips(resnet: ResNetTower) -> None:
    assert (resnet.num_blocks, resnet.width, resnet.resolution_px, resnet.num_patches(64)) == (6, 24, 64, 4)
    assert_close(resnet(images(64)), resnet_clip().encode_image(images(64)))
    assert not FrozenStatistics(3).training
    for stop in range(7):
        assert torch.equal(
            resnet.finish(resnet.blocks_until(resnet.embed(images(64)), stop), None, stop), resnet(images(64))
        )


@torch.inference_mode()
def test_zero_shot_on_a_resnet_equals_clips_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = resnet_clip()
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: clip)
    monkeypatch.setattr(
        open_clip, "get_tokenizer", lambda name: lambda lines: torch.tensor([[len(lines[0])] * 8, [3] * 8])
    )
    backbone = load_backbone("RN50", "openai", resolution_px=96)
    assert backbone.tower.resolution_px == 96
    head = backbone.zero_shot_head(["cat", "dog"], "a {}.")
    text = clip.encode_text(torch.tensor([[6] * 8, [3] * 8]), normalize=True)
    expected = clip.logit_scale.exp() * clip.encode_image(images(64), normalize=True) @ text.T
    assert_close(head(backbone.tower(images(64))), expected)
    assert torch.allclose(backbone.semantic_weights(["cat", "dog"], "a {}."), text, atol=1e-6)


@torch.inference_mode()
def test_a_resnet_resizes_the_positions_of_its_attention_pool(resnet: ResNetTower) -> None:
    visual, before = resnet_clip().visual, resnet(images(64))
    positions = visual.attnpool.positional_embedding
    grid = F.interpolate(positions[1:].T.reshape(1, 256, 2, 2), size=(3, 3), mode="bicubic").reshape(256, 9)
    visual.attnpool.positional_embedding = torch.nn.Parameter(torch.cat([positions[:1], grid.T]))
    assert_close(resnet(images(96)), visual(images(96)))
    assert torch.equal(resnet(images(64)), before)


def lift(tower: Tower | ResNetTower, kind: str) -> Lift:
    torch.manual_seed(2)
    return Lift(tower, {kind: FITTING[kind]}, CosineHead(random_weights(3, tower.width)))  # type: ignore[arg-type]


def trained_names(tower: ResNetTower, kind: str) -> set[str]:
    """What a kind trains beside the head, written out."""
    norms = {"bn1", "bn2", "bn3", "downsample.1"}
    names = {name for name, _ in tower.named_parameters() if name.startswith("blocks.")}
    if kind == "linear_probe":
        return set()
    if kind == "clip_adapter":
        return {"tuner.behind.clip_adapter.down.weight", "tuner.behind.clip_adapter.up.weight"}
    if kind == "ssf":
        convolutions = {1: 4, 3: 4, 5: 3}  # the last block of a stage has no shortcut of its own
        return {
            f"tuner.ssf.{block}.after.{i}.{part}"
            for block, number in convolutions.items()
            for i in range(number)
            for part in ("scale", "shift")
        }
    kept = {
        "full": lambda name: True,
        "partial": lambda name: name.split(".")[1] in "45",
        "batchnorm": lambda name: name.split(".", 2)[2].rpartition(".")[0] in norms,
        "bitfit": lambda name: name.endswith(".bias"),
    }[kind]
    return {f"tower.{name}" for name in names if kept(name)}


@pytest.mark.parametrize("kind", FITTING)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tuners_that_fit_a_resnet_train_just_their_parameters(kind: str, checkpointing: bool) -> None:
    tower = rebuild(resnet_clip().visual)
    tower.checkpointing = checkpointing
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    model = lift(tower, kind).train()
    start = {name: parameter.detach().clone() for name, parameter in model.trained().items()}
    assert set(start) == trained_names(tower, kind) | {"head.weight"}
    if kind not in ("ssf", "clip_adapter"):
        assert torch.equal(model.feature(images(64)), tower(images(64)))
    optimizer = torch.optim.SGD(model.trained().values(), lr=0.003)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(images(64)), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(start[name], parameter) for name, parameter in model.trained().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())
    statistics, own = dict(tower.named_buffers()), dict(model.tower.named_buffers())
    assert len(own) == 3 * (3 + 3 * 6 + 4)
    assert all(buffer is statistics[name] for name, buffer in own.items())


@pytest.mark.parametrize("kind", FITTING)
def test_the_features_of_a_resnets_frozen_blocks_can_be_cached(kind: str, resnet: ResNetTower) -> None:
    model = lift(resnet, kind)
    with torch.no_grad():
        assert torch.equal(model.from_frozen(model.frozen_part(images(64))), model(images(64)))


def test_checkpointing_gives_a_resnet_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        tower = rebuild(resnet_clip().visual)
        tower.checkpointing = checkpointing
        model = lift(tower, "ssf")
        F.cross_entropy(model(images(64)), LABELS).backward()
        gradients.append({name: parameter.grad for name, parameter in model.trained().items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and bool((gradient != 0).any()), name  # noqa: PT018
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7), name


def test_ssf_starts_near_the_identity_and_scales_and_shifts_each_channel(resnet: ResNetTower) -> None:
    torch.manual_seed(3)
    ssf = resnet.make_ssf(1)
    assert [len(part.scale) for part in ssf.after] == resnet.blocks[1].channels == [16, 16, 64, 64]
    x = torch.randn(2, 16, 3, 3)
    assert torch.allclose(ssf.conv(0, x), x, atol=0.5)
    scale, shift = ssf.after[1].scale.view(1, 16, 1, 1), ssf.after[1].shift.view(1, 16, 1, 1)
    assert torch.allclose(ssf.conv(1, x), x * scale + shift)
    other = SsfConv([16, 16, 64, 64])
    assert torch.equal(Both(ssf, other).conv(1, x), other.conv(1, ssf.conv(1, x)))
    with pytest.raises(
        BadInput, match="tuner ssf: norms must be false for a backbone without layer norms, but got true"
    ):
        resnet.make_ssf(1, norms=True)


def test_a_resnet_has_no_patches_to_leave_out(resnet: ResNetTower) -> None:
    with pytest.raises(ValueError, match="patches: must not be given for a convolutional tower"):
        resnet(images(64), patches=torch.zeros(4, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    "kind", ["adaptformer", "adapter", "lora", "dora", "ia3", "vpt_shallow", "vpt_deep", "layernorm", "sparse"]
)
def test_a_tuner_of_attention_blocks_is_refused_on_a_resnet(kind: str, resnet: ResNetTower) -> None:
    with pytest.raises(BadInput) as caught:
        check_tuner(resnet, kind)
    assert str(caught.value) == (
        f"tuner {kind}: requires attention blocks, but this backbone (ModifiedResNet) has none; "
        "use ssf, bitfit, batchnorm or linear_probe"
    )
    check_tuner(rebuild(vit_of()), kind)


@pytest.mark.parametrize("kind", [*FITTING, "zero_shot"])
def test_a_tuner_that_fits_a_resnet_is_accepted(kind: str, resnet: ResNetTower) -> None:
    check_tuner(resnet, kind)
    if kind == "batchnorm":
        with pytest.raises(BadInput) as caught:
            check_tuner(rebuild(vit_of()), kind)
        assert str(caught.value) == (
            "tuner batchnorm: requires batch norms, but this backbone (VisionTransformer) has none; use layernorm"
        )
    else:
        check_tuner(rebuild(vit_of()), kind)


@pytest.mark.parametrize(("wanted", "nearest"), [(100, 96), (60, 64), (3, 16), (0, 16)])
def test_a_resolution_that_is_no_multiple_of_the_patch_gives_a_one_line_error(
    wanted: int, nearest: int, tmp_path: Path
) -> None:
    save_file(vit_of(depth=6).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(BadInput) as caught:
        load_backbone("timm:test_vit", str(tmp_path / "weights.safetensors"), resolution_px=wanted)
    assert str(caught.value) == (
        f"backbone.resolution_px: must be a multiple of the patch size, 16 px, but got {wanted}; use {nearest}"
    )


@pytest.mark.parametrize("kind", ["bitfit", "ssf"])
def test_a_resized_tower_still_trains_after_an_evaluation(kind: str) -> None:
    for tower, size in ((rebuild(vit_of()), 80), (rebuild(resnet_clip().visual), 96)):
        with torch.inference_mode():
            expected = tower(images(size))
        torch.manual_seed(2)
        model = Lift(tower, {kind: {"blocks": [0]}}, CosineHead(random_weights(3, tower.width)))  # type: ignore[arg-type]
        if kind == "bitfit":
            assert torch.equal(model.feature(images(size)), expected)
        F.cross_entropy(model(images(size)), LABELS).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trained().values())


@pytest.mark.parametrize(
    ("name", "options", "refused"),
    [
        ("vit_small_patch16_dinov3", {"depth": 1, "img_size": 32, "embed_dim": 64, "num_heads": 2}, True),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
            True,
        ),
        ("test_vit", {}, False),
    ],
)
def test_fp16_is_refused_for_towers_that_overflow_in_it(name: str, options: dict[str, Any], refused: bool) -> None:
    tower = rebuild(timm.create_model(name, **options))
    check_precision(tower, "bf16")
    if not refused:
        check_precision(tower, "fp16")
        return
    with pytest.raises(BadInput) as caught:
        check_precision(tower, "fp16")
    assert str(caught.value) == (
        "backbone.precision: must be fp32 or bf16 for DINOv3 and Swin, whose activations are too large for fp16, but got fp16; "
        "set backbone.precision=bf16"
    )
