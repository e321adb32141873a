"""Division of the classes into many, medium and few: published bounds, those of the settings, and thirds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.data.dataset import Dataset, Split
from lift_ray.epoch_metrics import GROUPS
from lift_ray.evaluation.metrics import PUBLISHED, ClassGroups, groups_of, labelled_counts, stored_groups

SMALL = [60, 30, 10, 5, 4, 3, 2, 1]
COUNTS = st.lists(st.integers(0, 300), min_size=1, max_size=40)


def sizes(groups: ClassGroups) -> list[int]:
    return [int((groups.names == group).sum()) for group in GROUPS]


@given(counts=st.lists(st.integers(1, 1000), max_size=20))
def test_the_published_bounds_hold_where_each_group_has_a_class(counts: list[int]) -> None:
    groups = ClassGroups.of([101, 100, 20, 19, *counts])
    assert (groups.few_below, groups.many_above, groups.by_thirds, groups.note) == (*PUBLISHED, False, "")
    expected = ["many" if count > 100 else "few" if count < 20 else "medium" for count in counts]
    assert groups.names.tolist() == ["many", "medium", "medium", "few", *expected]
    assert groups.rules == {"many": "over 100", "medium": "20 to 100", "few": "under 20"}


def test_a_small_set_is_cut_into_thirds_and_says_so() -> None:
    groups = ClassGroups.of(SMALL)
    assert groups.names.tolist() == ["many"] * 3 + ["medium"] * 2 + ["few"] * 3
    assert groups.rules == {"many": "over 9", "medium": "4 to 9", "few": "under 4"}
    assert groups.note == "groups are thirds of the classes: few <= 3 training images, many >= 10"


@given(counts=st.lists(st.integers(0, 10**6), min_size=3, max_size=60, unique=True))
def test_thirds_of_classes_that_all_differ_are_as_equal_as_they_can_be(counts: list[int]) -> None:
    groups = ClassGroups.of(counts)
    if groups.by_thirds:
        assert max(sizes(groups)) - min(sizes(groups)) <= 1 + (len(counts) % 3 == 2)


@given(counts=COUNTS)
def test_no_group_is_empty_if_at_least_three_counts_differ(counts: list[int]) -> None:
    groups, different = ClassGroups.of(counts), len(set(counts))
    assert sum(size > 0 for size in sizes(groups)) >= min(3, different)


@given(counts=COUNTS)
def test_groups_follow_their_bounds_and_classes_of_equal_count_stay_together(counts: list[int]) -> None:
    groups = ClassGroups.of(counts)
    for count, name in zip(counts, groups.names, strict=True):
        assert (count < groups.few_below) == (name == "few")
        assert (count > groups.many_above) == (name == "many")


def test_equal_counts_are_never_divided_even_if_a_third_becomes_large() -> None:
    assert ClassGroups.of([1] * 8 + [2, 3]).names.tolist() == ["few"] * 8 + ["medium", "many"]
    assert ClassGroups.of([9, 8] + [7] * 8).names.tolist() == ["many", "medium"] + ["few"] * 8
    assert ClassGroups.of([4, 5, 4, 5]).names.tolist() == ["few", "many", "few", "many"]


@pytest.mark.parametrize(("count", "group"), [(19, "few"), (20, "medium"), (100, "medium"), (101, "many")])
def test_classes_of_equal_counts_are_in_one_group_by_the_published_bounds(count: int, group: str) -> None:
    groups = ClassGroups.of([count] * 5)
    assert set(groups.names) == {group}
    assert (groups.by_thirds, groups.note) == (False, "")


def test_bounds_of_the_settings_hold_even_if_a_group_is_empty() -> None:
    groups = ClassGroups.of(SMALL, [2, 1000])
    assert groups.names.tolist() == ["medium"] * 7 + ["few"]
    assert groups.rules == {"many": "over 1,000", "medium": "2 to 1,000", "few": "under 2"}
    assert not groups.by_thirds


def dataset(labels: list[int], labelled: list[int] | None) -> Dataset:
    train = Split("train", (), np.array(labels), np.arange(len(labels)))
    return Dataset(
        "d", ("a", "b", "c"), {"train": train}, labelled_counts=None if labelled is None else np.array(labelled)
    )


def test_the_groups_of_a_dataset_are_those_before_anything_was_held_out() -> None:
    held_out = dataset([0, 0, 0, 1, 1, 2], [4, 3, 150])
    assert groups_of(held_out, "auto").names.tolist() == ["medium", "few", "many"]
    whole = groups_of(replace(held_out, splits={}), "auto").names
    part = replace(held_out, splits={"train": held_out.splits["train"].subset(0.3)})
    assert whole.tolist() == groups_of(part, "auto").names.tolist() == ["medium", "few", "many"]


def test_without_that_knowledge_they_are_those_of_the_training_split() -> None:
    known = dataset([0, 0, 0, 1, 1, 2], None)
    assert labelled_counts(known).tolist() == [3, 2, 1]
    assert groups_of(known, "auto").names.tolist() == ["many", "medium", "few"]
    assert groups_of(known, [3, 3]).names.tolist() == ["medium", "few", "few"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ["few", "few", "few"]),  # of an earlier version
        ({"labelled_counts": None}, ["few", "few", "few"]),
        ({"labelled_counts": [4, 9, 7]}, ["few", "many", "medium"]),
        ({"labelled_counts": [4, 9, 7], "bounds": [5, 100]}, ["few", "medium", "medium"]),
    ],
)
def test_a_record_knows_its_groups_without_the_dataset(more: dict[str, Any], expected: list[str]) -> None:
    record = {"class_counts": [3, 2, 1], "config": {"evaluation": {"group_bounds": more.pop("bounds", "auto")}}, **more}
    assert stored_groups(record).names.tolist() == expected
