"""The long-tailed cut: counts by rule and the rows that realise them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.data.longtail import keep_first, longtail_counts, plot, semi_supervised_counts, summary
from lift_ray.errors import BadInput

COUNTS = st.lists(st.integers(0, 500), min_size=1, max_size=40).map(lambda counts: np.array(counts, dtype=np.int64))


def test_the_profile_of_the_quickstart_runs_from_200_to_4() -> None:
    counts = longtail_counts(np.full(100, 1000), 200, 50.0)
    assert counts[0] == 200
    assert counts[-1] == 4
    assert counts[50] == round(200 * 50 ** (-50 / 99))
    assert (np.diff(counts) <= 0).all()


def test_classes_keep_their_rank_and_ties_go_to_the_first() -> None:
    assert longtail_counts(np.array([50, 100, 50]), 100, 4.0).tolist() == [50, 100, 25]


def test_imbalance_one_only_caps() -> None:
    assert longtail_counts(np.array([5, 30, 12]), 10, 1.0).tolist() == [5, 10, 10]


def test_a_single_class_and_an_empty_class_work() -> None:
    assert longtail_counts(np.array([7]), 5, 100.0).tolist() == [5]
    assert longtail_counts(np.array([9, 0]), 5, 100.0).tolist() == [5, 0]


@pytest.mark.parametrize(
    ("largest", "imbalance", "message"),
    [
        (0, 2.0, "largest: must be at least 1, but got 0; give the images of the largest class"),
        (5, 0.5, "imbalance: must be at least 1, but got 0.5; give largest / smallest, for example 50"),
    ],
)
def test_values_out_of_range_are_bad_input(largest: int, imbalance: float, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        longtail_counts(np.array([5, 3]), largest, imbalance)
    assert str(caught.value) == message


@given(natural=COUNTS, largest=st.integers(1, 300), imbalance=st.floats(1, 500))
def test_counts_never_exceed_the_natural_ones_and_never_empty_a_class(
    natural: np.ndarray, largest: int, imbalance: float
) -> None:
    counts = longtail_counts(natural, largest, imbalance)
    assert (counts <= np.minimum(natural, largest)).all()
    assert ((counts > 0) == (natural > 0)).all()
    assert (np.diff(counts[np.argsort(-natural, kind="stable")]) <= 0).all()


@given(labels=st.lists(st.integers(0, 6), max_size=80), counts=st.lists(st.integers(0, 12), min_size=7, max_size=7))
def test_the_kept_rows_are_the_first_of_each_class_in_storage_order(labels: list[int], counts: list[int]) -> None:
    left, expected = list(counts), []
    for row, label in enumerate(labels):
        if left[label]:
            left[label] -= 1
            expected.append(row)
    kept = keep_first(np.array(labels, dtype=np.int64), np.array(counts, dtype=np.int64))
    assert kept.tolist() == expected
    assert kept.dtype == np.int64


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "gamma", "expected"),
    [
        (
            500,
            4000,
            100,
            [[500, 299, 179, 107, 64, 38, 23, 13, 8, 5], [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]],
        ),
        (
            1500,
            3000,
            150,
            [[1500, 859, 492, 282, 161, 92, 53, 30, 17, 10], [3000, 1719, 985, 564, 323, 185, 106, 60, 34, 20]],
        ),
    ],
)
def test_semi_supervised_cifar_10_has_the_counts_of_the_literature(
    labelled: int, unlabelled: int, gamma: float, expected: list[list[int]]
) -> None:
    balanced = np.full(10, 4500)
    counts = semi_supervised_counts(balanced, labelled, unlabelled, gamma, gamma)
    assert [part.tolist() for part in counts] == expected
    flipped = semi_supervised_counts(balanced, labelled, unlabelled, gamma, gamma, flipped=True)
    assert [part.tolist() for part in flipped] == [expected[0], expected[1][::-1]]


def test_semi_supervised_classes_keep_a_labelled_image_and_their_rank() -> None:
    labelled, further = semi_supervised_counts(np.array([30, 90, 60]), 4, 50, 100.0, 1.0)
    assert labelled.tolist() == [1, 4, 1]
    assert further.tolist() == [50, 50, 50]


def test_a_summary_describes_the_class_counts() -> None:
    counts = np.array([101, 100, 20, 19, 4])
    found = summary(counts)
    assert (found.classes, found.images, found.largest, found.smallest, found.imbalance) == (5, 244, 101, 4, 25.25)
    assert str(found) == "5 classes, 244 images: 101 to 4 a class, imbalance 25.2"


def test_a_plot_falls_from_the_largest_class_to_the_smallest_on_a_log_scale() -> None:
    assert plot(np.array([1, 100, 10]), height=2).splitlines() == ["100 █", "  1 ██▁"]


@given(counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=300))
def test_a_plot_fits_the_terminal_and_shows_every_column(counts: list[int]) -> None:
    lines = plot(np.array(counts)).splitlines()
    assert len(lines) == 6
    label = len(f"{max(*counts, 2):,}") + 1
    assert len(lines[-1]) == label + min(len(counts), 60)
    assert " " not in lines[-1][label:]
    assert all(len(line) <= len(lines[-1]) for line in lines)
