"""Accuracy by class and by group of classes, and calibration of the predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lift_ray.data.dataset import Dataset
from lift_ray.epoch_metrics import GROUPS
from lift_ray.storage.atomic import replacing

ANY = "all"  # name of all groups together, in tables by group
PUBLISHED = (20, 100)  # bounds of the groups: few below the first, many above the second
NUM_BINS = 15  # of confidence, as in arXiv 1706.04599

GroupBounds = Literal["auto"] | Sequence[int]


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


@dataclass(frozen=True, eq=False)
class ClassGroups:
    """Division of the classes into many, medium and few by their number of labeled training images.

    Attributes:
        names: many, medium or few for each class, (K,).
        few_below, many_above: few has classes with fewer images than few_below, many those with more than many_above.
        by_thirds: True if these bounds are not the published ones, but were chosen so that no group is empty.
    """

    names: NDArray[np.str_]
    few_below: int
    many_above: int
    by_thirds: bool = False

    @classmethod
    def of(cls, counts: ArrayLike, bounds: GroupBounds = "auto") -> ClassGroups:
        """Divide classes.

        Args:
            counts: labeled training images of each class before any were held out, (K,).
            bounds: (few_below, many_above). With auto, they are the published (20, 100) if each group then has a class;
                otherwise the classes are sorted by their images and cut into thirds. Classes with equally many images stay
                together, so the groups differ in size, and two different numbers of images give few and many only. If
                all classes have equally many, the published bounds hold.
        """
        counts = np.asarray(counts)
        if bounds != "auto":
            few_below, many_above = (int(bound) for bound in bounds)
            return cls(_divided(counts, few_below, many_above), few_below, many_above)
        names = _divided(counts, *PUBLISHED)
        by_thirds = len(np.unique(names)) < len(GROUPS) and len(np.unique(counts)) > 1
        few_below, many_above = _thirds(counts) if by_thirds else PUBLISHED
        return cls(_divided(counts, few_below, many_above), few_below, many_above, by_thirds)

    @property
    def rules(self) -> dict[str, str]:
        """Numbers of training images of a class of each group, in words."""
        few, many = f"{self.few_below:,}", f"{self.many_above:,}"
        return {"many": f"over {many}", "medium": f"{few} to {many}", "few": f"under {few}"}

    def __str__(self) -> str:
        sizes = ", ".join(f"{(self.names == name).sum():,} {name} ({rule})" for name, rule in self.rules.items())
        return sizes + ("; these are thirds of the classes" if self.by_thirds else "")

    @property
    def note(self) -> str:
        """A sentence about the bounds, if they are not the published ones, because a group would be empty; otherwise ""."""
        if not self.by_thirds:
            return ""
        few, many = self.few_below - 1, self.many_above + 1
        return f"groups are thirds of the classes: few <= {few:,} training images, many >= {many:,}"


def _divided(counts: NDArray[Any], few_below: int, many_above: int) -> NDArray[np.str_]:
    return np.where(counts > many_above, "many", np.where(counts < few_below, "few", "medium"))


def _thirds(counts: NDArray[Any]) -> tuple[int, int]:
    """Return (few_below, many_above) of groups of about equal size, from at least two different counts."""
    images, classes = np.unique(counts, return_counts=True)
    below = classes.cumsum()[:-1]  # classes below each place where the groups can be cut
    first = int(np.abs(below[: max(1, len(below) - 1)] - len(counts) / 3).argmin())
    beyond = below[first + 1 :]
    second = first + 1 + int(np.abs(beyond - 2 * len(counts) / 3).argmin()) if len(beyond) else first
    return int(images[first]) + 1, int(images[second + 1]) - 1


def groups_of(dataset: Dataset, bounds: GroupBounds) -> ClassGroups:
    """Return the groups of a dataset, which are the same for every fold, data_frac and refit. Raises BadInput without images.

    Args:
        bounds: the setting evaluation.group_bounds.
    """
    return ClassGroups.of(labelled_counts(dataset), bounds)


def labelled_counts(dataset: Dataset) -> NDArray[np.int64]:
    """Return the labeled training images of each class before any were held out, or if unknown those of the training split, (K,)."""
    counts = dataset.labelled_counts
    return dataset.split("train").class_counts(dataset.num_classes) if counts is None else counts


def stored_groups(record: Mapping[str, Any]) -> ClassGroups:
    """Return the groups of a checkpoint from its record (training.checkpoint.Record, as a mapping).

    Records of earlier versions lack the images before any were held out: the training images and the published bounds then hold.
    """
    if record.get("labelled_counts") is None:
        return ClassGroups.of(record["class_counts"], PUBLISHED)
    return ClassGroups.of(record["labelled_counts"], record["config"]["evaluation"]["group_bounds"])


def summarise(
    classes: PerClass, bins: NDArray[np.float64], loss_sums: NDArray[np.float64], groups: NDArray[np.str_]
) -> dict[str, float]:
    """Compute metrics from the counts of one split with at least one image. All except the losses are in [0, 1].

    Args:
        classes: counts by class.
        bins: (3, M), images, summed confidence and correct images of the M bins of confidence.
        loss_sums: cross-entropy of the logits, summed over the images of each class, (K,).
        groups: many, medium or few for each class, (K,).

    Returns:
        accuracy: fraction of images that are classified correctly.
        mean_class_accuracy, worst_class, harmonic_mean, geometric_mean: of the class accuracies a_k. The last two are 0 if one a_k
        is 0.
        macro_f1: mean over classes of 2 correct / (total + predicted).
        many, medium, few: mean a_k of the group; a group without classes is left out.
        calibration_error: expected calibration error, the sum over bins of |confidence - correct| / images (arXiv 1706.04599).
        loss: mean cross-entropy.
        balanced_log_loss: mean over classes of the mean cross-entropy of the class.
        Classes without images in the split are ignored.
    """
    seen = classes.total > 0
    correct, total, predicted = (counts[seen] for counts in classes)
    accuracies, groups, losses = correct / total, groups[seen], loss_sums[seen]
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
        "balanced_log_loss": (losses / total).mean(),
        "loss": losses.sum() / images,
    }
    out |= {group: accuracies[groups == group].mean() for group in GROUPS if (groups == group).any()}
    return {name: float(value) for name, value in out.items()}


def pseudo_label_figures(counts: NDArray[np.int64], groups: NDArray[np.str_]) -> dict[str, float]:
    """Compute precision, recall and number of pseudo-labels, over all classes and by group.

    Args:
        counts: (3, K), images of each class, pseudo-labels of the class, and correct ones among these.
        groups: many, medium or few for each class, (K,).

    Returns:
        precision, recall and pseudo_labels, and the same with _many, _medium and _few. Precision is left out if there is no
        pseudo-label, and all three are left out for a group without images.
    """
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
    groups: NDArray[np.str_],
    correct: NDArray[np.int64],
    total: NDArray[np.int64],
    predicted: NDArray[np.int64],
) -> list[dict[str, Any]]:
    """Return a row for each class. The last three arguments are the fields of `PerClass`, so they can be passed as `*classes`.

    accuracy and f1 are None for a class without images in the split; the means of the others are mean_class_accuracy and macro_f1.
    precision is None for a class that was never predicted.
    """
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
        columns |= {"parameter_group": pa.string(), "parameter_group_kept": pa.float64()}
    with replacing(path) as temporary:
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows, schema=pa.schema(columns.items())), temporary)
