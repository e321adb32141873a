"""The contract of tuners on one tower of each kind: pooling, positions, norms and MLPs other than CLIP's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_tuners import (
    BLOCKS,
    CANNOT_MERGE,
    CASES,
    CLASSES,
    IMAGES,
    PATCH_PX,
    TRAINED,
    WIDTH,
    assert_only_given_patches_matter,
    close_in_bf16,
    gradients,
    lift,
    perturbed,
)
from timm.layers import AttentionPoolLatent, RotaryEmbeddingCat, RotaryEmbeddingMixed
from torch import nn

from lift_ray.errors import BadInput
from lift_ray.inference.exported_model import exported_model
from lift_ray.model.backbone import check_tuner
from lift_ray.model.blocks import BlockShape
from lift_ray.model.merging import merged
from lift_ray.model.positions import Rotary
from lift_ray.model.tower import AttentionPool, Pool, Tower

torch.set_num_threads(1)


def attention_pool() -> AttentionPool:
    pool = AttentionPoolLatent(WIDTH, num_heads=2, mlp_ratio=2, norm_layer=nn.LayerNorm)
    return AttentionPool(pool, nn.LayerNorm(WIDTH), nn.Identity())


def rotary(mixed: bool = False) -> Rotary:
    if mixed:
        return Rotary(RotaryEmbeddingMixed(dim=WIDTH, depth=BLOCKS, num_heads=2))
    return Rotary(RotaryEmbeddingCat(WIDTH // 2, in_pixels=False, feat_shape=[2, 2]))


SHAPES: dict[str, dict[str, Any]] = {
    "gated": {"gated_mlp": True, "mlp_norm": True, "inner_norm": True, "activation": torch.nn.functional.silu},
    "norms behind": {"post_norm": True},
    "RMS norms": {"norm": nn.RMSNorm, "query_norm": True},
    "bias by distance": {"relative_side": 2},
}
PARTS: dict[str, dict[str, Any]] = {
    "mean": {"pool": lambda: Pool("mean", nn.LayerNorm(WIDTH))},
    "mean without class token": {
        "pool": lambda: Pool("mean", nn.LayerNorm(WIDTH), norm_last=True, first_patch=0),
        "class_token": False,
        "norm_first": False,
    },
    "attention pooling": {"pool": attention_pool, "class_token": False},
    "rotary": {"rotary": rotary, "num_registers": 2, "positions": "none"},
    "mixed rotary": {"rotary": lambda: rotary(mixed=True), "positions": "patches"},
}
KINDS = [*SHAPES, *PARTS]
SOME = [case for case in CASES if case not in ("adapter", "full", "sparse mlp", "dora", "vpt_shallow", "lora")]


def tower_of(kind: str, checkpointing: bool = False) -> Tower:
    torch.manual_seed(0)
    shape = {"num_heads": 2, "hidden": 4 * WIDTH, "activation": torch.nn.functional.gelu} | SHAPES.get(kind, {})
    parts = {key: make() if callable(make) else make for key, make in PARTS.get(kind, {}).items()}
    tower = Tower(
        BlockShape(WIDTH, **shape),
        num_blocks=BLOCKS,
        patch_px=PATCH_PX,
        resolution_px=16,
        checkpointing=checkpointing,
        **parts,
    )
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=KINDS)
def tower(request: pytest.FixtureRequest) -> Tower:
    return tower_of(request.param)


def skip_without_place(tower: Tower, case: str) -> None:
    try:
        for kind in CASES[case]:
            check_tuner(tower, kind)
    except BadInput as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("case", SOME)
def test_the_frozen_part_is_computed_once_and_nothing_below_is_in_the_graph(tower: Tower, case: str) -> None:
    skip_without_place(tower, case)
    model = perturbed(lift(tower, case, (1, 2)))
    kept = model.frozen_part(IMAGES)
    assert not kept.requires_grad
    logits = model(IMAGES)
    assert torch.allclose(model.from_frozen(kept), logits, atol=1e-5, rtol=0)
    assert not torch.allclose(logits, lift(tower, case, (1, 2))(IMAGES), atol=1e-4) or case in (
        "linear_probe",
        "zero_shot",
    )


def test_frozen_blocks_continue_with_the_patches_that_were_kept(tower: Tower) -> None:
    if not tower.can_drop_patches:
        pytest.skip("looks at whole images")
    model, size_px = perturbed(lift(tower, "adaptformer", (2,))), IMAGES.shape[-1]
    patches = torch.rand(len(IMAGES), tower.num_patches(size_px)).argsort(1)[:, :3]
    with torch.no_grad():
        first = model.continue_frozen(tower.embed(IMAGES, patches), 0, 1, patches, size_px)
        frozen = model.continue_frozen(first, 1, 2, patches, size_px)
    assert torch.equal(model.from_frozen(frozen, patches, size_px), model(IMAGES, patches))


@pytest.mark.parametrize("case", [case for case in SOME if case in TRAINED])
def test_exactly_what_is_trained_gets_a_gradient_also_with_checkpointing(tower: Tower, case: str, request: Any) -> None:
    skip_without_place(tower, case)
    model = perturbed(lift(tower, case, (1, 2)))
    found = gradients(model)
    assert {name for name, gradient in found.items() if gradient is not None} == set(model.trained())
    again = gradients(perturbed(lift(tower_of(request.node.callspec.params["tower"], True), case, (1, 2))))
    for name in model.trained():
        one, other = found[name], again[name]
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("case", [case for case in SOME if not CANNOT_MERGE & {*CASES[case]}])
def test_a_tuner_that_changes_only_weights_is_merged_into_them(tower: Tower, case: str) -> None:
    skip_without_place(tower, case)
    model = perturbed(lift(tower, case))
    if not all(tuner.can_merge for tuner in model.tuner.per_block):
        assert getattr(tower.blocks[0].norm1, "bias", None) is None  # a shift has no place in a norm without bias
        return
    plain = merged(model.tower, model.tuner.per_block)
    assert torch.allclose(model.tuner.behind(plain(IMAGES)), model.feature(IMAGES), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["adaptformer", "vpt_deep", "linear_probe"])
def test_patches_can_be_given_in_any_order_and_left_out(tower: Tower, case: str) -> None:
    if not tower.can_drop_patches:
        pytest.skip("looks at whole images")
    model = perturbed(lift(tower, case))
    assert_only_given_patches_matter(model)


@pytest.mark.parametrize("case", ["adaptformer", "lora", "bitfit"])
def test_bf16_stays_close_on_every_kind_of_tower(tower: Tower, case: str) -> None:
    close_in_bf16(perturbed(lift(tower, case)))


@pytest.mark.parametrize("kind", ["vpt_shallow", "vpt_deep"])
def test_prompts_are_refused_where_each_pair_of_tokens_has_a_bias(kind: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_tuner(tower_of("bias by distance"), kind)
    assert str(caught.value) == (
        f"tuner {kind}: requires a backbone that takes more tokens, but this one (VisionTransformer) has a bias for each pair "
        "of its own; use adaptformer or lora"
    )


def test_larger_images_have_their_own_angles_and_biases() -> None:
    for kind in KINDS:
        tower = tower_of(kind)
        larger = torch.nn.functional.interpolate(IMAGES, scale_factor=2)
        assert tower(larger).shape == tower(IMAGES).shape
        assert tower.num_patches(32) == 4 * tower.num_patches(16)


class NarrowMean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)[:, : WIDTH // 2]


@pytest.mark.parametrize("case", [case for case in TRAINED if "clip_adapter" not in case])
def test_tuners_have_the_width_of_the_blocks_where_the_feature_has_another(case: str) -> None:
    shape = BlockShape(WIDTH, num_heads=2, hidden=4 * WIDTH, activation=torch.nn.functional.gelu)
    pool = AttentionPool(NarrowMean(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH // 2))
    tower = Tower(shape, num_blocks=BLOCKS, patch_px=PATCH_PX, resolution_px=16, pool=pool, feature_width=WIDTH // 2)
    model = lift(tower.eval().requires_grad_(False), case)
    assert model.feature(IMAGES).shape == (len(IMAGES), WIDTH // 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adaptformer", "lora"])
def test_every_kind_of_tower_can_be_exported_for_any_batch(tower: Tower, case: str) -> None:
    model = perturbed(lift(tower, case, (1, 2)))
    backbone = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    module: Any = exported_model(model, backbone, torch.zeros(CLASSES))  # type: ignore[arg-type]
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module(pixels[:2])  # positions are resized before the tracer comes
        batch = torch.export.Dim("batch")
        program = torch.export.export(module, (pixels[:2],), dynamic_shapes=({0: batch},), strict=True)
        assert torch.allclose(program.module()(pixels), module(pixels), atol=1e-4)
