"""Confusions: how often images of one class are classified as another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Confusions:
    """Numbers of images by true and predicted class, without the zeros; a matrix of thousands of classes would be mostly zeros.

    Args:
        names: names of the K classes.
        true, predicted, count: class, predicted class and number of images, (P,) each, sorted by true and predicted class.
    """

    names: Sequence[str]
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    count: NDArray[np.int64]

    @classmethod
    def of(cls, label: NDArray[Any], predicted: NDArray[Any], names: Sequence[str]) -> Confusions:
        """Count images.

        Args:
            label, predicted: true and predicted class of each image, (N,).
        """
        pairs, count = np.unique(label.astype(np.int64) * len(names) + predicted, return_counts=True)
        return cls(names, pairs // len(names), pairs % len(names), count)

    @property
    def totals(self) -> NDArray[np.int64]:
        """Number of images of each class, (K,)."""
        return np.bincount(self.true, self.count, len(self.names)).astype(np.int64)

    def most_confused(self, number: int) -> list[dict[str, Any]]:
        """Return rows of the pairs of two classes with the most images, with their fraction of the images of the true class.

        Among pairs with equally many images, those with the larger fraction come first.
        """
        fraction = self.count / self.totals[self.true]
        order = np.lexsort((self.predicted, self.true, -fraction, -self.count))
        wrong = [k for k in order if self.true[k] != self.predicted[k]][:number]
        return [self._row(k) | {"fraction": float(fraction[k])} for k in wrong]

    def classes(self, most: int) -> list[int]:
        """Return all classes if there are at most `most`, otherwise those of the most confused pairs, ascending."""
        if len(self.names) <= most:
            return list(range(len(self.names)))
        found: dict[int, None] = {}
        wrong = self.true != self.predicted
        for k in np.flatnonzero(wrong)[np.argsort(-self.count[wrong], kind="stable")]:
            pair = dict.fromkeys((int(self.true[k]), int(self.predicted[k])))
            if len(found | pair) > most:
                break
            found |= pair
        return sorted(found)

    def matrix(self, classes: Sequence[int]) -> NDArray[np.int64]:
        """Return the counts of these C classes, (C, C), by true class (row) and predicted class (column)."""
        place = np.full(len(self.names), -1)
        place[list(classes)] = np.arange(len(classes))
        rows, columns = place[self.true], place[self.predicted]
        inside = (rows >= 0) & (columns >= 0)
        out = np.zeros((len(classes), len(classes)), np.int64)
        out[rows[inside], columns[inside]] = self.count[inside]
        return out

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each pair of classes that has images: true, predicted, count."""
        return [self._row(k) for k in range(len(self.count))]

    def _row(self, k: int) -> dict[str, Any]:
        return {
            "true": self.names[self.true[k]],
            "predicted": self.names[self.predicted[k]],
            "count": int(self.count[k]),
        }
