"""What other taus would give, counted beside an evaluation, and how much of the best one's gain is luck."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lift_ray.evaluation.accumulator import TauGrid, halves_of, shift_of

COUNTS = np.array([100, 10, 1])
TAUS = [0.0, 0.5, 1.0]


def data(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (number,), generator=generator)
    prior = torch.from_numpy(np.log(COUNTS / COUNTS.sum())).float()
    logits = torch.randn(number, 3, generator=generator) + 1.5 * torch.eye(3)[labels] + 0.5 * prior
    return logits, labels


def accuracy(logits: torch.Tensor, labels: torch.Tensor, tau: float) -> float:
    adjusted = logits - tau * torch.from_numpy(np.log(COUNTS / COUNTS.sum())).float()
    right = adjusted.argmax(1) == labels
    return float(np.mean([right[labels == k].float().mean().item() for k in labels.unique().tolist()]))


def counted(logits: torch.Tensor, labels: torch.Tensor, batch: int) -> dict[str, float]:
    grid = TauGrid(TAUS, COUNTS, torch.device("cpu"))
    halves = torch.from_numpy(halves_of(labels.numpy()))
    for i in range(0, len(labels), batch):
        grid.add(logits[i : i + batch], labels[i : i + batch], halves[i : i + batch])
    return grid.result()


@pytest.mark.parametrize("batch", [7, 1000])
def test_the_best_tau_is_the_best_by_definition_however_the_images_are_batched(batch: int) -> None:
    logits, labels = data(300)
    values = [accuracy(logits, labels, tau) for tau in TAUS]
    found = counted(logits, labels, batch)
    assert found["posthoc_tau"] == TAUS[int(np.argmax(values))] == 0.5
    assert found["posthoc_mean_class_accuracy"] == pytest.approx(max(values))


def test_optimism_is_how_much_better_the_choosing_half_scores_with_its_own_choice() -> None:
    logits, labels = data(40, seed=1)
    halves = halves_of(labels.numpy())
    by_half = [[accuracy(logits[halves == h], labels[halves == h], tau) for tau in TAUS] for h in (0, 1)]
    first, second = (np.array(values) for values in by_half)
    expected = (first.max() - first[second.argmax()] + second.max() - second[first.argmax()]) / 2
    assert counted(logits, labels, 1000)["posthoc_optimism"] == pytest.approx(expected)
    assert expected > 0


def test_a_clear_best_has_no_optimism_and_a_class_without_images_counts_for_nothing() -> None:
    labels = torch.tensor([0, 0, 2, 2])
    logits = torch.tensor([[5.0, 0, 0]] * 2 + [[3.0, 0, 1.0]] * 2)
    found = counted(logits, labels, 4)
    assert found == {"posthoc_tau": 0.5, "posthoc_mean_class_accuracy": 1.0, "posthoc_optimism": 0.0}


def test_without_an_adjustment_a_class_without_training_images_changes_nothing() -> None:
    logits, labels = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), torch.tensor([1, 0])
    grid = TauGrid([0.0], np.array([5, 0, 2]), torch.device("cpu"))
    grid.add(logits, labels, torch.zeros(2, dtype=torch.int64))
    assert grid.result()["posthoc_mean_class_accuracy"] == 1
    assert shift_of(0.0, np.array([5, 0, 2])).tolist() == [0, 0, 0]


def test_each_class_is_split_evenly() -> None:
    labels = np.array([2, 0, 2, 1, 2, 0, 2, 2])
    assert halves_of(labels).tolist() == [0, 0, 1, 0, 0, 1, 1, 0]


@pytest.mark.filterwarnings("error")
def test_with_one_image_of_each_class_the_optimism_is_not_known() -> None:
    found = counted(torch.eye(3), torch.tensor([0, 1, 2]), 3)
    assert found.keys() == {"posthoc_tau", "posthoc_mean_class_accuracy"}
