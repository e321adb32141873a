"""Features of frozen blocks in files, which all processes of a search on a node compute and use together.

A split is cut into chunks. Each process claims a free chunk, computes it, writes it and marks it as done. When none is free, it waits
for the others, and takes over the chunks of processes that have died. Readers map the file into memory, so the node holds it once.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from lift_ray.storage.atomic import replacing

FREE, DONE, FAILED = 0, -1, -2  # in place of the owner of a chunk
CHUNK = 256  # images, at least
MOST_CHUNKS = 64  # of large splits, which would otherwise start a stream of batches too often
WAIT_S = 0.1
SPARE_BYTES = 2**30  # of the disk that stay free for checkpoints
DATA, STATE, MEMBER = ".features", ".state", ".member"


def root_folder() -> Path:
    """Return the folder for the features of all searches of this user on this node: in LIFT_CACHE, or the temporary folder."""
    place = Path(os.environ.get("LIFT_CACHE") or tempfile.gettempdir()).expanduser()
    return place / ("lift_ray-features" if (user := _user()) is None else f"lift_ray-features-{user}")


def _user() -> int | None:
    """Return the number of this process's user; None on Windows, where each user has a temporary folder of their own."""
    return os.getuid() if hasattr(os, "getuid") else None


def chunks_of(num_images: int, batch_size: int) -> list[range]:
    """Return the chunks of a split, whole batches each, whoever computes them."""
    size = -(-max(CHUNK, num_images // MOST_CHUNKS) // batch_size) * batch_size
    return [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]


class SharedFeatures:
    """The files of a search on this node. The last process that leaves removes them.

    A process is alive as long as it holds the lock of its member file, which the kernel releases when it dies. A process that joins
    removes the folders in which none is alive, so the files of a killed search stay only until the next search begins on this node.

    Args:
        search: name of this run of the search.

    Attributes:
        problem: why features are not cached although the limit allows it, in one line.

    Raises OSError if there can be no such folder.
    """

    def __init__(self, search: str) -> None:
        self.problem = ""
        whole = root_folder()
        whole.mkdir(0o700, parents=True, exist_ok=True)
        found = whole.lstat()  # a link could lead into another folder, from which files would be removed
        if not stat.S_ISDIR(found.st_mode) or _user() not in (None, found.st_uid):
            raise PermissionError(f"{whole} is not a folder of this user")
        self._root = whole / socket.gethostname()  # it may be on storage that several nodes share
        self._root.mkdir(exist_ok=True)
        self.folder, self.number = self._root / search, secrets.randbits(62) + 1
        with self.alone():
            for folder in self._root.iterdir():
                if folder.is_dir() and not _has_members(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            self._member = FileLock(self._member_file(self.number), fallback_to_soft=False, thread_local=False)
            self._member.acquire()

    def close(self) -> None:
        """Leave; what was read stays readable."""
        with suppress(OSError), self.alone():  # somebody may have emptied the temporary folder
            self._member.release()
            self._member_file(self.number).unlink(missing_ok=True)
            if not _has_members(self.folder):
                shutil.rmtree(self.folder, ignore_errors=True)

    def alone(self) -> FileLock:
        """Return the lock of all folders: while it is held, nobody joins, leaves, claims or creates."""
        return FileLock(self._root / ".lock", fallback_to_soft=False)

    def is_alive(self, number: int) -> bool:
        """Return True unless the member with this number has left or died. Call it with the lock."""
        return number == self.number or _is_held(self._member_file(number))

    def _member_file(self, number: int) -> Path:
        return self.folder / f"{number:x}{MEMBER}"

    def file(self, name: str, chunks: list[range], image_bytes: int, limit_bytes: float) -> FeatureFile | None:
        """Return the file of this name, new if there is none yet.

        None if it does not fit the limit of all files together, or if the disk does not take it, which `problem` then says.
        """
        path = self.folder / f"{name}{DATA}"
        try:
            return self._file(path, chunks, image_bytes, limit_bytes)
        except OSError as error:  # a quota, or a folder that somebody has removed
            with suppress(OSError):
                if not path.with_suffix(STATE).exists():  # otherwise it is complete, and other processes may use it
                    path.unlink(missing_ok=True)
            self.tell(str(error))
            return None

    def _file(self, path: Path, chunks: list[range], image_bytes: int, limit_bytes: float) -> FeatureFile | None:
        with self.alone():
            if not path.with_suffix(STATE).exists():
                num_bytes = chunks[-1].stop * image_bytes
                others = [file.stat() for file in self.folder.glob(f"*{DATA}") if file != path]
                if num_bytes + sum(other.st_size for other in others) > limit_bytes:
                    return None
                unwritten = sum(map(_unwritten_bytes, others))
                free = shutil.disk_usage(self.folder).free - unwritten - SPARE_BYTES
                if num_bytes > free:
                    self.tell(f"{num_bytes / 2**30:.1f} GiB are needed and {max(0, free) / 2**30:.1f} are free")
                    return None
                with path.open("wb") as file:
                    file.truncate(num_bytes)
                with replacing(path.with_suffix(STATE)) as temporary:
                    np.zeros((len(chunks), 2), np.int64).tofile(temporary)
        found = FeatureFile(self, path, chunks)
        return None if found.has_failed else found

    def find(self, name: str, chunks: list[range]) -> FeatureFile | None:
        """Return the file of this name if all of it is computed."""
        path = self.folder / f"{name}{DATA}"
        with suppress(OSError):
            if path.with_suffix(STATE).exists() and (found := FeatureFile(self, path, chunks)).is_done:
                return found
        return None

    def fail(self, file: FeatureFile, error: OSError) -> None:
        """Give up a file that cannot be written, and free its place on the disk."""
        with self.alone():
            file.state[:, 0] = FAILED
            file.path.unlink(missing_ok=True)
        self.tell(str(error))

    def tell(self, why: str) -> None:
        """Note why features are not cached, for the first of several problems."""
        self.problem = self.problem or (
            f"{self._root}: features of the frozen blocks are not cached: {why}; set LIFT_CACHE to a larger disk"
        )


class FeatureFile:
    """Features of a split, (N, ...), that processes compute together.

    Attributes:
        state: (chunks, 2), mapped: the owner of each chunk, or FREE, DONE or FAILED; and the number of its images that are written.
    """

    def __init__(self, shared: SharedFeatures, path: Path, chunks: list[range]) -> None:
        self.shared, self.path, self.chunks = shared, path, chunks
        self.state = np.memmap(path.with_suffix(STATE), np.int64, "r+", shape=(len(chunks), 2))

    @property
    def is_done(self) -> bool:
        """True if all chunks are computed."""
        return bool((self.state[:, 0] == DONE).all())

    @property
    def has_failed(self) -> bool:
        """True if the disk was full."""
        return bool((self.state[:, 0] == FAILED).any())

    def fill(self, compute: Callable[[range], Iterable[torch.Tensor]], tell: Callable[[int], None]) -> bool:
        """Compute all that is left together with other processes. Returns False if the disk is full or the files are gone.

        Args:
            compute: yields the features of a chunk, batch by batch.
            tell: called often with the number of images that are done; it may raise, which frees the claimed chunk.
        """
        try:
            opened = self.path.open("r+b", buffering=0)
        except OSError as error:  # another process found the disk full, and removed it
            self.shared.tell(str(error))
            return False
        with opened as file:
            while not self.is_done:
                tell(self._num_done())
                if self.has_failed:
                    return False
                try:
                    number = self._claim()
                except OSError as error:
                    self.shared.tell(str(error))
                    return False
                if number is None:
                    time.sleep(WAIT_S)
                    continue
                try:
                    at = self.chunks[number].start
                    for part in compute(self.chunks[number]):
                        if (fault := _write(file, part, at)) is not None:
                            self.shared.fail(self, fault)
                            return False
                        at += len(part)
                        self.state[number, 1] = at - self.chunks[number].start
                        tell(self._num_done())
                    if not self.has_failed:
                        self.state[number, 0] = DONE
                finally:
                    if self.state[number, 0] == self.shared.number:
                        self.state[number] = FREE, 0
        return True

    def _num_done(self) -> int:
        return int(self.state[:, 1].sum())

    def _claim(self) -> int | None:
        """Return the number of a chunk that is now this process's; None if all are done or others work on them."""
        with self.shared.alone():
            owners = self.state[:, 0]
            for owner in set(owners.tolist()) - {FREE, DONE, FAILED}:
                if not self.shared.is_alive(owner):
                    self.state[owners == owner] = FREE, 0
            free = np.flatnonzero(owners == FREE)
            if not len(free):
                return None
            owners[free[0]] = self.shared.number
            return int(free[0])

    def tensor(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """Return all features, (N, *shape), mapped from the file: processes share its pages, and changes stay in this one."""
        whole = (self.chunks[-1].stop, *shape)
        return torch.from_file(str(self.path), False, int(np.prod(whole)), dtype=dtype).view(whole)


def _unwritten_bytes(file: os.stat_result) -> int:
    """Return the bytes that a file will still take from the disk. Windows takes all of them when it sets the size of a file."""
    return max(0, file.st_size - 512 * file.st_blocks) if hasattr(file, "st_blocks") else 0


def _write(file: FileIO, part: torch.Tensor, at: int) -> OSError | None:
    """Write the features of samples from number `at` on. Returns the error if the disk is full; a mapped file would end the process."""
    data = part.cpu().contiguous().flatten().view(torch.uint8).numpy().data
    offset = at * (data.nbytes // len(part))
    try:
        file.seek(offset)
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        return error
    return None


def _has_members(folder: Path) -> bool:
    return any(_is_held(file) for file in folder.glob(f"*{MEMBER}"))


def _is_held(file: Path) -> bool:
    """Return True if a process holds the lock of a file that exists."""
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
