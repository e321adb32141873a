"""Accuracy by class and by group of classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MANY_ABOVE = 100
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")
RULES = {"many": f"over {MANY_ABOVE}", "medium": f"{FEW_BELOW} to {MANY_ABOVE}", "few": f"under {FEW_BELOW}"}


def class_groups(train_counts: NDArray[np.int64]) -> NDArray[np.str_]:
    """many (> 100 training images), medium (20 to 100) or few (< 20) for each class, (K,)."""
    return np.where(train_counts > MANY_ABOVE, "many", np.where(train_counts < FEW_BELOW, "few", "medium"))


def summarise(
    correct: NDArray[np.int64], total: NDArray[np.int64], loss_sum: float, train_counts: NDArray[np.int64]
) -> dict[str, float]:
    """Metrics from counts of one split, each accuracy in [0, 1].

    Args:
        correct, total: images of each class, (K,).
        loss_sum: cross-entropy of the raw logits summed over the images.
        train_counts: (K,), what makes a class many, medium or few.

    Returns:
        accuracy over images, mean_class_accuracy, loss, and many, medium, few as means of class accuracies; a group
        without classes in this split is left out.
    """
    seen = total > 0
    per_class = correct[seen] / total[seen]
    groups = class_groups(train_counts)[seen]
    images = max(1, int(total.sum()))
    out = {
        "accuracy": float(correct.sum() / images),
        "mean_class_accuracy": float(per_class.mean()),
        "loss": loss_sum / images,
    }
    return out | {group: float(per_class[groups == group].mean()) for group in GROUPS if (groups == group).any()}
