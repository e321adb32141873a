"""The settings and the code offer the same kinds; pairs of tuners; formulas; where prompts go; what sparse fine-tuning trains."""

from __future__ import annotations

import copy
import typing
from typing import Any

import pytest
import torch

from lift_ray.methods.lift import Lift
from lift_ray.model.blocks import BlockShape
from lift_ray.model.heads import CosineHead, random_weights
from lift_ray.model.tower import Tower
from lift_ray.model.tuners.dora.module import Decomposed
from lift_ray.model.tuners.sparse.module import Sparse
from lift_ray.registry import HEADS, LOSSES, METHODS, SAMPLERS, TUNERS
from lift_ray.settings.messages import models_of
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import SearchConfig

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
WIDTH, BLOCKS, CLASSES, RATIO = 32, 3, 5, 0.1
TENSORS_PER_BLOCK = 2 * 4  # weights and biases of the linears
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(0)
    tower = Tower(
        BlockShape(WIDTH, num_heads=2, hidden=4 * WIDTH, activation=torch.nn.functional.gelu),
        num_blocks=BLOCKS,
        patch_px=8,
        resolution_px=16,
    )
    return tower.eval().requires_grad_(False)


def lift(tower: Tower, parts: dict[str, dict[str, Any]], num_classes: int = CLASSES) -> Lift:
    torch.manual_seed(2)
    return Lift(tower, parts, CosineHead(random_weights(num_classes, WIDTH), 25.0))


def kinds_of(union: object) -> set[str]:
    """The kinds that a union in the settings offers."""
    models = models_of(union)
    return {kind for model in models for kind in typing.get_args(model.model_fields["kind"].annotation)}


def test_the_settings_accept_exactly_the_registered_kinds() -> None:
    fields = RunConfig.model_fields
    for section, kinds in (("tuner", TUNERS), ("head", HEADS), ("loss", LOSSES), ("method", METHODS)):
        assert kinds_of(fields[section].annotation) == set(kinds), section
    assert set(typing.get_args(SearchConfig.model_fields["sampler"].annotation)) == set(SAMPLERS)
    for kind in TUNERS.values():
        ways = [bool(way) for way in (kind.build, kind.trains, kind.prepare, kind.behind)]
        assert sum(ways) == (kind.name not in ("linear_probe", "zero_shot")), "one way to tune, or none"


def test_two_tuners_may_sit_in_different_blocks(tower: Tower) -> None:
    model = lift(tower, {"lora": {"bottleneck": 4, "blocks": [2]}, "bitfit": {"blocks": [1, 2]}})
    placed = {tuple(name.split(".")[1:3]) for name in model.trained() if not name.startswith("head.")}
    assert placed == {("lora", "2"), ("blocks", "1"), ("blocks", "2")}
    assert model.first_tuned == 1


@pytest.mark.parametrize("kinds", [("lora", "ssf"), ("ssf", "lora")])
def test_two_tuners_at_one_place_act_in_the_order_given(tower: Tower, kinds: tuple[str, str]) -> None:
    options: dict[str, dict[str, Any]] = {"lora": {"bottleneck": 4, "mlp": True}, "ssf": {"norms": True}}
    model = lift(tower, {kind: {**options[kind], "blocks": [1]} for kind in kinds})
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    first, second = (model.get_submodule(f"tuner.{kind}.1") for kind in kinds)
    both = model.tuner.per_block[1]
    h, x, inner = torch.randn(2, 4, WIDTH), torch.randn(2, 4, WIDTH), torch.randn(2, 4, 4 * WIDTH)
    for place, args in {
        "norm1": (h,),
        "query": (h, x),
        "key": (h, x),
        "value": (h, x),
        "attention_out": (x,),
        "norm2": (h,),
        "mlp_in": (h, inner),
        "mlp_out": (inner, x),
        "beside_mlp": (h, x),
    }.items():
        *given, changed = args
        for tuner in (first, second):
            changed = getattr(tuner, place)(*given, changed)
        assert torch.equal(getattr(both, place)(*args), changed), place
        assert torch.equal(changed, args[-1]) == (place == "beside_mlp"), place


@pytest.mark.parametrize(
    ("kind", "blocks", "prompts"),
    [
        ("vpt_shallow", None, [0, None, None]),
        ("vpt_deep", [0, 1, 2], [0, 1, 2]),
        ("vpt_deep", [0, 2], [0, None, 2]),
        ("vpt_deep", [1], ["none", 1, None]),
    ],
)
def test_prompts_stand_after_the_class_token_in_the_place_of_earlier_ones(
    tower: Tower, kind: str, blocks: list[int] | None, prompts: list[int | str | None]
) -> None:
    model = lift(tower, {kind: {"length": 3, **({"blocks": blocks} if blocks else {})}})
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = [tower.embed(IMAGES)]
    hooks = [b.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in tower.blocks]
    hooks += [b.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in tower.blocks]
    model(IMAGES)
    for hook in hooks:
        hook.remove()
    for before, x, prompt in zip(outputs[:-1], inputs, prompts, strict=True):
        assert x.shape[1] == 1 + (0 if prompt == "none" else 3) + 4
        assert torch.equal(x[:, 0], before[:, 0])
        assert torch.equal(x[:, -4:], before[:, -4:])
        if isinstance(prompt, int):
            learned = model.get_parameter(f"tuner.{kind}.{prompt}.prompt")
            assert torch.equal(x[:, 1:4], learned.expand(len(IMAGES), -1, -1))


@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_clip_adapter_mixes_its_bottleneck_with_the_towers_feature(tower: Tower, ratio: float) -> None:
    model = lift(tower, {"clip_adapter": {"bottleneck": 3, "ratio": ratio}})
    down, up = (model.tuner.behind.get_parameter(f"clip_adapter.{name}.weight") for name in ("down", "up"))
    feature = tower(IMAGES)
    inner = torch.einsum("rd,bd->br", down, feature).clamp(min=0)
    expected = ratio * torch.einsum("dr,br->bd", up, inner).clamp(min=0) + (1 - ratio) * feature
    assert (expected != feature).any(dim=1).all()
    for found in (model.feature(IMAGES), model.feature_from_frozen(model.frozen_part(IMAGES))):
        assert torch.allclose(found, expected, atol=1e-6)


def away_from_the_start(model: Lift) -> Lift:
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_ia3_scales_keys_values_and_what_the_mlp_computes_inside(tower: Tower) -> None:
    model = away_from_the_start(lift(tower, {"ia3": {"blocks": [0, 2]}}))
    changed = copy.deepcopy(tower)
    for index in (0, 2):
        block: Any = changed.blocks[index]
        k, v, inner = (model.get_parameter(f"tuner.ia3.{index}.{name}") for name in ("k", "v", "inner"))
        scales = torch.cat([torch.ones(WIDTH), k, v])
        block.attn.in_proj.weight.copy_(torch.diag(scales) @ block.attn.in_proj.weight)
        block.attn.in_proj.bias.mul_(scales)
        before = block.mlp.activation
        block.mlp.activation = lambda x, before=before, inner=inner: inner * before(x)
    assert not torch.allclose(changed(IMAGES), tower(IMAGES), atol=1e-3)
    assert torch.allclose(model.feature(IMAGES), changed(IMAGES), atol=1e-5)


@torch.no_grad()
def test_dora_gives_each_output_a_magnitude_and_a_direction(tower: Tower) -> None:
    model = away_from_the_start(lift(tower, {"dora": {"bottleneck": 4, "mlp": True, "blocks": [0, 2]}}))
    changed = copy.deepcopy(tower)
    for index in (0, 2):
        block: Any = changed.blocks[index]
        attention, mlp = block.attn.in_proj.weight, block.mlp
        weights = {
            "q": attention[:WIDTH],
            "v": attention[2 * WIDTH :],
            "fc1": mlp.in_proj.weight,
            "fc2": mlp.out_proj.weight,
        }
        for name, weight in weights.items():
            m, down, up = (
                model.get_parameter(f"tuner.dora.{index}.{name}.{part}") for part in ("magnitude", "down", "up")
            )
            moved = weight + torch.einsum("ir,ro->oi", down, up) / 4
            weight.copy_(m[:, None] * moved / moved.square().sum(1, keepdim=True).sqrt())
    assert not torch.allclose(changed(IMAGES), tower(IMAGES), atol=1e-3)
    assert torch.allclose(model.feature(IMAGES), changed(IMAGES), atol=1e-5)


def test_no_gradient_goes_through_doras_norm() -> None:
    torch.manual_seed(3)
    linear = torch.nn.Linear(WIDTH, 3)
    part = Decomposed(linear.weight, linear.bias, 2)
    torch.nn.init.normal_(part.up)
    x = torch.randn(5, WIDTH)
    part.changed(x, linear(x)).sum().backward()
    expected = (x @ part.down / 2).sum(0)[:, None] * part.scale()
    assert part.up.grad is not None
    assert torch.allclose(part.up.grad, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["adaptformer", "adapter", "lora", "dora"])
def test_each_tuned_block_may_have_a_bottleneck_of_its_own(tower: Tower, kind: str) -> None:
    config = RunConfig.model_validate({"tuner": {"kind": kind, "bottleneck": [2, 7], "blocks": [2, 0]}})
    options = config.resolve(CLASSES, BLOCKS, WIDTH).tuner.options(BLOCKS)
    model = lift(tower, {kind: options})
    for block, width in ((0, 2), (2, 7)):
        downs = [p for name, p in model.get_submodule(f"tuner.{kind}.{block}").named_parameters() if "down" in name]
        assert downs
        assert all(width in down.shape for down in downs)


@pytest.mark.parametrize(("places", "start"), [("attention", "attn."), ("mlp", "mlp.")])
def test_sparse_can_be_limited_to_attention_or_mlp(tower: Tower, places: str, start: str) -> None:
    model = lift(tower, {"sparse": {"ratio": RATIO, "blocks": [1], "places": places}})
    names = [name.removeprefix("tower.blocks.1.") for name in sparse_parts(model)]
    assert len(names) == TENSORS_PER_BLOCK // 2
    assert all(name.startswith(start) for name in names)
    everywhere = sparse_parts(lift(tower, {"sparse": {"ratio": RATIO, "blocks": [1]}}))
    assert all(torch.equal(part.index, everywhere[name].index) for name, part in sparse_parts(model).items())


def sparse_parts(model: Lift) -> dict[str, Sparse]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparse)}


def test_sparse_changes_its_places_and_no_others(tower: Tower) -> None:
    model = lift(tower, {"sparse": {"ratio": RATIO, "blocks": [1]}})
    parts = sparse_parts(model)
    assert len(parts) == TENSORS_PER_BLOCK
    for name, part in parts.items():
        with torch.no_grad():
            part.values.add_(1)
        linear, _, which = name.removeprefix("tower.").removesuffix(".0").partition(".parametrizations.")
        frozen, changed = (getattr(t.get_submodule(linear), which).flatten() for t in (tower, model.tower))
        assert len(part.index) == round(RATIO * frozen.numel())
        assert torch.equal((changed != frozen).nonzero().flatten(), part.index.sort().values)


def test_sparse_places_come_from_the_seed(tower: Tower) -> None:
    drawn = []
    for seed in (2, 2, 5):
        torch.manual_seed(seed)
        parts = {"sparse": {"ratio": RATIO, "blocks": [0, 2]}}
        drawn.append(sparse_parts(Lift(tower, parts, CosineHead(random_weights(CLASSES, WIDTH), 25.0))))
    one, same, other = drawn
    assert len(one) == 2 * TENSORS_PER_BLOCK
    for name, part in one.items():
        assert torch.equal(part.index, same[name].index)
        assert not torch.equal(part.index, other[name].index)


@pytest.mark.parametrize("num_classes", [5, 40])
@pytest.mark.parametrize("blocks", [None, [1]])
def test_the_derived_sparse_ratio_trains_as_many_values_as_the_classifier_has(
    tower: Tower, num_classes: int, blocks: list[int] | None
) -> None:
    config = RunConfig.model_validate({"tuner": {"kind": "sparse", "blocks": blocks}})
    options = config.resolve(num_classes, BLOCKS, WIDTH).tuner.model_dump(exclude={"kind"})
    parts = sparse_parts(lift(tower, {"sparse": options}, num_classes))
    assert len(parts) == TENSORS_PER_BLOCK * len(blocks or range(BLOCKS))
    difference = sum(part.values.numel() for part in parts.values()) - num_classes * WIDTH
    assert abs(difference) <= len(parts) / 2  # each tensor rounds


@pytest.mark.parametrize("ratio", [1e-9, 1.0])
def test_sparse_trains_at_least_one_value_of_a_tensor_and_at_most_all(tower: Tower, ratio: float) -> None:
    model = lift(tower, {"sparse": {"ratio": ratio, "blocks": [1]}})
    for name, part in sparse_parts(model).items():
        frozen = model.get_parameter(name.removesuffix("0") + "original")
        assert len(part.index.unique()) == len(part.index) == (frozen.numel() if ratio == 1 else 1)
    assert torch.equal(model.feature(IMAGES), tower(IMAGES))
