"""Datasets: classes, splits and their shards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lift_ray.data.longtail import Int64s, keep_first
from lift_ray.errors import BadInput


@dataclass(frozen=True)
class Shard:
    """One Parquet file.

    Attributes:
        url: path or URL of the file.
        row_groups: number of rows of each row group.
        row_group_bytes: uncompressed bytes of the images of each row group; () if unknown.
        num_bytes: size of the file; 0 if unknown.
        identity: changes with the file's content; "" for local files, or if the store does not report it.
        sha256: checksum of the file if there is a manifest.
    """

    url: str
    row_groups: tuple[int, ...]
    row_group_bytes: tuple[int, ...] = ()
    num_bytes: int = 0
    identity: str = ""
    sha256: str = ""

    @property
    def num_rows(self) -> int:
        """Number of rows of the file."""
        return sum(self.row_groups)


@dataclass(frozen=True, eq=False)
class Split:
    """The kept samples of one split, in storage order.

    Attributes:
        name: one of SPLITS; the labels of `unlabelled` are for evaluation only.
        shards: its files, sorted by name.
        labels: label of every kept sample, (N,).
        rows: row number of every kept sample, counted across the shards, (N,), ascending.
        image_column: name of the image column.
    """

    name: str
    shards: tuple[Shard, ...]
    labels: Int64s
    rows: Int64s
    image_column: str = "image"

    @property
    def num_samples(self) -> int:
        """Number of kept samples N."""
        return len(self.labels)

    def class_counts(self, num_classes: int) -> Int64s:
        """Return the number of kept samples of each class, (K,)."""
        return np.bincount(self.labels, minlength=num_classes).astype(np.int64)

    def take(self, samples: Int64s) -> Split:
        """Return the samples with these numbers, in this order."""
        return replace(self, labels=self.labels[samples], rows=self.rows[samples])

    def subset(self, frac: float) -> Split:
        """Return the first `round(frac * n)` kept samples of each class in storage order, at least one; frac in (0, 1]."""
        if frac == 1:
            return self
        counts = self.class_counts(int(self.labels.max()) + 1)
        return self.take(keep_first(self.labels, np.maximum(1, np.round(frac * counts).astype(np.int64))))


@dataclass(frozen=True, eq=False)
class Dataset:
    """An open dataset: URI, K class names, and splits by name."""

    uri: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    def split(self, name: str) -> Split:
        """Return a split by name. Raises BadInput, naming the existing splits, if it does not exist."""
        if name not in self.splits:
            there = ", ".join(self.splits)
            raise BadInput(self.uri, f"must have the split {name!r}", f"only {there}", "choose one of these")
        return self.splits[name]
