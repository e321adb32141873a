"""Folds: which images each fold holds out, what its model trains on, and that features and files are shared between folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from lift_ray.data import folds
from lift_ray.data.dataset import Dataset, Shard, Split
from lift_ray.data.folds import EVERYTHING, SEARCHED, Folds, training_view, unseen_classes
from lift_ray.errors import BadInput

COUNTS = (60, 30, 10, 5, 4, 3, 2, 1)  # training images of each class


def split(name: str, counts: Sequence[int], groups: np.ndarray | None = None) -> Split:  # type: ignore[type-arg]
    labels = np.random.default_rng(len(name)).permutation(np.repeat(np.arange(len(counts)), counts))
    shard = Shard(f"{name}.parquet", (len(labels),))
    return Split(name, (shard,), labels, np.arange(len(labels)), groups=groups)


def dataset(
    counts: Sequence[int] = COUNTS,
    held: Sequence[int] | None = (6, 3, 1, 1, 1, 1, 1, 0),
    kind: Literal["drawn", "separate"] = "drawn",
) -> Dataset:
    splits = {"train": split("train", counts), "test": split("test", [2] * len(counts))}
    if held is not None:
        splits["validation"] = split("validation", held)
    return Dataset("d", tuple("abcdefgh"[: len(counts)]), splits, kind)


def images(one: Split) -> set[tuple[str, int]]:
    """Return file and row of each image."""
    starts = np.cumsum([0, *(shard.num_rows for shard in one.shards)])
    owners = np.searchsorted(starts, one.rows, side="right") - 1
    return {
        (one.shards[owner].url, int(row - starts[owner])) for owner, row in zip(owners, one.rows.tolist(), strict=True)
    }


@pytest.mark.parametrize("kind", ["drawn", "separate"])
def test_each_image_outside_the_test_split_is_held_out_once_from_a_model_that_does_not_train_on_it(
    kind: Literal["drawn", "separate"],
) -> None:
    data, four = dataset(kind=kind), Folds(4)
    views = [four.view(data, fold) for fold in (1, 2, 3, 4)]
    held = [images(view.split("validation")) for view in views]
    whole = images(data.split("train")) | images(data.split("validation"))
    single = {("train.parquet", int(row)) for row in np.flatnonzero(data.split("train").labels == 7)}
    assert sum(map(len, held)) == len(set.union(*held)), "an image was held out twice"
    assert set.union(*held) == whole - single, "the only image of its class is never held out"
    for view, out in zip(views, held, strict=True):
        trained = images(view.split("train"))
        assert not trained & out
        assert set(view.split("train").labels.tolist()) == set(range(8)), "a class has no training image"
        expected = whole if kind == "drawn" else images(data.split("train"))
        assert trained == expected - out
        assert images(view.split("test")) == images(data.split("test"))


def test_labels_follow_their_images_into_the_folds() -> None:
    data = dataset()
    label_of = {
        (one.shards[0].url, int(row)): int(label)
        for one in data.splits.values()
        for row, label in zip(one.rows, one.labels, strict=True)
    }
    for fold in (2, 3, EVERYTHING):
        for one in Folds(3).view(data, fold).splits.values():
            places = one.shards
            starts = np.cumsum([0, *(shard.num_rows for shard in places)])
            for row, label in zip(one.rows.tolist(), one.labels.tolist(), strict=True):
                owner = int(np.searchsorted(starts, row, side="right")) - 1
                assert label_of[places[owner].url, row - int(starts[owner])] == label


def test_the_first_fold_is_the_validation_split_untouched() -> None:
    data = dataset()
    view = Folds(4).view(data, SEARCHED)
    assert view.splits["train"] is data.splits["train"]
    assert view.splits["validation"] is data.splits["validation"]


def test_folds_are_stratified_and_about_equally_large() -> None:
    data = dataset((60, 30, 10), (6, 3, 1))
    views = [Folds(4, seed=5).view(data, fold) for fold in (2, 3, 4)]
    counts = np.array([view.split("validation").class_counts(3) for view in views])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp(counts.sum(1)) <= 1


def test_folds_are_a_function_of_seed_and_data() -> None:
    data = dataset()

    def held(seed: int) -> set[tuple[str, int]]:
        return images(Folds(3, seed).view(data, 2).split("validation"))

    assert held(0) == held(0) != held(1)


def test_everything_adds_the_validation_images_unless_they_are_a_set_of_their_own() -> None:
    for kind, expected in (("drawn", 115 + 14), ("separate", 115)):
        view = Folds().view(dataset(kind=kind), EVERYTHING)  # type: ignore[arg-type]
        assert view.split("train").num_samples == expected
        assert "validation" not in view.splits
    separate = Folds(train_on_separate=True).view(dataset(kind="separate"), EVERYTHING)
    assert separate.split("train").num_samples == 115 + 14
    assert training_view(dataset(), "train").splits.keys() == {"train", "validation", "test"}
    assert training_view(dataset(kind="separate"), "train+validation").split("train").num_samples == 115 + 14


def test_a_dataset_of_train_and_test_draws_its_first_fold_from_train() -> None:
    data = dataset(held=None)
    for number, of_largest in ((1, 6), (4, 15)):
        view = Folds(number).view(data, SEARCHED)
        assert view.validation == "drawn"
        counts = view.split("validation").class_counts(8)
        assert counts[0] == of_largest
        assert (counts[1:7] >= 1).all(), "a class of two images or more has a validation image"
        assert counts[7] == 0
        assert (view.split("train").class_counts(8) >= 1).all()
        assert view.labelled_counts is not None
        assert view.labelled_counts.tolist() == list(COUNTS), "groups are those of the images before any are held out"
    views = [Folds(4).view(data, fold) for fold in (1, 2, 3, 4)]
    held = [images(view.split("validation")) for view in views]
    assert sum(map(len, held)) == len(set.union(*held)) == 114
    assert images(Folds(4).view(data, EVERYTHING).split("train")) == images(data.split("train"))
    for view, out in zip(views, held, strict=True):
        assert images(view.split("train")) == images(data.split("train")) - out
        assert len(view.split("train").shards) == 1, "parts of one split become one"


def test_classes_without_a_held_out_image_are_named() -> None:
    assert unseen_classes(dataset()) == ["h"]
    assert unseen_classes(dataset(held=(6, 3, 1, 1, 1, 0, 0, 0))) == ["f", "g", "h"]
    assert unseen_classes(dataset(held=(6, 3, 1, 1, 1, 0, 0, 0)), Folds(3)) == ["h"], "further folds see f and g"


def test_a_dataset_whose_classes_have_one_image_each_cannot_be_searched() -> None:
    with pytest.raises(
        BadInput, match=r"^d: must have a class with two training images, but no validation image can be"
    ):
        Folds().view(dataset((1, 1, 1), None), SEARCHED)


def test_a_group_is_never_divided() -> None:
    data = dataset((40, 20, 8), (4, 2, 1))
    train = data.splits["train"]
    groups = train.labels * 100 + np.random.default_rng(0).integers(0, 5, train.num_samples)
    data = replace(data, splits={**data.splits, "train": replace(train, groups=groups)})
    for number in (3, 4):
        fold_of: dict[int, set[int]] = {}
        for fold in range(2, number + 1):
            held = Folds(number).view(data, fold).split("validation")
            for row in held.rows.tolist():
                fold_of.setdefault(int(groups[row]), set()).add(fold)
        assert all(len(found) == 1 for found in fold_of.values())
        assert len(fold_of) == len(np.unique(groups))
    alone = replace(data, splits={"train": replace(train, groups=groups)}, validation="separate")
    view = Folds(3).view(alone, SEARCHED)
    assert not set(groups[view.split("validation").rows].tolist()) & set(groups[view.split("train").rows].tolist())


def test_a_group_of_several_classes_stays_together_where_one_of_them_is_nowhere_else() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    groups = np.array([1, 1, 2, 2, 3, 3, 3, 3])  # class 1 is at the third location only
    train = replace(split("train", (6, 2)), labels=labels, groups=groups)
    for held in (None, (1, 0)):
        splits = {"train": train} | ({} if held is None else {"validation": split("validation", held)})
        data = Dataset("d", ("a", "b"), splits, "separate")
        for fold in (1, 2, 3):
            view = Folds(3).view(data, fold)
            out, trained = view.split("validation"), view.split("train")
            assert 1 in trained.labels
            if out.groups is not None and trained.groups is not None:
                assert not set(out.groups.tolist()) & set(trained.groups.tolist())


def test_a_view_is_divided_once_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = dataset(), []
    by_class = folds._by_class
    monkeypatch.setattr(folds, "_by_class", lambda *args: calls.append(args) or by_class(*args))
    for fold in (2, 3, 2, EVERYTHING, 3):
        Folds(3, seed=77).view(data, fold)
    assert len(calls) == 1
