"""Long-tailed class counts by rule, and the rows that realise them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lift_ray.errors import BadInput

Int64s = npt.NDArray[np.int64]


def longtail_counts(natural_counts: Int64s, largest: int, imbalance: float) -> Int64s:
    """The exponential profile `min(natural, round(largest * imbalance ** (-i / (K - 1))))`, never below one image.

    i is the rank of a class by natural count (descending, ties by class index), so the head stays the head.

    Args:
        natural_counts: images of each class, (K,).
        largest: what the first class may keep, >= 1.
        imbalance: largest over smallest count of the profile, >= 1.

    Returns:
        Counts in class order, (K,); a class without images keeps 0. Raises BadInput for values out of range.
    """
    if largest < 1:
        raise BadInput(f"largest: must be at least 1, but got {largest}; give the images of the largest class")
    if imbalance < 1:
        raise BadInput(f"imbalance: must be at least 1, but got {imbalance}; give largest / smallest, such as 50")
    natural = np.asarray(natural_counts, dtype=np.int64)
    rank = np.empty(len(natural), dtype=np.int64)
    rank[np.argsort(-natural, kind="stable")] = np.arange(len(natural))
    profile = np.round(largest * float(imbalance) ** (-rank / max(len(natural) - 1, 1))).astype(np.int64)
    return np.minimum(natural, np.maximum(profile, 1))


def keep_first(labels: Int64s, counts: Int64s) -> Int64s:
    """Rows of the first `counts[c]` samples of every class c, in storage order.

    Args:
        labels: label of every sample, (N,), each in [0, K).
        counts: samples to keep, (K,); more than there are keeps them all.

    Returns:
        Ascending indices into `labels`.
    """
    by_class = np.argsort(labels, kind="stable")
    totals = np.bincount(labels, minlength=len(counts))
    nth_of_class = np.empty(len(labels), dtype=np.int64)
    nth_of_class[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(totals) - totals, totals)
    return np.flatnonzero(nth_of_class < np.asarray(counts)[labels]).astype(np.int64)
