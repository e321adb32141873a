"""Unlabeled images: image files, or rows of Parquet shards."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from lift_ray.data.convert.index import absolute, valid_text
from lift_ray.data.decode import IMAGE_SUFFIXES
from lift_ray.data.footers import Footer, column_chunk, is_bytes, read_cells, read_footer
from lift_ray.data.local_files import read_named
from lift_ray.data.walk import LeftOut, counted, links_line, walk
from lift_ray.errors import BadInput
from lift_ray.storage.atomic import replacing
from lift_ray.storage.store import PATIENCE_S, fetch, is_remote, locate, reached

RULE = "must be images, a folder of images, or Parquet shards"
READERS = 4  # row groups read at a time
REMOTE_READERS = 16  # remote files read at a time


@dataclass(frozen=True)
class ImageFiles:
    """Images in a fixed order. It is sent to other processes, so it holds names and numbers but no open files.

    Attributes:
        files: URLs of the images, or of the shards.
        row_groups: for each shard, the number of rows in each of its row groups; () for image files.
        column: leaf column of the shards that holds encoded images; "" for image files.
        left_out: files in the folders that are not used, with the reasons.
        num_links: number of symbolic links in the folders that were followed.
    """

    files: tuple[str, ...]
    row_groups: tuple[tuple[int, ...], ...] = ()
    column: str = ""
    left_out: tuple[LeftOut, ...] = ()
    num_links: int = 0

    def __len__(self) -> int:
        return sum(map(sum, self.row_groups)) if self.column else len(self.files)

    def places(self, start: int, stop: int) -> tuple[list[str], list[int | None]]:
        """Return the file and the row in that file of the images [start, stop); the row is None for image files."""
        if not self.column:
            return list(map(valid_text, self.files[start:stop])), [None] * (stop - start)
        ends = np.cumsum([sum(rows) for rows in self.row_groups])
        numbers = np.arange(start, stop)
        shards = np.searchsorted(ends, numbers, side="right")
        rows = numbers - np.concatenate([[0], ends])[shards]
        return [valid_text(self.files[shard]) for shard in shards], [int(row) for row in rows]


def find_images(where: Sequence[str], column: str | None = None) -> ImageFiles:
    """Find the images that paths, folders and patterns name, in the order given, with the files of a folder sorted by name.

    In a folder and its subfolders, *.parquet files are used if there are any, otherwise images (by suffix). Symbolic links are
    followed; hidden files and system folders are ignored (`walk`).

    Args:
        where: paths or fsspec URLs, either all images or all Parquet shards.
        column: Parquet column of encoded images (bytes, or a struct with a field `bytes`).  [image]

    Raises BadInput if nothing is found, images and shards are mixed, or a shard has no such column.
    """
    found = [_found(absolute(each)) for each in where]
    files = [url for each in found for url in each.files]
    left_out = tuple(entry for each in found for entry in each.left_out)
    num_links = sum(each.num_links for each in found)
    shards = [url for url in files if url.endswith(".parquet")]
    if not shards:
        if column is not None:
            raise BadInput("--image-column", "requires Parquet shards", f"images ({files[0]})", "leave it out")
        return ImageFiles(tuple(files), left_out=left_out, num_links=num_links)
    if len(shards) < len(files):
        other = next(url for url in files if url not in shards)
        rule = f"must be a Parquet shard, because {shards[0]} is one"
        raise BadInput(other, rule, "another file", "run predict on images and shards separately")
    with ThreadPoolExecutor(REMOTE_READERS) as pool:
        footers = list(pool.map(lambda url: read_footer(url, PATIENCE_S), shards))
    columns = {_leaf(url, footer, column or "image") for url, footer in zip(shards, footers, strict=True)}
    if len(columns) > 1:
        raise BadInput(
            shards[0],
            "all shards must store images in the same column",
            " and ".join(sorted(columns)),
            "run predict on each kind of shard separately",
        )
    rows = tuple(footer.rows for footer in footers)
    if not sum(map(sum, rows)):
        raise BadInput(shards[0], "must contain images", "0 rows", "check the path")
    return ImageFiles(tuple(shards), rows, columns.pop(), left_out, num_links)


def left_out_lines(images: ImageFiles, out: Path) -> list[str]:
    """Return the lines that say what was left out and followed, and where `write_left_out` lists it."""
    lines = [links_line(images.num_links)] if images.num_links else []
    if images.left_out:
        lines.append(f"left out {counted(images.left_out)}: {left_out_list(out)}")
    return lines


def write_left_out(images: ImageFiles, out: Path) -> None:
    """Write the names of what was left out beside `out`, or remove the list of an earlier call if there is nothing. Raises OSError."""
    listed = left_out_list(out)
    if not images.left_out:
        listed.unlink(missing_ok=True)
        return
    names = "".join(f"{name}: {reason}\n" for name, reason in images.left_out)
    with replacing(listed) as path:
        path.write_text(valid_text(names), encoding="utf-8")


def left_out_list(out: Path) -> Path:
    """Return the path of the list of what was left out."""
    return out.with_name(f"{out.name}.left_out.txt")


def _found(url: str) -> ImageFiles:
    """Return the files that a path, folder or pattern names."""
    file_system, path = locate(url)

    def full(name: str) -> str:
        return str(file_system.unstrip_protocol(name)) if "://" in url else name

    with reached(url, RULE, "check the path"):
        if any(letter in path for letter in "*?["):
            found = ImageFiles(
                tuple(full(name) for name in sorted(file_system.glob(path)) if not file_system.isdir(name))
            )
        elif file_system.isdir(path):
            walked, inside = walk(file_system, path), path.rstrip("/") + "/"
            used = [name for name in walked.files if name.endswith(".parquet")]
            reason = "not a Parquet file" if used else "no image suffix"
            used = used or [name for name in walked.files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
            if not used and any(name.endswith(".arrow") for name in walked.files):
                remedy = "convert them with python -m lift_ray.convert arrow"
                raise BadInput(url, RULE, "Arrow files, as save_to_disk writes them", remedy)
            others = [(name, reason) for name in sorted({*walked.files} - {*used})]
            found = ImageFiles(
                tuple(full(inside + name) for name in used),
                left_out=tuple((full(inside + name), why) for name, why in sorted([*walked.left_out, *others])),
                num_links=walked.num_links,
            )
        elif file_system.exists(path):
            return ImageFiles((url,))
        else:
            raise FileNotFoundError(path)
    if not found.files:
        raise BadInput(url, RULE, "none", "check the path")
    return found


def _leaf(url: str, footer: Footer, column: str) -> str:
    schema = footer.schema
    if column not in schema.names:
        raise BadInput(
            url,
            f"must have the column {column}",
            ", ".join(schema.names),
            "pass the name of the image column with --image-column",
        )
    kind = schema.field(column).type
    inner = {field.name: field.type for field in kind}.get("bytes", pa.null()) if pa.types.is_struct(kind) else kind
    if not is_bytes(inner):
        raise BadInput(
            url,
            f"the column {column} must hold encoded images (binary, or struct<bytes: binary>)",
            kind,
            "choose another column with --image-column",
        )
    leaf = f"{column}.bytes" if inner is not kind else column
    for group in range(len(footer.row_groups)):
        column_chunk(url, footer, group, leaf)  # raises BadInput for encrypted images
    return leaf


class ImageReader:
    """Reader of encoded images by number. Threads may share one reader.

    Args:
        images: images to read from.
        keep: number of row groups to keep in memory.
    """

    def __init__(self, images: ImageFiles, keep: int = 2 * READERS) -> None:
        self._images, self._keep = images, keep
        homes = [(s, g, rows) for s, groups in enumerate(images.row_groups) for g, rows in enumerate(groups)]
        self._homes = [(shard, group) for shard, group, _ in homes]
        self._ends = np.cumsum([rows for _, _, rows in homes])
        self._groups: OrderedDict[int, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        remote = not images.column and is_remote(locate(images.files[0])[0]) if images.files else False
        self._pool = ThreadPoolExecutor(REMOTE_READERS if remote else READERS, "lift-read")
        self._in_pool = remote
        self._footer = cache(lambda shard: read_footer(images.files[shard], PATIENCE_S))

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        """Yield the images [start, stop), None for a row without an image. Raises BadInput if a file cannot be read."""
        if not self._images.column:
            urls = self._images.files[start:stop]
            yield from self._pool.map(_bytes, urls) if self._in_pool else map(_bytes, urls)
            return
        for number in range(*self._span(start, stop)):
            before = self._ends[number - 1] if number else 0
            cells, paths = self._started(number).result()
            for row in range(max(0, start - before), min(stop, self._ends[number]) - before):
                image = cells[row].as_py()
                yield self._named(number, paths[row].as_py()) if image is None and paths is not None else image

    def prefetch(self, start: int, stop: int) -> None:
        """Start reading the row groups of the images [start, stop)."""
        for number in range(*self._span(start, stop)) if self._images.column else ():
            self._started(number)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        return int(first), int(last) + 1

    def _started(self, number: int) -> Future[Any]:
        # The cache holds futures, so that threads that want a row group while it is being read wait for the same read. Evicting
        # a future does not take it from the threads that hold it.
        with self._lock:
            if number not in self._groups:
                self._groups[number] = self._pool.submit(self._load, number)
            self._groups.move_to_end(number)
            for old in list(self._groups)[: -self._keep]:
                del self._groups[old]
            return self._groups[number]

    def _load(self, number: int) -> tuple[Any, Any]:
        """Return the images of a row group, (rows,), and their paths if some have no bytes, else None."""
        shard, group = self._homes[number]
        url, leaf, footer = self._images.files[shard], self._images.column, self._footer(shard)
        cells = read_cells(url, footer, [group], leaf, PATIENCE_S)
        path = f"{leaf.removesuffix('.bytes')}.path"
        if not cells.null_count or path not in footer.leaves:
            return cells, None
        return cells, read_cells(url, footer, [group], path, PATIENCE_S)

    def _named(self, number: int, path: str | None) -> bytes | None:
        """Return the image file that a row without bytes names; None if there is none."""
        folder = self._images.files[self._homes[number][0]].rpartition("/")[0]
        if not path:
            return None
        try:
            return read_named(folder, path)
        except ValueError:
            return None


def _bytes(url: str) -> bytes:
    return fetch(url, None, None, PATIENCE_S)
