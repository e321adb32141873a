"""Selection of the images of a conversion and their splits, drawn by seed before any image is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lift_ray.data.convert.groups import group_numbers
from lift_ray.data.convert.index import ImageIndex
from lift_ray.data.layout import SPLITS
from lift_ray.data.longtail import Int64s, keep_first, longtail_counts, places_of, semi_supervised_counts
from lift_ray.data.stratify import assign_groups
from lift_ray.errors import BadInput, first_few

DRAWN = {"validation": 0.1, "test": 0.2}  # splits that are drawn if the source has none, and their fractions

Row = tuple[str, int, *tuple[int, ...]]
"""Reference and label of an image, and the number of its group if there are groups."""


@dataclass(frozen=True)
class Division:
    """Division of images into splits. Raises BadInput for options that cannot be combined.

    Attributes:
        validation_frac, test_frac: fraction of each class, in [0, 1), that moves from training to this split; 0 draws none.
            None for the default of DRAWN if the source has no such split, but no test split for a semi-supervised set.
        seed: seed of every draw and of the order.
        imbalance: reduce the training images that are no test images to a long tail with this factor, >= 1. Validation images
            are drawn from what this discards.
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


@dataclass(frozen=True)
class Divided:
    """Images divided into splits.

    Attributes:
        splits: shuffled rows of every nonempty split, in the order of SPLITS. The unlabeled split of a semi-supervised set also
            contains the labeled images.
        from_training: the training split and those that were taken out of it.
    """

    splits: dict[str, list[Row]]
    from_training: tuple[str, ...]


def divide(index: ImageIndex, division: Division) -> Divided:
    """Divide images into splits.

    Raises BadInput if a class has no training image or too few, the index already has a split that is to be drawn, or groups are
    combined with a cut.
    """
    _check(index, division)
    is_cut = division.imbalance is not None or index.discarded is not None
    fractions = _fractions(index, division)
    numbers = None if index.groups is None else group_numbers(index)
    drawn = _draw(index, numbers, 0.0 if is_cut else fractions["validation"], fractions["test"], division.seed)
    own = {split: list[Row](rows) for split, rows in index.splits.items() if split != "train"}
    splits = {split: _shuffled(rows, split, division.seed) for split, rows in {**drawn, **own}.items()}
    if is_cut:
        discarded = list[Row](index.discarded or ())
        if division.imbalance is not None:
            splits["train"], discarded = _long_tailed(splits["train"], division.imbalance, division.largest)
        if "validation" not in own:
            shuffled = _shuffled(discarded, "validation", division.seed)
            splits["validation"] = _from_discarded(shuffled, splits["train"], fractions["validation"])
    if division.labelled is not None:
        splits["train"], pool = _semi_supervised(index, splits["train"], division)
        splits["unlabelled"] = _shuffled(pool, "unlabelled", division.seed)
    taken = [] if is_cut or division.labelled is not None else [split for split in DRAWN if split not in own]
    nonempty = {split: _with_groups(splits[split], numbers) for split in SPLITS if splits.get(split)}
    return Divided(nonempty, ("train", *taken))


def _check(index: ImageIndex, division: Division) -> None:
    trained = {label for _, label in index.splits.get("train", [])}
    if bare := [repr(name) for label, name in enumerate(index.class_names) if label not in trained]:
        raise BadInput(
            index.source,
            "every class must have an image",
            but=f"{first_few(bare)} {'has' if len(bare) == 1 else 'have'} none",
            remedy="add images or remove these classes",
        )
    taken = {"validation": division.validation_frac, "test": division.test_frac, "unlabelled": division.labelled}
    for split, value in taken.items():
        if value is not None and split in index.splits:
            option = "labelled" if split == "unlabelled" else f"{split}-frac"
            raise BadInput(
                option, "must not be given", but=f"{index.source} has its own {split} images", remedy="remove it"
            )
    for option, value in (("imbalance", division.imbalance), ("labelled", division.labelled)):
        if index.groups is not None and value is not None:
            raise BadInput("group", f"cannot be combined with {option}, which takes single images", remedy="remove one")


def _fractions(index: ImageIndex, division: Division) -> dict[str, float]:
    """Return the fraction of each split that is drawn. Raises BadInput if nothing is left for training."""
    given = {"validation": division.validation_frac, "test": division.test_frac}
    defaults = {split: 0.0 if split in index.splits else frac for split, frac in DRAWN.items()}
    if division.labelled is not None:
        defaults["test"] = 0.0
    fractions = {split: defaults[split] if frac is None else frac for split, frac in given.items()}
    if sum(fractions.values()) >= 1:
        split = "validation" if division.test_frac is None else "test"
        raise BadInput(
            f"{split}-frac", "must leave images for training", f"{fractions[split]:g}", "give a smaller fraction"
        )
    return fractions


def _draw(
    index: ImageIndex, numbers: Mapping[str, int] | None, validation_frac: float, test_frac: float, seed: int
) -> dict[str, list[Row]]:
    """Draw validation and test from the training images: single ones, or whole groups if there are `numbers` of groups."""
    rows = index.splits["train"]
    if numbers is None:
        drawn = stratified_split(_labels(rows), validation_frac, test_frac, seed)
    else:
        groups = np.array([numbers[reference] for reference, _ in rows], dtype=np.int64)
        fractions = (1 - validation_frac - test_frac, validation_frac, test_frac)
        parts = assign_groups(_labels(rows), groups, fractions, seed, in_order=True)
        drawn = {split: np.flatnonzero(parts == part) for part, split in enumerate(("train", *DRAWN))}
    return {split: [rows[row] for row in chosen] for split, chosen in drawn.items()}


def stratified_split(labels: Int64s, validation_frac: float, test_frac: float, seed: int) -> dict[str, Int64s]:
    """Draw round(frac * n) images of every class of n for validation and test, but at least those of `_held_out`.

    Args:
        labels: label of every image, (N,).
        validation_frac, test_frac: in [0, 1), together below 1; 0 draws none.

    Returns:
        Ascending indices into `labels` for train, validation and test, together a permutation of 0 .. N-1.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Int64s]] = {split: [np.zeros(0, np.int64)] for split in ("train", *DRAWN)}
    for _, images in places_of(labels):
        drawn = rng.permutation(images)
        num_validation, num_test = _held_out(len(drawn), validation_frac, test_frac)
        cuts = np.split(drawn, [num_validation, num_validation + num_test])
        for split, rows in zip((*DRAWN, "train"), cuts, strict=True):
            parts[split].append(rows)
    return {split: np.sort(np.concatenate(rows)) for split, rows in parts.items()}


def _held_out(count: int, validation_frac: float, test_frac: float) -> tuple[int, int]:
    """Return how many of a class's images go to validation and test.

    A class of two images has one in validation, one of four also has one in test, and one stays in training.
    """
    least_validation, least_test = int(validation_frac > 0 and count >= 2), int(test_frac > 0 and count >= 4)
    num_validation = min(max(round(validation_frac * count), least_validation), count - 1 - least_test)
    num_test = min(max(round(test_frac * count), least_test), count - 1 - num_validation)
    return num_validation, num_test


def _long_tailed(rows: list[Row], imbalance: float, largest: int | None) -> tuple[list[Row], list[Row]]:
    """Return the rows of the long tail, and those that it discards."""
    labels = _labels(rows)
    natural = np.bincount(labels).astype(np.int64)
    counts = longtail_counts(natural, int(natural.max()) if largest is None else largest, imbalance)
    kept = np.zeros(len(rows), dtype=bool)
    kept[keep_first(labels, counts)] = True
    return [rows[row] for row in np.flatnonzero(kept)], [rows[row] for row in np.flatnonzero(~kept)]


def _from_discarded(discarded: list[Row], train: list[Row], frac: float) -> list[Row]:
    """Return round(frac * n) discarded rows of every class, at least one; n counts its images before the cut."""
    labels = _labels(discarded)
    before = np.bincount(np.concatenate([labels, _labels(train)]))
    return _first(discarded, labels, np.maximum(np.round(frac * before), frac > 0).astype(np.int64))


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


def _with_groups(rows: Sequence[Row], numbers: Mapping[str, int] | None) -> list[Row]:
    return list(rows) if numbers is None else [(*row, numbers[row[0]]) for row in rows]


def _labels(rows: Sequence[Row]) -> Int64s:
    return np.array([row[1] for row in rows], dtype=np.int64)


def _first(rows: list[Row], labels: Int64s, counts: Int64s) -> list[Row]:
    return [rows[row] for row in keep_first(labels, counts)]


def _shuffled(rows: list[Row], split: str, seed: int) -> list[Row]:
    order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(len(rows))
    return [rows[row] for row in order]
