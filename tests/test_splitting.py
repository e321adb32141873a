"""Which images are kept for which split: drawn by seed, stratified, and never leaving a class without training."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.data.convert.groups import with_groups
from lift_ray.data.convert.index import FilesIn, ImageIndex
from lift_ray.data.convert.splitting import Divided, Division, divide, stratified_split
from lift_ray.errors import BadInput

FRACS = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)).filter(lambda pair: sum(pair) < 1)
COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=8)
Row = tuple[str, int]


def index_of(counts: list[int], **more: list[Row]) -> ImageIndex:
    """An index with so many training images of each class; splitting reads none of them."""
    rows = [(f"{label}/{number}.jpg", label) for label, count in enumerate(counts) for number in range(count)]
    names = tuple(f"class {label}" for label in range(len(counts)))
    return ImageIndex("photos", names, {"train": rows, **more}, FilesIn("photos"))


def grouped(*sizes: list[int], **more: list[Row]) -> ImageIndex:
    """An index of classes whose groups have these sizes; groups of size 1 have no name."""
    index = index_of([sum(here) for here in sizes], **more)
    names = {}
    for label, here in enumerate(sizes):
        own = iter(range(sum(here)))
        for group, size in enumerate(here):
            names.update({f"{label}/{number}.jpg": f"{label} {group}" for number in islice(own, size) if size > 1})
    return with_groups(index, names)


def counts_of(rows: list[Any], num_classes: int) -> list[int]:
    return np.bincount([row[1] for row in rows], minlength=num_classes).tolist()


def sizes_of(splits: dict[str, list[Any]], num_classes: int) -> dict[str, list[int]]:
    """Images of each class in each split."""
    return {split: counts_of(rows, num_classes) for split, rows in splits.items()}


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), fracs=FRACS, seed=st.integers(0, 3))
def test_a_stratified_split_deals_out_every_image_once_and_no_split_lacks_a_class_that_it_can_have(
    labels: list[int], fracs: tuple[float, float], seed: int
) -> None:
    rows = np.array(labels, dtype=np.int64)
    parts = stratified_split(rows, *fracs, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    assert set(rows[parts["train"]]) == set(labels)
    for label in set(labels):
        count = labels.count(label)
        held, tested = ((rows[parts[split]] == label).sum() for split in ("validation", "test"))
        assert (held >= 1) or fracs[0] == 0 or count == 1
        assert (tested >= 1) or fracs[1] == 0 or count < 4
        assert held <= max(1, round(fracs[0] * count))
        assert tested <= max(1, round(fracs[1] * count))
    again = stratified_split(rows, *fracs, seed)
    assert all((again[split] == part).all() for split, part in parts.items())


def test_thousands_of_classes_are_drawn_as_one_after_another() -> None:
    labels = np.random.default_rng(0).integers(0, 3000, 20_000)
    rng, expected = np.random.default_rng(7), []
    for label in np.unique(labels):
        drawn = rng.permutation(np.flatnonzero(labels == label))
        expected.append(drawn[: max(round(0.2 * len(drawn)), int(len(drawn) > 1))])
    assert stratified_split(labels, 0.2, 0.0, 7)["validation"].tolist() == sorted(np.concatenate(expected).tolist())


def test_classes_of_one_to_sixty_images_are_divided_as_documented() -> None:
    divided = divide(index_of([60, 30, 10, 5, 4, 3, 2, 1]), Division())
    assert sizes_of(divided.splits, 8) == {
        "train": [42, 21, 7, 3, 2, 1, 1, 1],
        "validation": [6, 3, 1, 1, 1, 1, 1, 0],
        "test": [12, 6, 2, 1, 1, 1, 0, 0],
    }
    assert divided.from_training == ("train", "validation", "test")


@pytest.mark.parametrize(
    ("count", "division", "sizes"),
    [
        (3, Division(test_frac=0.1), (2, 1, 0)),
        (4, Division(test_frac=0.1), (2, 1, 1)),
        (4, Division(0.9, 0.05), (1, 2, 1)),
        (2, Division(0.0, 0.9), (1, 0, 1)),
        (10, Division(0.0, 0.0), (10, 0, 0)),
        (10, Division(0.0), (8, 0, 2)),
        (10, Division(test_frac=0.0), (9, 1, 0)),
    ],
)
def test_fractions_that_are_given_are_kept_and_zero_draws_none(
    count: int, division: Division, sizes: tuple[int, int, int]
) -> None:
    splits = divide(index_of([count]), division).splits
    assert tuple(len(splits.get(split, ())) for split in ("train", "validation", "test")) == sizes


@given(counts=COUNTS, fracs=FRACS, seed=st.integers(0, 3))
def test_dividing_keeps_every_image_in_one_split_and_every_class_in_training(
    counts: list[int], fracs: tuple[float, float], seed: int
) -> None:
    index = index_of(counts)
    splits = divide(index, Division(*fracs, seed=seed)).splits
    assert sorted(row for rows in splits.values() for row in rows) == sorted(index.splits["train"])
    assert min(counts_of(splits["train"], len(counts))) >= 1
    assert all(splits.values())


@given(counts=COUNTS, imbalance=st.floats(1, 50), seed=st.integers(0, 3))
def test_the_long_tail_is_cut_from_training_and_validation_drawn_from_what_it_discards(
    counts: list[int], imbalance: float, seed: int
) -> None:
    index = index_of(counts)
    whole = divide(index, Division(0.0, seed=seed)).splits
    cut = divide(index, Division(0.2, seed=seed, imbalance=imbalance, largest=10))
    assert cut.splits.get("test") == whole.get("test")
    kept, held = set(cut.splits["train"]), set(cut.splits.get("validation", ()))
    assert kept <= set(whole["train"])
    assert held <= set(whole["train"]) - kept
    before, after = counts_of(whole["train"], len(counts)), counts_of(list(kept), len(counts))
    assert 1 <= min(after) <= max(after) <= 10
    wanted = [min(max(1, round(0.2 * b)), b - a) for b, a in zip(before, after, strict=True)]
    assert counts_of(list(held), len(counts)) == wanted
    assert cut.from_training == ("train",)


def test_what_stays_in_a_long_tail_is_not_what_was_listed_first() -> None:
    def kept(seed: int) -> list[Any]:
        return divide(index_of([100, 100]), Division(0.0, 0.0, seed=seed, imbalance=10)).splits["train"]

    assert counts_of(kept(1), 2) == [100, 10]
    first = {f"1/{number}.jpg" for number in range(10)}
    assert {reference for reference, label in kept(1) if label == 1} != first
    assert kept(1) == kept(1)
    assert kept(1) != kept(2)


def test_validation_of_a_published_cut_is_drawn_from_its_discarded_images_by_seed() -> None:
    whole = index_of([10, 10, 10])
    cut = [row for row in whole.splits["train"] if row[1] < 2 or row[0] in ("2/0.jpg", "2/1.jpg")]
    discarded = [row for row in whole.splits["train"] if row not in cut]
    index = replace(whole, splits={"train": cut, "test": [("t.jpg", 0)]}, discarded=discarded)
    splits = divide(index, Division(0.3)).splits
    assert sorted(splits["train"]) == sorted(cut)
    assert counts_of(splits["validation"], 3) == [0, 0, 3]
    assert set(splits["validation"]) <= set(discarded)
    assert set(splits["validation"]) != set(divide(index, Division(0.3, seed=1)).splits["validation"])
    assert list(divide(replace(index, discarded=[]), Division(0.3)).splits) == ["train", "test"]


def test_splits_of_the_source_stay_as_they_are() -> None:
    own = [("val/1.jpg", 0), ("val/2.jpg", 1)]
    divided = divide(index_of([10, 10], validation=own), Division(test_frac=0.5))
    assert sorted(divided.splits["validation"]) == own
    assert counts_of(divided.splits["test"], 2) == [5, 5]
    assert list(divided.splits) == ["train", "validation", "test"]
    assert divided.from_training == ("train", "test")
    both = divide(index_of([10, 10], validation=own, test=[("test/1.jpg", 0)]), Division())
    assert sizes_of(both.splits, 2) == {"train": [10, 10], "validation": [1, 1], "test": [1, 0]}
    cut = divide(index_of([10, 10], validation=own), Division(imbalance=5))
    assert sizes_of(cut.splits, 2) == {"train": [8, 2], "validation": [1, 1], "test": [2, 2]}


def groups_of(divided: Divided) -> dict[str, set[int]]:
    return {split: {row[2] for row in rows} for split, rows in divided.splits.items()}


def test_no_group_is_in_two_splits_and_a_class_of_one_group_is_in_training_only() -> None:
    index = grouped([6] * 10, [3, 3, 4], [2, 2], [9])
    divided = divide(index, Division())
    assert sizes_of(divided.splits, 4) == {
        "train": [42, 7, 2, 9],
        "validation": [6, 3, 2, 0],
        "test": [12, 0, 0, 0],
    }
    found = groups_of(divided)
    assert not found["train"] & found["validation"]
    assert not found["test"] & (found["train"] | found["validation"])
    assert set.union(*found.values()) == set(range(16))


@given(
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=8), min_size=1, max_size=5), seed=st.integers(0, 3)
)
def test_images_of_a_group_and_only_they_have_its_number(sizes: list[list[int]], seed: int) -> None:
    index = grouped(*sizes)
    divided = divide(index, Division(seed=seed))
    rows = [row for split in divided.splits.values() for row in split]
    assert sorted(row[:2] for row in rows) == sorted(index.splits["train"])
    assert index.groups is not None
    named = {(index.groups.get(row[0], row[0]), row[2]) for row in rows}  # type: ignore[misc]
    assert len(named) == len({name for name, _ in named}) == len({number for _, number in named})
    assert {number for _, number in named} == set(range(sum(map(len, sizes))))
    assert min(counts_of(divided.splits["train"], len(sizes))) >= 1


def test_images_without_a_group_are_counted_in_a_note() -> None:
    assert grouped([2, 1, 1]).notes == ("images without a group: 2; each is a group of its own",)
    assert grouped([2, 2]).notes == ()


@pytest.mark.parametrize(
    ("division", "option"),
    [(Division(imbalance=2), "imbalance"), (Division(labelled=2, unlabelled=2, gamma_l=1), "labelled")],
)
def test_groups_cannot_be_combined_with_a_cut(division: Division, option: str) -> None:
    with pytest.raises(BadInput) as caught:
        divide(grouped([2, 2]), division)
    assert str(caught.value) == f"group: cannot be combined with {option}, which takes single images; remove one"


@pytest.mark.parametrize("flipped", [False, True])
def test_the_labelled_images_of_cifar_10_also_stand_in_the_unlabelled_pool(flipped: bool) -> None:
    division = Division(labelled=500, unlabelled=4000, gamma_l=100, flipped=flipped)
    divided = divide(index_of([5000] * 10), division)
    splits = divided.splits
    assert divided.from_training == ("train",)
    assert "test" not in splits
    labelled, further = counts_of(splits["train"], 10), [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]
    assert labelled == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    pool = np.add(labelled, further[::-1] if flipped else further).tolist()
    assert counts_of(splits["unlabelled"], 10) == pool
    train = set(splits["train"])
    assert train <= set(splits["unlabelled"])
    assert len(set(splits["unlabelled"])) == sum(pool)
    assert not set(splits["validation"]) & set(splits["unlabelled"])
    head = splits["unlabelled"][: sum(pool) // 4]
    assert sum(row in train for row in head) < 0.5 * sum(labelled), "labelled images do not stand in front"


def test_gamma_u_one_makes_the_unlabelled_images_uniform() -> None:
    splits = divide(index_of([60] * 3), Division(0.0, labelled=20, unlabelled=40, gamma_l=10, gamma_u=1)).splits
    assert counts_of(splits["unlabelled"], 3) == [60, 46, 42]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"largest": 5}, "largest: requires an imbalance, but got none; add --imbalance"),
    ({"labelled": 5}, "labelled: requires gamma-l, but got none; add --gamma-l"),
    ({"gamma_u": 5.0}, "gamma-u: requires gamma-l, but got none; add --gamma-l"),
    ({"flipped": True}, "reversed: requires gamma-l, but got none; add --gamma-l"),
    ({"labelled": 5, "gamma_l": 2.0}, "labelled: requires unlabelled, but got none; add --unlabelled"),
    (
        {"labelled": 5, "unlabelled": 5, "gamma_l": 2.0, "imbalance": 2.0},
        "imbalance: cannot be combined with labelled, whose imbalance is gamma-l; remove one",
    ),
    (
        {"labelled": 5, "unlabelled": 5, "gamma_l": 2.0, "gamma_u": 1.0, "flipped": True},
        "reversed: requires an unlabelled imbalance above 1, but gamma-u is 1; remove it",
    ),
    (
        {"labelled": 5, "unlabelled": 6, "gamma_l": 2.0},
        "photos: class 'class 0' must have 11 training images (5 labelled and 6 further), but got 9; give smaller numbers",
    ),
    (
        {"labelled": 5, "unlabelled": 1, "gamma_l": 0.5},
        "gamma-l: must be at least 1, but got 0.5; give a larger number",
    ),
    (
        {"validation_frac": 0.6, "test_frac": 0.5},
        "test-frac: must leave images for training, but got 0.5; give a smaller fraction",
    ),
    (
        {"validation_frac": 0.85},
        "validation-frac: must leave images for training, but got 0.85; give a smaller fraction",
    ),
    (
        {"test_frac": 1.0},
        "test-frac: must be at least 0 and below 1, but got 1; for example, 0.1",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_make_no_sense_are_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        divide(index_of([10, 10]), Division(**options))
    assert str(caught.value) == message
