"""Datasets: classes, splits and their shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from lift_ray.data.bit_depth import AS_STORED, Rendering
from lift_ray.data.longtail import Int64s, keep_first
from lift_ray.errors import BadInput

MAKES_SPLIT = {
    "train": "convert again with training images",
    "validation": "convert again with --validation-frac 0.1",
    "test": "convert again with --test-frac 0.2, or set test: none",
    "unlabelled": "convert again with --labelled, --unlabelled and --gamma-l",
}


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
        rows: row number of every kept sample, counted across the shards, (N,).
        image_column: name of the image column.
        groups: group of every kept sample (location, sequence, individual), (N,); None if the dataset has none. Samples of a
            group are never divided between splits or folds.
        parts: the splits that this one was put together from, and the sample numbers in each; () for a split of the dataset.
    """

    name: str
    shards: tuple[Shard, ...]
    labels: Int64s
    rows: Int64s
    image_column: str = "image"
    groups: Int64s | None = None
    parts: tuple[tuple[Split, Int64s], ...] = ()

    @property
    def num_samples(self) -> int:
        """Number of kept samples N."""
        return len(self.labels)

    @cached_property
    def key(self) -> str:
        """Digest of the files and rows of the kept samples."""
        digest = hashlib.sha256("\n".join(shard.url for shard in self.shards).encode())
        digest.update(np.ascontiguousarray(self.rows).tobytes())
        return digest.hexdigest()

    @cached_property
    def row_group_starts(self) -> Int64s:
        """Number of the first row of each row group, counted across the shards, and of all rows, (G + 1,)."""
        sizes = [rows for shard in self.shards for rows in shard.row_groups]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])

    def row_groups_of(self, rows: Int64s) -> Int64s:
        """Return the number of the row group of each row, counted across the shards."""
        return np.searchsorted(self.row_group_starts, rows, side="right") - 1

    def class_counts(self, num_classes: int) -> Int64s:
        """Return the number of kept samples of each class, (K,)."""
        return np.bincount(self.labels, minlength=num_classes).astype(np.int64)

    def take(self, samples: Int64s) -> Split:
        """Return the samples with these numbers, in this order."""
        groups = None if self.groups is None else self.groups[samples]
        return replace(self, labels=self.labels[samples], rows=self.rows[samples], groups=groups, parts=())

    def subset(self, frac: float) -> Split:
        """Return the first `round(frac * n)` kept samples of each class in storage order, at least one; frac in (0, 1]."""
        if frac == 1:
            return self
        counts = self.class_counts(int(self.labels.max()) + 1)
        return self.take(keep_first(self.labels, np.maximum(1, np.round(frac * counts).astype(np.int64))))


def joined(name: str, parts: Sequence[tuple[Split, Int64s]]) -> Split:
    """Return samples of several splits as one split, part after part.

    Args:
        parts: splits of a dataset, and the sample numbers to take from each, ascending. Parts of the same split become one.
    """
    parts = _merged(parts)
    starts = np.cumsum([0, *(sum(shard.num_rows for shard in split.shards) for split, _ in parts)])
    taken = [split.take(samples) for split, samples in parts]
    groups = [split.groups for split in taken if split.groups is not None]
    return Split(
        name,
        tuple(shard for split in taken for shard in split.shards),
        np.concatenate([split.labels for split in taken]),
        np.concatenate([start + split.rows for start, split in zip(starts[:-1], taken, strict=True)]),
        taken[0].image_column,
        np.concatenate(groups) if len(groups) == len(taken) else None,
        tuple(parts),
    )


def _merged(parts: Sequence[tuple[Split, Int64s]]) -> list[tuple[Split, Int64s]]:
    """Return the parts in terms of splits that are not put together from others, each once."""
    found: dict[int, tuple[Split, list[Int64s]]] = {}
    for split, samples in parts:
        start = 0
        for inner, numbers in split.parts or ((split, np.arange(split.num_samples)),):
            here = samples[(samples >= start) & (samples < start + len(numbers))] - start
            found.setdefault(id(inner), (inner, []))[1].append(numbers[here])
            start += len(numbers)
    return [(split, np.sort(np.concatenate(samples))) for split, samples in found.values()]


@dataclass(frozen=True, eq=False)
class Dataset:
    """An open dataset.

    Attributes:
        uri: path or URL, as given.
        class_names: names of the K classes.
        splits: splits by name.
        validation: `drawn` if the validation images were taken out of the training images, so that a final model may be trained
            on both; `separate` if they are a set of their own, for example a published one.
        labelled_counts: labeled training images of each class before any were held out, (K,); they define many, medium and few.
            None for a dataset without a training split.
        rendering: how the conversion made images with more than 8 bits, several pages or transparency 8-bit RGB; new images
            must be rendered in the same way.
    """

    uri: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    validation: Literal["drawn", "separate"] = "separate"
    labelled_counts: Int64s | None = None
    rendering: Rendering = AS_STORED

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @property
    def train_on(self) -> str:
        """The splits that the training images come from, as in a run file: `train` or `train+validation`."""
        return "+".join(dict.fromkeys(part.name for part, _ in self.splits["train"].parts)) or "train"

    def split(self, name: str) -> Split:
        """Return a split by name. Raises BadInput, with the option of `convert` that makes it, if it does not exist."""
        if name not in self.splits:
            remedy = MAKES_SPLIT.get(name, "choose one of these")
            raise BadInput(self.uri, f"must have a {name} split", f"only {', '.join(self.splits)}", remedy)
        return self.splits[name]
