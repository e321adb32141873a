"""Encoded images out of Parquet shards at any fsspec URL."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from types import TracebackType
from typing import Any

import numpy as np

from lift_ray.data.cache import ShardCopies, shard_limit_bytes
from lift_ray.data.dataset import Split
from lift_ray.data.footers import image_bytes, read_footer, read_images
from lift_ray.data.layout import RECONVERT
from lift_ray.data.longtail import Int64s
from lift_ray.errors import BadInput
from lift_ray.storage.store import PATIENCE_S

LOADERS = 4  # row groups loaded in the background at a time


class RowReader:
    """Reads the encoded images of a split by sample number.

    Whole row groups are read, of the column of images only, each in one request, and kept in a cache that drops the least
    recently used ones. Footers are kept. Threads may share a reader: they load different row groups at the same time, and
    the same one once.
    """

    def __init__(self, split: Split, cache_bytes: int = 512 * 2**20, patience_s: float = PATIENCE_S) -> None:
        """Nothing is read yet.

        Args:
            cache_bytes: bounds what is cached and what is being read ahead; only the row group that a call of `read` works
                on may come on top. It may be changed at any time.
            patience_s: how long a request to a remote store is tried again while its failure may pass.

        Raises BadInput when LIFT_CACHE_GB is not a number.
        """
        self._split, self.cache_bytes, self._patience_s = split, cache_bytes, patience_s
        self._homes = [(s, g) for s, shard in enumerate(split.shards) for g in range(len(shard.row_groups))]
        sizes = [rows for shard in split.shards for rows in shard.row_groups]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        self._copies = ShardCopies(shard_limit_bytes(), patience_s)
        self._footers: dict[int, _Once] = {}
        self._cache: OrderedDict[int, _RowGroup] = OrderedDict()
        self._cached_bytes = 0
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def cached_bytes(self) -> int:
        """Bytes of images that the cache holds now, or will hold when what is on its way has come."""
        return self._cached_bytes

    def read(self, samples: Int64s) -> list[bytes]:
        """Encoded images of the kept samples with these numbers, each in [0, N), in the order asked for.

        Raises BadInput when a shard cannot be read, has changed since the split was opened, or a row has no image.
        """
        rows, groups = self._rows_and_groups(samples)
        order = np.argsort(groups, kind="stable").tolist()
        images = [b""] * len(rows)
        if len(groups) and groups[order[0]] != groups[order[-1]]:
            self._start(groups[order].tolist())
        for group, members in groupby(order, key=groups.__getitem__):
            column = self._row_group(int(group))
            for place in members:
                image = column[int(rows[place] - self._starts[group])]
                if not image.is_valid:
                    url = self._split.shards[self._homes[group][0]].url
                    at = f"row {rows[place]} of row group {self._homes[group][1]}"
                    raise BadInput(url, "every row must contain an image", f"none in {at}", RECONVERT)
                images[place] = image.as_py()
        return images

    def prefetch(self, samples: Int64s) -> None:
        """Start loading what these samples need in the background, in this order, as far as the cache has room; return.

        Room is made by dropping row groups that were read, none of which these samples need. What fails to load is tried
        again by `read`, which tells.
        """
        _, groups = self._rows_and_groups(samples)
        self._start(groups.tolist())

    def close(self) -> None:
        """Empty the cache and stop reading ahead; a later read starts anew."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._footers.clear()
            self._cache.clear()
            self._cached_bytes = 0
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)

    def _rows_and_groups(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        rows = self._split.rows[samples]
        return rows, np.searchsorted(self._starts, rows, side="right") - 1

    def _start(self, groups: list[int]) -> None:
        """Begin to load row groups, in this order, as far as there is room."""
        wanted = dict.fromkeys(groups)
        with self._lock:
            for group in wanted:
                if group in self._cache:
                    self._cache.move_to_end(group)
            for group in wanted:
                if group in self._cache:
                    continue
                if not self._make_room(self._expected_bytes(group), keep=wanted):
                    return
                self._pool = self._pool or ThreadPoolExecutor(LOADERS, "lift-read")
                self._pool.submit(self._added(group).run)

    def _row_group(self, group: int) -> Any:
        """The images of a row group, from the cache, from whoever is loading it, or loaded here."""
        with self._lock:
            entry = self._cache.get(group) or self._added(group)
            self._cache.move_to_end(group)
            entry.was_read = True
        column = entry.result()
        with self._lock:
            for old in list(self._cache):
                if self._cached_bytes <= self.cache_bytes:
                    break
                if self._cache[old].is_done:
                    self._drop(old)
        return column

    def _make_room(self, num_bytes: int, keep: dict[int, None]) -> bool:
        """Drop row groups that were read until so many bytes fit; nothing when that would not do. Under the lock."""
        excess = self._cached_bytes + num_bytes - self.cache_bytes
        old = []
        for group, entry in self._cache.items():
            if excess <= 0:
                break
            if entry.was_read and entry.is_done and group not in keep:
                old.append(group)
                excess -= entry.num_bytes
        if excess <= 0:
            for group in old:
                self._drop(group)
        return excess <= 0

    def _added(self, group: int) -> _RowGroup:
        """A new entry of the cache, not loaded yet. Under the lock."""
        entry = _RowGroup(lambda: self._loaded(group, entry), self._expected_bytes(group))
        self._cache[group] = entry
        self._cached_bytes += entry.num_bytes
        return entry

    def _drop(self, group: int) -> None:
        self._cached_bytes -= self._cache.pop(group).num_bytes

    def _expected_bytes(self, group: int) -> int:
        shard, inner = self._homes[group]
        sizes = self._split.shards[shard].row_group_bytes
        return sizes[inner] if sizes else 0

    def _loaded(self, group: int, entry: _RowGroup) -> Any:
        """The images of a row group, with their true size in the books; a failed one leaves them, to be tried again."""
        try:
            column = self._load(*self._homes[group])
        except BaseException:
            with self._lock:
                if self._cache.get(group) is entry:
                    self._drop(group)
            raise
        with self._lock:
            if self._cache.get(group) is entry:
                self._cached_bytes += column.nbytes - entry.num_bytes
                entry.num_bytes = column.nbytes
        return column

    def _load(self, number: int, inner: int) -> Any:
        shard, name, patience_s = self._split.shards[number], self._split.image_column, self._patience_s
        if copy := self._copies.path(shard):
            try:
                return read_images(str(copy), self._footer(number, str(copy)), inner, name, patience_s)
            except BadInput:  # dropped by another process just now, or broken on this disk
                copy.unlink(missing_ok=True)
        return read_images(shard.url, self._footer(number, shard.url), inner, name, patience_s)

    def _footer(self, number: int, url: str) -> Any:
        with self._lock:
            footer = self._footers.get(number)
            if footer is None or footer.failed:
                footer = self._footers[number] = _Once(lambda: self._checked_footer(number, url))
        return footer.result()

    def _checked_footer(self, number: int, url: str) -> Any:
        shard = self._split.shards[number]
        metadata = read_footer(url, self._patience_s)
        if metadata.num_rows != shard.num_rows:
            raise BadInput(
                shard.url,
                f"must not change after opening ({shard.num_rows} rows)",
                f"{metadata.num_rows} rows",
                "start again",
            )
        if shard.row_group_bytes and image_bytes(metadata, self._split.image_column) != shard.row_group_bytes:
            raise BadInput(shard.url, "must not change after opening", "other row groups", "start again")
        return metadata


def _nothing() -> None:
    """What is left of work that was begun."""


class _Once:
    """Work that is done once, by the first thread that asks; the others wait for the result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._begun, self._future = work, threading.Lock(), Future[Any]()

    @property
    def is_done(self) -> bool:
        """Whether the result, or a failure, is there."""
        return self._future.done()

    @property
    def failed(self) -> bool:
        """Whether the work ended with an exception."""
        return self.is_done and self._future.exception() is not None

    def run(self) -> None:
        """Do the work here, unless a thread has begun it."""
        if self._begun.acquire(blocking=False):
            work, self._work = self._work, _nothing  # it holds the cache's entry, which holds it: neither would ever go
            try:
                self._future.set_result(work())
            except BaseException as error:
                self._future.set_exception(error)

    def result(self) -> Any:
        """The result, or the exception of the work."""
        self.run()
        return self._future.result()


class _RowGroup(_Once):
    """A row group in the cache: its size, expected or true, and whether it was of use yet."""

    def __init__(self, work: Callable[[], Any], num_bytes: int) -> None:
        super().__init__(work)
        self.num_bytes, self.was_read = num_bytes, False
