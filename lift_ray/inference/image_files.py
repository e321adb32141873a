"""Pictures without labels that are somewhere: files, or rows of Parquet shards."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lift_ray.data.convert.folder import IMAGE_SUFFIXES
from lift_ray.data.convert.index import absolute
from lift_ray.data.footers import read_columns, read_footer
from lift_ray.errors import BadInput
from lift_ray.storage.store import PATIENCE_S, fetch, is_remote, locate, reached

RULE = "must be images, a folder of images, or Parquet shards"
READERS = 4  # row groups that are read at a time
REMOTE_READERS = 16  # files


@dataclass(frozen=True)
class ImageFiles:
    """Pictures in a fixed order. It is sent to other processes, so it holds names and numbers, no open files.

    Attributes:
        files: URLs of the images, or of the shards.
        row_groups: of each shard, the rows of its row groups; () for images.
        column: of the shards, the leaf column that holds encoded images; "" for images.
    """

    files: tuple[str, ...]
    row_groups: tuple[tuple[int, ...], ...] = ()
    column: str = ""

    def __len__(self) -> int:
        return sum(map(sum, self.row_groups)) if self.column else len(self.files)

    def places(self, start: int, stop: int) -> tuple[list[str], list[int | None]]:
        """File and row in it of the pictures [start, stop); no row for one that is a file of its own."""
        if not self.column:
            return list(self.files[start:stop]), [None] * (stop - start)
        ends = np.cumsum([sum(rows) for rows in self.row_groups])
        numbers = np.arange(start, stop)
        shards = np.searchsorted(ends, numbers, side="right")
        rows = numbers - np.concatenate([[0], ends])[shards]
        return [self.files[shard] for shard in shards], [int(row) for row in rows]


def find_images(where: Sequence[str], column: str | None = None) -> ImageFiles:
    """The pictures that files, folders and patterns name, in the order given, each folder by name.

    A folder holds images (by their suffix, also in folders inside it), or *.parquet files. Hidden files are left out.

    Args:
        where: paths or fsspec URLs, all of images or all of Parquet.
        column: of the encoded images in Parquet, bytes or a struct with them.  [image]

    Raises BadInput: nothing is there, both kinds, or no such column.
    """
    files = [url for each in where for url in _files(absolute(each))]
    shards = [url for url in files if url.endswith(".parquet")]
    if not shards:
        if column is not None:
            raise BadInput(f"--column: must come with Parquet shards, but got images ({files[0]}); leave it out")
        return ImageFiles(tuple(files))
    if len(shards) < len(files):
        other = next(url for url in files if url not in shards)
        raise BadInput(f"{other}: must be Parquet as {shards[0]} is, but is not; give images and shards one by one")
    with ThreadPoolExecutor(REMOTE_READERS) as pool:
        footers = list(pool.map(lambda url: read_footer(url, PATIENCE_S), shards))
    columns = {_leaf(url, footer, column or "image") for url, footer in zip(shards, footers, strict=True)}
    if len(columns) > 1:
        raise BadInput(
            f"{shards[0]}: every shard must hold its images alike, but got {' and '.join(sorted(columns))}; "
            "give them one by one"
        )
    rows = tuple(tuple(footer.row_group(g).num_rows for g in range(footer.num_row_groups)) for footer in footers)
    if not sum(map(sum, rows)):
        raise BadInput(f"{shards[0]}: must hold images, but got 0 rows; check the path")
    return ImageFiles(tuple(shards), rows, columns.pop())


def _files(url: str) -> list[str]:
    """The files that a path, folder or pattern names."""
    file_system, path = locate(url)
    with reached(url, RULE, "check the path"):
        if any(letter in path for letter in "*?["):
            found = [name for name in sorted(file_system.glob(path)) if not file_system.isdir(name)]
        elif file_system.isdir(path):
            inside = path.rstrip("/") + "/"
            names = [
                name
                for name in sorted(file_system.find(path))
                if not any(part.startswith(".") for part in name.removeprefix(inside).split("/"))
            ]
            found = [name for name in names if name.endswith(".parquet")] or [
                name for name in names if f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
            ]
        elif file_system.exists(path):
            return [url]
        else:
            raise FileNotFoundError(path)
    if not found:
        raise BadInput(f"{url}: {RULE}, but got none; check the path")
    return [str(file_system.unstrip_protocol(name)) if "://" in url else name for name in found]


def _leaf(url: str, footer: Any, column: str) -> str:
    schema = footer.schema.to_arrow_schema()
    if column not in schema.names:
        raise BadInput(
            f"{url}: must have the column {column}, but got {', '.join(schema.names)}; name it with --column"
        )
    kind = schema.field(column).type
    inner = {field.name: field.type for field in kind}.get("bytes", pa.null()) if pa.types.is_struct(kind) else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise BadInput(
            f"{url}: the column {column} must be encoded images (binary, or struct<bytes: binary>), but got {kind}; "
            "name another with --column"
        )
    return f"{column}.bytes" if inner is not kind else column


class ImageReader:
    """Reads encoded pictures by number; threads may share it.

    Args:
        pictures: all of them.
        keep: row groups in memory.
    """

    def __init__(self, pictures: ImageFiles, keep: int = 2 * READERS) -> None:
        self._pictures, self._keep = pictures, keep
        homes = [(s, g, rows) for s, groups in enumerate(pictures.row_groups) for g, rows in enumerate(groups)]
        self._homes = [(shard, group) for shard, group, _ in homes]
        self._ends = np.cumsum([rows for _, _, rows in homes])
        self._groups: OrderedDict[int, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        remote = not pictures.column and is_remote(locate(pictures.files[0])[0]) if pictures.files else False
        self._pool = ThreadPoolExecutor(REMOTE_READERS if remote else READERS, "lift-read")
        self._in_pool = remote
        self._footer = cache(lambda shard: read_footer(pictures.files[shard], PATIENCE_S))

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        """The pictures [start, stop); None for a row without one. Raises BadInput when a file cannot be read."""
        if not self._pictures.column:
            urls = self._pictures.files[start:stop]
            yield from self._pool.map(_bytes, urls) if self._in_pool else map(_bytes, urls)
            return
        for number in range(*self._span(start, stop)):
            before = self._ends[number - 1] if number else 0
            column = self._started(number).result()
            part = column.slice(max(0, start - before), min(stop, self._ends[number]) - max(start, before))
            yield from part.to_pylist()

    def prefetch(self, start: int, stop: int) -> None:
        """Start to read the row groups of the pictures [start, stop)."""
        for number in range(*self._span(start, stop)) if self._pictures.column else ():
            self._started(number)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        return int(first), int(last) + 1

    def _started(self, number: int) -> Future[Any]:
        with self._lock:
            if number not in self._groups:
                self._groups[number] = self._pool.submit(self._load, number)
            self._groups.move_to_end(number)
            for old in list(self._groups)[: -self._keep]:
                del self._groups[old]
            return self._groups[number]

    def _load(self, number: int) -> Any:
        shard, group = self._homes[number]
        url, leaf = self._pictures.files[shard], self._pictures.column
        name, _, inner = leaf.rpartition(".")
        column = read_columns(url, self._footer(shard), [group], leaf, PATIENCE_S).column(name or leaf)
        return pc.struct_field(column, inner) if name else column


def _bytes(url: str) -> bytes:
    return fetch(url, None, None, PATIENCE_S)
