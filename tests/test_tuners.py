"""One contract that every tuner keeps."""

from __future__ import annotations

import typing
from collections.abc import Callable

import open_clip
import pytest
import torch

from lift_ray.methods.lift import Lift, make_optimizer
from lift_ray.model.backbone import Tower, rebuild
from lift_ray.model.classifier import CosineHead, random_weights
from lift_ray.model.losses import LOSSES
from lift_ray.model.tuners import BLOCK_TUNERS, WITHOUT_BLOCKS, Tuner
from lift_ray.settings import run as settings_run
from lift_ray.settings.run import TUNER_KINDS, Optim

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
WIDTH, BLOCKS, CLASSES, BOTTLENECK = 32, 3, 5, 4
IN_BLOCKS = [kind for kind in TUNER_KINDS if kind not in WITHOUT_BLOCKS]
# trained values of one block for width D and bottleneck R
NUMBERS: dict[str, Callable[[int, int], int]] = {
    "adaptformer": lambda d, r: 1 + 2 * d + (d * r + r) + (r * d + d),
    "lora": lambda d, r: 4 * d * r,
}


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": BLOCKS, "width": WIDTH, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    return rebuild(open_clip.CLIP(16, vision, text).visual)


IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6) % CLASSES


def lift(tower: Tower, kind: str, blocks: list[int] | None = None, seed: int = 2) -> Lift:
    torch.manual_seed(seed)
    options = {"bottleneck": BOTTLENECK} if kind in BLOCK_TUNERS else {}
    tuner = Tuner(kind, WIDTH, BLOCKS, list(range(BLOCKS)) if blocks is None else blocks, **options)
    return Lift(tower, tuner, CosineHead(random_weights(CLASSES, WIDTH)))


def perturbed(model: Lift) -> Lift:
    """Away from the identity: behind an `up` of zero nothing else would show."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", TUNER_KINDS)
def test_a_fresh_tuner_is_the_identity(tower: Tower, kind: str) -> None:
    assert torch.equal(lift(tower, kind).feature(IMAGES), tower(IMAGES))


@pytest.mark.parametrize("kind", TUNER_KINDS)
@pytest.mark.parametrize("blocks", [[0, 1, 2], [1]])
def test_the_number_of_trained_values_is_exact(tower: Tower, kind: str, blocks: list[int]) -> None:
    in_blocks = len(blocks) * NUMBERS[kind](WIDTH, BOTTLENECK) if kind in NUMBERS else 0
    in_head = 0 if kind == "zero_shot" else CLASSES * WIDTH
    trained = lift(tower, kind, blocks).trained()
    assert sum(p.numel() for p in trained.values()) == in_blocks + in_head
    assert all(name.startswith(("head.", f"tuner.{kind}.")) for name in trained)


@pytest.mark.parametrize("kind", [kind for kind in TUNER_KINDS if kind != "zero_shot"])
def test_every_trained_value_gets_a_gradient_and_nothing_else_does(tower: Tower, kind: str) -> None:
    model = perturbed(lift(tower, kind))
    torch.nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    trained = model.trained()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert name not in trained or bool((parameter.grad != 0).any()), name


def test_zero_shot_has_nothing_to_train(tower: Tower) -> None:
    assert not lift(tower, "zero_shot")(IMAGES).requires_grad


@pytest.mark.parametrize("kind", [kind for kind in TUNER_KINDS if kind != "zero_shot"])
def test_every_trained_tensor_moves_the_logits(tower: Tower, kind: str) -> None:
    model = perturbed(lift(tower, kind))
    torch.manual_seed(4)
    with torch.no_grad():
        before = model(IMAGES)
        for name, parameter in model.trained().items():
            kept = parameter.clone()
            parameter.add_(0.1 * torch.randn_like(parameter))
            assert float((model(IMAGES) - before).abs().max()) > 1e-5, name
            parameter.copy_(kept)
        assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("kind", TUNER_KINDS)
def test_what_is_stored_makes_the_same_model_again(tower: Tower, kind: str) -> None:
    model, other = perturbed(lift(tower, kind)), lift(tower, kind, seed=5)
    stored = {name: value.clone() for name, value in model.stored().items()}
    assert set(stored) == {n for n, _ in model.named_parameters() if not n.startswith("tower.")}
    assert not torch.equal(model(IMAGES), other(IMAGES))
    other.load_stored(stored)
    assert torch.equal(model(IMAGES), other(IMAGES))


@pytest.mark.parametrize("kind", TUNER_KINDS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(tower: Tower, kind: str) -> None:
    model = lift(tower, kind)
    stored = {name: value.clone() + 1 for name, value in model.stored().items()}
    before = {name: value.clone() for name, value in model.stored().items()}
    name = sorted(stored)[-1]
    too_few = {n: v for n, v in stored.items() if n != name}
    for wrong in (too_few, {**stored, "head.bias": torch.zeros(1)}, {**stored, name: torch.zeros(1, 1, 7)}):
        blamed = "head.bias" if "head.bias" in wrong else name
        with pytest.raises(ValueError, match=f"does not fit the model: {blamed}$"):
            model.load_stored(wrong)
    assert all(torch.equal(value, before[n]) for n, value in model.stored().items())


@pytest.mark.parametrize("kind", IN_BLOCKS)
@pytest.mark.parametrize("blocks", [[0], [2], [0, 2]])
def test_only_the_chosen_blocks_change(tower: Tower, kind: str, blocks: list[int]) -> None:
    model = perturbed(lift(tower, kind, blocks))
    assert {int(name.split(".")[2]) for name in model.trained() if name.startswith("tuner.")} == set(blocks)
    inputs: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for tuners in (None, model.tuner.per_block):
            seen: list[torch.Tensor] = []
            hooks = [
                block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                for block in tower.blocks
            ]
            out = tower(IMAGES, tuners)
            inputs.append([*seen, out])
            for hook in hooks:
                hook.remove()
    same = [torch.equal(plain, tuned) for plain, tuned in zip(*inputs, strict=True)]
    assert same == [index <= blocks[0] for index in range(BLOCKS + 1)]


@pytest.mark.parametrize("kind", IN_BLOCKS)
def test_nothing_below_the_first_tuned_block_is_in_the_graph(tower: Tower, kind: str) -> None:
    model = lift(tower, kind, [2])
    needs_gradient: list[bool] = []
    hooks = [b.register_forward_hook(lambda _, __, out: needs_gradient.append(out.requires_grad)) for b in tower.blocks]
    model(IMAGES)
    for hook in hooks:
        hook.remove()
    assert needs_gradient == [False, False, True]


@pytest.mark.parametrize("kind", TUNER_KINDS)
def test_bf16_stays_close_and_gives_fp32_logits(tower: Tower, kind: str) -> None:
    model = perturbed(lift(tower, kind))
    exact = model(IMAGES).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(IMAGES)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert float((rough.detach() - exact).abs().max()) < 0.05 * float(exact.abs().max())
    if kind != "zero_shot":
        torch.nn.functional.cross_entropy(rough, LABELS).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trained().values())


@pytest.mark.parametrize("kind", [kind for kind in TUNER_KINDS if kind != "zero_shot"])
def test_a_few_steps_lower_the_loss_and_leave_the_tower_alone(tower: Tower, kind: str) -> None:
    model = lift(tower, kind)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    optimizer = make_optimizer(model.trained(), Optim(lr=0.002))
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def kinds_of(union: object) -> set[str]:
    """The kinds that a union in the settings offers."""
    models = typing.get_args(typing.get_args(union)[0])
    return {kind for model in models for kind in typing.get_args(model.model_fields["kind"].annotation)}


def test_the_dicts_hold_exactly_what_the_settings_offer() -> None:
    tuners = kinds_of(settings_run.Tuner)
    assert set(TUNER_KINDS) == tuners == set(typing.get_args(settings_run.TunerKind))
    assert set(BLOCK_TUNERS) | set(WITHOUT_BLOCKS) == tuners
    assert not set(BLOCK_TUNERS) & set(WITHOUT_BLOCKS)
    assert set(NUMBERS) == set(BLOCK_TUNERS)
    assert set(LOSSES) == kinds_of(settings_run.Loss)
