"""Folds: each labeled image outside the test split is held out once, from a model that does not train on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lift_ray.data.dataset import Dataset, Split, joined
from lift_ray.data.longtail import Int64s
from lift_ray.data.stratify import assign_groups
from lift_ray.errors import BadInput

Mask = npt.NDArray[np.bool_]

SEARCHED = 1  # the fold on which trials are searched
EVERYTHING = 0  # number of the view that trains on all labeled images and holds none out
VALIDATION_FRAC = 0.1  # of each class, if the dataset has no validation split and there is a single fold


@dataclass(frozen=True)
class Folds:
    """Division of the labeled images outside the test split, a pure function of these arguments and the data.

    Fold 1 is the validation split. If there is none, it is drawn from the training split like another fold. The folds 2 to K divide
    the training split. An image that would leave its class without a training image is never held out.

    Args:
        number: K, 1 or at least 3: with 2, the second fold would be the whole training split.
        seed: seed of the division.
        train_on_separate: train on validation images in `everything` even if they are a set of their own.
    """

    number: int = 1
    seed: int = 0
    train_on_separate: bool = False

    def view(self, dataset: Dataset, fold: int) -> Dataset:
        """Return the dataset with the training and validation images of a fold; EVERYTHING has no validation split.

        Its other splits are unchanged, and so are fold 1 of a dataset with a validation split, and a dataset without training
        split.
        """
        if "train" not in dataset.splits or (fold == EVERYTHING and "validation" not in dataset.splits):
            return dataset
        dataset = _with_validation(self, dataset)
        train, validation = dataset.splits["train"], dataset.splits["validation"]
        if fold == SEARCHED:
            return dataset
        trains_on_both = dataset.validation == "drawn" or (fold == EVERYTHING and self.train_on_separate)
        held = _fold_of(self, dataset) == fold if fold else np.zeros(train.num_samples, bool)
        parts = [(train, np.flatnonzero(~held))]
        if trains_on_both:
            parts.append((validation, np.arange(validation.num_samples)))
        splits = {name: split for name, split in dataset.splits.items() if name != "validation"}
        splits["train"] = joined("train", parts) if held.any() or trains_on_both else train
        if fold:
            splits["validation"] = joined("validation", [(train, np.flatnonzero(held))])
        return replace(dataset, splits=splits)


@lru_cache(maxsize=8)
def _with_validation(folds: Folds, dataset: Dataset) -> Dataset:
    """Return the dataset with its labeled counts, and a validation split drawn from its training images if it has none."""
    whole = dataset.splits["train"]
    if dataset.labelled_counts is None:
        dataset = replace(dataset, labelled_counts=whole.class_counts(dataset.num_classes))
    if "validation" in dataset.splits:
        return dataset
    held = _drawn(whole, 1 / folds.number if folds.number > 1 else VALIDATION_FRAC, folds.seed)
    if not held.any():
        raise BadInput(
            dataset.uri,
            "must have a class with two training images",
            but="no validation image can be drawn",
            remedy="add images",
        )
    train = joined("train", [(whole, np.flatnonzero(~held))])
    drawn = joined("validation", [(whole, np.flatnonzero(held))])
    return replace(dataset, splits={**dataset.splits, "train": train, "validation": drawn}, validation="drawn")


@lru_cache(maxsize=8)
def _fold_of(folds: Folds, dataset: Dataset) -> Int64s:
    """Return the fold of each sample of the training split, (N,), from 2 to K; 0 if it is never held out."""
    train, others = dataset.splits["train"], np.zeros(dataset.num_classes, np.int64)
    if dataset.validation == "drawn":
        others = dataset.splits["validation"].class_counts(dataset.num_classes)
    number = folds.number - 1
    if train.groups is not None:
        fold_of = 2 + assign_groups(train.labels, train.groups, [1 / number] * number, folds.seed)
    else:
        order = _by_class(train.labels, folds.seed)
        fold_of = np.empty(train.num_samples, np.int64)
        fold_of[order] = 2 + np.arange(train.num_samples) % number
    # A class whose training images are all in one fold, with none elsewhere, would have no training image in that fold.
    counts = np.zeros((folds.number + 1, dataset.num_classes), np.int64)
    np.add.at(counts, (fold_of, train.labels), 1)
    alone = (counts == counts.sum(0)) & (others == 0)
    return np.where(_with_their_groups(train, alone[fold_of, train.labels]), 0, fold_of)


def _with_their_groups(split: Split, samples: Mask) -> Mask:
    """Return the mask of samples, (N,), with all others of their groups."""
    return samples if split.groups is None else np.isin(split.groups, split.groups[samples])


def training_view(dataset: Dataset, train_on: str) -> Dataset:
    """Return the dataset with the training images of a run file: `train`, or `train+validation` and then no validation split."""
    return dataset if train_on == "train" else Folds(train_on_separate=True).view(dataset, EVERYTHING)


def _drawn(split: Split, frac: float, seed: int) -> Mask:
    """Return a mask, (N,), of the given fraction of each class with two images or more: at least one, and never all."""
    if split.groups is not None:
        apart = assign_groups(split.labels, split.groups, [1 - frac, frac], seed, in_order=True)
        kept = np.bincount(split.labels[apart == 0], minlength=int(split.labels.max()) + 1)
        held: Mask = (apart == 1) & ~_with_their_groups(split, kept[split.labels] == 0)
        return held
    order = _by_class(split.labels, seed)
    counts = np.bincount(split.labels)
    wanted = np.minimum(np.maximum(1, np.round(frac * counts)), counts - 1).astype(np.int64)
    rank = np.arange(len(order)) - np.searchsorted(split.labels[order], split.labels[order], side="left")
    held = np.zeros(len(order), bool)
    held[order] = rank < wanted[split.labels[order]]
    return held


def _by_class(labels: Int64s, seed: int) -> Int64s:
    """Return sample numbers in the order of their classes, in random order within a class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def unseen_classes(dataset: Dataset, folds: Folds | None = None) -> list[str]:
    """Return the names of the classes that no held-out image shows to a search."""
    seen = np.zeros(dataset.num_classes, bool)
    for fold in range(1, (folds or Folds()).number + 1):
        validation = (folds or Folds()).view(dataset, fold).splits["validation"]
        seen |= validation.class_counts(dataset.num_classes) > 0
    return [name for name, is_seen in zip(dataset.class_names, seen, strict=True) if not is_seen]
