"""Accuracy by class and group, against a slow plain computation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.results.metrics import class_groups, summarise


def array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_groups_change_at_20_and_above_100() -> None:
    counts = array(1, 19, 20, 21, 99, 100, 101, 5000)
    assert class_groups(counts).tolist() == ["few", "few", "medium", "medium", "medium", "medium", "many", "many"]


def test_a_group_without_classes_is_left_out() -> None:
    found = summarise(array(1, 2), array(2, 2), 3.0, array(500, 50))
    assert found == {"accuracy": 0.75, "mean_class_accuracy": 0.75, "loss": 0.75, "many": 0.5, "medium": 1.0}


def test_classes_without_images_in_the_split_count_nowhere() -> None:
    found = summarise(array(3, 0, 0), array(4, 0, 1), 10.0, array(500, 5, 50))
    assert found == {"accuracy": 0.6, "mean_class_accuracy": 0.375, "loss": 2.0, "many": 0.75, "medium": 0.0}


def test_accuracy_weighs_images_and_mean_class_accuracy_classes() -> None:
    found = summarise(array(90, 0), array(90, 10), 1.0, array(200, 2))
    assert (found["accuracy"], found["mean_class_accuracy"]) == (0.9, 0.5)
    assert (found["many"], found["few"]) == (1.0, 0.0)


CLASSES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 300)), min_size=1, max_size=12
).filter(lambda classes: any(right + wrong for right, wrong, _ in classes))


@given(classes=CLASSES, loss_sum=st.floats(0, 1e6))
def test_summarise_equals_counting_by_hand(classes: list[tuple[int, int, int]], loss_sum: float) -> None:
    found = summarise(
        array(*(right for right, _, _ in classes)), array(*(right + wrong for right, wrong, _ in classes)), loss_sum,
        array(*(count for _, _, count in classes)),
    )  # fmt: skip
    expected: dict[str, float] = {}
    accuracies: dict[str, list[float]] = {"all": [], "many": [], "medium": [], "few": []}
    images = hits = 0
    for right, wrong, count in classes:
        images, hits = images + right + wrong, hits + right
        if right + wrong:
            group = "many" if count > 100 else "few" if count < 20 else "medium"
            for name in ("all", group):
                accuracies[name].append(right / (right + wrong))
    for name, values in accuracies.items():
        if values:
            expected["mean_class_accuracy" if name == "all" else name] = sum(values) / len(values)
    assert found == pytest.approx({**expected, "accuracy": hits / images, "loss": loss_sum / images})
    assert all(0 <= value <= 1 for name, value in found.items() if name != "loss")
