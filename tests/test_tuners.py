"""One contract that every tuner keeps, alone and beside another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lift_ray.methods.lift import Lift
from lift_ray.model.blocks import BlockShape
from lift_ray.model.heads import CosineHead, random_weights
from lift_ray.model.merging import merged
from lift_ray.model.tower import Tower
from lift_ray.registry import TUNERS
from lift_ray.settings.run import OptimConfig
from lift_ray.training.step import make_optimizer

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
WIDTH, BLOCKS, CLASSES, PATCH_PX = 32, 3, 5, 8
BOTTLENECK, LENGTH, RATIO = 4, 3, 0.1
EVERY = tuple(range(BLOCKS))
NARROW, SPARSE = {"bottleneck": BOTTLENECK}, {"ratio": RATIO}
SIZES: dict[str, dict[str, Any]] = {  # options that are not derived here, small
    "adaptformer": NARROW,
    "adapter": NARROW,
    "lora": NARROW,
    "dora": NARROW,
    "vpt_shallow": {"length": LENGTH},
    "vpt_deep": {"length": LENGTH},
    "sparse": SPARSE,
    "clip_adapter": NARROW,
}
# every kind that is registered, those of plugins too; batchnorm needs a convolutional tower (test_towers.py)
ALONE: dict[str, dict[str, dict[str, Any]]] = {
    **{kind: {kind: SIZES.get(kind, {})} for kind in TUNERS if kind != "batchnorm"},
    "lora with mlp": {"lora": {**NARROW, "mlp": True}},
    "dora with mlp": {"dora": {**NARROW, "mlp": True}},
    "sparse attention": {"sparse": {**SPARSE, "places": "attention"}},
    "sparse mlp": {"sparse": {**SPARSE, "places": "mlp"}},
    "ssf with norms": {"ssf": {"norms": True}},
}
PAIRS: dict[str, dict[str, dict[str, Any]]] = {
    "adaptformer + lora": {"adaptformer": NARROW, "lora": NARROW},
    "lora + bitfit": {"lora": NARROW, "bitfit": {}},
    "vpt_deep + layernorm": {"vpt_deep": {"length": LENGTH}, "layernorm": {}},
    "adapter + sparse": {"adapter": NARROW, "sparse": SPARSE},
    "ia3 + lora with mlp": {"ia3": {}, "lora": {**NARROW, "mlp": True}},
    "dora with mlp + ia3": {"dora": {**NARROW, "mlp": True}, "ia3": {}},
    "ssf + dora with mlp": {"ssf": {}, "dora": {**NARROW, "mlp": True}},
    "lora + clip_adapter": {"lora": NARROW, "clip_adapter": NARROW},
}
CASES = ALONE | PAIRS
TRAINED = [case for case in CASES if case != "zero_shot"]
WITHOUT_BLOCKS = ("vpt_shallow", "clip_adapter", "linear_probe", "zero_shot")
IN_CHOSEN_BLOCKS = [case for case in CASES if case not in WITHOUT_BLOCKS]
STARTS_ELSEWHERE = [case for case in CASES if {"ssf", "vpt_shallow", "vpt_deep", "clip_adapter"} & {*CASES[case]}]
CANNOT_MERGE = {"adaptformer", "adapter", "vpt_shallow", "vpt_deep"}
OWN_WEIGHTS = ("bitfit", "layernorm", "sparse", "full", "partial")
# trained values of one block for width D, bottleneck R and P prompt tokens; the MLPs are 4 D wide
LINEARS = {"in_proj": (3, 1), "out_proj": (1, 1), "mlp_in": (4, 1), "mlp_out": (1, 4)}  # (rows, columns) in D


def sparse_values(d: int, linear: str) -> int:
    rows, columns = LINEARS[linear]
    return round(RATIO * rows * columns * d * d) + round(RATIO * rows * d)


NUMBERS: dict[str, Callable[[int, int, int], int]] = {
    "adaptformer": lambda d, r, p: 1 + 2 * d + (d * r + r) + (r * d + d),
    "adapter": lambda d, r, p: 2 * d + (d * r + r) + (r * d + d),
    "lora": lambda d, r, p: 2 * 2 * d * r,
    "lora with mlp": lambda d, r, p: 2 * 2 * d * r + 2 * (d + 4 * d) * r,
    "dora": lambda d, r, p: 2 * (2 * d * r + d),
    "dora with mlp": lambda d, r, p: 2 * (2 * d * r + d) + 2 * (d + 4 * d) * r + (4 * d + d),
    "ia3": lambda d, r, p: (1 + 1 + 4) * d,
    "ssf": lambda d, r, p: 2 * (3 + 1 + 4 + 1) * d,
    "ssf with norms": lambda d, r, p: 2 * (3 + 1 + 4 + 1 + 2) * d,
    "vpt_shallow": lambda d, r, p: p * d,
    "vpt_deep": lambda d, r, p: p * d,
    "bitfit": lambda d, r, p: (2 + 3 + 1 + 4 + 1) * d,
    "layernorm": lambda d, r, p: 4 * d,
    "sparse": lambda d, r, p: sum(sparse_values(d, name) for name in LINEARS),
    "sparse attention": lambda d, r, p: sparse_values(d, "in_proj") + sparse_values(d, "out_proj"),
    "sparse mlp": lambda d, r, p: sparse_values(d, "mlp_in") + sparse_values(d, "mlp_out"),
    "full": lambda d, r, p: 12 * d * d + 9 * d + 4 * d,
    "partial": lambda d, r, p: 12 * d * d + 9 * d + 4 * d,
    "clip_adapter": lambda d, r, p: 2 * d * r,
    "linear_probe": lambda d, r, p: 0,
    "zero_shot": lambda d, r, p: 0,
}


PUBLISHED = [case for case in CASES if all(kind in NUMBERS for kind in case.split(" + "))]


def new_tower(checkpointing: bool = False) -> Tower:
    torch.manual_seed(0)
    tower = (
        Tower(
            BlockShape(WIDTH, num_heads=2, hidden=4 * WIDTH, activation=torch.nn.functional.gelu),
            num_blocks=BLOCKS,
            patch_px=PATCH_PX,
            resolution_px=16,
            checkpointing=checkpointing,
        )
        .eval()
        .requires_grad_(False)
    )
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


@pytest.fixture(scope="module")
def tower() -> Tower:
    return new_tower()


IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6) % CLASSES


def lift(tower: Tower, case: str, blocks: tuple[int, ...] = EVERY, seed: int = 2, head_seed: int = 2) -> Lift:
    torch.manual_seed(head_seed)
    head = CosineHead(random_weights(CLASSES, WIDTH), 25.0)
    torch.manual_seed(seed)
    chosen = {"blocks": list(blocks)}
    parts = {kind: options if kind in WITHOUT_BLOCKS else options | chosen for kind, options in CASES[case].items()}
    return Lift(tower, parts, head)


def perturbed(model: Lift) -> Lift:
    """Away from the identity, where nothing shows behind an `up` of zero, and with bottlenecks whose ReLUs are all open."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.trained().items():
            parameter.add_((0.02 if name.startswith("tower.") else 0.2) * torch.randn_like(parameter))
            if name.endswith("down.bias"):
                parameter.fill_(3.0)
        for (
            adapter
        ) in model.tuner.behind:  # no biases: units that are open for an image, and outputs that see all of them
            feature = model.tower.finish(model.tower.embed(IMAGES), model.tuner.per_block)
            adapter.down.weight.copy_(feature[:BOTTLENECK] / WIDTH)
            adapter.up.weight.abs_()
    return model


def loss_of(model: Lift) -> Tensor:
    return torch.nn.functional.cross_entropy(model(IMAGES), LABELS)


def gradients(model: Lift) -> dict[str, Tensor | None]:
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_only_given_patches_matter(model: Lift) -> None:
    shuffled = torch.tensor([2, 0, 3, 1]).expand(len(IMAGES), -1)
    assert torch.allclose(model(IMAGES, shuffled), model(IMAGES), atol=1e-4)
    other = IMAGES.clone()
    other[:, :, :PATCH_PX, PATCH_PX:] += 1  # patch 1
    without, beside = shuffled[:, :3], shuffled[:, 1:]
    assert torch.equal(model(other, without), model(IMAGES, without))
    assert not torch.allclose(model(other, beside), model(IMAGES, beside), atol=1e-4)


def close_in_bf16(model: Lift) -> Tensor:
    """The logits in bf16, which stay close to the exact ones."""
    exact = model(IMAGES).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(IMAGES)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert float((rough.detach() - exact).abs().max()) < 0.05 * float(exact.abs().max())
    return rough


def shifts_all_keys(model: Lift, name: str) -> Tensor:
    """Which values of a tensor move every key of a block alike: softmax does not see that, so they have no effect at all."""
    place = torch.arange(model.trained()[name].numel())
    if name.endswith("attn.in_proj.parametrizations.bias.0.values"):
        place = model.get_buffer(name.removesuffix("values") + "index")
    elif not name.endswith(("attn.in_proj.bias", "attn_in.shift")):
        return torch.zeros(len(place), dtype=torch.bool)
    return (place >= WIDTH) & (place < 2 * WIDTH)


@contextmanager
def seen_by_blocks(tower: Tower) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The inputs of all calls of blocks, and the outputs of those that came to their end."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in tower.blocks]
    hooks += [b.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in tower.blocks]
    yield inputs, outputs
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("case", PUBLISHED)
def test_a_fresh_tuner_is_the_identity_where_its_paper_says_so(tower: Tower, case: str) -> None:
    plain, tuned = tower(IMAGES), lift(tower, case).feature(IMAGES).detach()
    same = bool(torch.allclose(tuned, plain, rtol=0, atol=1e-5))  # the last block adds up in another order for LoRA
    assert same == (case not in STARTS_ELSEWHERE)
    if "ssf" in case:
        assert float((tuned - plain).norm() / plain.norm()) < 0.2


@pytest.mark.parametrize("case", PUBLISHED)
@pytest.mark.parametrize("blocks", [EVERY, (1,)])
def test_the_number_of_trained_values_is_exact(tower: Tower, case: str, blocks: tuple[int, ...]) -> None:
    numbers = {kind: NUMBERS[kind](WIDTH, BOTTLENECK, LENGTH) for kind in case.split(" + ")}
    in_tuners = sum(n * (1 if kind in WITHOUT_BLOCKS else len(blocks)) for kind, n in numbers.items())
    trained = lift(tower, case, blocks).trained()
    in_head = 0 if case == "zero_shot" else CLASSES * WIDTH
    assert sum(p.numel() for p in trained.values()) == in_tuners + in_head
    for name in trained:
        where = "tuner.behind." if "clip_adapter." in name else "tuner."
        assert name.startswith(("head.", "tower.blocks.", *(f"{where}{kind}." for kind in CASES[case])))


@pytest.mark.parametrize("case", PUBLISHED)
def test_a_tuner_that_changes_only_weights_can_be_merged_into_them(tower: Tower, case: str) -> None:
    model = perturbed(lift(tower, case))
    assert all(tuner.can_merge for tuner in model.tuner.per_block) == (not CANNOT_MERGE & {*CASES[case]})
    if not CANNOT_MERGE & {*CASES[case]}:
        plain = merged(model.tower, model.tuner.per_block)
        assert {name for name, _ in plain.named_parameters()} == {name for name, _ in tower.named_parameters()}
        assert torch.allclose(model.tuner.behind(plain(IMAGES)), model.feature(IMAGES), atol=1e-4)


@pytest.mark.parametrize("case", TRAINED)
def test_every_trained_value_gets_a_gradient_and_nothing_else_does(tower: Tower, case: str) -> None:
    model = perturbed(lift(tower, case))
    trained = model.trained()
    for name, gradient in gradients(model).items():
        assert (gradient is not None) == (name in trained), name
        if gradient is not None:
            keys = shifts_all_keys(model, name)
            values = gradient.flatten()
            assert bool((values[~keys] != 0).all()), name
            assert bool((values[keys].abs() < 1e-5 * values.abs().max()).all()), name


def test_zero_shot_has_nothing_to_train(tower: Tower) -> None:
    model = lift(tower, "zero_shot")
    assert model.trained() == {}
    assert not model(IMAGES).requires_grad


@pytest.mark.parametrize("case", TRAINED)
def test_every_trained_tensor_moves_the_logits(tower: Tower, case: str) -> None:
    model = perturbed(lift(tower, case))
    torch.manual_seed(4)
    with torch.no_grad():
        before = model(IMAGES)
        for name, parameter in model.trained().items():
            keys = shifts_all_keys(model, name).view_as(parameter)
            for part, moves in ((~keys, True), (keys, False)):
                kept = parameter.clone()
                parameter.add_(0.1 * torch.randn_like(parameter) * part)
                change = float((model(IMAGES) - before).abs().max())
                assert change > 1e-3 if moves else change < 1e-4, f"{name}: {change:.1e}"
                parameter.copy_(kept)
        assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("case", CASES)
def test_what_is_stored_makes_the_same_model_again(tower: Tower, case: str) -> None:
    model = perturbed(lift(tower, case))
    other = lift(tower, case, seed=2 if "sparse" in case else 5, head_seed=5)  # places are drawn, not stored
    stored = {name: value.clone() for name, value in model.stored().items()}
    assert set(stored) == set(model.trained()) | {"head.weight"}
    assert not torch.equal(model(IMAGES), other(IMAGES))
    other.load_stored(stored)
    assert torch.equal(model(IMAGES), other(IMAGES))


@pytest.mark.parametrize("case", CASES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(tower: Tower, case: str) -> None:
    model = lift(tower, case)
    stored = {name: value.clone() + 1 for name, value in model.stored().items()}
    before = {name: value.clone() for name, value in model.stored().items()}
    name = sorted(stored)[-1]
    too_few = {n: v for n, v in stored.items() if n != name}
    for wrong in (too_few, {**stored, "head.bias": torch.zeros(1)}, {**stored, name: torch.zeros(1, 1, 7)}):
        blamed = "head.bias" if "head.bias" in wrong else name
        with pytest.raises(ValueError, match=f"does not fit the model: {blamed}$"):
            model.load_stored(wrong)
    assert all(torch.equal(value, before[n]) for n, value in model.stored().items())


@pytest.mark.parametrize("case", CASES)
def test_two_models_on_one_tower_do_not_see_each_other(tower: Tower, case: str) -> None:
    before, plain = {n: v.clone() for n, v in tower.state_dict().items()}, tower(IMAGES)
    one, other = lift(tower, case), lift(tower, case, seed=5)
    logits = other(IMAGES)
    perturbed(one)
    if case != "zero_shot":
        gradients(one)
        make_optimizer(one.trained(), OptimConfig(lr=0.1)).step()
        assert not torch.equal(one(IMAGES), other(IMAGES))
    assert torch.equal(other(IMAGES), logits)
    assert all(parameter.grad is None for parameter in other.parameters())
    assert torch.equal(tower(IMAGES), plain)
    assert set(tower.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_are_shared_with_the_tower_and_not_copied(tower: Tower, case: str) -> None:
    model = lift(tower, case)
    original = {name: parameter.data_ptr() for name, parameter in tower.named_parameters()}
    frozen = {}
    for name, parameter in model.tower.named_parameters():
        if not parameter.requires_grad:
            frozen[name.replace(".parametrizations", "").replace(".original", "")] = parameter.data_ptr()
    own = {name.removeprefix("tower.") for name in model.trained() if name.startswith("tower.blocks.")}
    assert frozen == {name: place for name, place in original.items() if name not in own}
    assert (model.tower is tower) == (not set(CASES[case]) & set(OWN_WEIGHTS))
    storages = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}
    assert all(buffer.untyped_storage().data_ptr() in storages for buffer in model.tuner.buffers())


@pytest.mark.parametrize("case", IN_CHOSEN_BLOCKS)
@pytest.mark.parametrize("blocks", [(0,), (2,), (0, 2)])
def test_only_the_chosen_blocks_change(tower: Tower, case: str, blocks: tuple[int, ...]) -> None:
    model = perturbed(lift(tower, case, blocks))
    in_blocks = [name for name in model.trained() if not name.startswith(("head.", "tuner.behind."))]
    assert {int(name.split(".")[2]) for name in in_blocks} == set(blocks)
    with torch.no_grad(), seen_by_blocks(tower) as plain:
        tower(IMAGES)
    with torch.no_grad(), seen_by_blocks(model.tower) as tuned:
        model.feature(IMAGES)
    prompts = "vpt_deep" in case  # they are there before the block sees its input
    same = [torch.equal(a, b) for a, b in zip(plain[0], tuned[0], strict=True)]
    assert same == [index < blocks[0] or (index == blocks[0] and not prompts) for index in range(BLOCKS)]
    assert not torch.equal(plain[1][-1], tuned[1][-1])


@pytest.mark.parametrize("case", CASES)
def test_nothing_below_the_first_tuned_block_is_in_the_graph(tower: Tower, case: str) -> None:
    model = lift(tower, case, (2,))
    with seen_by_blocks(model.tower) as (_, outputs):
        model(IMAGES)
    first = 2 if case in IN_CHOSEN_BLOCKS else 0 if case == "vpt_shallow" else BLOCKS
    assert model.first_tuned == first
    assert [out.requires_grad for out in outputs] == [index >= first for index in range(BLOCKS)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocks", [EVERY, (1, 2), (2,)])
def test_the_frozen_part_can_be_computed_once_for_all_models(tower: Tower, case: str, blocks: tuple[int, ...]) -> None:
    model = perturbed(lift(tower, case, blocks))
    kept = model.frozen_part(IMAGES)
    assert not kept.requires_grad
    frozen = model.first_tuned
    expected = tower(IMAGES) if frozen == BLOCKS else tower.blocks_until(tower.embed(IMAGES), frozen)
    assert torch.equal(kept, expected)
    with seen_by_blocks(model.tower) as (inputs, _):
        logits = model.from_frozen(kept)
    assert len(inputs) == BLOCKS - frozen
    assert torch.allclose(logits, model(IMAGES), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", TRAINED)
def test_checkpointing_computes_again_and_gives_the_same_gradients(tower: Tower, case: str) -> None:
    plain = gradients(perturbed(lift(tower, case, (1, 2))))
    model = perturbed(lift(new_tower(checkpointing=True), case, (1, 2)))
    with seen_by_blocks(model.tower) as (inputs, _):
        saved = gradients(model)
    assert len(inputs) == BLOCKS + (BLOCKS - model.first_tuned)
    assert set(saved) == set(plain)
    for name, gradient in saved.items():
        expected = plain[name]
        assert (gradient is None) == (expected is None)
        if gradient is not None and expected is not None:
            assert torch.allclose(gradient, expected, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("case", CASES)
def test_patches_that_are_left_out_have_no_effect(tower: Tower, case: str) -> None:
    model = perturbed(lift(tower, case))
    assert_only_given_patches_matter(model)


@pytest.mark.parametrize("case", CASES)
def test_bf16_stays_close_and_gives_fp32_logits(tower: Tower, case: str) -> None:
    model = perturbed(lift(tower, case))
    rough = close_in_bf16(model)
    if case != "zero_shot":
        torch.nn.functional.cross_entropy(rough, LABELS).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trained().values())


@pytest.mark.parametrize("case", TRAINED)
def test_a_few_steps_lower_the_loss(tower: Tower, case: str) -> None:
    model = lift(tower, case)
    optimizer = make_optimizer(model.trained(), OptimConfig(lr=0.002))
    losses = []
    for _ in range(12):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
