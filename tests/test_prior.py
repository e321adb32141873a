"""The label prior inside a model: recovered from logits where it was planted, and taken out again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lift_ray.methods import prior
from lift_ray.methods.prior import fit, gla, kept, mean_prior, resampled, thirds
from lift_ray.registry import LOSSES

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them


def planted(
    num_classes: int, counts: torch.Tensor | int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of overlapping Gaussian classes that are exact but for a prior q, their labels, and log q."""
    random = torch.Generator().manual_seed(num_classes)
    means = torch.randn(num_classes, 16, generator=random) / 2
    labels = torch.arange(num_classes).repeat_interleave(torch.as_tensor(counts).expand(num_classes))
    x = means[labels] + torch.randn(len(labels), 16, generator=random)
    log_q = torch.randn(num_classes, generator=random).log_softmax(0)
    return temperature * (x @ means.T - means.square().sum(1) / 2 + log_q), labels, log_q


def distance(found: torch.Tensor, planted: torch.Tensor) -> float:
    """L1 of two priors given by their logs."""
    return float((found.exp() - planted.exp()).abs().sum())


@pytest.mark.parametrize(
    ("num_classes", "images", "too_few", "calibrate"),
    [(50, 40, 5, True), (50, 40, 5, False), (365, 5, 1, True), (1000, 5, 1, True)],
)
def test_a_planted_prior_is_found_with_so_many_images_of_each_class_but_not_with_fewer(
    num_classes: int, images: int, too_few: int, calibrate: bool
) -> None:
    logits, labels, log_q = planted(num_classes, images)
    found = fit(logits, labels, calibrate=calibrate)
    assert distance(found.log_q, log_q) < 0.1 < 0.5 < distance(torch.zeros(num_classes).log_softmax(0), log_q)
    assert float(found.log_q.exp().sum()) == pytest.approx(1, abs=1e-5)
    logits, labels, log_q = planted(num_classes, too_few)
    assert 0.1 < distance(fit(logits, labels, calibrate=calibrate).log_q, log_q) < 0.25


@pytest.mark.parametrize("temperature", [1e-4, 0.25, 4.0, 300.0])
def test_the_temperature_is_found_with_the_prior(temperature: float) -> None:
    logits, labels, log_q = planted(50, 80, temperature)
    found = fit(logits, labels)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert distance(found.log_q, log_q) < 0.1
    if 0.1 < temperature < 10:
        assert distance(fit(logits, labels, calibrate=False).log_q, log_q) > 0.1


def test_a_set_that_is_not_balanced_has_its_own_prior_taken_out() -> None:
    counts = torch.from_numpy(np.geomspace(200, 10, 50).astype(int))
    logits, labels, log_q = planted(50, counts)
    log_r = (counts / counts.sum()).log()
    found = fit(logits, labels).log_q
    assert distance(found, log_q) < 0.15
    assert distance((found - log_r).log_softmax(0), log_q) > 0.5


def test_what_was_fitted_predicts_each_class_as_often_as_it_is_there() -> None:
    logits, labels, _ = planted(50, 40)
    found = fit(logits, labels)
    mass = (logits / found.temperature - found.log_q).softmax(1).mean(0)
    assert torch.allclose(mass, torch.full((50,), 1 / 50), atol=1e-4)


def test_two_ranks_find_what_one_does() -> None:
    logits, labels, _ = planted(50, 40)
    barrier, given = Barrier(2), [torch.zeros(0)] * 2

    def work(rank: int) -> torch.Tensor:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            given[rank] = tensor
            barrier.wait(100)
            total = torch.stack(given).sum(0)
            barrier.wait(100)
            return total

        return fit(logits[rank::2], labels[rank::2], reduce=reduce).log_q

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first, fit(logits, labels).log_q, atol=1e-4)


def test_a_class_without_an_image_is_named() -> None:
    logits, labels, _ = planted(50, 4)
    with pytest.raises(ValueError, match=r"every class needs an image, but there is none of class 3, 7$"):
        fit(logits[(labels != 3) & (labels != 7)], labels[(labels != 3) & (labels != 7)])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: -z, "the model's logits must say something of the labels, but no temperature makes them do"),
        (lambda z: z * float("nan"), "the model's logits must be finite and differ, but their deviation is nan"),
        (lambda z: z * 0, "the model's logits must be finite and differ, but their deviation is 0"),
    ],
)
def test_logits_that_carry_no_signal_have_no_prior(spoil: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    logits, labels, _ = planted(50, 40)
    with pytest.raises(ValueError, match=f"^{message}$"):
        fit(spoil(logits), labels)


def test_the_fit_settles_where_alternating_scaling_did_not() -> None:
    logits, labels, _ = planted(50, 40)
    logits = logits + 100 * F.one_hot(labels, 50)  # every image is right: without the ridge, 1 / T is infinite
    found = fit(logits, labels)
    mass = (logits / found.temperature - found.log_q).double().softmax(1).mean(0)
    assert float((mass * 50 - 1).abs().max()) < 0.01


def test_a_fit_that_does_not_converge_gives_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior, "MOST_ROUNDS", 2)
    with pytest.raises(ValueError, match=r"^the label prior must settle, but a class is still off by [0-9.e-]+ of its"):
        fit(*planted(50, 40)[:2])


def test_resampled_images_tell_the_error_of_a_prior() -> None:
    """The estimate follows the true error, which falls with the square root of the images, also with one image of a class."""
    ratios = []
    for images in (1, 10, 40):
        logits, labels, log_q = planted(50, images)
        found = fit(logits, labels)
        samples = resampled(logits, labels, found)
        assert torch.equal(samples, resampled(logits, labels, found))
        error = found.log_q - log_q
        spread = (samples - samples.mean(1, keepdim=True)).var(0).mean().sqrt()
        ratios.append(float(spread / error.std()))
    assert all(0.5 < ratio < 1.5 for ratio in ratios)


def test_a_class_keeps_its_group_as_often_as_the_resampled_priors_say() -> None:
    names = np.array(["many", "medium", "few"])
    samples = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1], [0.6, 0.1, 0.3]]).log()
    assert kept(names, samples).tolist() == [0.75, 0.5, 0.75]


def test_gla_of_exact_models_that_hold_a_prior_each_is_exact_again() -> None:
    logits, labels, log_q = planted(50, 40)
    balanced = logits - log_q
    log_prior = torch.from_numpy(np.geomspace(200, 2, 50)).log().log_softmax(0).float()
    made = gla(balanced + log_prior, balanced + log_q, log_prior, log_q)
    assert torch.allclose(made, 2 * balanced, atol=1e-4)
    right = [float((z.argmax(1) == labels).float().mean()) for z in (balanced + log_prior, made)]
    assert right[1] > right[0]


def test_the_loss_of_gla_adds_both_priors_to_the_logits() -> None:
    logits, labels, log_q = planted(50, 4)
    counts = torch.from_numpy(np.geomspace(200, 2, 50)).float()
    expected = F.cross_entropy(logits + (counts / counts.sum()).log() + log_q, labels)
    assert float(LOSSES.build("gla", counts, log_q=log_q)(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


def test_thirds_are_by_prior_and_cover_all_classes() -> None:
    log_q = torch.tensor([0.1, 0.3, 0.05, 0.25, 0.2, 0.04, 0.06]).log()
    assert thirds(log_q).tolist() == ["medium", "many", "few", "many", "many", "few", "medium"]


def test_the_mean_prior_of_equal_ones_is_the_same_and_of_others_lies_between() -> None:
    one, other = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.1, 0.2, 0.7]).log()
    assert torch.allclose(mean_prior([one, one]), one)
    found = mean_prior([one, other]).exp()
    assert found[0] == pytest.approx(float(found[2]))
    assert float(found.sum()) == pytest.approx(1)
