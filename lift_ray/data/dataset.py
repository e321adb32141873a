"""A dataset: its classes, its splits and their shards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lift_ray.data.longtail import Int64s, keep_first
from lift_ray.errors import BadInput


@dataclass(frozen=True)
class Shard:
    """One Parquet file.

    Attributes:
        url: where it is.
        row_groups: rows of each of its row groups.
        row_group_bytes: bytes of the images of each, uncompressed; () when not known.
        num_bytes: of the whole file; 0 when not known.
        identity: changes with the file's content; "" when the store does not tell, or is this machine's own disk.
        sha256: of the file, when there is a manifest.
    """

    url: str
    row_groups: tuple[int, ...]
    row_group_bytes: tuple[int, ...] = ()
    num_bytes: int = 0
    identity: str = ""
    sha256: str = ""

    @property
    def num_rows(self) -> int:
        """Rows of the whole file."""
        return sum(self.row_groups)


@dataclass(frozen=True, eq=False)
class Split:
    """The kept samples of one split, in storage order.

    Attributes:
        name: one of SPLITS; the labels of `unlabelled` are for measuring only.
        shards: its files, by name.
        labels: label of every kept sample, (N,).
        rows: global row number, counted through the shards, of every kept sample, (N,), ascending.
        image_column: name of the column of images.
    """

    name: str
    shards: tuple[Shard, ...]
    labels: Int64s
    rows: Int64s
    image_column: str = "image"

    @property
    def num_samples(self) -> int:
        """N, the number of kept samples."""
        return len(self.labels)

    def class_counts(self, num_classes: int) -> Int64s:
        """Kept samples of each class, (K,)."""
        return np.bincount(self.labels, minlength=num_classes).astype(np.int64)

    def take(self, samples: Int64s) -> Split:
        """The samples of these numbers, in this order."""
        return replace(self, labels=self.labels[samples], rows=self.rows[samples])

    def share(self, frac: float) -> Split:
        """The first `round(frac * n)` kept samples of each class in storage order, at least one of each; frac in (0, 1]."""
        if frac == 1:
            return self
        counts = self.class_counts(int(self.labels.max()) + 1)
        return self.take(keep_first(self.labels, np.maximum(1, np.round(frac * counts).astype(np.int64))))


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened data set: where it is, its class names (K of them) and its splits by name."""

    uri: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    def split(self, name: str) -> Split:
        """The split of this name. Raises BadInput, naming what is there, when it is absent."""
        if name not in self.splits:
            there = ", ".join(self.splits)
            raise BadInput(self.uri, f"must have the split {name!r}", f"only {there}", "choose one of these")
        return self.splits[name]
