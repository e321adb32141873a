"""Turns labelled images that are somewhere into shuffled, stratified Parquet shards."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lift_ray.data.catalog import MANIFEST, SPLITS, shard_names
from lift_ray.data.index import ImageIndex
from lift_ray.data.longtail import Int64s
from lift_ray.data.shards import SplitRecord, discard, publish, write_split
from lift_ray.data.store import join, locate, one_line, reached
from lift_ray.errors import BadInput

SKIPPED = "skipped.txt"


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: a record of each split, the class names, and one line for every image left out."""

    splits: dict[str, SplitRecord]
    class_names: tuple[str, ...]
    skipped: tuple[str, ...]


def convert(
    index: ImageIndex,
    destination: str,
    *,
    short_side_px: int | None = None,
    quality: int = 90,
    validation_frac: float | None = None,
    test_frac: float | None = None,
    rows_per_shard: int = 4096,
    row_group_rows: int = 256,
    seed: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Check every image, and write them as a data set that `open_dataset` opens.

    Args:
        index: the images.
        destination: folder, any fsspec URL.
        short_side_px: shrink larger images to this short side and encode them as JPEG; None keeps the bytes.
        quality: of that JPEG, 1 to 100.
        validation_frac: part of each class, in [0, 1), that leaves the training split; None means 0.1 where the index
            has no validation split. One image of each class always stays.
        test_frac: the same for the test split; None means 0.
        rows_per_shard, row_group_rows: layout of the files.
        seed: of the split and of the order, which is shuffled.
        skip_bad: leave images out that cannot be decoded, and list them in skipped.txt.
        overwrite: replace a data set at the destination.
        progress: called with (done, total) images.

    Raises:
        BadInput: a bad image, a class left without a training image, or a destination that is taken or unwritable.
    """
    splits = _assign(index, validation_frac, test_frac, seed)
    _check_destination(index.source, destination, overwrite)
    total = sum(map(len, splits.values()))
    skipped: list[str] = []
    records: dict[str, SplitRecord] = {}
    done = 0

    def good(rows: list[tuple[str, int]], pool: ThreadPoolExecutor) -> Iterator[tuple[bytes, str, int]]:
        nonlocal done
        for (path, label), image in _in_order(pool, lambda row: _encoded(index, row[0], short_side_px, quality), rows):
            done += 1
            progress(done, total)
            if isinstance(image, bytes):
                yield image, path, label
            elif skip_bad:
                skipped.append(str(image).replace("; remove it or pass --skip-bad", ""))
            else:
                raise image

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for split, rows in splits.items():
            records[split] = write_split(
                destination,
                split,
                good(rows, pool),
                index.class_names,
                rows_per_shard=rows_per_shard,
                row_group_rows=row_group_rows,
            )
    records = {split: record for split, record in records.items() if record.rows}
    counts = records["train"].class_counts if "train" in records else (0,) * len(index.class_names)
    if 0 in counts:
        discard(destination)
        name = index.class_names[counts.index(0)]
        raise BadInput(f"{index.source}: every class must keep a training image, but {name!r} has no good one; add one")
    publish(destination, index.class_names, records)
    _list_skipped(destination, skipped)
    return Converted(records, index.class_names, tuple(skipped))


def stratified_split(labels: Int64s, validation_frac: float, test_frac: float, seed: int) -> dict[str, Int64s]:
    """Draw round(frac * n) images of every class for validation and test; one of each class stays in train.

    Args:
        labels: label of every image, (N,).
        validation_frac, test_frac: in [0, 1), together below 1.

    Returns:
        Ascending indices into `labels` by split name, together a permutation of 0 .. N-1.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Int64s]] = {split: [np.zeros(0, np.int64)] for split in SPLITS}
    for label in np.unique(labels):
        drawn = rng.permutation(np.flatnonzero(labels == label))
        num_validation = min(round(validation_frac * len(drawn)), len(drawn) - 1)
        num_test = min(round(test_frac * len(drawn)), len(drawn) - 1 - num_validation)
        cuts = np.split(drawn, [num_validation, num_validation + num_test])
        for split, rows in zip(("validation", "test", "train"), cuts, strict=True):
            parts[split].append(rows)
    return {split: np.sort(np.concatenate(rows)) for split, rows in parts.items()}


def _assign(
    index: ImageIndex, validation_frac: float | None, test_frac: float | None, seed: int
) -> dict[str, list[tuple[str, int]]]:
    """The shuffled rows of every split that gets any, in the order of SPLITS."""
    fracs = {"validation": validation_frac, "test": test_frac}
    for split, frac in fracs.items():
        if frac is not None and not 0 <= frac < 1:
            raise BadInput(f"{split}-frac: must be at least 0 and below 1, but got {frac:g}; give 0.1, for instance")
        if frac is not None and split in index.splits:
            raise BadInput(f"{split}-frac: must be left out, but {index.source} has its own {split} images; drop it")
    validation = 0.1 if validation_frac is None and "validation" not in index.splits else validation_frac or 0.0
    if validation + (test_frac or 0.0) >= 1:
        raise BadInput(f"test-frac: must leave images to train on, but got {test_frac:g}; give a smaller part")
    source = index.splits["train"]
    drawn = stratified_split(
        np.array([label for _, label in source], dtype=np.int64), validation, test_frac or 0.0, seed
    )
    splits = {}
    for number, split in enumerate(SPLITS):
        own = index.splits.get(split, []) if split != "train" else []
        rows = own or [source[row] for row in drawn[split]]
        order = np.random.default_rng([seed, number]).permutation(len(rows))
        splits[split] = [rows[row] for row in order]
    return {split: rows for split, rows in splits.items() if rows}


def _check_destination(source: str, destination: str, overwrite: bool) -> None:
    (file_system, path), (source_system, source_path) = locate(destination), locate(source)
    path = path.rstrip("/")
    if file_system == source_system and f"{path}/".startswith(f"{source_path.rstrip('/')}/"):
        raise BadInput(f"{destination}: must lie outside the source, but got a folder in {source}; choose another")
    with reached(destination, "must be a folder that can be written", "check the path"):
        if not file_system.exists(path):
            return
        if not file_system.isdir(path):
            raise BadInput(f"{destination}: must be a folder, but got a file; choose another name")
        there = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in file_system.ls(path, detail=False)]
    if not overwrite and (MANIFEST in there or shard_names(there)):
        raise BadInput(f"{destination}: must be free, but got a data set there; pass --overwrite or choose another")


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Any], bytes | BadInput], rows: Sequence[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], bytes | BadInput]]:
    """Results of `work` in the order of `rows`, with a bounded number of images in memory."""
    rest = iter(rows)
    window: deque[tuple[tuple[str, int], Future[bytes | BadInput]]] = deque()
    try:
        for row in islice(rest, 4 * (os.cpu_count() or 1)):
            window.append((row, pool.submit(work, row)))
        while window:
            row, future = window.popleft()
            yield row, future.result()
            for following in islice(rest, 1):
                window.append((following, pool.submit(work, following)))
    finally:
        for _, future in window:
            future.cancel()


def _encoded(index: ImageIndex, reference: str, short_side_px: int | None, quality: int) -> bytes | BadInput:
    """The bytes to store, after one full decode; or what is wrong with the image."""
    try:
        data = index.read(reference)
        if not data:
            raise OSError("0 bytes")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return data if short_side_px is None else _shrunk(image, short_side_px, quality)
    except UnidentifiedImageError:
        reason = "bytes of no known format"
    except Exception as error:  # decoders and stores raise many types for broken input
        reason = one_line(error)
    return BadInput(
        f"{join(index.source, reference)}: must be a whole image, but got {reason}; remove it or pass --skip-bad"
    )


def _shrunk(image: Image.Image, short_side_px: int, quality: int) -> bytes:
    upright = ImageOps.exif_transpose(image).convert("RGB")
    scale = min(1.0, short_side_px / min(upright.size))
    if scale < 1:
        width, height = (max(1, round(scale * side)) for side in upright.size)
        upright = upright.resize((width, height), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    upright.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def _list_skipped(destination: str, skipped: list[str]) -> None:
    file_system, path = locate(destination)
    name = join(path, SKIPPED)
    with reached(destination, "must be a folder that can be written", "check the disk"):
        if skipped:
            file_system.pipe_file(name, "".join(f"{line}\n" for line in skipped).encode())
        elif file_system.exists(name):
            file_system.rm_file(name)
