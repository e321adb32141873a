"""Which images are kept for which split: drawn by seed, stratified, and never leaving a class without training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.data.convert.index import FilesIn, ImageIndex
from lift_ray.data.convert.splitting import Division, divide, stratified_split
from lift_ray.errors import BadInput

FRACS = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)).filter(lambda pair: sum(pair) < 1)
COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def index_of(counts: list[int], **more: list[tuple[str, int]]) -> ImageIndex:
    """An index with so many training images of each class; splitting reads none of them."""
    rows = [(f"{label}/{number}.jpg", label) for label, count in enumerate(counts) for number in range(count)]
    names = tuple(f"class {label}" for label in range(len(counts)))
    return ImageIndex("photos", names, {"train": rows, **more}, FilesIn("photos"))


def counts_of(rows: list[tuple[str, int]], num_classes: int) -> list[int]:
    return np.bincount([label for _, label in rows], minlength=num_classes).tolist()


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), fracs=FRACS, seed=st.integers(0, 3))
def test_a_stratified_split_deals_out_every_image_once_and_keeps_each_class_in_training(
    labels: list[int], fracs: tuple[float, float], seed: int
) -> None:
    rows = np.array(labels, dtype=np.int64)
    parts = stratified_split(rows, *fracs, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    assert set(rows[parts["train"]]) == set(labels)
    for label in set(labels):
        count = labels.count(label)
        assert (rows[parts["validation"]] == label).sum() == min(round(fracs[0] * count), count - 1)


@given(counts=COUNTS, fracs=FRACS, seed=st.integers(0, 3))
def test_dividing_keeps_every_image_in_one_split_and_every_class_in_training(
    counts: list[int], fracs: tuple[float, float], seed: int
) -> None:
    index = index_of(counts)
    splits = divide(index, Division(*fracs, seed=seed))
    assert sorted(row for rows in splits.values() for row in rows) == sorted(index.splits["train"])
    assert min(counts_of(splits["train"], len(counts))) >= 1
    assert all(splits.values())


@given(counts=COUNTS, imbalance=st.floats(1, 50), seed=st.integers(0, 3))
def test_the_long_tail_is_cut_from_training_only_and_drawn_by_seed(
    counts: list[int], imbalance: float, seed: int
) -> None:
    index = index_of(counts)
    whole = divide(index, Division(0.2, seed=seed))
    cut = divide(index, Division(0.2, seed=seed, imbalance=imbalance, largest=10))
    assert cut.get("validation") == whole.get("validation")
    assert set(cut["train"]) <= set(whole["train"])
    kept = counts_of(cut["train"], len(counts))
    assert 1 <= min(kept) <= max(kept) <= 10


def test_what_stays_in_a_long_tail_is_not_what_was_listed_first() -> None:
    kept = divide(index_of([100, 100]), Division(0.0, seed=1, imbalance=10))["train"]
    assert counts_of(kept, 2) == [100, 10]
    first = {f"1/{number}.jpg" for number in range(10)}
    assert {reference for reference, label in kept if label == 1} != first
    assert kept == divide(index_of([100, 100]), Division(0.0, seed=1, imbalance=10))["train"]
    assert kept != divide(index_of([100, 100]), Division(0.0, seed=2, imbalance=10))["train"]


def test_splits_of_the_source_stay_as_they_are() -> None:
    own = [("val/1.jpg", 0), ("val/2.jpg", 1)]
    splits = divide(index_of([10, 10], validation=own), Division(test_frac=0.5))
    assert sorted(splits["validation"]) == own
    assert counts_of(splits["test"], 2) == [5, 5]
    assert list(splits) == ["train", "validation", "test"]


@pytest.mark.parametrize("flipped", [False, True])
def test_the_labelled_images_of_cifar_10_also_stand_in_the_unlabelled_pool(flipped: bool) -> None:
    division = Division(labelled=500, unlabelled=4000, gamma_l=100, flipped=flipped)
    splits = divide(index_of([5000] * 10), division)
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
    splits = divide(index_of([60] * 3), Division(0.0, labelled=20, unlabelled=40, gamma_l=10, gamma_u=1))
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
        {"test_frac": 1.0},
        "test-frac: must be at least 0 and below 1, but got 1; for example, 0.1",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_make_no_sense_are_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        divide(index_of([10, 10]), Division(**options))
    assert str(caught.value) == message
