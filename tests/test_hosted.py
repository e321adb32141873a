"""Towers that are hosted: the origin's own feature, the tuners that fit, and what nothing may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file
from test_towers import images, shaken
from torch import nn

import lift_ray
from lift_ray.errors import BadInput
from lift_ray.evaluation.cpu_parallel import batch_size
from lift_ray.inference.export import not_for_open_clip
from lift_ray.inference.exported_model import exported_model
from lift_ray.methods.lift import Lift
from lift_ray.model.backbone import FITS, Backbone, check_tuner
from lift_ray.model.heads import CosineHead, random_weights
from lift_ray.model.hosted import OpaqueTower, StagedTower, TimmHead, fill_buffers, host, timm_projection
from lift_ray.model.tuners.base import Identity
from lift_ray.registry import TUNERS
from lift_ray.settings.run import RunConfig
from lift_ray.training.plan import memory, saved_bytes
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace, first_tuned

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
LABELS = torch.arange(4) % 3
OFF = {"drop_rate": 0.5, "drop_path_rate": 0.5}  # what training would switch on
CONV = {**OFF, "depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
FAST = {**OFF, "layers": (1, 2, 1, 1), "embed_dims": (8, 16, 32, 64)}
SWIN = {**OFF, "img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
STAGED: dict[str, tuple[str, dict[str, Any]]] = {
    "ConvNeXt": ("convnext_atto", CONV),
    "ConvNeXt V2": ("convnextv2_atto", CONV),
    "FastViT": ("fastvit_t8", FAST),
    "MobileCLIP": ("fastvit_mci0", FAST),
    "ResNet": ("resnet18", {**OFF, "layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}),
    "ResNet bottleneck": ("resnet26d", {**OFF, "layers": (1, 2, 1, 1), "channels": (4, 8, 8, 16)}),
    "Swin": ("swin_tiny_patch4_window7_224", {**SWIN, "window_size": 4}),
    "Swin V2": ("swinv2_tiny_window8_256", {**SWIN, "window_size": 4}),
}
OPAQUE: dict[str, tuple[str, dict[str, Any]]] = {
    "ByobNet": ("test_byobnet", {"drop_rate": 0.5}),
    "relative positions": ("test_vit_relpos", {"img_size": 64, "drop_rate": 0.5}),
    "class and distillation": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1, "proj_drop_rate": 0.5}),
}
ALL = {**STAGED, **OPAQUE}
EACH = ("ConvNeXt", "MobileCLIP", "ResNet", "Swin")  # one for each way to be cut
NORMS = {"Swin": "layernorm", "Swin V2": "layernorm", "ConvNeXt": "layernorm", "ConvNeXt V2": "layernorm"}
PLACES = ("adaptformer", "adapter")  # kinds with modules of their own
OWN = ("bitfit", "norms", "full", "partial")  # kinds that train the tower's parameters


def origin_of(case: str) -> Any:
    name, options = ALL[case]
    torch.manual_seed(0)
    return shaken(timm.create_model(name, **options))


@torch.inference_mode()
def feature_of(origin: Any, size_px: int = 64) -> torch.Tensor:
    feature: torch.Tensor = origin.forward_head(origin.forward_features(images(size_px)), pre_logits=True)
    return feature


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert float(expected.std(0).max()) > 1e-3 * float(expected.abs().max())  # the images are told apart
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def tower_of(case: str, **options: Any) -> StagedTower:
    return host(origin_of(case), f"timm:{ALL[case][0]}", resolution_px=64, **options)


def lift_of(tower: StagedTower, case: str, kind: str) -> Lift:
    torch.manual_seed(2)
    blocks = list(range(tower.num_blocks))
    options: dict[str, Any] = {"blocks": blocks[-2:] if kind == "partial" else blocks}
    if kind in PLACES:
        options = {"blocks": blocks[1:], "bottleneck": 3}
    elif kind == "linear_probe":
        options = {}
    kind = NORMS.get(case, "batchnorm") if kind == "norms" else kind
    return Lift(tower, {kind: options}, CosineHead(random_weights(3, tower.width)))  # type: ignore[arg-type]


def trained_by(origin: Any, case: str, kind: str) -> list[torch.Tensor]:
    """The origin's parameters that a kind trains, found by timm's own names and types."""
    norm = nn.LayerNorm if case in NORMS else nn.BatchNorm2d
    is_stage = ("stages.", "layers.", "layer1", "layer2", "layer3", "layer4")
    last = ("layer3", "layer4") if case == "ResNet" else ("stages.2", "stages.3")
    last = ("layers.1",) if case.startswith("Swin") else last
    norms = {id(p) for module in origin.modules() if isinstance(module, norm) for p in module.parameters()}
    kept: dict[str, Callable[[str, nn.Parameter], bool]] = {
        "full": lambda name, p: True,
        "partial": lambda name, p: name.startswith(last),
        "bitfit": lambda name, p: name.endswith("bias"),
        "norms": lambda name, p: id(p) in norms,
    }
    return [p for name, p in origin.named_parameters() if name.startswith(is_stage) and kept[kind](name, p)]


@pytest.mark.parametrize("case", ALL)
def test_a_hosted_tower_gives_the_feature_of_its_origin(case: str) -> None:
    origin = origin_of(case)
    before = {name: tensor.clone() for name, tensor in origin.state_dict().items()}
    tower = host(origin, case, resolution_px=64)
    expected = feature_of(origin)
    with torch.inference_mode():
        assert_close(tower(images(64)), expected)
    assert (tower.width, tower.family) == (
        expected.shape[1],
        "stages" if case in STAGED else "opaque",
    )
    classifier = origin.get_classifier()
    dropped = sum(
        p.numel() for part in (classifier if isinstance(classifier, tuple) else [classifier]) for p in part.parameters()
    )
    assert dropped > 0
    assert sum(p.numel() for p in tower.parameters()) == sum(p.numel() for p in origin.parameters()) - dropped
    assert {p.data_ptr() for p in tower.parameters()} < {p.data_ptr() for p in origin.parameters()}  # shared
    assert origin(images(64)).shape == (4, origin.num_classes)  # its classifier is still there
    assert all(torch.equal(before[name], tensor) for name, tensor in origin.state_dict().items())


@pytest.mark.parametrize("case", ALL)
def test_training_mode_changes_no_feature_and_no_statistics(case: str) -> None:
    origin = origin_of(case)
    origin.train()
    assert not torch.equal(origin(images(64)), origin.eval()(images(64)))  # it would change the origin
    tower = host(shaken(origin), case, resolution_px=64)
    expected, statistics = tower(images(64)), {name: b.clone() for name, b in tower.named_buffers()}
    tower.train()
    tower.with_own(name for name, _ in tower.named_parameters()).train()(images(64))
    assert torch.equal(tower(images(64)), expected)
    assert all(torch.equal(statistics[name], buffer) for name, buffer in tower.named_buffers())


@pytest.mark.parametrize("case", STAGED)
@torch.inference_mode()
def test_cached_blocks_continue_to_the_same_feature(case: str) -> None:
    tower = tower_of(case)
    expected, x = tower(images(64)), tower.embed(images(64))
    shapes = set()
    for stop in range(tower.num_blocks + 1):
        part = tower.blocks_until(x, stop)
        shapes.add(part.shape)
        assert torch.equal(tower.finish(part, None, stop), expected)
        assert torch.equal(
            tower.finish(tower.blocks_until(tower.blocks_until(x, stop // 2), stop, stop // 2), None, stop), expected
        )
    assert len(shapes) >= 2  # stages
    assert [
        tower.blocks_until(x, i + 1).shape[-1 if case.startswith("Swin") else 1] for i in range(tower.num_blocks)
    ] == [tower.block_width(i) for i in range(tower.num_blocks)]


@pytest.mark.parametrize("kind", [*OWN, *PLACES, "linear_probe"])
@pytest.mark.parametrize("case", EACH)
def test_a_step_changes_what_the_kind_trains_and_nothing_else(case: str, kind: str) -> None:
    origin = origin_of(case)
    tower = host(origin, case, resolution_px=64)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    model = lift_of(tower, case, kind).train()
    trained = model.trained()
    if kind in OWN:
        wanted = trained_by(origin, case, kind)
        own = [p for name, p in trained.items() if name.startswith("tower.blocks.")]
        assert len(wanted) > 0
        assert sorted(p.shape for p in own) == sorted(p.shape for p in wanted)
        assert len(own) == len(trained) - 1  # and the head
        shared = {p.data_ptr() for p in model.tower.parameters()}
        assert not shared & {p.data_ptr() for p in wanted}
        assert len(shared) == len(list(tower.parameters()))
    elif kind in PLACES:
        parts = 7 if kind == "adaptformer" else 6
        assert len(trained) == parts * (tower.num_blocks - 1) + 1
        for index in range(1, tower.num_blocks):
            assert trained[f"tuner.{kind}.{index}.down.weight"].shape == (3, tower.block_width(index))
    else:
        assert set(trained) == {"head.weight"}
    assert torch.equal(model.feature(images(64)), tower(images(64)))  # all kinds start where the origin is
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    start = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(2):  # the lower linear of a bottleneck follows in the second step
        F.cross_entropy(model(images(64)), LABELS).backward()
        optimizer.step()
    assert [name for name, p in trained.items() if torch.equal(start[name], p)] == []
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())
    stored = model.stored()
    assert set(stored) == set(trained)
    other = lift_of(tower, case, kind)
    other.load_stored(stored)
    with torch.no_grad():
        assert torch.equal(other(images(64)), model(images(64)))
        assert torch.equal(model.from_frozen(model.frozen_part(images(64))), model(images(64)))


@pytest.mark.parametrize("kind", ["full", "adaptformer"])
@pytest.mark.parametrize("case", EACH)
def test_checkpointing_gives_the_same_gradients(case: str, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        tower = tower_of(case)
        tower.checkpointing = checkpointing
        model = lift_of(tower, case, kind)
        F.cross_entropy(model(images(64)), LABELS).backward()
        gradients.append({name: parameter.grad for name, parameter in model.trained().items()})
    assert len(gradients[0]) > 2
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None, name
        assert other is not None, name
        assert torch.allclose(gradient, other, atol=1e-6), name


@pytest.mark.parametrize("case", ["ConvNeXt", "ResNet", "Swin"])
def test_a_bottleneck_sees_the_channels_of_each_place(case: str) -> None:
    """A place whose neighbors change keeps what the bottleneck adds to it."""
    tower, index = tower_of(case), 1
    tuner = TUNERS.build("adaptformer", tower, index, bottleneck=3)
    nn.init.normal_(tuner.up.weight)
    block = tower.blocks[index]
    with torch.no_grad():
        x = tower.blocks_until(tower.embed(images(64)), index)
        out, changed = block(x, Identity()), block(x, tuner)
        a = block.before(x)
        a = block.block.downsample(a) if getattr(block.block, "downsample", None) is not None else a
        if not case.startswith("Swin"):
            a, out, changed = (tensor.permute(0, 2, 3, 1) for tensor in (a, out, changed))
        added = tuner.up(F.relu(tuner.down(F.layer_norm(a[2, 1, 0], a.shape[-1:], tuner.norm.weight, tuner.norm.bias))))
        assert torch.allclose(changed[2, 1, 0] - out[2, 1, 0], added, atol=1e-5)
        assert float(added.abs().max()) > 1e-3


@pytest.mark.parametrize("case", ALL)
def test_each_kind_fits_or_is_refused_in_one_line(case: str) -> None:
    tower = tower_of(case)
    norm, make = NORMS.get(case, "batchnorm"), type(origin_of(case)).__name__
    fitting = {"linear_probe", "zero_shot"}
    if case in STAGED:
        fitting |= {"adaptformer", "adapter", "bitfit", "full", "partial", norm}
    for kind in TUNERS:
        if kind in fitting | {"clip_adapter"}:
            check_tuner(tower, kind)
            continue
        with pytest.raises(BadInput) as caught:
            check_tuner(tower, kind)
        if case in OPAQUE:
            rest = f"requires places inside the backbone, but this backbone ({make}) has none; use linear_probe or clip_adapter"
        elif kind in ("layernorm", "batchnorm"):
            sort = {"layernorm": "layer norms", "batchnorm": "batch norms"}[kind]
            rest = f"requires {sort}, but this backbone ({make}) has none; use {norm}"
        else:
            rest = (
                f"requires the blocks of a plain transformer, but this backbone ({make}) has none; "
                "use adaptformer, adapter, bitfit or linear_probe"
            )
        assert str(caught.value) == f"tuner {kind}: {rest}"
    assert {kind for fit in FITS.values() for kind in fit.kinds or ()} <= {*TUNERS, "clip_adapter"}


@pytest.mark.parametrize("case", OPAQUE)
def test_an_opaque_tower_can_be_probed_and_its_features_cached(case: str) -> None:
    tower = tower_of(case)
    assert isinstance(tower, OpaqueTower)
    config = RunConfig.parse({"tuner": {"kind": "linear_probe"}}).resolve(3, tower.num_blocks, tower.width)
    model = lift_of(tower, case, "linear_probe")
    assert (
        first_tuned(config, tower.num_blocks) == model.first_tuned == tower.num_blocks > 0
    )  # 0 would mean: nothing to cache
    with torch.no_grad():
        frozen = model.frozen_part(images(64))
        assert frozen.shape == (4, tower.width)
        assert torch.equal(model.from_frozen(frozen), model(images(64)))
    assert set(model.trained()) == set(model.stored()) == {"head.weight"}


def largest_activation(origin: nn.Module) -> int:
    """Number of values of the largest output of the origin's modules for one image, measured in a real forward pass."""
    largest = 0

    def note(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal largest
        if isinstance(out, torch.Tensor) and out.shape[0] % 4 == 0:  # windows of images too, but no tables of positions
            largest = max(largest, out.numel() // 4)

    for module in origin.modules():
        module.register_forward_hook(note)
    feature_of(origin)
    return largest


@pytest.mark.parametrize("case", ALL)
def test_the_largest_activation_is_known_without_a_forward_pass(case: str) -> None:
    origin = origin_of(case)
    tower = host(origin, case, resolution_px=64)
    assert tower.activation_bytes == 4 * largest_activation(origin)
    if case not in (*OPAQUE, "Swin", "Swin V2"):
        before, tower.resolution_px = tower.activation_bytes, 128
        assert tower.activation_bytes == 4 * before
    assert batch_size(torch.device("cpu"), tower) >= 1  # type: ignore[arg-type]


def test_a_tower_is_cut_without_its_values() -> None:
    with torch.device("meta"):
        tower = host(timm.create_model("convnext_base"), "timm:convnext_base")
    assert (tower.num_blocks, tower.width, tower.resolution_px, tower.patch_px) == (36, 1024, 224, 32)
    assert tower.widths == [128] * 3 + [256] * 3 + [512] * 27 + [1024] * 3
    assert all(p.is_meta for p in tower.parameters())


@pytest.mark.parametrize("case", [name for name in ALL if not name.startswith("Swin")])
def test_another_resolution_gives_the_feature_of_the_origin(case: str) -> None:
    origin = origin_of(case)
    tower = host(origin, case, resolution_px=64)
    tower.resolution_px = 96
    if hasattr(origin, "set_input_size"):
        origin.set_input_size(96)
    with torch.inference_mode():
        assert_close(tower(images(96)), feature_of(origin, 96))
    assert not any(p.requires_grad for p in tower.parameters())


def test_a_resolution_that_the_origin_does_not_take_is_refused() -> None:
    tower = tower_of("Swin")
    with pytest.raises(BadInput) as caught:
        tower.resolution_px = 96
    assert str(caught.value) == (
        "backbone.resolution_px: must be 64 for this backbone (SwinTransformer), but got 96; remove it"
    )
    assert tower.resolution_px == 64
    with pytest.raises(
        BadInput, match=r"^backbone.model: must turn images of 32 px into one feature, but this backbone \(Swin.*\); "
    ):
        host(origin_of("Swin"), "Swin", resolution_px=32)


def test_a_map_and_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(BadInput, match=r"must turn images of 64 px into one feature, but this backbone .* shape"):
        host(nn.Conv2d(3, 4, 3), "a map", resolution_px=64)
    with pytest.raises(BadInput) as caught:
        host(timm.create_model("test_vit", img_size=(32, 64)), "timm:test_vit")
    assert str(caught.value) == "backbone.model: must take square images, but timm:test_vit does not; use another model"


@torch.inference_mode()
def test_any_module_from_images_to_features_is_hosted() -> None:
    torch.manual_seed(0)
    origin = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.Flatten(), nn.Linear(6 * 64, 5), nn.Dropout(0.5)).eval()
    tower = host(origin, "another", resolution_px=64)
    assert (tower.family, tower.width, tower.patch_px) == ("opaque", 5, 1)
    assert torch.equal(tower.train()(images(64)), origin(images(64)))


def test_some_patches_of_a_hosted_tower_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="patches: must not be given"):
        tower_of("ConvNeXt")(images(64), patches=torch.zeros(4, 2, dtype=torch.int64))


def visual_of(name: str = "test_convnext", **options: Any) -> Any:
    torch.manual_seed(0)
    return shaken(TimmModel(name, 12, 64, **options))


def shared_space(visual: Any, head: TimmHead) -> torch.Tensor:
    """The hosted trunk's feature after the head's matrix or tail."""
    tower = host(visual.trunk, "visual", resolution_px=64, tail=head.tail)
    feature = tower.train()(images(64))
    if head.projection is not None:
        assert head.projection.shape == (tower.width, 12)
        feature = feature @ head.projection
    return feature if head.bias is None else feature + head.bias


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_vit", "test_efficientnet", "fastvit_t8"])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_linear_head_is_a_projection(name: str, bias: bool) -> None:
    visual = visual_of(name, pool="", proj="linear", proj_bias=bias, drop=0.5)
    head = timm_projection(visual)
    assert ((head.bias is None), head.tail) == (not bias, None)
    assert head.projection is not None
    assert_close(shared_space(visual, head), visual(images(64)))


@pytest.mark.parametrize(
    ("name", "proj"),
    [
        ("test_convnext", None),
        ("test_resnet", ""),
        ("test_vit", None),
        ("test_efficientnet", None),
        ("fastvit_mci0", ""),
    ],
)
@torch.inference_mode()
def test_without_a_head_the_trunks_classifier_is_the_projection(name: str, proj: Any) -> None:
    visual = visual_of(name, pool="token" if name == "test_vit" else "avg", proj=proj)
    head = timm_projection(visual)
    assert head.tail is None
    assert head.projection is not None
    assert head.bias is not None
    assert_close(shared_space(visual, head), visual(images(64)))


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
@torch.inference_mode()
def test_without_any_projection_the_feature_is_the_shared_space(name: str) -> None:
    visual = visual_of(name, pool="avg", proj="none")
    assert timm_projection(visual) == TimmHead(None, None, None)
    assert_close(shared_space(visual, TimmHead()), visual(images(64)))


@pytest.mark.parametrize(
    "options",
    [
        {"proj": "mlp", "pool": "", "drop": 0.5},
        {"proj": "mlp", "pool": "avg", "proj_bias": True},
        {"proj": "", "pool": "rot_attn"},
        {"proj": "linear", "pool": "rot_attn"},
        {"proj": "linear", "pool": "abs_attn"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["test_convnext", "test_byobnet"])
@torch.inference_mode()
def test_a_head_that_is_no_matrix_becomes_a_part_of_the_tower(name: str, options: dict[str, Any]) -> None:
    visual = visual_of(name, **options)
    head = timm_projection(visual)
    assert (head.projection, head.bias) == (None, None)
    assert head.tail is not None
    side = visual.trunk.pretrained_cfg["input_size"][1]  # the positions of the attention pool are for this size
    tower = host(visual.trunk, "visual", resolution_px=side, tail=head.tail)
    assert tower.width == 12
    assert_close(tower.train()(images(side)), visual(images(side)))
    assert {p.data_ptr() for p in tower.parameters()} == {p.data_ptr() for p in visual.parameters()}
    assert tower.family == ("stages" if name == "test_convnext" else "opaque")


def test_two_projections_are_refused() -> None:
    with pytest.raises(BadInput) as caught:
        timm_projection(visual_of("deit_tiny_distilled_patch16_224", pool="token", proj=None))
    assert str(caught.value) == (
        "backbone.model: must have one projection, but its VisionTransformerDistilled has 2; use another model"
    )


def test_a_tuner_without_a_place_is_refused_by_add_tuner() -> None:
    tower: Any = tower_of("ConvNeXt")
    backbone = Backbone("timm:convnext_atto", tower, (0, 0, 0), (1, 1, 1), None, None, 1.0)
    with pytest.raises(
        BadInput, match=r"^tuner lora: requires the blocks of a plain transformer, but this backbone \(ConvNeXt\)"
    ):
        lift_ray.add_tuner(backbone, lift_ray.LoraConfig(), num_classes=3)
    model = lift_ray.add_tuner(backbone, lift_ray.AdaptformerConfig(bottleneck=2), num_classes=3)
    assert torch.equal(model.feature(images(64)), tower(images(64)))
    assert len(model.trained()) == 7 * tower.num_blocks + 1


def test_a_hosted_tower_with_tuners_can_be_exported_but_not_as_weights_of_open_clip() -> None:
    tower = tower_of("ConvNeXt")
    model = lift_of(tower, "ConvNeXt", "adaptformer")
    with torch.no_grad():
        for parameter in model.tuner.parameters():
            parameter.add_(0.1)
        backbone: Any = Backbone("convnext_tiny", tower, (0.5,) * 3, (0.2,) * 3, None, None, 1.0)  # type: ignore[arg-type]
        module, pixels = exported_model(model, backbone, torch.zeros(3)), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        batch = torch.export.Dim("batch")
        program = torch.export.export(module, (pixels,), dynamic_shapes=({0: batch},), strict=True)
        pixels = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
        assert torch.allclose(program.module()(pixels), model((pixels / 255 - 0.5) / 0.2), atol=1e-4)
    classifier: Any = SimpleNamespace(backbone=backbone, model=model, config=RunConfig())
    assert not_for_open_clip(classifier).startswith("requires a vision transformer or ResNet of CLIP")


@pytest.mark.parametrize(
    ("case", "kind", "augment"),
    [
        ("ConvNeXt", "adaptformer", "none"),
        ("MobileCLIP", "bitfit", "none"),
        ("ResNet", "partial", "none"),
        ("Swin", "layernorm", "crop_flip"),
        ("relative positions", "linear_probe", "none"),
        ("relative positions", "linear_probe", "crop_flip"),
    ],
)
def test_a_run_trains_on_a_hosted_tower_from_cached_features(
    case: str, kind: str, augment: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tower: Any = tower_of(case)
    backbone = Backbone(case, tower, (0.5,) * 3, (0.25,) * 3, None, None, 1.0)  # type: ignore[arg-type]
    monkeypatch.setattr("lift_ray.training.workspace.load_backbone", lambda *args, **kwargs: backbone)
    tree = {
        "backbone": {"model": f"{case} {kind}"},
        "tuner": {"kind": kind} | ({"last": 1} if kind == "partial" else {}),
        "head": {"init": "class_mean"},
        "augment": {"kind": augment},
        "optim": {"epochs": 2, "global_batch_size": 16, "lr": 0.01},
    }
    if kind in ("adaptformer", "bitfit"):
        tree["tuner"] = {"kind": kind, "blocks": {"last": 1}}
    run = Run(RunConfig.parse(tree), workspace)
    before = {name: p.detach().clone() for name, p in run.model.trained().items()}
    cached = (
        workspace.cached_features(run.config, run.model, workspace.images(run.config, run.train))
        if augment == "none"
        else None
    )
    assert (cached is not None) == (augment == "none")
    epochs = [epoch.flat() for epoch in run.epochs()]
    assert len(epochs) == 2
    assert any(not torch.equal(before[name], p) for name, p in run.model.trained().items())
    assert sum(memory(run.model, run.config, 16).values()) > 4 * sum(p.numel() for p in tower.parameters())
    run.save(tmp_path / "checkpoint")
    stored = load_file(tmp_path / "checkpoint" / "weights.safetensors")
    assert set(stored) == set(run.model.stored())
    for patched, value in (("patch_dropout", 0.5), ("start_px", 32)):
        config = RunConfig.parse({**tree, "augment": {"kind": "crop_flip", patched: value}})
        with pytest.raises(
            BadInput, match=f"^augment.{patched}: requires a backbone with patches, but {case} has none"
        ):
            workspace.resolve(config)
    with pytest.raises(BadInput, match=r"^tuner lora: "):
        workspace.resolve(RunConfig.parse({**tree, "tuner": {"kind": "lora"}}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        STAGED["Swin"],
        STAGED["Swin V2"],
        OPAQUE["relative positions"],
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}),
        ("eva02_tiny_patch14_224", {"depth": 1}),
        ("vit_small_patch16_dinov3", {"depth": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tables_that_no_file_holds_are_computed(name: str, options: dict[str, Any]) -> None:
    real = shaken(timm.create_model(name, **options))
    with torch.device("meta"):
        empty = timm.create_model(name, **options)
    empty.load_state_dict(real.state_dict(), assign=True)
    missing = [key for key, buffer in empty.named_buffers() if buffer.is_meta]
    assert missing
    fill_buffers(empty)
    expected = dict(real.named_buffers())
    for key, buffer in empty.named_buffers():
        assert torch.equal(buffer, expected[key]), key
    assert set(empty.state_dict()) == set(real.state_dict())
    side = empty.patch_embed.img_size[0]
    with torch.inference_mode():
        assert torch.equal(empty.eval()(images(side, 1)), real(images(side, 1)))


def test_tables_that_nobody_can_compute_are_refused() -> None:
    trunk = nn.Linear(2, 2)
    trunk.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(BadInput) as caught:
        fill_buffers(trunk)
    assert str(caught.value) == (
        "backbone.pretrained: must not be a file for this backbone, but a file does not hold the tables of its Linear; "
        "remove it, or update timm"
    )


def test_the_memory_of_checkpointing_is_that_of_the_largest_block() -> None:
    tower = host(origin_of("ConvNeXt"), "ConvNeXt", resolution_px=64)
    model = Lift(tower, {"full": {"blocks": list(range(tower.num_blocks))}}, torch.nn.Identity())
    batch = images(64)[:2]

    def estimate() -> int:
        return saved_bytes(model, 4, lambda: model.feature(batch))

    whole = estimate()
    tower.checkpointing = model.tower.checkpointing = True
    inputs = [batch.new_empty(0)]
    hooks = [block.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in model.tower.blocks]
    least = estimate()
    for hook in hooks:
        hook.remove()
    between = sum(x.numel() * 4 for x in inputs if x.requires_grad)
    mean, largest = whole / tower.num_blocks, least - between
    assert 1.2 * mean < largest < whole
