"""Losses against the reference figures, and in the limits where they become one another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_figures import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.model.losses import Loss
from lift_ray.registry import LOSSES

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
OPTIONS: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "focal": {"gamma": 2.0},
    "ldam": {"max_margin": 0.5, "scale": 25.0},
    "class_balanced": {"beta": 0.9999},
    "reweighted": {},
    "balanced_softmax": {},
    "logit_adjusted": {"tau": 1.0},
    "lade": {"remine": 0.1, "weight": 0.1},
    "gla": {"log_q": torch.zeros(())},
}
GOLDEN_CASES: list[tuple[str, str, dict[str, float]]] = [
    ("CE", "cross_entropy", {}),
    ("Focal", "focal", {}),
    ("LDAM", "ldam", {}),
    ("CB", "class_balanced", {}),
    ("GRW", "reweighted", {}),
    ("BS", "balanced_softmax", {}),
    ("LA", "logit_adjusted", {}),
    ("LA_tau0.5", "logit_adjusted", {"tau": 0.5}),
    ("LA_tau2", "logit_adjusted", {"tau": 2.0}),
    ("LADE", "lade", {}),
]
COUNTS = torch.tensor([500.0, 120.0, 33.0, 7.0, 1.0])
UNIFORM = torch.full((5,), 40.0)
LOGITS = 3 * torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5


def made(kind: str, counts: torch.Tensor = COUNTS, **options: float) -> Loss:
    return LOSSES.build(kind, counts, **(OPTIONS[kind] | options))


def value_and_gradient(loss: Loss, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def assert_same(loss: Loss, other: Loss, logits: torch.Tensor = LOGITS, labels: torch.Tensor = LABELS) -> None:
    for mine, theirs in zip(
        value_and_gradient(loss, logits, labels), value_and_gradient(other, logits, labels), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


def differ(loss: Loss, other: Loss) -> bool:
    return abs(float(loss(LOGITS, LABELS) - other(LOGITS, LABELS))) > 1e-3


@pytest.mark.parametrize(("name", "kind", "options"), GOLDEN_CASES)
def test_golden_losses(name: str, kind: str, options: dict[str, float]) -> None:
    loss = made(kind, torch.from_numpy(GOLDEN["class_counts"]).float(), **options)
    logits, labels = torch.from_numpy(GOLDEN["losses/logit"]), torch.from_numpy(GOLDEN["losses/label"]).long()
    value, gradient = value_and_gradient(loss, logits, labels)
    assert abs(float(value) - float(GOLDEN[f"losses/{name}/value"])) <= 2e-5
    assert np.abs(gradient.numpy() - GOLDEN[f"losses/{name}/grad"]).max() <= 2e-5


def test_every_kind_of_loss_is_held_to_a_golden_figure() -> None:
    assert {kind for _, kind, _ in GOLDEN_CASES} == set(LOSSES) - {"gla"}  # in test_prior.py
    assert {name for name, _, _ in GOLDEN_CASES} == {
        key.split("/")[1] for key in GOLDEN.files if key.startswith("losses/") and key.endswith("/grad")
    }


@pytest.mark.parametrize("kind", ["balanced_softmax", "logit_adjusted", "class_balanced", "reweighted"])
def test_with_uniform_counts_what_depends_on_them_is_cross_entropy(kind: str) -> None:
    assert_same(made(kind, UNIFORM), F.cross_entropy)
    assert differ(made(kind), F.cross_entropy)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("logit_adjusted", {"tau": 0.0}),
        ("focal", {"gamma": 0.0}),
        ("ldam", {"max_margin": 0.0}),
        ("class_balanced", {"beta": 0.0}),
    ],
)
def test_without_its_strength_a_loss_is_cross_entropy(kind: str, options: dict[str, float]) -> None:
    assert_same(made(kind, **options), F.cross_entropy)
    assert differ(made(kind), F.cross_entropy)


def test_lade_without_weight_is_balanced_softmax() -> None:
    assert_same(made("lade", weight=0.0), made("balanced_softmax"))
    assert differ(made("lade"), made("balanced_softmax"))


def test_class_balanced_becomes_reweighted_as_beta_goes_to_1() -> None:
    assert_same(made("class_balanced", beta=1 - 1e-9), made("reweighted"))
    assert differ(made("class_balanced", beta=0.9), made("reweighted"))


@pytest.mark.parametrize("max_margin", [0.5, 0.2])
def test_ldam_margins_go_with_the_fourth_root_and_end_at_the_largest(max_margin: float) -> None:
    loss, flat = made("ldam", max_margin=max_margin, scale=1.0), torch.zeros(1, 5)
    losses = [float(loss(flat, torch.tensor([k]))) for k in range(5)]
    margins = [math.log((math.exp(value) - 1) / 4) for value in losses]  # CE of (-m, 0, 0, 0, 0) at 0
    assert margins[-1] == pytest.approx(max_margin, rel=1e-5)
    for margin, count in zip(margins, COUNTS.tolist(), strict=True):
        assert margin == pytest.approx(max_margin * count**-0.25, rel=1e-5)


def test_ldam_scales_the_margin_and_not_the_logits() -> None:
    by_hand = LOGITS.clone()
    by_hand[torch.arange(12), LABELS] -= 25 * 0.5 * COUNTS[LABELS] ** -0.25
    assert float(made("ldam")(LOGITS, LABELS)) == pytest.approx(float(F.cross_entropy(by_hand, LABELS)), rel=1e-6)


def test_focal_weighs_an_image_by_its_missing_probability() -> None:
    probability = 0.9
    logits = torch.tensor([[math.log(probability), math.log(1 - probability)]])
    value = float(made("focal", torch.ones(2), gamma=3.0)(logits, torch.tensor([0])))
    assert value == pytest.approx(0.1**3 * -math.log(0.9), rel=1e-4)


def test_reweighted_makes_every_class_of_the_batch_count_the_same_when_it_is_drawn_by_the_prior() -> None:
    counts, labels = torch.tensor([6.0, 2.0]), torch.tensor([0, 0, 0, 1])
    logits = LOGITS[:4, :2]
    each = F.cross_entropy(logits, labels, reduction="none")
    expected = (each[:3].mean() + each[3]) / 2
    assert float(made("reweighted", counts)(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


def test_lade_asks_for_logits_that_are_normalised_under_uniform_classes() -> None:
    """With remine the second term pulls r_k to 0: a shift of all logits, which no softmax sees, has a best value."""
    loss = made("lade", UNIFORM, remine=0.1, weight=1.0)

    def excess(shift: float) -> float:
        return float(loss(torch.full((5, 5), shift), torch.arange(5)))

    assert excess(0.0) < min(excess(0.5), excess(-0.5))
    # a_k = r_k = shift, so that 0.1 * shift^2 is left
    assert excess(0.5) - excess(0.0) == pytest.approx(0.1 * 0.5**2, rel=1e-3)


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in LOSSES), ("focal", {"gamma": 0.5})])
def test_extreme_logits_and_classes_of_one_image_leave_values_and_gradients_finite(
    kind: str, options: dict[str, float]
) -> None:
    logits = torch.zeros(4, 5)
    logits[0, 0] = logits[1, 1] = logits[2, 2] = 1e4
    logits[3] = -1e4
    loss = made(kind, torch.tensor([1e6, 1e4, 1.0, 1.0, 1.0]), **options)
    value, gradient = value_and_gradient(loss, logits, torch.tensor([0, 4, 2, 3]))
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_never_reads_a_value_on_the_host(kind: str) -> None:
    """Tensors of the meta device hold no values: reading one, or a shape that depends on values, raises."""
    logits = torch.zeros(6, 5, device="meta", requires_grad=True)
    value = made(kind, COUNTS.to("meta"))(logits, torch.zeros(6, dtype=torch.int64, device="meta"))
    value.backward()
    assert value.shape == ()
    assert logits.grad is not None


@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_logits_give_a_finite_loss(kind: str) -> None:
    value, gradient = value_and_gradient(made(kind), LOGITS.bfloat16(), LABELS)
    assert float(value) == pytest.approx(float(made(kind)(LOGITS, LABELS)), rel=0.05)
    assert gradient.dtype == torch.bfloat16


BATCHES = st.tuples(st.integers(2, 6), st.integers(1, 9), st.integers(0, 2**20))


def drawn(batch: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_classes, size, seed = batch
    random = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(size, num_classes, generator=random, dtype=torch.float64)
    labels = torch.randint(num_classes, (size,), generator=random)
    return logits, labels, torch.randint(1, 900, (num_classes,), generator=random).double()


@pytest.mark.parametrize("kind", LOSSES)
@given(batch=BATCHES)
def test_renaming_the_classes_and_reordering_the_images_changes_nothing(kind: str, batch: Any) -> None:
    logits, labels, counts = drawn(batch)
    classes, images = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in logits.T.shape)
    inverse = classes.argsort()
    moved = made(kind, counts[classes])(logits[images][:, classes], inverse[labels[images]])
    assert float(moved) == pytest.approx(float(made(kind, counts)(logits, labels)), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", sorted(LOSSES.keys() - {"lade"}))  # it is for normalised logits, see above
@given(batch=BATCHES)
def test_a_shift_of_all_logits_of_an_image_changes_nothing(kind: str, batch: Any) -> None:
    logits, labels, counts = drawn(batch)
    loss = made(kind, counts)
    assert float(loss(logits + 7.0, labels)) == pytest.approx(float(loss(logits, labels)), rel=1e-6, abs=1e-9)


@given(batch=BATCHES, factor=st.floats(0.01, 100), tau=st.floats(0, 3))
def test_only_the_shares_of_the_classes_matter_to_logit_adjustment(batch: Any, factor: float, tau: float) -> None:
    logits, labels, counts = drawn(batch)
    one, other = (made("logit_adjusted", c, tau=tau)(logits, labels) for c in (counts, factor * counts))
    assert float(one) == pytest.approx(float(other), rel=1e-6, abs=1e-9)
    by_hand = torch.softmax(logits + tau * (counts / counts.sum()).log(), 1)[torch.arange(len(labels)), labels]
    assert float(one) == pytest.approx(float(-by_hand.log().mean()), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["cross_entropy", "balanced_softmax", "logit_adjusted"])
def test_label_smoothing_spreads_part_of_the_target_over_all_classes(kind: str) -> None:
    plain, smoothed = made(kind), made(kind, label_smoothing=0.2)
    over_all = torch.stack([plain(LOGITS, torch.full_like(LABELS, number)) for number in range(5)]).mean()
    torch.testing.assert_close(smoothed(LOGITS, LABELS), 0.8 * plain(LOGITS, LABELS) + 0.2 * over_all)
