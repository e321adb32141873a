"""Accumulators of an evaluation, which count on the device, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.epoch_metrics import POSTHOC_ACCURACY, POSTHOC_OPTIMISM, POSTHOC_TAU
from lift_ray.evaluation.metrics import NUM_BINS, PerClass, summarise


def shift_of(tau: float, class_counts: NDArray[np.int64]) -> Tensor:
    """Return tau * log prior, (K,) in fp32, which the post-hoc adjustment subtracts from logits.

    The prior of a class is its fraction of the training images.
    """
    if not tau:  # the logarithm is infinite for a class without training images, and 0 times that is not a number
        return torch.zeros(len(class_counts))
    return tau * torch.from_numpy(np.log(class_counts / class_counts.sum())).float()


class MetricAccumulator:
    """Sums over the images of a split; `add` reads nothing back to the host.

    Bin m of M = 15 counts images whose confidence, the largest softmax probability, is in (m / M, (m + 1) / M].

    Args:
        num_classes: K.
        device: device of the logits.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)  # correct, total, predicted
        self._bins = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=device)  # images, confidence, correct
        self._losses = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: raw logits (B, K), labels (B,)."""
        log_p = logits.float().log_softmax(1)
        predicted = logits.argmax(1)
        hit, one = predicted == labels, torch.ones_like(labels)
        self._counts[0].index_add_(0, labels, hit.long())
        self._counts[1].index_add_(0, labels, one)
        self._counts[2].index_add_(0, predicted, one)
        confidence = log_p.amax(1).exp().double()
        place = ((confidence * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)
        self._bins.index_add_(1, place, torch.stack([one.double(), confidence, hit.double()]))
        self._losses.index_add_(0, labels, -log_p.gather(1, labels.unsqueeze(1)).squeeze(1).double())

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the caller must sum over the ranks, in place, before `result`."""
        return [self._counts, self._bins, self._losses]

    def result(self, groups: NDArray[np.str_]) -> tuple[dict[str, float], PerClass]:
        """Return the metrics of `summarise`, and the counts by class.

        Args:
            groups: many, medium or few for each class, (K,).
        """
        classes = PerClass(*self._counts.cpu().numpy())
        return summarise(classes, self._bins.cpu().numpy(), self._losses.cpu().numpy(), groups), classes


class PredictionCollector:
    """Prediction of a model for each image of a split, in storage order; a rank fills its slice, the rest stays 0.

    Args:
        num_images: N, images of the whole split.
        first: number of the first image of this rank's slice.
        device: device of the logits.
    """

    def __init__(self, num_images: int, first: int, device: torch.device) -> None:
        self._found = torch.zeros(2, num_images, dtype=torch.float64, device=device)  # predicted, confidence
        self._at = first

    def add(self, logits: Tensor) -> None:
        """Add the next images: raw logits (B, K)."""
        confidence, predicted = logits.float().softmax(1).max(1)
        self._found[:, self._at : self._at + len(logits)] = torch.stack([predicted.double(), confidence.double()])
        self._at += len(logits)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the caller must sum over the ranks, in place, before `result`."""
        return [self._found]

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the predicted class and its probability for each image, (N,) each."""
        predicted, confidence = self._found.cpu().numpy()
        return predicted.astype(np.int64), confidence


class TauGrid:
    """Accuracy for each strength of the post-hoc adjustment z - tau * log prior, counted during an evaluation.

    The images are divided into halves. Choosing tau on one half and measuring on the other estimates the selection bias.

    Args:
        taus: strengths in ascending order.
        train_counts: (K,), training images of each class.
        device: device of the logits.
    """

    def __init__(self, taus: Sequence[float], train_counts: NDArray[np.int64], device: torch.device) -> None:
        self.taus = list(taus)
        num_classes = len(train_counts)
        self._shifts = [shift_of(tau, train_counts).to(device) for tau in taus]
        self._correct = torch.zeros(len(self.taus), 2 * num_classes, dtype=torch.int64, device=device)
        self._total = torch.zeros(2 * num_classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor, halves: Tensor) -> None:
        """Count a batch: raw logits (B, K), labels (B,), and 0 or 1 for each image (B,)."""
        cell = labels + halves * (len(self._total) // 2)
        self._total.index_add_(0, cell, torch.ones_like(labels))
        for shift, correct in zip(self._shifts, self._correct, strict=True):
            correct.index_add_(0, cell, ((logits.float() - shift).argmax(1) == labels).long())

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the caller must sum over the ranks, in place, before `result`."""
        return [self._correct, self._total]

    def result(self) -> dict[str, float]:
        """Return the best tau and its effect.

        Returns:
            posthoc_tau: the tau with the best mean class accuracy.
            posthoc_mean_class_accuracy: the mean class accuracy with it.
            posthoc_optimism: mean over both halves of (best accuracy on the half) - (its accuracy with the tau chosen on the other
            half), at least 0; left out if a half has no image, as with one image of each class.
        """
        correct, total = (t.cpu().numpy().astype(float) for t in self.tensors())
        by_half, counts = correct.reshape(len(self.taus), 2, -1), total.reshape(2, -1)
        both = _mean_class_accuracy(by_half.sum(1), counts.sum(0))
        best = int(both.argmax())
        found = {POSTHOC_TAU: self.taus[best], POSTHOC_ACCURACY: float(both[best])}
        if not counts.any(1).all():
            return found
        first, second = (_mean_class_accuracy(by_half[:, half], counts[half]) for half in (0, 1))
        optimism = (first.max() - first[second.argmax()] + second.max() - second[first.argmax()]) / 2
        return {**found, POSTHOC_OPTIMISM: float(optimism)}


def _mean_class_accuracy(correct: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over classes, (T,), from correct (T, K) and total (K,); classes without images are left out."""
    there = total > 0
    mean: NDArray[np.float64] = (correct[:, there] / total[there]).mean(1)
    return mean


def halves_of(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide images into halves, 0 or 1, (N,): images of a class alternate."""
    order = np.argsort(labels, kind="stable")
    seen = np.arange(len(order)) - np.searchsorted(labels[order], labels[order], side="left")
    halves = np.empty(len(labels), np.int64)
    halves[order] = seen % 2
    return halves
