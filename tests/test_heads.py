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
WITH_WEIGHTS = [kind.name for kind in HEADS.values() if not kind.from_text]  # tests/test_text_side.py has the others
NORMALISING = sorted({*WITH_WEIGHTS} - {"linear"})


FEATURES = drawn("dev/clf_x", (8, 128))
WEIGHTS = drawn("dev/clf_w", (10, 128), 0.5)


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_golden_heads(kind: str) -> None:
    head = HEADS.build(kind, WEIGHTS, **({"scale": 25.0} if kind == "cosine" else {}))
    difference = np.abs(head(FEATURES).detach().numpy() - GOLDEN[f"classifier/{kind}/logit"]).max()
    assert difference <= 2e-5


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_a_head_trains_its_weights_and_only_the_linear_one_a_bias(kind: str) -> None:
    head = HEADS.build(kind, WEIGHTS)
    head(FEATURES).square().sum().backward()
    trained = dict(head.named_parameters())
    assert set(trained) == set(head.state_dict()) == ({"weight", "bias"} if kind == "linear" else {"weight"})
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_a_head_copies_the_weights_it_starts_from(kind: str) -> None:
    given = WEIGHTS.clone()
    head = HEADS.build(kind, given)
    with torch.no_grad():
        head.weight += 1
    assert torch.equal(given, WEIGHTS)


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_the_length_of_a_class_s_weights_counts_in_the_linear_head_alone(kind: str) -> None:
    same = torch.allclose(HEADS.build(kind, WEIGHTS)(FEATURES), HEADS.build(kind, 3 * WEIGHTS)(FEATURES), atol=1e-5)
    assert same == (kind in NORMALISING)


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
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
    predicted = (F.normalize(features, dim=1) @ F.normalize(weights, dim=1).T).argmax(1)
    return float(torch.stack([(predicted[labels == k] == k).float().mean() for k in labels.unique()]).mean())


@pytest.mark.parametrize(("num_classes", "width"), [(4, 24), (12, 48)])
def test_the_probe_separates_what_class_means_do_not(num_classes: int, width: int) -> None:
    features, labels = toy(num_classes, width)
    centered = features - features.mean(0)  # the bias of the probe is dropped
    means = mean_class_accuracy(class_means(centered, labels, num_classes), centered, labels)
    assert mean_class_accuracy(probe_weights(centered, labels, num_classes), centered, labels) > means + 0.05


def balanced_regression(features: torch.Tensor, labels: torch.Tensor, penalty: float) -> torch.Tensor:
    """W of the objective in the docstring, minimized in double precision and by torch's gradients."""
    num_classes = int(labels.max()) + 1
    share = (len(labels) / (num_classes * labels.bincount()))[labels].double()
    parameters = torch.zeros(num_classes, features.shape[1] + 1, dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS(
        [parameters], max_iter=5000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        losses = F.cross_entropy(features.double() @ weight.T + bias, labels, reduction="none")
        value = (share * losses).sum() + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(objective)  # type: ignore[arg-type]
    return parameters.detach()[:, :-1]


@pytest.mark.parametrize("penalty", [1.0, 4.0])
def test_the_probe_minimizes_balanced_logistic_regression_with_a_free_bias(penalty: float) -> None:
    features, labels = toy(4, 24)
    expected = F.normalize(balanced_regression(features, labels, penalty), dim=1).float()
    torch.testing.assert_close(
        probe_weights(features, labels, 4, penalty=penalty, steps=500), expected, rtol=0.0, atol=2e-3
    )


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_the_probe_is_that_of_scikit_learn() -> None:
    """As far as 100 iterations of two solvers agree. LIFT has scikit-learn 1.2, whose tolerance was on the sum of the losses."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    for num_classes, width in ((4, 24), (12, 48)):
        features, labels = toy(num_classes, width)
        theirs = linear_model.LogisticRegression(class_weight="balanced", C=1.0, max_iter=100, tol=1e-8)
        theirs.fit(features.numpy(), labels.numpy())
        cosines = F.cosine_similarity(probe_weights(features, labels, num_classes), torch.from_numpy(theirs.coef_))
        assert cosines.min() > 0.995


def test_the_probe_weighs_classes_and_not_images() -> None:
    """Every image of one class given three times over changes nothing but the number of images that share the penalty."""
    features, labels = toy(4, 24)
    again = torch.cat([torch.arange(len(labels)), *2 * [labels.eq(3).nonzero().flatten()]])
    once = probe_weights(features, labels, 4, penalty=4.0, steps=500)
    thrice = probe_weights(features[again], labels[again], 4, penalty=4.0 * len(again) / len(labels), steps=500)
    torch.testing.assert_close(once, thrice, rtol=0.0, atol=5e-3)


def test_the_probe_gives_the_same_for_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = toy(4, 24)
    whole = probe_weights(features, labels, 4, penalty=4.0)
    assert torch.equal(whole, probe_weights(features, labels, 4, penalty=4.0))
    monkeypatch.setattr(heads, "CHUNK_VALUES", 4 * 7)
    torch.testing.assert_close(probe_weights(features, labels, 4, penalty=4.0), whole, rtol=0.0, atol=5e-3)


def test_the_probe_works_on_features_made_in_inference_mode_and_inside_it() -> None:
    with torch.inference_mode():
        features = drawn("inference", (30, 6)) + torch.eye(6)[torch.arange(30) % 3]
        labels = torch.arange(30) % 3
        inside = probe_weights(features, labels, 3)
    outside = probe_weights(features, labels, 3)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad
    HEADS.build("cosine", inside)(features.clone()).sum().backward()
