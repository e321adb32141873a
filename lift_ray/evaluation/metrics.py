"""Accuracy by class and by group of classes, and calibration of the predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lift_ray.epoch_metrics import GROUPS
from lift_ray.storage.atomic import replacing

MANY_ABOVE = 100
FEW_BELOW = 20
ANY = "all"  # name of all groups together, in tables by group
RULES = {"many": f"over {MANY_ABOVE}", "medium": f"{FEW_BELOW} to {MANY_ABOVE}", "few": f"under {FEW_BELOW}"}


class PerClass(NamedTuple):
    """Counts of one split for each class, (K,) each.

    Args:
        correct: images of the class that were classified correctly.
        total: images of the class.
        predicted: images of any class that were classified as the class.
    """

    correct: NDArray[np.int64]
    total: NDArray[np.int64]
    predicted: NDArray[np.int64]


def class_groups(train_counts: NDArray[np.int64]) -> NDArray[np.str_]:
    """Return the group of each class, (K,): many (> 100 training images), medium (20 to 100) or few (< 20)."""
    return np.where(train_counts > MANY_ABOVE, "many", np.where(train_counts < FEW_BELOW, "few", "medium"))


def summarise(
    classes: PerClass, bins: NDArray[np.float64], loss_sum: float, train_counts: NDArray[np.int64]
) -> dict[str, float]:
    """Compute metrics from the counts of one split with at least one image. All except the loss are in [0, 1].

    Args:
        classes: counts by class.
        bins: (3, M), images, summed confidence and correct images of the M bins of confidence.
        loss_sum: cross-entropy of the raw logits, summed over the images.
        train_counts: (K,), training images of each class; they define its group.

    Returns:
        accuracy: fraction of images that are classified correctly.
        mean_class_accuracy, worst_class, harmonic_mean, geometric_mean: of the class accuracies a_k. The last two are 0 if one a_k
        is 0.
        macro_f1: mean over classes of 2 correct / (total + predicted).
        many, medium, few: mean a_k of the group; a group without classes is left out.
        calibration_error: expected calibration error, the sum over bins of |confidence - correct| / images (arXiv 1706.04599).
        loss: mean cross-entropy.
        Classes without images in the split are ignored.
    """
    seen = classes.total > 0
    correct, total, predicted = (counts[seen] for counts in classes)
    accuracies, groups = correct / total, class_groups(train_counts)[seen]
    images = int(total.sum())
    all_found = bool((correct > 0).all())
    out = {
        "accuracy": correct.sum() / images,
        "mean_class_accuracy": accuracies.mean(),
        "worst_class": accuracies.min(),
        "harmonic_mean": 1 / np.mean(1 / accuracies) if all_found else 0.0,
        "geometric_mean": np.exp(np.log(accuracies).mean()) if all_found else 0.0,
        "macro_f1": np.mean(2 * correct / (total + predicted)),
        "calibration_error": np.abs(bins[1] - bins[2]).sum() / images,
        "loss": loss_sum / images,
    }
    out |= {group: accuracies[groups == group].mean() for group in GROUPS if (groups == group).any()}
    return {name: float(value) for name, value in out.items()}


def pseudo_label_figures(counts: NDArray[np.int64], train_counts: NDArray[np.int64]) -> dict[str, float]:
    """Compute precision, recall and number of pseudo-labels, over all classes and by group.

    Args:
        counts: (3, K), images of each class, pseudo-labels of the class, and correct ones among these.
        train_counts: (K,), labeled images of each class; they define its group.

    Returns:
        precision, recall and pseudo_labels, and the same with _many, _medium and _few. Precision is left out if there is no
        pseudo-label, and all three are left out for a group without images.
    """
    groups = class_groups(train_counts)
    out: dict[str, float] = {}
    members = {"": np.full(len(groups), True), **{f"_{group}": groups == group for group in GROUPS}}
    for suffix, here in members.items():
        there, given, right = (float(n) for n in counts[:, here].sum(1))
        if there:
            out |= {f"recall{suffix}": right / there, f"pseudo_labels{suffix}": given}
        if given:
            out[f"precision{suffix}"] = right / given
    return out


def per_class_rows(
    class_names: Sequence[str],
    train_counts: NDArray[np.int64],
    correct: NDArray[np.int64],
    total: NDArray[np.int64],
    predicted: NDArray[np.int64],
) -> list[dict[str, Any]]:
    """Return a row for each class. The last three arguments are the fields of `PerClass`, so they can be passed as `*classes`.

    accuracy and f1 are None for a class without images in the split; the means of the others are mean_class_accuracy and macro_f1.
    precision is None for a class that was never predicted.
    """
    groups = class_groups(train_counts)
    return [
        {
            "class": name,
            "group": str(groups[k]),
            "train_images": int(train_counts[k]),
            "images": int(total[k]),
            "correct": int(correct[k]),
            "predicted": int(predicted[k]),
            "accuracy": float(correct[k] / total[k]) if total[k] else None,
            "precision": float(correct[k] / predicted[k]) if predicted[k] else None,
            "f1": float(2 * correct[k] / (total[k] + predicted[k])) if total[k] else None,
        }
        for k, name in enumerate(class_names)
    ]


def write_per_class(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write the rows of `per_class_rows` atomically as CSV; parameter groups if the rows have them, None as an empty field."""
    import pyarrow as pa
    import pyarrow.csv

    rows = list(rows)
    columns = {"class": pa.string(), "group": pa.string()}
    columns |= dict.fromkeys(("train_images", "images", "correct", "predicted"), pa.int64())
    columns |= dict.fromkeys(("accuracy", "precision", "f1"), pa.float64())
    if rows and "parameter_group" in rows[0]:
        columns["parameter_group"] = pa.string()
    with replacing(path) as temporary:
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows, schema=pa.schema(columns.items())), temporary)
