"""Labeled images of any source, converted or not: how many each class has, their size, and the command that converts them."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from lift_ray.data.bad_image import BadImage
from lift_ray.data.convert.folder import scan_folder
from lift_ray.data.convert.index import FilesIn, ImageIndex, absolute
from lift_ray.data.convert.lists import scan_list
from lift_ray.data.convert.splitting import Division, divide
from lift_ray.data.convert.tables import scan_table
from lift_ray.data.dataset import Dataset
from lift_ray.data.decode import opened
from lift_ray.data.jpeg_header import orientation
from lift_ray.data.layout import MANIFEST, find_shards, is_saved, shard_names
from lift_ray.data.longtail import Int64s
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput, one_line
from lift_ray.storage.store import PATIENCE_S, entries

Kind = Literal["dataset", "folder", "csv", "parquet", "arrow", "list"]

RULE = "must be a dataset, a folder of class directories, a CSV, Parquet or .txt list, or a folder of save_to_disk"
FILES: dict[str, Kind] = {"csv": "csv", "tsv": "csv", "parquet": "parquet", "txt": "list"}  # by suffix
KINDS = {
    "dataset": "a dataset",
    "folder": "a folder of class directories",
    "csv": "a table",
    "parquet": "a table in Parquet",
    "arrow": "a folder of save_to_disk",
    "list": "a list of paths and labels",
}
NUM_SIZES = 9  # images whose headers are read


@dataclass(frozen=True)
class ReadOptions:
    """Options of `convert` for reading tables, lists and folders; None for its defaults."""

    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    root: str | None = None
    class_names: str | None = None
    similar_names: str | None = None

    def given(self, kind: Kind, place: str) -> dict[str, str]:
        """Return the given options by name. Raises BadInput for one that this kind of source does not have."""
        names = [each.name for each in fields(self)]
        known = {"dataset": [], "folder": names[4:], "list": names[3:5]}.get(kind, names)
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if wrong := next((name for name in found if name not in known), None):
            raise BadInput(
                option(wrong), f"cannot be used with {place}", but=f"it is {KINDS[kind]}", remedy="leave it out"
            )
        return found


@dataclass(frozen=True)
class Source:
    """Labeled images.

    Attributes:
        place: path or URL, as given.
        kind: `dataset`, or the command of `convert` that makes one of it.
        options: the options of that command that were given.
        class_names: in label order.
        labelled: labeled training images of each class before any are held out, (K,).
        splits: images of each class in each split, (K,) each; of a source that is not converted, as `convert` will divide it.
        origin: the dataset, or the index of the images.
    """

    place: str
    kind: Kind
    options: Mapping[str, str]
    class_names: Sequence[str]
    labelled: Int64s
    splits: Mapping[str, Int64s]
    origin: Dataset | ImageIndex

    @property
    def is_converted(self) -> bool:
        """True if it can be searched as it is."""
        return self.kind == "dataset"

    def convert_command(self, destination: str, short_side: int | None) -> list[str]:
        """Return the words of the command that converts it, with `convert` first.

        Args:
            destination: folder or URL of the dataset.
            short_side: shrink larger images to this; None keeps their bytes.
        """
        options = dict(self.options)
        first = [self.place, destination]
        if self.kind == "list":
            first = [options.pop("root", _folder_of(self.place)), destination, "--train", self.place]
        words = ["convert", self.kind, *first]
        for name, value in options.items():
            words += [option(name), value]
        return [*words, *(["--short-side", str(short_side)] if short_side else [])]

    def sizes(self) -> tuple[list[tuple[int, int]], str]:
        """Return (width, height) of a few images, upright, and why the first of those without one cannot be read, or ""."""
        found, problem = [], ""
        for encoded in self._samples():
            if isinstance(encoded, str):
                problem = problem or encoded
                continue
            try:
                with opened(encoded) as image:
                    found.append(image.size[::-1] if orientation(image) >= 5 else image.size)
            except BadImage as error:
                problem = problem or one_line(error)
        return found, problem

    def _samples(self) -> list[bytes | str]:
        """Return a few encoded images, or for one that cannot be read the reason."""
        if isinstance(self.origin, Dataset):
            split = self.origin.split("train")
            first = split.rows < split.shards[0].row_groups[0]  # reading another row group would be another request
            rows = np.flatnonzero(first) if first.any() else np.arange(1)
            with RowReader(split) as reader:
                return list(reader.read(rows[_spread(len(rows))]))
        images = [reference for rows in self.origin.splits.values() for reference, _ in rows]
        at = _spread(len(images)) if isinstance(self.origin.read, FilesIn) else np.arange(min(NUM_SIZES, len(images)))
        return [_read(self.origin, images[number]) for number in at.tolist()]


def option(name: str) -> str:
    """Return the option of the command line: `--image-column` for image_column."""
    return f"--{name.replace('_', '-')}"


def find_source(place: str, options: ReadOptions | None = None) -> Source:
    """Look at a source without converting it; of its images, only names and labels are read.

    Args:
        place: a dataset, also `embedded:NAME`; a folder of class directories, possibly in split directories; a .csv or .tsv table; a
            Parquet file, a folder of them, or a pattern with `*`; a .txt list of paths and labels; a folder of `save_to_disk`. Any
            fsspec URL.
        options: how to read one that is not converted.

    Raises BadInput if it cannot be read, or `convert` would refuse it.
    """
    kind, options = _kind(place), options or ReadOptions()
    given = options.given(kind, place)
    if kind == "dataset":
        dataset = open_dataset(place)
        counts = {name: split.class_counts(dataset.num_classes) for name, split in dataset.splits.items()}
        train = dataset.split("train").class_counts(dataset.num_classes)
        labelled = train if dataset.labelled_counts is None else dataset.labelled_counts
        return Source(place, kind, given, dataset.class_names, labelled, counts, dataset)
    index = _scan(place, kind, given)
    number, divided = len(index.class_names), divide(index, Division())
    splits = {
        name: np.bincount([row[1] for row in rows], minlength=number).astype(np.int64)
        for name, rows in divided.splits.items()
    }
    labelled = sum((splits[name] for name in divided.from_training if name in splits), np.zeros(number, np.int64))
    return Source(place, kind, given, index.class_names, labelled, splits, index)


def _scan(place: str, kind: Kind, given: Mapping[str, str]) -> ImageIndex:
    if kind == "folder":
        return scan_folder(place, **given)
    if kind != "list":
        return scan_table(place, kind=kind, **given)
    if "class_names" not in given:
        raise BadInput(
            "--class-names",
            "is required for a list of paths and numbers",
            but="is missing",
            remedy="give a file with a class name on each line, in the order of the numbers",
        )
    return scan_list(given.get("root", _folder_of(place)), train=place, class_names=given["class_names"])


def _kind(place: str) -> Kind:
    if place.startswith("embedded:"):
        return "dataset"
    suffix = place.rstrip("/").rpartition(".")[2].lower()
    if suffix in FILES or "*" in place:
        return FILES.get(suffix, "parquet")
    url = absolute(place)
    names = {entry.name for entry in entries(url, place, RULE, PATIENCE_S)}
    if MANIFEST in names:
        return "dataset"
    if is_saved(names):
        return "arrow"
    if shard_names(names) or _has_shards(place, url):
        return "dataset" if _opens(place) else "parquet"
    return "parquet" if any(name.endswith(".parquet") for name in names) else "folder"


def _has_shards(place: str, url: str) -> bool:
    try:
        return bool(find_shards(place, url, PATIENCE_S).shards)
    except BadInput:
        return False


def _opens(place: str) -> bool:
    """Return True for shards in the form of a dataset; others are tables that are to be converted."""
    try:
        open_dataset(place)
    except BadInput:
        return False
    return True


def _folder_of(place: str) -> str:
    return os.path.dirname(place) or "."


def _spread(number: int) -> Int64s:
    """Return up to NUM_SIZES of the numbers below `number`, evenly spaced."""
    return np.linspace(0, number - 1, min(NUM_SIZES, number)).round().astype(np.int64)


def _read(index: ImageIndex, reference: str) -> bytes | str:
    try:
        return index.read(reference)
    except Exception as error:  # a reader raises whatever its store or format does
        return f"{reference}: {one_line(error)}"
