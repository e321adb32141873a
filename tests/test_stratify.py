"""Groups of images are divided whole, and every class as evenly as whole groups allow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.data.stratify import assign_groups

SPLITS = (0.7, 0.1, 0.2)
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 12)), min_size=1, max_size=80)


def of_sizes(*sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and groups of classes whose groups have these sizes; no group has two classes."""
    per_group = [(label, size) for label, here in enumerate(sizes) for size in here]
    labels = np.repeat([label for label, _ in per_group], [size for _, size in per_group])
    return labels, np.repeat(np.arange(len(per_group)), [size for _, size in per_group])


def table(labels: np.ndarray, parts: np.ndarray, num_parts: int) -> list[list[int]]:
    """Images of each class in each part."""
    counts = np.zeros((labels.max() + 1, num_parts), dtype=int)
    np.add.at(counts, (labels, parts), 1)
    return counts.tolist()


@given(pairs=PAIRS, seed=st.integers(0, 5), in_order=st.booleans())
def test_no_group_is_in_two_parts_and_in_order_every_class_is_in_the_first(
    pairs: list[tuple[int, int]], seed: int, in_order: bool
) -> None:
    labels, groups = np.array(pairs, dtype=np.int64).T
    parts = assign_groups(labels, groups, SPLITS, seed, in_order=in_order)
    assert len(set(zip(groups.tolist(), parts.tolist(), strict=True))) == len(set(groups.tolist()))
    assert parts.tolist() == assign_groups(labels, groups, SPLITS, seed, in_order=in_order).tolist()
    if in_order:
        assert set(labels[parts == 0]) == set(labels)


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_groups_of_one_image_are_divided_evenly_over_folds_in_every_class(counts: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    folds = assign_groups(labels, np.arange(len(labels)), [0.25] * 4, seed)
    for label in range(len(counts)):
        held = np.bincount(folds[labels == label], minlength=4)
        assert held.max() - held.min() <= 1
    whole = np.bincount(folds, minlength=4)
    assert whole.max() - whole.min() <= 1 + len(counts) // 2


def test_a_class_of_one_group_stays_in_the_first_part_and_one_of_two_is_in_the_second_too() -> None:
    labels, groups = of_sizes([9], [3, 3], [3, 3, 3], [3, 3, 3, 3])
    found = table(labels, assign_groups(labels, groups, SPLITS, 0, in_order=True), 3)
    assert found == [[9, 0, 0], [3, 3, 0], [6, 3, 0], [6, 3, 3]]


@pytest.mark.parametrize(("fractions", "in_order"), [(SPLITS, True), ((0.25,) * 4, False)])
def test_many_groups_of_many_classes_get_close_to_the_wanted_fractions(
    fractions: tuple[float, ...], in_order: bool
) -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), rng.integers(5, 50, 200))
    chances = np.geomspace(50, 1, 20)
    labels = rng.choice(20, len(groups), p=chances / chances.sum())
    parts = assign_groups(labels, groups, fractions, 0, in_order=in_order)
    found = np.array(table(labels, parts, len(fractions)))
    whole = found.sum(axis=0)
    assert np.abs(whole / whole.sum() - fractions).max() < 0.03
    frequent = found[found.sum(axis=1) >= 100]
    assert len(frequent) == 12
    assert np.abs(frequent / frequent.sum(axis=1, keepdims=True) - fractions).max() < 0.06
    assert found.min() >= 1


def test_the_seed_decides_which_groups_are_held_out() -> None:
    labels, groups = of_sizes(list(range(8, 16)) * 3, list(range(8, 16)) * 2)
    first, second = (assign_groups(labels, groups, SPLITS, seed, in_order=True) for seed in (0, 1))
    assert set(groups[first == 1]) != set(groups[second == 1])


@pytest.mark.parametrize("fractions", [(0.9, 0.1, 0.0), (0.8, 0.0, 0.2)])
def test_a_part_with_the_fraction_zero_stays_empty(fractions: tuple[float, ...]) -> None:
    labels, groups = of_sizes([2] * 10, [1, 1])
    parts = assign_groups(labels, groups, fractions, 0, in_order=True)
    assert set(parts.tolist()) == {part for part, fraction in enumerate(fractions) if fraction}
