"""Encoded images out of Parquet shards at any fsspec URL."""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import groupby
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lift_ray.data.catalog import RECONVERT, Split
from lift_ray.data.longtail import Int64s
from lift_ray.data.store import locate, reached
from lift_ray.errors import BadInput


class RowReader:
    """Reads the encoded images of a split by sample number.

    Whole row groups are read, of the column image.bytes only, and kept in a cache that drops the least recently used
    ones. Footers and file handles stay open. Calls from several threads take turns.
    """

    def __init__(self, split: Split, cache_bytes: int = 512 * 2**20) -> None:
        """`cache_bytes` bounds what the cache holds between calls; a larger row group is read anew each time."""
        self._split, self._cache_bytes = split, cache_bytes
        self._homes = [(s, g) for s, shard in enumerate(split.shards) for g in range(len(shard.row_groups))]
        sizes = [rows for shard in split.shards for rows in shard.row_groups]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        self._open: dict[int, tuple[Any, Any]] = {}
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def cached_bytes(self) -> int:
        """Bytes of images that the cache holds now."""
        return self._cached_bytes

    def read(self, samples: Int64s) -> list[bytes]:
        """Encoded images of the kept samples with these numbers, each in [0, N), in the order asked for.

        Raises BadInput when a shard cannot be read, has changed since the split was opened, or a row has no image.
        """
        rows = self._split.rows[samples]
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        images = [b""] * len(rows)
        with self._lock:
            for group, members in groupby(np.argsort(groups, kind="stable").tolist(), key=groups.__getitem__):
                places = list(members)
                inside = rows[places] - self._starts[group]
                for place, row, image in zip(places, inside, self._row_group(int(group)).take(inside), strict=True):
                    if not image.is_valid:
                        url = self._split.shards[self._homes[group][0]].url
                        at = f"row {row} of row group {self._homes[group][1]}"
                        raise BadInput(f"{url}: every row must hold image bytes, but got none in {at}; {RECONVERT}")
                    images[place] = image.as_py()
        return images

    def close(self) -> None:
        """Close the files and empty the cache; a later read opens them again."""
        with self._lock:
            for file, parquet in self._open.values():
                parquet.close()
                file.close()
            self._open.clear()
            self._cache.clear()
            self._cached_bytes = 0

    def _row_group(self, group: int) -> Any:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        number, inner = self._homes[group]
        url = self._split.shards[number].url
        with reached(url, "must be readable Parquet", f"copy it again, or {RECONVERT}"):
            table = self._parquet(number).read_row_group(inner, columns=["image.bytes"])
            column = pc.struct_field(table.column("image"), "bytes")
        self._cache[group] = column
        self._cached_bytes += column.nbytes
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return column

    def _parquet(self, number: int) -> Any:
        if number not in self._open:
            shard = self._split.shards[number]
            file_system, path = locate(shard.url)
            file = file_system.open(path, "rb")
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            self._open[number] = (file, parquet)
            if parquet.metadata.num_rows != shard.num_rows:
                raise BadInput(
                    f"{shard.url}: must stay as it was when opened ({shard.num_rows} rows), "
                    f"but got {parquet.metadata.num_rows} rows; start again"
                )
        return self._open[number][1]
