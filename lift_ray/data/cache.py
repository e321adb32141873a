"""Local cache of remote data: the index of each dataset, and optionally whole shards.

LIFT_CACHE is the folder (default ~/.cache/lift_ray). LIFT_CACHE_GB, a number above 0, enables caching of whole shards up to that
size.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from lift_ray.data.layout import RECONVERT
from lift_ray.errors import BadInput
from lift_ray.storage.store import fetch

if TYPE_CHECKING:
    from lift_ray.data.dataset import Shard

DOWNLOAD_BYTES = 2**24  # per request
DEAD_S = 900.0  # a download that wrote nothing for this long is dead
NEEDED_S = 86400.0  # in random order, a shard used today is needed again before a new one would pay for its download


def cache_folder() -> Path:
    """Return the cache folder: LIFT_CACHE, or ~/.cache/lift_ray."""
    return Path(os.environ.get("LIFT_CACHE") or "~/.cache/lift_ray").expanduser()


def shard_limit_bytes() -> int:
    """Return LIFT_CACHE_GB in bytes; 0, the default, caches no shards. Raises BadInput unless it is a number of at least 0."""
    text = os.environ.get("LIFT_CACHE_GB") or "0"
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise BadInput("LIFT_CACHE_GB", "must be a number of at least 0", f"{text!r}", "for example, 100")
    return int(size * 1e9)


def load_index(url: str, fingerprint: str) -> dict[str, Any] | None:
    """Return the cached arrays of a dataset; None if there are none, they are unreadable, or the fingerprint differs."""
    try:
        with np.load(_index_file(url), allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return arrays if str(arrays.pop("fingerprint", "")) == fingerprint else None


def store_index(url: str, fingerprint: str, arrays: dict[str, Any]) -> None:
    """Cache arrays of a dataset, whole or not at all; does nothing if the folder cannot be written."""
    with suppress(OSError):
        _index_file(url).parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=_index_file(url).parent, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, fingerprint=np.array(fingerprint), **arrays)
            os.replace(name, _index_file(url))
        except OSError:
            Path(name).unlink(missing_ok=True)


class ShardCopies:
    """Local copies of whole remote shards, shared by all processes of this machine.

    The first process that needs a shard downloads it; the others read from the store until the copy is complete. The least
    recently used shards are dropped to stay within the limit, but not for another shard of the same dataset, which is then
    read from the store. If the disk is full, everything is read from the store after one warning.
    """

    def __init__(self, limit_bytes: int, patience_s: float) -> None:
        """`limit_bytes` bounds all shards in the folder, including those being downloaded."""
        self._limit_bytes, self._patience_s = limit_bytes, patience_s
        self._folder = cache_folder() / "shards"
        self._off, self._lock = limit_bytes == 0, threading.Lock()

    def path(self, shard: Shard) -> Path | None:
        """Return the path of the local copy, downloaded if necessary; None if the shard is to be read from its store.

        Raises BadInput when the store fails, or the checksum differs from the manifest twice.
        """
        if self._off or not shard.identity:
            return None
        copy = (
            self._folder / f"{_digest(shard.url.rpartition('/')[0])}-{_digest(f'{shard.url} {shard.identity}')}.parquet"
        )
        try:
            with suppress(FileNotFoundError):
                os.utime(copy)  # time of last use, which decides what is dropped
                return copy
            self._folder.mkdir(parents=True, exist_ok=True)
            if partial := self._reserved(copy, shard.num_bytes):
                try:
                    self._download(shard, partial)
                    with self._alone():
                        os.replace(partial, copy)
                finally:
                    partial.unlink(missing_ok=True)
                return copy
        except OSError as error:
            with self._lock:
                first, self._off = not self._off, True
            if first:
                warnings.warn(
                    f"{self._folder}: shards are no longer cached ({error}); reading from the store", stacklevel=2
                )
        return None

    def _reserved(self, copy: Path, num_bytes: int) -> Path | None:
        """Return a temporary file of full length; None if another process downloads this shard, or there is no space."""
        with self._alone():
            now, old = time.time(), []
            excess = num_bytes - self._limit_bytes
            for path in [*self._folder.glob("*.parquet"), *self._folder.glob("*.partial")]:
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    unused_s = now - stat.st_mtime
                    if path.suffix == ".partial" and unused_s > DEAD_S:
                        path.unlink()
                        continue
                    if path.name.startswith(copy.stem):
                        return None
                    excess += stat.st_size
                    related = path.name.partition("-")[0] == copy.name.partition("-")[0]
                    if path.suffix == ".parquet" and (unused_s > NEEDED_S or not related):
                        old.append((unused_s, stat.st_size, path))
            if excess > sum(size for _, size, _ in old):
                return None
            for _, size, path in sorted(old, reverse=True):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= size
            partial = copy.with_name(f"{copy.stem}.{os.getpid()}.partial")
            with partial.open("wb") as file:
                file.truncate(num_bytes)  # counts towards the limit from now on
            return partial

    def _alone(self) -> FileLock:
        """Return the lock of the folder: while it is held, no other thread or process counts or renames its files."""
        # flock only: the kernel releases it when its process dies. A soft lock is a file that a killed process would leave behind.
        return FileLock(self._folder / ".lock", fallback_to_soft=False)

    def _download(self, shard: Shard, partial: Path) -> None:
        for _ in range(2):
            digest = hashlib.sha256()
            # not "wb": the file keeps its full length, which counts towards the limit
            with partial.open("r+b") as file:
                for start in range(0, shard.num_bytes, DOWNLOAD_BYTES):
                    end = min(start + DOWNLOAD_BYTES, shard.num_bytes)
                    data = fetch(shard.url, start, end, self._patience_s)
                    digest.update(data)
                    file.write(data)
            if digest.hexdigest() == shard.sha256 or not shard.sha256:
                return
        raise BadInput(
            shard.url,
            f"must match the sha256 in the manifest, {shard.sha256[:12]}...",
            f"a checksum mismatch ({digest.hexdigest()[:12]}...)",
            f"{RECONVERT} or copy it again",
        )


def _index_file(url: str) -> Path:
    return cache_folder() / "index" / f"{_digest(url)}.npz"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
