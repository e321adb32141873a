"""What an evaluation counts, on the device, batch by batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.results.metrics import PerClass, summarise

NUM_BINS = 15  # of confidence, as in arXiv 1706.04599


class Tally:
    """Sums over the images of a split; `add` reads nothing back to the host.

    Bin m of M = 15 holds the images whose confidence, the largest softmax probability, lies in (m / M, (m + 1) / M].

    Args:
        num_classes: K.
        device: where the logits are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)  # correct, total, predicted
        self._bins = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=device)  # images, confidence, correct
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

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
        self._loss -= log_p.gather(1, labels.unsqueeze(1)).double().sum()

    def tensors(self) -> list[Tensor]:
        """What the caller must sum over the ranks, in place, before `result`."""
        return [self._counts, self._bins, self._loss]

    def result(self, train_counts: NDArray[np.int64]) -> tuple[dict[str, float], PerClass]:
        """The metrics of `summarise`, and the counts by class.

        Args:
            train_counts: (K,), training images of each class.
        """
        classes = PerClass(*self._counts.cpu().numpy())
        return summarise(classes, self._bins.cpu().numpy(), float(self._loss), train_counts), classes
