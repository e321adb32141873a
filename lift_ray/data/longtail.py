"""Long-tailed class counts: profiles, selection of rows, and summaries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lift_ray.errors import BadInput
from lift_ray.text import count

Int64s = npt.NDArray[np.int64]


def places_of(values: Int64s) -> Iterator[tuple[int, Int64s]]:
    """Yield each distinct value, ascending, with its places in order. Sorts once: a pass for each of thousands takes minutes."""
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, starts)[1:], strict=True)


def longtail_counts(natural_counts: Int64s, largest: int, imbalance: float) -> Int64s:
    """Return the exponential profile `min(natural, round(largest * imbalance ** (-i / (K - 1))))`, never below one image.

    i is the rank of a class by natural count (descending, ties by class index), so the largest classes stay the largest.

    Args:
        natural_counts: images of each class, (K,).
        largest: maximum count of the first class, >= 1.
        imbalance: ratio of the largest to the smallest count of the profile, >= 1.

    Returns:
        Counts in class order, (K,); a class without images keeps 0. Raises BadInput for values out of range.
    """
    if largest < 1:
        raise BadInput("largest", "must be at least 1", largest, "give the images of the largest class")
    if imbalance < 1:
        raise BadInput("imbalance", "must be at least 1", imbalance, "give largest / smallest, for example 50")
    natural = np.asarray(natural_counts, dtype=np.int64)
    profile = np.round(largest * float(imbalance) ** -_tail(natural)).astype(np.int64)
    return np.minimum(natural, np.maximum(profile, 1))


def semi_supervised_counts(
    natural_counts: Int64s, labelled: int, unlabelled: int, gamma_l: float, gamma_u: float, *, flipped: bool = False
) -> tuple[Int64s, Int64s]:
    """Return counts of labeled images, `max(1, int(labelled / gamma_l ** t))`, and unlabeled ones, `int(unlabelled / gamma_u ** t)`.

    t grows from 0 for the class with the most images to 1 for the one with the fewest, ties by class index. On balanced data this is
    the order of the classes, as in the literature on CIFAR.

    Args:
        natural_counts: images of each class, (K,); only their order matters.
        labelled, unlabelled: images of the first class, each >= 1.
        gamma_l, gamma_u: ratio of the largest to the smallest count, each >= 1.
        flipped: the class with the fewest labeled images gets the most unlabeled ones.

    Returns:
        Labeled and additional unlabeled images of each class, (K,) each. Raises BadInput for values out of range.
    """
    for name, value in (("labelled", labelled), ("unlabelled", unlabelled), ("gamma-l", gamma_l), ("gamma-u", gamma_u)):
        if value < 1:
            raise BadInput(name, "must be at least 1", f"{value:g}", "give a larger number")
    tail = _tail(np.asarray(natural_counts, dtype=np.int64))
    counts = (labelled / float(gamma_l) ** tail).astype(np.int64)
    further = (unlabelled / float(gamma_u) ** (1 - tail if flipped else tail)).astype(np.int64)
    return np.maximum(counts, 1), further


def _tail(natural: Int64s) -> npt.NDArray[np.float64]:
    """Return the rank of each class, from 0 (most images) to 1 (fewest), ties by class index, (K,)."""
    rank = np.empty(len(natural), dtype=np.int64)
    rank[np.argsort(-natural, kind="stable")] = np.arange(len(natural))
    return rank / max(len(natural) - 1, 1)


def keep_first(labels: Int64s, counts: Int64s) -> Int64s:
    """Return the rows of the first `counts[c]` samples of every class c, in storage order.

    Args:
        labels: label of every sample, (N,), each in [0, K).
        counts: number of samples to keep, (K,); larger values than available keep all.

    Returns:
        Ascending indices into `labels`.
    """
    by_class = np.argsort(labels, kind="stable")
    totals = np.bincount(labels, minlength=len(counts))
    nth_of_class = np.empty(len(labels), dtype=np.int64)
    nth_of_class[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(totals) - totals, totals)
    return np.flatnonzero(nth_of_class < np.asarray(counts)[labels]).astype(np.int64)


@dataclass(frozen=True)
class Distribution:
    """Summary of class counts."""

    classes: int
    images: int
    largest: int
    smallest: int
    imbalance: float

    def __str__(self) -> str:
        return (
            f"{count(self.classes, 'class')}, {count(self.images, 'image')}: {self.largest:,} to {self.smallest:,} a class, "
            f"imbalance {self.imbalance:.1f}"
        )


def summary(counts: Int64s) -> Distribution:
    """Summarize the counts of K >= 1 classes, (K,); the imbalance factor is largest / smallest."""
    largest, smallest = int(counts.max()), int(counts.min())
    return Distribution(
        classes=len(counts),
        images=int(counts.sum()),
        largest=largest,
        smallest=smallest,
        imbalance=largest / smallest if smallest else math.inf,
    )


def plot(counts: Int64s, width: int = 60, height: int = 6) -> str:
    """Plot sorted class counts, (K,), as `height` lines of text, on a log scale that starts at one image.

    More than `width` classes are subsampled evenly; the first and the last are always shown.
    """
    ordered = np.sort(counts)[::-1]
    shown = ordered[np.linspace(0, len(ordered) - 1, min(len(ordered), width)).round().astype(np.int64)]
    top = max(int(ordered[0]), 2)
    eighths = 1 + np.log(np.maximum(shown, 1)) / math.log(top) * (8 * height - 1)  # one image is still visible
    fill = np.clip(np.round(eighths[None, :] - 8 * np.arange(height)[::-1, None]), 0, 8).astype(np.int64)
    scale = f"{top:,}"
    names = [scale] + [""] * (height - 2) + ["1"]
    bars = ("".join(" ▁▂▃▄▅▆▇█"[step] for step in line).rstrip() for line in fill)
    return "\n".join(f"{name:>{len(scale)}} {bar}".rstrip() for name, bar in zip(names, bars, strict=True))
