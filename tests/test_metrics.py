"""Accuracy by class and group, against a slow plain computation."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.epoch_metrics import METRICS
from lift_ray.evaluation.metrics import PUBLISHED, ClassGroups, PerClass, per_class_rows, summarise, write_per_class

NAMES = {
    "accuracy",
    "mean_class_accuracy",
    "many",
    "medium",
    "few",
    "worst_class",
    "harmonic_mean",
    "geometric_mean",
    "macro_f1",
    "calibration_error",
    "balanced_log_loss",
    "loss",
}
NO_BINS = np.zeros((3, 15))


def array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def figures(
    correct: np.ndarray,
    total: np.ndarray,
    train_counts: np.ndarray,
    predicted: np.ndarray | None = None,
    loss_sums: Sequence[float] = (),
    bins: np.ndarray = NO_BINS,
) -> dict[str, float]:
    classes = PerClass(correct, total, total if predicted is None else predicted)
    losses = np.array(loss_sums or [0.0] * len(total))
    return summarise(classes, bins, losses, published(train_counts))


def published(train_counts: np.ndarray) -> np.ndarray:
    return ClassGroups.of(train_counts, PUBLISHED).names


def test_the_metrics_of_a_split_are_those_that_a_search_may_name() -> None:
    assert set(figures(array(1, 2, 3), array(2, 2, 4), array(500, 50, 5))) == set(METRICS) == NAMES


def test_groups_change_at_20_and_above_100() -> None:
    counts = array(1, 19, 20, 21, 99, 100, 101, 5000)
    assert published(counts).tolist() == ["few", "few", "medium", "medium", "medium", "medium", "many", "many"]


def test_a_group_without_classes_is_left_out() -> None:
    found = figures(array(1, 2), array(2, 2), array(500, 50))
    assert set(found) == NAMES - {"few"}
    assert (found["many"], found["medium"]) == (0.5, 1.0)


def test_classes_without_images_in_the_split_count_nowhere() -> None:
    found = figures(array(3, 0, 2), array(4, 0, 4), array(500, 5, 50), predicted=array(3, 3, 2), loss_sums=[9, 0, 1])
    assert found == pytest.approx(
        {
            "accuracy": 5 / 8,
            "mean_class_accuracy": 0.625,
            "many": 0.75,
            "medium": 0.5,
            "worst_class": 0.5,
            "harmonic_mean": 0.6,
            "geometric_mean": math.sqrt(0.375),
            "macro_f1": (6 / 7 + 4 / 6) / 2,
            "calibration_error": 0.0,
            "loss": 1.25,
            "balanced_log_loss": (9 / 4 + 1 / 4) / 2,
        }
    )


def test_accuracy_weighs_images_and_mean_class_accuracy_classes() -> None:  # pragma: allowlist secret
    found = figures(array(90, 0), array(90, 10), array(200, 2))
    assert (found["accuracy"], found["mean_class_accuracy"]) == (0.9, 0.5)
    assert (found["many"], found["few"]) == (1.0, 0.0)


def test_a_class_never_recognised_makes_both_means_of_products_0_without_a_warning() -> None:
    with np.errstate(all="raise"):
        found = figures(array(9, 0, 4), array(10, 3, 5), array(200, 2, 30))
    assert (found["worst_class"], found["harmonic_mean"], found["geometric_mean"]) == (0.0, 0.0, 0.0)


def test_macro_f1_falls_when_a_class_is_predicted_too_often() -> None:
    right = figures(array(4, 4), array(5, 5), array(9, 9), predicted=array(5, 5))
    eager = figures(array(4, 4), array(5, 5), array(9, 9), predicted=array(5, 11))
    assert right["macro_f1"] == pytest.approx(0.8)
    assert eager["macro_f1"] == pytest.approx((0.8 + 0.5) / 2)


def test_calibration_error_weighs_the_bins_by_their_images() -> None:
    bins = np.array([[8.0, 2.0], [6.0, 1.0], [5.0, 2.0]])  # 0.75 sure and 0.625 right; 0.5 sure and 1.0 right
    found = figures(array(7), array(10), array(9), bins=bins)
    assert found["calibration_error"] == pytest.approx(0.8 * 0.125 + 0.2 * 0.5)


CLASSES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 300)), min_size=1, max_size=12
).filter(lambda classes: any(right + wrong for right, wrong, _, _ in classes))


def columns(classes: list[tuple[int, int, int, int]]) -> tuple[PerClass, np.ndarray]:
    right, wrong, mistaken, train = (array(*column) for column in zip(*classes, strict=True))
    return PerClass(right, right + wrong, right + mistaken), train


@given(classes=CLASSES, losses=st.lists(st.floats(0, 1e6), min_size=12, max_size=12))
def test_summarise_equals_counting_by_hand(classes: list[tuple[int, int, int, int]], losses: list[float]) -> None:
    counts, train = columns(classes)
    found = summarise(counts, NO_BINS, np.array(losses[: len(classes)]), published(train))
    lists: dict[str, list[float]] = {name: [] for name in ("mean_class_accuracy", "macro_f1", "many", "medium", "few")}
    lists["balanced_log_loss"] = []
    images = hits = 0
    loss_sum = 0.0
    for (right, wrong, mistaken, count), loss in zip(classes, losses, strict=False):
        images, hits = images + right + wrong, hits + right
        if right + wrong:
            loss_sum += loss
            lists["balanced_log_loss"].append(loss / (right + wrong))
            group = "many" if count > 100 else "few" if count < 20 else "medium"
            for name in ("mean_class_accuracy", group):
                lists[name].append(right / (right + wrong))
            precision, recall = right / max(1, right + mistaken), right / (right + wrong)
            lists["macro_f1"].append(2 * precision * recall / (precision + recall) if right else 0.0)
    expected = {name: sum(values) / len(values) for name, values in lists.items() if values}
    every = lists["mean_class_accuracy"]
    expected |= {
        "accuracy": hits / images,
        "loss": loss_sum / images,
        "calibration_error": 0.0,
        "worst_class": min(every),
        "geometric_mean": math.prod(every) ** (1 / len(every)),
        "harmonic_mean": len(every) / sum(1 / value for value in every) if min(every) else 0.0,
    }
    assert found == pytest.approx(expected)
    assert all(0 <= value <= 1 + 1e-12 for name, value in found.items() if "loss" not in name)
    low, harmonic, geometric, mean = (
        found[name] for name in ("worst_class", "harmonic_mean", "geometric_mean", "mean_class_accuracy")
    )
    assert harmonic <= geometric + 1e-9
    assert geometric <= mean + 1e-9
    assert low <= harmonic + 1e-9


@given(classes=CLASSES)
def test_the_rows_of_the_classes_average_to_the_metrics(classes: list[tuple[int, int, int, int]]) -> None:
    counts, train = columns(classes)
    rows = per_class_rows([f"class {k}" for k in range(len(classes))], train, published(train), *counts)
    found = summarise(counts, NO_BINS, np.zeros(len(classes)), published(train))
    for column, metric in (("accuracy", "mean_class_accuracy"), ("f1", "macro_f1")):
        values = [row[column] for row in rows if row[column] is not None]
        assert sum(values) / len(values) == pytest.approx(found[metric])
    assert sum(row["correct"] for row in rows) / sum(row["images"] for row in rows) == pytest.approx(found["accuracy"])
    for group in ("many", "medium", "few"):
        values = [row["accuracy"] for row in rows if row["group"] == group and row["images"]]
        assert ([sum(values) / len(values)] if values else []) == pytest.approx(
            [found[group]] if group in found else []
        )


ROWS = per_class_rows(
    ["sea star", 'the "old", one', "never seen", "never said"],
    array(101, 20, 3, 1),
    published(array(101, 20, 3, 1)),
    array(3, 1, 0, 0),
    array(4, 2, 0, 2),
    array(5, 1, 2, 0),
)


def test_a_row_is_empty_where_a_class_has_no_images_or_predictions() -> None:
    assert ROWS[0] == {
        "class": "sea star",
        "group": "many",
        "train_images": 101,
        "images": 4,
        "correct": 3,
        "predicted": 5,
        "accuracy": 0.75,
        "precision": 0.6,
        "f1": pytest.approx(2 / 3),
    }
    assert [(row["accuracy"], row["precision"], row["f1"]) for row in ROWS[2:]] == [(None, 0.0, None), (0.0, None, 0.0)]


def test_the_written_rows_are_read_back_by_any_csv_reader(tmp_path: Path) -> None:
    path = tmp_path / "per_class.csv"
    path.write_text("of an earlier run")
    write_per_class(ROWS, path)
    with path.open(newline="") as file:
        back = list(csv.DictReader(file))
    assert list(back[0]) == [
        "class",
        "group",
        "train_images",
        "images",
        "correct",
        "predicted",
        "accuracy",
        "precision",
        "f1",
    ]
    assert [row["class"] for row in back] == [row["class"] for row in ROWS]
    for row, read in zip(ROWS, back, strict=True):
        for name in ("train_images", "images", "correct", "predicted", "accuracy", "precision", "f1"):
            assert read[name] == "" if row[name] is None else float(read[name]) == row[name]
    assert [found.name for found in tmp_path.iterdir()] == ["per_class.csv"]


def test_an_interrupted_write_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "per_class.csv"
    write_per_class(ROWS, path)
    before = path.read_bytes()

    def half(table: object, where: Path) -> None:
        where.write_text("class,gro")
        raise OSError("disk full")

    monkeypatch.setattr(pyarrow.csv, "write_csv", half)
    with pytest.raises(OSError, match="disk full"):
        write_per_class(ROWS, path)
    assert path.read_bytes() == before


def test_importing_the_metrics_loads_neither_torch_nor_pyarrow() -> None:
    code = "import sys, lift_ray.evaluation.metrics; print({'torch', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
