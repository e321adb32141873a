"""Metrics of an epoch, and their flat names in files."""

from __future__ import annotations

import pytest

from lift_ray.epoch_metrics import ACCURACIES, FIELDS, METRICS, EpochMetrics

FLAT = {
    "epoch": 2,
    "train/loss": 1.5,
    "time/train_s": 3.0,
    "cost/train_s": 4.0,
    "unlabelled/recall_few": 0.25,
    "validation/few": 0.0,
    "test/few": 0.5,
    "trained_parameters": 800,
    "num_epochs": 5,
}
FOUND = EpochMetrics(
    2,
    train={"loss": 1.5},
    seconds={"train_s": 3.0},
    cost={"train_s": 4.0},
    unlabelled={"recall_few": 0.25},
    validation={"few": 0.0},
    test={"few": 0.5},
    trained_parameters=800,
    num_epochs=5,
)


def test_metrics_are_flat_in_a_fixed_order_and_come_back() -> None:
    assert list(FOUND.flat().items()) == list(FLAT.items())
    assert EpochMetrics.of(dict(reversed(FLAT.items()))) == FOUND
    assert FOUND.flat("validation", "cost") == {"validation/few": 0.0, "cost/train_s": 4.0}
    assert set(FOUND.flat(*FIELDS)) == {name for name in FLAT if "/" in name}


def test_what_is_not_known_is_left_out_and_other_names_are_dropped() -> None:
    assert EpochMetrics(0).flat() == {"epoch": 0}
    assert EpochMetrics.of({"epoch": 1, "step/loss": 1.0, "time": 2.0, "report": 3.0}) == EpochMetrics(1)


@pytest.mark.parametrize("name", FLAT)
def test_a_metric_is_found_by_its_flat_name(name: str) -> None:
    assert FOUND[name] == FOUND.get(name) == FLAT[name]
    assert name in FOUND


@pytest.mark.parametrize("name", ["validation/many", "step/loss", "time", "validation", "flat", "loss", ""])
def test_an_unknown_name_has_no_metric(name: str) -> None:
    assert name not in FOUND
    assert (FOUND.get(name), FOUND.get(name, 7.0)) == (None, 7.0)
    with pytest.raises(KeyError, match=name):
        FOUND[name]


def test_the_accuracies_are_metrics_of_a_split_and_no_name_is_there_twice() -> None:
    assert set(ACCURACIES) < set(METRICS)
    assert len(set(METRICS)) == len(METRICS)
