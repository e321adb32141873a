"""The frozen linears of a tower: packed or not, the same product and the same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lift_ray.methods.lift import Lift
from lift_ray.model import linear as linear_module
from lift_ray.model.backbone import load_backbone
from lift_ray.model.linear import linear, prepack

torch.set_num_threads(1)


def two_linears(width: int = 96, hidden: int = 160) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(width, hidden).requires_grad_(False)
    packed = nn.Linear(width, hidden).requires_grad_(False)
    packed.load_state_dict(plain.state_dict())
    prepack(packed)
    return plain, packed


@pytest.mark.parametrize("rows", [(1,), (2,), (16,), (300,), (7, 37), (70, 65)])
def test_a_packed_linear_has_the_product_and_the_gradient_of_a_plain_one(rows: tuple[int, ...]) -> None:
    found = []
    x = torch.randn(*rows, 96)
    for one in two_linears():
        inputs = x.clone().requires_grad_()
        out = linear(inputs, one.weight, one.bias)
        out.square().sum().backward()
        found.append((out.detach(), inputs.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_weights_are_packed_when_they_are_first_multiplied_and_backward_only_if_a_gradient_passes() -> None:
    if not linear_module._ONEDNN:
        pytest.skip("this build of torch multiplies with F.linear")
    _, packed = two_linears()
    assert packed.weight.packed == {}
    linear(torch.randn(4, 96), packed.weight, packed.bias)
    assert packed.weight.packed.keys() == {"forward"}
    linear(torch.randn(4, 96, requires_grad=True), packed.weight, packed.bias).sum().backward()
    assert packed.weight.packed.keys() == {"forward", "backward"}


def test_a_prepacked_tower_has_the_features_of_a_plain_one_and_trains_its_own_weights(small_clip: str) -> None:
    plain, packed = (load_backbone(small_clip, prepacked=prepacked).tower for prepacked in (False, True))
    images = torch.randn(5, 3, 32, 32)
    assert torch.allclose(plain(images), packed(images), rtol=1e-5, atol=1e-5)
    models = [Lift(tower, {"full": {"blocks": [1]}}, nn.Identity()) for tower in (plain, packed)]
    for model in models:
        with torch.no_grad():
            for parameter in model.trained().values():
                parameter.mul_(1.5)
    assert torch.allclose(models[0](images), models[1](images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(models[0](images), plain(images), atol=1e-3)
