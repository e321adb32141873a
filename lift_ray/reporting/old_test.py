"""Comparison of a model's metrics on new images with those on the test split of its dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lift_ray.epoch_metrics import ACCURACIES
from lift_ray.errors import BadInput, one_line
from lift_ray.reporting.confidence import Interval, accuracy_intervals
from lift_ray.reporting.study_files import COPY_AGAIN, Predictions, read_winner
from lift_ray.storage.layout import BEST, BEST_METRICS, FINAL_CHECKPOINT, METRICS, STUDY, TOGETHER
from lift_ray.storage.output import Output
from lift_ray.terminal.evaluation_tables import compared_table, intervals_line
from lift_ray.terminal.tables import console
from lift_ray.text import count, say

PREFIX = "test/"
EVALUATE_IT = "add --old-test to evaluate it now"


@dataclass(frozen=True)
class OldTest:
    """Results on the test split of the dataset that a model was trained on.

    Attributes:
        metrics: accuracies over all classes of that split, by name (ACCURACIES).
        predictions: predictions of its images; None if only the metrics are stored.
    """

    metrics: Mapping[str, float]
    predictions: Predictions | None = None


@dataclass(frozen=True)
class Comparison:
    """Results on new images and on the old test split.

    Attributes:
        new, old: accuracies of both, with 95% intervals; those of `old` are None if they are unknown.
        classes: number of classes that are compared, None if the classes of the old test split are not known.
    """

    new: Mapping[str, Interval]
    old: Mapping[str, Interval | float]
    classes: int | None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each accuracy that both have: metric, new, old, difference (new - old) and its 95% interval, low to high."""
        rows = []
        for metric, new in self.new.items():
            if (old := self.old.get(metric)) is None:
                continue
            value = old.value if isinstance(old, Interval) else old
            row = {"metric": metric, "new": new.value, "old": value, "difference": new.value - value}
            if isinstance(old, Interval):
                found = difference(new, old)
                row |= {"low": found.low, "high": found.high}
            rows.append(row)
        return rows


@dataclass(frozen=True)
class NewResults:
    """Results that new images have beside their metrics.

    Attributes:
        intervals: 95% intervals of the accuracies, by name.
        comparison: comparison with the old test split, None if there is none.
        note: why there is none, or how it is limited; "" if there is nothing to say.
    """

    intervals: Mapping[str, Interval]
    comparison: Comparison | None
    note: str

    @classmethod
    def of(cls, predictions: Predictions, groups: NDArray[np.str_], old: OldTest | str) -> NewResults:
        """Compute intervals, and compare with the old test split.

        Args:
            predictions: those of the new images.
            groups: many, medium or few for each class, (K,).
            old: results on the old test split, or the reason why they are not known.
        """
        intervals = accuracy_intervals(predictions, groups)
        if isinstance(old, str):
            return cls(intervals, None, old)
        comparison, note = compare(predictions, old, groups), ""
        if comparison is None:
            return cls(intervals, None, "no comparison with the old test split: they share no class")
        if comparison.classes is None:
            few = len(np.unique(predictions.label)) < len(groups)
            fewer = " and are of all its classes, while the new images are of fewer" if few else ""
            note = f"of the old test split only accuracies are stored: they have no intervals{fewer}; {EVALUATE_IT}"
        return cls(intervals, comparison, note)

    def for_json(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        comparison = self.comparison
        return {
            "intervals": {name: [one.low, one.high] for name, one in self.intervals.items()},
            "old_test": None if comparison is None else {"classes": comparison.classes, "rows": comparison.rows},
            "old_test_note": self.note,
        }

    def print(self, prefix: str = "") -> None:
        """Print intervals and comparison after a prefix."""
        say(prefix + intervals_line({name: (one.low, one.high) for name, one in self.intervals.items()}))
        if self.comparison is not None:
            number = self.comparison.classes
            classes = "" if number is None else f", {count(number, 'class')} that both have"
            title = f"{prefix}New images and the old test split{classes}: accuracy (%)"
            console().print(compared_table(self.comparison.rows, title))
        if self.note:
            say(self.note)


def difference(new: Interval, old: Interval) -> Interval:
    """Return new - old with its 95% interval, for estimates from different images.

    The distances from the value to the ends are added in squares, end by end, which needs no symmetric intervals (Newcombe 1998,
    doi 10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I).
    """
    value = new.value - old.value
    below = np.hypot(new.value - new.low, old.high - old.value)
    above = np.hypot(new.high - new.value, old.value - old.low)
    return Interval(value, float(value - below), float(value + above))


def compare(new: Predictions, old: OldTest, groups: NDArray[np.str_]) -> Comparison | None:
    """Compare predictions with an old test: on the classes that both have, if the old predictions are known.

    Args:
        groups: many, medium or few for each class, (K,).

    Returns None if they have no class in common.
    """
    if old.predictions is None:
        return Comparison(accuracy_intervals(new, groups), old.metrics, None)
    common = np.intersect1d(new.label, old.predictions.label)
    if not len(common):
        return None
    both = [accuracy_intervals(_only(predictions, common), groups) for predictions in (new, old.predictions)]
    return Comparison(both[0], both[1], len(common))


def _only(predictions: Predictions, classes: NDArray[np.int64]) -> Predictions:
    here = np.isin(predictions.label, classes)
    return Predictions(predictions.label[here], predictions.predicted[here], predictions.confidence[here])


def read_old_test(where: str) -> OldTest | None:
    """Read the results of a model on the test split of its dataset, as `tune` and `train` store them.

    Args:
        where: folder or URL of a checkpoint, or of the results of tune or train.

    Returns None if nothing is stored. Raises BadInput for a file that cannot be read.
    """
    places = _places(where)
    for out in places:
        if out.holds(STUDY) and (found := read_winner(out)) is not None:
            metrics, predictions = found
            if accuracies := _accuracies(metrics):
                return OldTest(accuracies, predictions)
    for out in places:
        for name in (BEST_METRICS, f"{BEST}/{BEST_METRICS}", TOGETHER, METRICS):
            if out.holds(name) and (accuracies := _accuracies(_last_line(out, name))):
                return OldTest(accuracies)
    return None


def _places(where: str) -> list[Output]:
    """Return the folder, and the results of the search or run that it is in if it is their best/ or checkpoint/."""
    url, mark, query = (where if "://" in where else str(Path(where).absolute())).partition("?")
    parent, _, name = url.rstrip("/").rpartition("/")
    places = [url, *([parent] if name in (BEST, FINAL_CHECKPOINT) else [])]
    return [Output(f"{place}{mark}{query}", "CHECKPOINT") for place in places]


def _last_line(out: Output, name: str) -> dict[str, Any]:
    """Return a JSON file, or the last line of one with several."""
    with out.fetched(name) as path:
        try:
            text = path.read_text()
            found = json.loads(text.splitlines()[-1] if name == METRICS else text)
        except (OSError, ValueError, IndexError) as error:
            raise BadInput(f"{out}/{name}", f"invalid JSON: {one_line(error)}", remedy=COPY_AGAIN) from None
    return found if isinstance(found, dict) else {}


def _accuracies(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {name: metrics.get(PREFIX + name) for name in ACCURACIES}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
