"""Datasets for Python programs, from any source: what is not converted yet is converted once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lift_ray.data.cache import cache_folder
from lift_ray.data.convert.conversion import convert
from lift_ray.data.convert.index import ImageIndex, distinct, encode_lossless
from lift_ray.data.convert.shards import ShardRecord
from lift_ray.data.convert.sources import ReadOptions, find_source
from lift_ray.data.convert.splitting import Division
from lift_ray.data.convert.tasks import Job, ShardTask, convert_shard
from lift_ray.data.dataset import Dataset
from lift_ray.data.layout import MANIFEST
from lift_ray.data.local_files import read_file
from lift_ray.data.open import open_dataset as open_converted
from lift_ray.errors import BadInput
from lift_ray.storage.store import join
from lift_ray.terminal.image_progress import image_progress

MEMORY = "memory://dataset"  # source of images that only this process has
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
Labelled = Any
"""A sequence of (Pillow image, label), as a torch Dataset, or a datasets.Dataset with the columns image and label."""


def open_dataset(
    source: str | os.PathLike[str] | Dataset | Labelled | Mapping[str, Labelled],
    *,
    to: str | os.PathLike[str] | None = None,
    validation_frac: float | None = None,
    test_frac: float | None = None,
    seed: int = 0,
    **options: str,
) -> Dataset:
    """Open a dataset, and convert it first if necessary, as `convert` does: every image is checked, and splits are drawn.

    Args:
        source: a dataset of lift_ray (a folder, any fsspec URL, embedded:NAME); a folder of class directories; a CSV, Parquet or
            .txt list; a folder of `save_to_disk`; or images in memory: a torch Dataset of (Pillow image, label), a
            datasets.Dataset, or either of these by split.
        to: folder or URL for the converted dataset; None for a folder in the cache (~/.cache/lift_ray), which is used again as long
            as files and labels stay the same. Required for images in memory.
        validation_frac: fraction of each class for validation, if the source has no such split; None for 0.1.
        test_frac: the same for the test split; None for 0.2.
        seed: of the draw of these images.
        options: image_column, label_column, split_column, root, class_names, similar_names, as those of `convert`.

    Raises BadInput if the source cannot be read, or an image cannot be decoded.
    """
    if isinstance(source, Dataset):
        return source
    division = Division(validation_frac, test_frac, seed)
    if not isinstance(source, str | os.PathLike):
        if to is None:
            raise BadInput("to", "is required for images in memory", but="is missing", remedy="give a folder for them")
        return _converted(_in_memory(source), os.fspath(to), division)
    if unknown := options.keys() - {each.name for each in fields(ReadOptions)}:
        known = ", ".join(each.name for each in fields(ReadOptions))
        raise BadInput("open_dataset", f"unknown option '{min(unknown)}'", remedy=f"known: {known}")
    found = find_source(os.fspath(source), ReadOptions(**options))
    if isinstance(found.origin, Dataset):
        return found.origin
    return _converted(found.origin, None if to is None else os.fspath(to), division)


def _converted(index: ImageIndex, to: str | None, division: Division) -> Dataset:
    """Convert images, unless the cache has them converted from the same files."""
    if to is None:
        to = str(cache_folder() / "datasets" / _fingerprint(index, division))
        if (Path(to) / MANIFEST).exists():
            return open_converted(to)
    with image_progress() as advance:
        convert(index, to, division=division, progress=advance, run_tasks=_in_threads, workers=1)
    return open_converted(to)


def _in_threads(job: Job, tasks: Sequence[ShardTask], advance: Callable[[int], None]) -> list[ShardRecord]:
    """Run the tasks in this process: others would import the script of the user again."""
    threads = os.cpu_count() or 1
    return [convert_shard(job, task, threads, lambda: advance(1)) for task in tasks]


def _fingerprint(index: ImageIndex, division: Division) -> str:
    """Return a name that changes with the files, their labels, and how they are divided."""
    digest = hashlib.sha256(json.dumps([index.source, index.class_names, vars(division)]).encode())
    for name, rows in index.splits.items():
        for reference, label in rows:
            digest.update(
                f"{name}\0{reference}\0{label}\0{_version(index, reference)}\n".encode(errors="surrogateescape")
            )
    return digest.hexdigest()[:16]


def _version(index: ImageIndex, reference: str) -> str:
    """Return size and time of a local file; "" for anything else."""
    try:
        found = os.stat(join(index.root or index.source, reference).removeprefix("file://"))
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True)
class _ImagesIn:
    """Reader of images in memory, as lossless files; a reference is `split/number`."""

    splits: Mapping[str, Labelled]

    def __call__(self, reference: str) -> bytes:
        split, number = reference.split("/")
        image = _pair(self.splits[split], int(number))[0]
        if isinstance(image, str | os.PathLike):
            return read_file(os.fspath(image))
        return encode_lossless(image)


def _in_memory(source: Labelled | Mapping[str, Labelled]) -> ImageIndex:
    by_name = dict(source) if isinstance(source, Mapping) else {"train": source}
    if unknown := [name for name in by_name if name not in SPLITS]:
        raise BadInput("source", "must have the splits train, validation or test", unknown[0], "rename it")
    splits = {SPLITS[name]: part for name, part in by_name.items()}
    labels = {name: _labels(part) for name, part in splits.items()}
    given, names = _class_names(next(iter(splits.values()))), sorted({str(y) for part in labels.values() for y in part})
    if given is None and all(name.isdecimal() for name in names):
        given = [f"class {number}" for number in range(1 + max(map(int, names)))]
    number_of = {name: number for number, name in enumerate(given or names)}
    rows = {
        split: [
            (f"{split}/{number}", int(label) if str(label).isdecimal() else number_of[str(label)])
            for number, label in enumerate(part)
        ]
        for split, part in labels.items()
    }
    class_names, notes = distinct(given or names, "source")
    return ImageIndex(MEMORY, class_names, rows, _ImagesIn(splits), notes=notes)


def _labels(part: Labelled) -> list[Any]:
    if hasattr(part, "column_names"):  # of datasets, which would decode all images otherwise
        return list(part["label"])
    found = getattr(part, "targets", None)
    if found is not None and len(found) == len(part):
        return [int(label) for label in found]
    return [_pair(part, number)[1] for number in range(len(part))]


def _pair(part: Labelled, number: int) -> tuple[Any, Any]:
    try:
        item = part[number]
        image, label = (item["image"], item["label"]) if isinstance(item, Mapping) else item
    except (TypeError, ValueError, KeyError, AttributeError):
        rule = "must be a sequence of (Pillow image, label), or have the columns image and label"
        raise BadInput("source", rule, type(part).__name__) from None
    return image, label


def _class_names(part: Labelled) -> list[str] | None:
    """Return the names that torchvision's or Hugging Face's datasets have, None for others."""
    if hasattr(part, "features"):
        return list(getattr(part.features.get("label"), "names", None) or []) or None
    names = getattr(part, "classes", None)
    return None if names is None else list(map(str, names))
