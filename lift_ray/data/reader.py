"""Read encoded images from Parquet shards at any fsspec URL."""

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

LOADERS = 4  # row groups loaded in the background at the same time


class RowReader:
    """Reader of the encoded images of a split, by sample number.

    Each row group is read as a whole (the image column only) in one request, and kept in a least-recently-used cache. Footers are
    cached too. Threads may share a reader: they load different row groups at the same time, and the same one only once.
    """

    def __init__(self, split: Split, cache_bytes: int = 512 * 2**20, patience_s: float = PATIENCE_S) -> None:
        """Prepare to read; nothing is read yet.

        Args:
            cache_bytes: limit for cached and prefetched row groups; only the row group that `read` works on may exceed it. It
                may be changed at any time.
            patience_s: how long requests to a remote store are retried.

        Raises BadInput when LIFT_CACHE_GB is not a number.
        """
        self._split, self.cache_bytes, self._patience_s = split, cache_bytes, patience_s
        self._homes = [(s, g) for s, shard in enumerate(split.shards) for g in range(len(shard.row_groups))]
        self._starts = split.row_group_starts
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
        """Image bytes in the cache, including row groups that are still loading."""
        return self._cached_bytes

    def read(self, samples: Int64s) -> list[bytes]:
        """Return the encoded images of samples by number, each in [0, N), in the requested order.

        Raises BadInput if a shard cannot be read or has changed since the split was opened, or a row has no image.
        """
        return self.read_rows(self._split.rows[samples])

    def read_rows(self, rows: Int64s) -> list[bytes]:
        """Return the encoded images of rows, numbered across the shards, as `read`."""
        groups = self._split.row_groups_of(rows)
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
        """Start loading the row groups of these samples in the background, in this order, as far as the cache has space.

        Space is freed by dropping row groups that were read and that these samples do not need. If loading fails, `read` tries
        again and reports the error.
        """
        self.prefetch_rows(self._split.rows[samples])

    def prefetch_rows(self, rows: Int64s) -> None:
        """Start loading the row groups of rows, numbered across the shards, as `prefetch`."""
        self._start(self._split.row_groups_of(rows).tolist())

    def close(self) -> None:
        """Empty the cache and stop reading ahead; a later read starts from scratch."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._footers.clear()
            self._cache.clear()
            self._cached_bytes = 0
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, groups: list[int]) -> None:
        """Start loading row groups, in this order, as far as there is space."""
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
        """Return the images of a row group: from the cache, from the thread that is loading it, or loaded here."""
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
        """Drop row groups that were read until `num_bytes` fit, or none if that is not enough. Call with the lock held."""
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
        """Add an entry to the cache, not loaded yet. Call with the lock held."""
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
        """Load a row group and correct its size in the cache; a failed one is removed, so that it is tried again."""
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
            except BadInput:  # another process dropped it just now, or the copy is broken
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
        footer = read_footer(url, self._patience_s)
        if sum(footer.rows) != shard.num_rows:
            raise BadInput(
                shard.url,
                f"must not change after opening ({shard.num_rows} rows)",
                f"{sum(footer.rows)} rows",
                "start again",
            )
        if shard.row_group_bytes and image_bytes(url, footer, self._split.image_column) != shard.row_group_bytes:
            raise BadInput(shard.url, "must not change after opening", "other row groups", "start again")
        return footer


def _nothing() -> None:
    """Stand in for work that has begun."""


class _Once:
    """Work that is done once, by the first thread that asks for it; other threads wait for the result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._begun, self._future = work, threading.Lock(), Future[Any]()

    @property
    def is_done(self) -> bool:
        """True if the work has ended, with a result or an exception."""
        return self._future.done()

    @property
    def failed(self) -> bool:
        """True if the work ended with an exception."""
        return self.is_done and self._future.exception() is not None

    def run(self) -> None:
        """Do the work in this thread, unless another one has begun it."""
        if self._begun.acquire(blocking=False):
            # the work refers to this entry: without the cut, the reference cycle would keep the images in memory
            work, self._work = self._work, _nothing
            try:
                self._future.set_result(work())
            except BaseException as error:
                self._future.set_exception(error)

    def result(self) -> Any:
        """Return the result, or raise the exception of the work."""
        self.run()
        return self._future.result()


class _RowGroup(_Once):
    """A row group in the cache, with its size (expected, then true) and a flag for whether it was read."""

    def __init__(self, work: Callable[[], Any], num_bytes: int) -> None:
        super().__init__(work)
        self.num_bytes, self.was_read = num_bytes, False
