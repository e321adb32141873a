"""Heads against the reference figures, and the weights they start from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_figures import GOLDEN, drawn

from lift_ray.model import heads
from lift_ray.model.heads import class_means, probe_weights
from lift_ray.registry import HEADS

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
NORMALISING = sorted(HEADS.keys() - {"linear"})


FEATURES = drawn("dev/clf_x", (8, 128))
WEIGHTS = drawn("dev/clf_w", (10, 128), 0.5)


@pytest.mark.parametrize("kind", HEADS)
def test_golden_heads(kind: str) -> None:
    head = HEADS.build(kind, WEIGHTS, **({"scale": 25.0} if kind == "cosine" else {}))
    difference = np.abs(head(FEATURES).detach().numpy() - GOLDEN[f"classifier/{kind}/logit"]).max()
    assert difference <= 2e-5


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_trains_its_weights_and_only_the_linear_one_a_bias(kind: str) -> None:
    head = HEADS.build(kind, WEIGHTS)
    head(FEATURES).square().sum().backward()
    trained = dict(head.named_parameters())
    assert set(trained) == set(head.state_dict()) == ({"weight", "bias"} if kind == "linear" else {"weight"})
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_copies_the_weights_it_starts_from(kind: str) -> None:
    given = WEIGHTS.clone()
    head = HEADS.build(kind, given)
    with torch.no_grad():
        head.weight += 1
    assert torch.equal(given, WEIGHTS)


@pytest.mark.parametrize("kind", HEADS)
def test_the_length_of_a_class_s_weights_counts_in_the_linear_head_alone(kind: str) -> None:
    same = torch.allclose(HEADS.build(kind, WEIGHTS)(FEATURES), HEADS.build(kind, 3 * WEIGHTS)(FEATURES), atol=1e-5)
    assert same == (kind in NORMALISING)


@pytest.mark.parametrize("kind", HEADS)
def test_the_length_of_the_feature_counts_where_it_is_not_normalised(kind: str) -> None:
    head = HEADS.build(kind, WEIGHTS)
    same = torch.allclose(head(FEATURES), head(3 * FEATURES), atol=1e-5)
    assert same == (kind in ("cosine", "layernorm"))


def test_the_cosine_scale_multiplies_the_logits() -> None:
    logits = HEADS.build("cosine", WEIGHTS, scale=5.0)(FEATURES)
    assert torch.allclose(5 * logits, HEADS.build("cosine", WEIGHTS, scale=25.0)(FEATURES))
    assert float(logits.detach().abs().max()) <= 5.0


def test_class_means_are_unit_rows_along_the_means() -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])
    means = class_means(FEATURES, labels, 3)
    for k in range(3):
        mean = FEATURES[labels == k].mean(0)
        torch.testing.assert_close(means[k], mean / mean.norm())


def test_class_means_look_at_the_first_100_images_of_each_class() -> None:
    labels = torch.arange(330) % 3
    labels[320:] = 2
    features = drawn("first", (330, 4))
    features[labels.eq(0).nonzero().flatten()[100:]] = 1e6
    features[labels.eq(2).nonzero().flatten()[100:]] = -1e6
    means = class_means(features, labels, 3)
    for k in range(3):
        mean = features[labels == k][:100].mean(0)
        torch.testing.assert_close(means[k], mean / mean.norm())


def test_class_means_of_half_precision_features_are_summed_in_float() -> None:
    features = (drawn("half", (300, 16)) + 4).bfloat16()
    labels = torch.arange(300) % 3
    torch.testing.assert_close(class_means(features, labels, 3), class_means(features.float(), labels, 3))


@pytest.mark.parametrize("start", [class_means, probe_weights])
def test_a_class_without_images_is_named(start: object) -> None:
    assert callable(start)
    with pytest.raises(ValueError, match="none of class 1, 3;"):
        start(FEATURES, torch.tensor([0, 2, 4, 0, 2, 4, 0, 2]), 5)
    with pytest.raises(ValueError, match=r"none of class 3, 4, 5, 6, \.\.\.;"):
        start(FEATURES, torch.arange(8) % 3, 12)


def toy(num_classes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A long tail of classes that a plane separates, though most of the spread has nothing to do with the class."""
    counts = (150 * 0.02 ** (torch.arange(num_classes) / (num_classes - 1))).long().clamp(min=2)
    labels = torch.arange(num_classes).repeat_interleave(counts)
    features = drawn("spread", (len(labels), width)) * torch.linspace(0.02, 3, width)
    informative = width // 2
    features[:, :informative] += 0.7 * drawn("centres", (num_classes, informative))[labels]
    return features + 2, labels


def mean_class_accuracy(weights: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> float:
    predicted = (F.normalize(features, dim=1) @ weights.T).argmax(1)
    return float(torch.stack([(predicted[labels == k] == k).float().mean() for k in labels.unique()]).mean())


@pytest.mark.parametrize(("num_classes", "width"), [(4, 24), (12, 48)])
def test_the_probe_separates_what_class_means_do_not(num_classes: int, width: int) -> None:
    features, labels = toy(num_classes, width)
    means = mean_class_accuracy(class_means(features, labels, num_classes), features, labels)
    weights = probe_weights(features, labels, num_classes)
    assert mean_class_accuracy(weights, features, labels) > max(0.97, means + 0.05)
    assert mean_class_accuracy(F.normalize(weights, dim=1), features, labels) > max(0.95, means + 0.05)


@pytest.mark.parametrize("penalty", [1.0, 0.05])
def test_the_probe_is_where_the_gradient_of_balanced_logistic_regression_vanishes(penalty: float) -> None:
    features, labels = toy(4, 24)
    unit, counts = F.normalize(features, dim=1).double(), labels.bincount()
    share = (len(labels) / (4 * counts))[labels].double()
    direction = probe_weights(features, labels, 4, penalty=penalty, steps=500).double()

    def gradient(length: float) -> torch.Tensor:
        weight = (length * direction).requires_grad_()
        loss = (share * F.cross_entropy(unit @ weight.T, labels, reduction="none")).sum()
        return torch.autograd.grad(loss + penalty / 2 * weight.square().sum(), weight)[0]

    low, high = 0.0, 1e4
    for _ in range(60):  # the length of the rows is not given back: where the loss along them is least
        middle = (low + high) / 2
        low, high = (middle, high) if (gradient(middle) * direction).sum() < 0 else (low, middle)
    assert gradient(low).norm() < 2e-3 * gradient(0.0).norm()
    assert float(direction.norm(dim=1).mean()) == pytest.approx(1.0, rel=1e-5)


def test_the_probe_weighs_classes_and_not_images() -> None:
    """Every image of one class given three times over changes nothing but the number of images that share the penalty."""
    features, labels = toy(4, 24)
    again = torch.cat([torch.arange(len(labels)), *2 * [labels.eq(3).nonzero().flatten()]])
    once = probe_weights(features, labels, 4, penalty=0.5)
    thrice = probe_weights(features[again], labels[again], 4, penalty=0.5 * len(again) / len(labels))
    torch.testing.assert_close(once, thrice, rtol=0.0, atol=5e-3)


def test_the_probe_gives_the_same_for_any_chunk_and_any_length_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = toy(4, 24)
    whole = probe_weights(features, labels, 4)
    assert torch.equal(whole, probe_weights(features, labels, 4))
    monkeypatch.setattr(heads, "CHUNK_VALUES", 4 * 7)
    torch.testing.assert_close(probe_weights(5 * features, labels, 4), whole, rtol=0.0, atol=2e-2)


def test_the_probe_works_on_features_made_in_inference_mode_and_inside_it() -> None:
    with torch.inference_mode():
        features = drawn("inference", (30, 6)) + torch.eye(6)[torch.arange(30) % 3]
        labels = torch.arange(30) % 3
        inside = probe_weights(features, labels, 3)
    outside = probe_weights(features, labels, 3)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad
    HEADS.build("cosine", inside)(features.clone()).sum().backward()
