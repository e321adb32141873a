"""Stratified division of groups of images: a group (location, sequence, individual, patient) is never divided."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lift_ray.data.longtail import Int64s

Float64s = npt.NDArray[np.float64]


def assign_groups(
    labels: Int64s, groups: Int64s, fractions: Sequence[float], seed: int, *, in_order: bool = False
) -> Int64s:
    """Divide groups of images into parts, so that each part gets about its fraction of every class and of the whole.

    The groups of the rarest classes are assigned first, larger ones before smaller ones, equal ones in an order drawn by
    `seed`. Each goes where the squared distances between the held and the wanted fractions of its classes grow the least. A class
    of several groups can still be in one part only, if its groups also contain other classes.

    Args:
        labels: label of every image, (N,).
        groups: group of every image, (N,); any integers.
        fractions: wanted fraction of each class in each of the P parts, together 1; a part with 0 stays empty.
        seed: seed of the order among groups of similar size.
        in_order: fill the parts in order, as training, validation and test: every class is in part 0, and part p counts as
            missing a class of at least 2p groups that it does not have. Otherwise parts of the same fraction are alike, as folds.

    Returns:
        Part of every image, (N,), a pure function of the arguments.
    """
    names, group_of = np.unique(groups, return_inverse=True)
    num_classes = int(labels.max()) + 1
    pairs, counts = np.unique(group_of * num_classes + labels, return_counts=True)
    owner, classes = np.divmod(pairs, num_classes)
    shares = counts / np.bincount(labels)[classes]
    num_groups = np.bincount(classes, minlength=num_classes)
    starts = np.searchsorted(owner, np.arange(len(names) + 1))
    sizes = np.bincount(group_of) / len(labels)
    held = np.zeros((len(fractions), num_classes + 1))  # the last column is the whole, balanced like one more class
    part_of = np.zeros(len(names), np.int64)
    for group in _order(num_groups[classes], shares, starts, seed):
        span = slice(starts[group], starts[group + 1])
        columns, added = np.append(classes[span], num_classes), np.append(shares[span], sizes[group])
        costs = _costs(held[:, columns], added, np.asarray(fractions, np.float64))
        if in_order:
            costs -= _missing(held[:, classes[span]], num_groups[classes[span]])
        part_of[group] = np.argmin(costs)
        held[part_of[group], columns] += added
    return part_of[group_of]


def _order(num_groups: Int64s, shares: Float64s, starts: Int64s, seed: int) -> Int64s:
    """Return the order in which groups are assigned. Sizes within a factor of two count as equal, so that the seed matters."""
    rarest = np.minimum.reduceat(num_groups, starts[:-1])
    largest = np.floor(np.log2(np.maximum.reduceat(shares, starts[:-1])))
    drawn = np.random.default_rng(seed).permutation(len(rarest))
    return drawn[np.lexsort((-largest[drawn], rarest[drawn]))]


def _costs(held: Float64s, added: Float64s, fractions: Float64s) -> Float64s:
    """Return how much the squared distances grow in each part, (P,), if it gets `added` of each class, (C,)."""
    growth = (2 * (held - fractions[:, None]) * added + added**2).sum(axis=1)
    return np.where(fractions > 0, growth, np.inf)


def _missing(held: Float64s, num_groups: Int64s) -> Float64s:
    """Return the number of classes that each part needs and does not have, (P,); infinite for part 0 if there are any."""
    needed = num_groups >= 2 * np.arange(len(held))[:, None]
    missing: Float64s = (needed & (held == 0)).sum(axis=1).astype(np.float64)
    if missing[0]:
        missing[0] = np.inf
    return missing
