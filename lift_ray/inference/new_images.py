"""Labeled images that a trained model has not seen, from any source, as a dataset with the classes of the model."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from lift_ray.data.bit_depth import AS_STORED, Rendering
from lift_ray.data.convert.folder import SPLIT_DIRECTORIES, scan_folder
from lift_ray.data.convert.images import Encoding
from lift_ray.data.convert.index import ImageIndex, absolute, folded, readable
from lift_ray.data.convert.lists import scan_list
from lift_ray.data.convert.shards import ROW_GROUP_ROWS, ROWS_PER_SHARD, SplitRecord, publish
from lift_ray.data.convert.splitting import Row
from lift_ray.data.convert.tables import scan_table
from lift_ray.data.convert.tasks import Job, ShardTask, run_here
from lift_ray.data.dataset import Dataset
from lift_ray.data.layout import MANIFEST, find_shards, is_saved, shard_names
from lift_ray.data.longtail import Int64s
from lift_ray.data.open import open_dataset
from lift_ray.data.walk import is_ignored
from lift_ray.errors import BadInput, RunFailed, first_few
from lift_ray.storage.store import PATIENCE_S, entries, join
from lift_ray.text import count

RULE = "must be a dataset, a folder of class directories, a CSV, Parquet or .txt list, or a folder of save_to_disk"
SPLIT = "test"  # of a source without splits
SHOWN = 10  # classes or images that a note names
TABLES = {"csv": "csv", "tsv": "csv", "parquet": "parquet", "txt": "list"}  # kind of a file, by its suffix

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SourceOptions:
    """Options for images that are not converted yet, as those of `convert`; None for its defaults."""

    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    root: str | None = None
    class_names: str | None = None

    def check(self, data: str, kind: str) -> None:
        """Raise BadInput if an option is given that this kind of source does not have."""
        known = {"list": ("root", "class_names"), "folder": ()}.get(kind, tuple(self.given))
        for name in self.given:
            if name not in known:
                needs = "a table (CSV or Parquet)" if kind == "list" else "a table or a list that is not converted yet"
                raise BadInput(f"--{name.replace('_', '-')}", f"requires {needs}", data, "leave it out")

    @property
    def given(self) -> dict[str, str]:
        """The options that are given, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}


@dataclass(frozen=True)
class ClassMatches:
    """Classes of images, and the classes of a model with the same names.

    Attributes:
        labels: label of the model for each class of the images, (C,); -1 for a class that the model does not have.
        by_case: names that differ from those of the model in upper and lower case, with those of the model.
    """

    labels: Int64s
    by_case: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NewImages:
    """Labeled images, ready to be evaluated.

    Attributes:
        dataset: the images of known classes, with the classes of the model; its URI is that of the source.
        split: the split to evaluate.
        matches: how the classes were matched.
        unknown: number of images of each class that the model does not have; they are left out.
        skipped: a line for each image that cannot be decoded and is left out.
        is_temporary: the images are in a temporary folder of this machine.
    """

    dataset: Dataset
    split: str
    matches: ClassMatches
    unknown: Mapping[str, int]
    skipped: Sequence[str] = ()
    is_temporary: bool = False

    @property
    def present(self) -> Int64s:
        """Labels of the classes that have images, ascending."""
        return np.unique(self.dataset.split(self.split).labels)

    def notes(self, *, absent: bool) -> list[str]:
        """Return sentences about what is left out, and if wanted about the model's classes that are `absent`."""
        notes, present, total = [], set(self.present.tolist()), self.dataset.num_classes
        names = [repr(name) for label, name in enumerate(self.dataset.class_names) if label not in present]
        if absent and names:
            notes.append(
                f"{len(names):,} of the model's {count(total, 'class')} {'have' if len(names) > 1 else 'has'} "
                f"no images here ({first_few(names)}); metrics are over the other {len(present):,}"
            )
        if self.matches.by_case:
            pairs = [f"{theirs!r} is {ours!r}" for theirs, ours in self.matches.by_case.items()]
            notes.append(f"names that differ in case or spaces only are the same class: {first_few(pairs, SHOWN)}")
        if self.unknown:
            number, counts = sum(self.unknown.values()), [f"{name!r} ({n:,})" for name, n in self.unknown.items()]
            notes.append(
                f"left out {count(number, 'image')} of {count(len(counts), 'class')} that the model does not "
                f"have: {first_few(counts, SHOWN)}"
            )
        if self.skipped:
            lines = [*self.skipped[:SHOWN], *(["..."] if len(self.skipped) > SHOWN else [])]
            notes.append("\n  ".join([f"left out {count(len(self.skipped), 'bad image')}:", *lines]))
        return notes

    def for_json(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {
            "classes": {
                "with_images": len(self.present),
                "of_model": self.dataset.num_classes,
                "unknown": dict(self.unknown),
                "by_case": dict(self.matches.by_case),
            },
            "skipped": list(self.skipped),
        }


@contextmanager
def opened_images(
    data: str,
    class_names: Sequence[str],
    split: str | None = None,
    options: SourceOptions | None = None,
    *,
    rendering: Rendering = AS_STORED,
    skip_bad: bool = False,
    progress: Progress = lambda done, total: None,
) -> Iterator[NewImages]:
    """Yield the labeled images of a source with the labels of a model.

    A dataset is opened where it is; one that `convert` did not write, only if its images need no rendering and no option is given. The
    images of any other source are checked, and copied to Parquet shards in a temporary folder, so that all images are decoded in the
    same way as in training.

    Args:
        data: a dataset; a folder of class directories, possibly in split directories; a .csv or .tsv table; a Parquet file, a folder
            of them, or a pattern with `*`; a .txt list of paths and labels; a folder of `save_to_disk`. Any fsspec URL.
        class_names: classes of the model, in label order.
        split: the split to take. None for the test split, or for all images if the source has no splits or a single one.
        options: how to read a table or list.
        rendering: how the model turns images into 8-bit RGB (`Record.rendering`); a dataset has its own.
        skip_bad: leave out images that cannot be decoded.
        progress: called with (done, total) images while images are copied.

    Raises BadInput if the source cannot be read, has no such split, has no image of a known class, or has a class in two spellings.
    """
    options = options or SourceOptions()
    as_stored = rendering == AS_STORED and not skip_bad and not options.given
    if (dataset := _existing(data, options, as_stored)) is not None:
        yield of_dataset(dataset, class_names, split)
        return
    index = _listed(data, split, options)
    name = _chosen(data, list(index.splits), split)
    matches = match_classes(index.class_names, class_names, data)
    unknown = _unknown(data, index.class_names, matches, Counter(label for _, label in index.splits[name]))
    label_of = matches.labels.tolist()
    rows = [(image, label_of[label]) for image, label in index.splits[name] if label_of[label] >= 0]
    with tempfile.TemporaryDirectory(prefix="lift_ray-") as folder:
        skipped = _copy(index, rows, class_names, folder, Encoding(rendering=rendering), skip_bad, progress)
        copied = open_dataset(folder).split(SPLIT)
        named = split or SPLIT
        here = Dataset(data, tuple(class_names), {named: replace(copied, name=named)})
        yield NewImages(here, named, matches, unknown, skipped, is_temporary=True)


def of_dataset(dataset: Dataset, class_names: Sequence[str], split: str | None = None) -> NewImages:
    """Return the images of an open dataset with the labels of a model.

    Args:
        class_names: classes of the model, in label order.
        split: the split to take; None for the test split, or for all images if there is a single split.

    Raises BadInput if there is no such split, no image of a known class, or a class in two spellings.
    """
    name = _chosen(dataset.uri, list(dataset.splits), split) if split is None else split
    counts = dataset.split(name).class_counts(dataset.num_classes)
    matches = match_classes(dataset.class_names, class_names, dataset.uri)
    unknown = _unknown(dataset.uri, dataset.class_names, matches, Counter(dict(enumerate(counts.tolist()))))
    return NewImages(relabelled(dataset, matches.labels, class_names), name, matches, unknown)


def match_classes(theirs: Sequence[str], ours: Sequence[str], where: str) -> ClassMatches:
    """Match the classes of images to those of a model by name.

    Names are the same if they are equal in Unicode's NFC; otherwise if they are with spaces for underscores, as `convert` writes them;
    otherwise if they are without regard to case and repeated spaces. A name that several classes of the model have in the last two
    forms matches none.

    Args:
        theirs: names of the C classes of the images.
        ours: names of the K classes of the model.
        where: the images, for messages.

    Raises BadInput if two differently written classes of the images are the same class of the model.
    """
    labels = np.full(len(theirs), -1, np.int64)
    by_case: dict[str, str] = {}
    for form in (_composed, readable, folded):
        label_of = _unambiguous([form(name) for name in ours])
        for number in np.flatnonzero(labels < 0).tolist():
            if (label := label_of.get(form(theirs[number]))) is not None:
                labels[number] = label
                if form is folded:
                    by_case[theirs[number]] = ours[label]
    first: dict[int, str] = {}
    for name, label in zip(theirs, labels.tolist(), strict=True):
        if label >= 0 and _composed(other := first.setdefault(label, name)) != _composed(name):
            raise BadInput(
                where,
                "each class must be written in one way",
                f"{other!r} and {name!r}, which both match {ours[label]!r} of the model",
                "give both the same name",
            )
    return ClassMatches(labels, by_case)


def relabelled(dataset: Dataset, labels: Int64s, class_names: Sequence[str]) -> Dataset:
    """Return a dataset with the classes of a model, without the images of other classes and without splits that are then empty.

    Args:
        labels: label of the model for each class of the dataset, (C,); -1 for none.
        class_names: names of the classes of the model.
    """
    splits = {}
    for name, split in dataset.splits.items():
        own = labels[split.labels]
        if len(known := np.flatnonzero(own >= 0)):
            splits[name] = replace(split.take(known), labels=own[known])
    return replace(dataset, class_names=tuple(class_names), splits=splits, labelled_counts=None)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _unambiguous(names: Sequence[str]) -> dict[str, int]:
    """Return the label of each name that a single class has."""
    counts = Counter(names)
    return {name: label for label, name in enumerate(names) if counts[name] == 1}


def _unknown(data: str, theirs: Sequence[str], matches: ClassMatches, counts: Mapping[int, int]) -> dict[str, int]:
    """Return the number of images of each unknown class, largest first. Raises BadInput if there are no others."""
    known = {label: counts[label] for label in range(len(theirs)) if matches.labels[label] >= 0}
    others = {theirs[label]: counts[label] for label in np.flatnonzero(matches.labels < 0).tolist() if counts[label]}
    if not any(known.values()):
        got = first_few([repr(name) for name in others or theirs])
        raise BadInput(
            data, "must have images of classes of the model", f"only {got}", "check the class names, or the model"
        )
    return dict(sorted(others.items(), key=lambda pair: -pair[1]))


def _chosen(data: str, found: Sequence[str], split: str | None) -> str:
    """Return the split to take: the wanted one, or else the test split, or else the only one. Raises BadInput."""
    labelled = [name for name in found if name != "unlabelled"]
    name = split or (labelled[0] if len(labelled) == 1 else SPLIT)
    if name not in labelled:
        remedy = "leave --split out to use all images" if len(labelled) == 1 else "choose one with --split"
        raise BadInput(data, f"must have a {name} split", f"only {', '.join(labelled)}", remedy)
    return name


def _existing(data: str, options: SourceOptions, as_stored: bool) -> Dataset | None:
    """Return the dataset at this place, None if it is another source.

    Args:
        as_stored: whether shards that `convert` did not write can be evaluated where they are.
    """
    if data.startswith("embedded:"):
        options.check(data, "folder")
        return open_dataset(data)
    if _kind_of_file(data):
        return None
    url = absolute(data)
    there = {entry.name for entry in entries(url, data, RULE, PATIENCE_S)}
    if MANIFEST in there:
        options.check(data, "folder")
        return open_dataset(data)
    if shard_names(there):
        find_shards(data, url, PATIENCE_S)  # a missing shard must not go unnoticed
    try:
        return open_dataset(data) if as_stored else None
    except BadInput:
        return None  # Parquet of another form: a table


def _has_shards(data: str) -> bool:
    try:
        return bool(find_shards(data, absolute(data), PATIENCE_S).shards)
    except BadInput:
        return False


def _kind_of_file(data: str) -> str | None:
    """Return the kind of source that a path or pattern names, None for a folder."""
    kind = TABLES.get(data.rstrip("/").rpartition(".")[2].lower())
    return "parquet" if kind is None and "*" in data else kind


def _listed(data: str, split: str | None, options: SourceOptions) -> ImageIndex:
    """List the images of a source that is no dataset. Raises BadInput."""
    kind = _kind_of_file(data)
    if kind is None:
        there = entries(absolute(data), data, RULE, PATIENCE_S)
        is_parquet = any(entry.name.endswith(".parquet") for entry in there) or _has_shards(data)
        kind = "parquet" if is_parquet else "arrow" if is_saved({entry.name for entry in there}) else "folder"
    options.check(data, kind)
    if kind == "folder":
        return _listed_folder(data, split)
    if kind == "list":
        if options.class_names is None:
            raise BadInput(
                "--class-names",
                "is required for a list of paths and numbers",
                but="is missing",
                remedy="give a file with a class name on each line, in the order of the numbers",
            )
        root = options.root or os.path.dirname(data) or "."
        return scan_list(root, train=data, class_names=options.class_names)
    return scan_table(data, kind=kind, similar_names="keep", **options.given)


def _listed_folder(data: str, split: str | None) -> ImageIndex:
    """List class directories. Of split directories only one is listed, because each may have classes of its own."""
    folders = [
        entry.name
        for entry in entries(absolute(data), data, RULE, PATIENCE_S)
        if entry.is_folder and not is_ignored(entry.name)
    ]
    splits = {SPLIT_DIRECTORIES[name.lower()]: name for name in folders if name.lower() in SPLIT_DIRECTORIES}
    if len(splits) < len(folders) or not all(_has_folders(join(data, name)) for name in splits.values()):
        return scan_folder(data, similar_names="keep")
    if not folders:
        return scan_folder(data)  # says what is missing
    name = _chosen(data, list(splits), split)
    index = scan_folder(join(data, splits[name]), similar_names="keep")
    return replace(index, splits={name: index.splits["train"]})


def _has_folders(url: str) -> bool:
    return any(
        entry.is_folder and not is_ignored(entry.name) for entry in entries(absolute(url), url, RULE, PATIENCE_S)
    )


def _copy(
    index: ImageIndex,
    rows: Sequence[Row],
    class_names: Sequence[str],
    folder: str,
    encoding: Encoding,
    skip_bad: bool,
    progress: Progress,
) -> tuple[str, ...]:
    """Write the images as a dataset with a test split, and return a line for each image that was skipped. Raises BadInput."""
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress(done, len(rows))

    progress(0, len(rows))
    job = Job(
        folder, index.source, tuple(class_names), index.read, encoding, ROW_GROUP_ROWS, skip_bad, False, index.root
    )
    tasks = [
        ShardTask(SPLIT, number, rows[start : start + ROWS_PER_SHARD])
        for number, start in enumerate(range(0, len(rows), ROWS_PER_SHARD))
    ]
    try:
        shards = sorted(run_here(job, tasks, advance, workers=os.cpu_count() or 1), key=lambda shard: shard.number)
        record = SplitRecord(tuple(shards))
        skipped = tuple(line for shard in shards for line in shard.skipped)
        if not record.rows:
            raise BadInput(index.source, "must have an image that can be decoded", f"none ({skipped[0]})", "check them")
        publish(folder, class_names, {SPLIT: record})
    except BadInput as error:
        if error.place.startswith(folder):
            raise BadInput(folder, error.rule, error.got, "set TMPDIR to a folder with space for the images") from None
        raise
    except RunFailed:
        raise RunFailed(
            f"{index.source}: a process that copies the images was killed, perhaps because memory ran out; convert them first"
        ) from None
    return skipped
