"""Selection of the images of a conversion and their splits, drawn by seed before any image is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lift_ray.data.convert.index import ImageIndex
from lift_ray.data.layout import SPLITS
from lift_ray.data.longtail import Int64s, keep_first, longtail_counts, semi_supervised_counts
from lift_ray.errors import BadInput

DRAWN = ("validation", "test")  # splits that can be drawn from the training images

Row = tuple[str, int]
"""Reference and label of an image."""


@dataclass(frozen=True)
class Division:
    """Division of images into splits. Raises BadInput for options that cannot be combined.

    Attributes:
        validation_frac: fraction of each class, in [0, 1), that moves from training to validation; None for 0.1 if the source
            has no validation split. At least one image of each class stays.
        test_frac: fraction of each class that moves to the test split; None for 0.
        seed: seed of every draw and of the order.
        imbalance: reduce the remaining training images to a long tail with this factor, >= 1.
        largest: images of the first class of that tail; None for all.
        labelled, unlabelled: make a semi-supervised set instead: labeled and additional unlabeled images of the first
            class.
        gamma_l, gamma_u: imbalance factors of the labeled and the unlabeled images, >= 1; gamma_u is gamma_l if None.
        flipped: reverse the order of the classes for the unlabeled images.
    """

    validation_frac: float | None = None
    test_frac: float | None = None
    seed: int = 0
    imbalance: float | None = None
    largest: int | None = None
    labelled: int | None = None
    unlabelled: int | None = None
    gamma_l: float | None = None
    gamma_u: float | None = None
    flipped: bool = False

    def __post_init__(self) -> None:
        for split, frac in (("validation", self.validation_frac), ("test", self.test_frac)):
            if frac is not None and not 0 <= frac < 1:
                raise BadInput(f"{split}-frac", "must be at least 0 and below 1", f"{frac:g}", "for example, 0.1")
        if self.largest is not None and self.imbalance is None:
            raise BadInput("largest", "requires an imbalance", "none", "add --imbalance")
        semi_supervised = {
            "labelled": self.labelled,
            "unlabelled": self.unlabelled,
            "gamma-l": self.gamma_l,
            "gamma-u": self.gamma_u,
            "reversed": self.flipped or None,
        }
        given = [name for name, value in semi_supervised.items() if value is not None]
        if given and (missing := {"labelled", "unlabelled", "gamma-l"} - set(given)):
            raise BadInput(given[0], f"requires {min(missing)}", "none", f"add --{min(missing)}")
        if given and self.imbalance is not None:
            raise BadInput(
                "imbalance", "cannot be combined with labelled, whose imbalance is gamma-l", remedy="remove one"
            )
        if self.flipped and (self.gamma_l if self.gamma_u is None else self.gamma_u) == 1:
            raise BadInput(
                "reversed", "requires an unlabelled imbalance above 1", but="gamma-u is 1", remedy="remove it"
            )


def divide(index: ImageIndex, division: Division) -> dict[str, list[Row]]:
    """Return the shuffled rows of every nonempty split, in the order of SPLITS.

    The unlabeled split of a semi-supervised set also contains the labeled images.

    Raises BadInput if the index already has a split that is to be drawn, or a class has too few images.
    """
    taken = {"validation": division.validation_frac, "test": division.test_frac, "unlabelled": division.labelled}
    for split, value in taken.items():
        if value is not None and split in index.splits:
            option = "labelled" if split == "unlabelled" else f"{split}-frac"
            raise BadInput(
                option, "must not be given", but=f"{index.source} has its own {split} images", remedy="remove it"
            )
    test_frac, validation_frac = division.test_frac or 0.0, division.validation_frac
    if validation_frac is None:
        validation_frac = 0.0 if "validation" in index.splits else 0.1
    if validation_frac + test_frac >= 1:
        raise BadInput("test-frac", "must leave images for training", f"{test_frac:g}", "give a smaller fraction")
    drawn = stratified_split(_labels(index.splits["train"]), validation_frac, test_frac, division.seed)
    splits = {**index.splits}
    for split in ("train", *DRAWN):
        if split == "train" or split not in index.splits:
            splits[split] = [index.splits["train"][row] for row in drawn[split]]
    splits = {split: _shuffled(splits[split], split, division.seed) for split in SPLITS if splits.get(split)}
    if division.imbalance is not None:
        splits["train"] = _long_tailed(splits["train"], division.imbalance, division.largest)
    if division.labelled is not None:
        splits["train"], pool = _semi_supervised(index, splits["train"], division)
        splits["unlabelled"] = _shuffled(pool, "unlabelled", division.seed)
    return splits


def stratified_split(labels: Int64s, validation_frac: float, test_frac: float, seed: int) -> dict[str, Int64s]:
    """Draw round(frac * n) images of every class for validation and test; one of each class stays in train.

    Args:
        labels: label of every image, (N,).
        validation_frac, test_frac: in [0, 1), together below 1.

    Returns:
        Ascending indices into `labels` for train, validation and test, together a permutation of 0 .. N-1.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Int64s]] = {split: [np.zeros(0, np.int64)] for split in ("train", *DRAWN)}
    for label in np.unique(labels):
        drawn = rng.permutation(np.flatnonzero(labels == label))
        num_validation = min(round(validation_frac * len(drawn)), len(drawn) - 1)
        num_test = min(round(test_frac * len(drawn)), len(drawn) - 1 - num_validation)
        cuts = np.split(drawn, [num_validation, num_validation + num_test])
        for split, rows in zip((*DRAWN, "train"), cuts, strict=True):
            parts[split].append(rows)
    return {split: np.sort(np.concatenate(rows)) for split, rows in parts.items()}


def _long_tailed(rows: list[Row], imbalance: float, largest: int | None) -> list[Row]:
    labels = _labels(rows)
    natural = np.bincount(labels).astype(np.int64)
    counts = longtail_counts(natural, int(natural.max()) if largest is None else largest, imbalance)
    return _first(rows, labels, counts)


def _semi_supervised(index: ImageIndex, rows: list[Row], division: Division) -> tuple[list[Row], list[Row]]:
    """Return the labeled rows, and the unlabeled pool, which includes them."""
    assert division.labelled is not None
    assert division.unlabelled is not None
    assert division.gamma_l is not None
    gamma_u = division.gamma_l if division.gamma_u is None else division.gamma_u
    labels = _labels(rows)
    natural = np.bincount(labels).astype(np.int64)
    labelled, further = semi_supervised_counts(
        natural, division.labelled, division.unlabelled, division.gamma_l, gamma_u, flipped=division.flipped
    )
    for label in np.flatnonzero(labelled + further > natural)[:1]:
        raise BadInput(
            index.source,
            f"class {index.class_names[label]!r} must have {labelled[label] + further[label]} training images "
            f"({labelled[label]} labelled and {further[label]} further)",
            natural[label],
            "give smaller numbers",
        )
    return _first(rows, labels, labelled), _first(rows, labels, labelled + further)


def _labels(rows: Sequence[Row]) -> Int64s:
    return np.array([label for _, label in rows], dtype=np.int64)


def _first(rows: list[Row], labels: Int64s, counts: Int64s) -> list[Row]:
    return [rows[row] for row in keep_first(labels, counts)]


def _shuffled(rows: list[Row], split: str, seed: int) -> list[Row]:
    order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(len(rows))
    return [rows[row] for row in order]
