"""Features of frozen blocks in files, which all processes of a user on a node compute and use together.

A split is cut into chunks. Each process claims a free chunk, computes it, writes it and marks it as done. When none is free, it waits
for the others, and takes over the chunks of processes that have died. Readers map the file into memory, so the node holds it once.
Files outlive their search, so that one which is resumed, or another over the same images, finds them. Their names have all that decides
their content. Those used least recently make room for new ones, and those not used for a week are removed. The nodes of a search
compute chunks for each other (`Exchange`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil  # type: ignore[import-untyped]  # comes with Ray
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from lift_ray.storage.atomic import replacing

FREE, DONE, FAILED = 0, -1, -2  # in place of the owner of a chunk
CHUNK = 256  # images, at least
MOST_CHUNKS = 64  # of large splits, which would otherwise start a stream of batches too often
WAIT_S = 0.1
SPARE_BYTES = 2**30  # of the disk that stay free for checkpoints
KEEP_S = 7 * 24 * 3600
GONE_S = 4 * KEEP_S
DATA, STATE, MEMBER, USES, BOOT = ".features", ".state", ".member", ".uses", ".boot"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def root_folder() -> Path:
    """Return the folder for the features of this user's searches: in LIFT_CACHE, or the temporary folder."""
    place = Path(os.environ.get("LIFT_CACHE") or tempfile.gettempdir()).expanduser()
    return place / ("lift_ray-features" if (user := _user()) is None else f"lift_ray-features-{user}")


def _user() -> int | None:
    """Return the number of this process's user; None on Windows, where each user has a temporary folder of their own."""
    return os.getuid() if hasattr(os, "getuid") else None


def chunks_of(num_images: int, batch_size: int) -> list[range]:
    """Return the chunks of a split, whole batches each, whoever computes them."""
    size = -(-max(CHUNK, num_images // MOST_CHUNKS) // batch_size) * batch_size
    return [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]


class Exchange(Protocol):
    """Connection to the other nodes that compute the same files."""

    def choose(self, file: str, lacking: Sequence[int]) -> tuple[int, bool] | None:
        """Return a chunk of these, and whether it is there or is to be computed; None if other nodes compute all of them."""

    def fetch(self, file: str, number: int) -> NDArray[np.uint8] | None:
        """Return the bytes of a chunk that is there; None if they were lost."""

    def renew(self, file: str, number: int) -> None:
        """Note that this process is still computing a chunk."""

    def give(self, file: str, number: int, data: NDArray[np.uint8]) -> None:
        """Offer the bytes of a chunk to the other nodes."""

    def drop(self, file: str, number: int) -> None:
        """Leave a chunk to other nodes."""


class SharedFeatures:
    """The files of this user on this node, as one of the processes that use them.

    A process is alive as long as it holds the lock of its member file, which the kernel releases when it dies.

    Args:
        exchange: with other nodes; None if there are none.

    Attributes:
        problem: why features are not cached although the limit allows it, in one line.

    Raises OSError if there can be no such folder.
    """

    def __init__(self, exchange: Exchange | None = None) -> None:
        self.problem, self.exchange = "", exchange
        whole = root_folder()
        whole.mkdir(0o700, parents=True, exist_ok=True)
        found = whole.lstat()  # a link could lead into another folder, from which files would be removed
        if not stat.S_ISDIR(found.st_mode) or _user() not in (None, found.st_uid):
            raise PermissionError(f"{whole} is not a folder of this user")
        self.folder = whole / socket.gethostname()  # it may be on storage that several nodes share
        self.folder.mkdir(exist_ok=True)
        self.number = secrets.randbits(62) + 1
        with self.alone():
            self._tidy()
            self._member = FileLock(self._member_file(self.number), fallback_to_soft=False, thread_local=False)
            self._member.acquire()

    def _tidy(self) -> None:
        """Remove what dead processes left, old files, and all files that a crash of the system may have cut off."""
        members = list(self.folder.glob(f"*{MEMBER}"))
        for member in members:
            if not _is_held(member):
                member.unlink(missing_ok=True)
                member.with_suffix(USES).unlink(missing_ok=True)
        boot = BOOT_ID.read_text() if BOOT_ID.exists() else str(round(psutil.boot_time(), -1))
        mark = self.folder / BOOT
        is_same = mark.exists() and mark.read_text() == boot
        is_first = not any(member.exists() for member in members)
        for state in self.folder.glob(f"*{STATE}"):
            is_old = time.time() - state.stat().st_mtime > KEEP_S and state.stem not in self._used()
            has_failed = is_first and bool((np.fromfile(state, np.int64) == FAILED).any())  # the disk may have room now
            if is_old or has_failed or not is_same:
                _remove(state)
        mark.write_text(boot)
        for other in self.folder.parent.iterdir():  # of containers and nodes that are gone
            with suppress(OSError):  # another process may be tidying too
                if time.time() - max(file.stat().st_mtime for file in (other, *other.glob("*"))) > GONE_S:
                    shutil.rmtree(other)

    def close(self) -> None:
        """Leave; what was read stays readable."""
        with suppress(OSError), self.alone():  # somebody may have emptied the temporary folder
            self._member.release()
            self._member_file(self.number).unlink(missing_ok=True)
            self._uses.unlink(missing_ok=True)

    def alone(self) -> FileLock:
        """Return the lock of the folder: while it is held, nobody joins, leaves, claims or creates."""
        return FileLock(self.folder / ".lock", fallback_to_soft=False)

    def is_alive(self, number: int) -> bool:
        """Return True unless the member with this number has left or died. Call it with the lock."""
        return number == self.number or _is_held(self._member_file(number))

    def _member_file(self, number: int) -> Path:
        return self.folder / f"{number:x}{MEMBER}"

    def _used(self) -> set[str]:
        """Return the names of the files that living processes use."""
        living = [path for path in self.folder.glob(f"*{USES}") if _is_held(path.with_suffix(MEMBER))]
        return {name for path in living for name in path.read_text().split()}

    @property
    def _uses(self) -> Path:
        """File with the names of the files that this process uses."""
        return self._member_file(self.number).with_suffix(USES)

    def _use(self, path: Path) -> None:
        """Note that this process uses a file now."""
        with self._uses.open("a") as uses:
            uses.write(f"{path.stem}\n")
        os.utime(path.with_suffix(STATE))

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
                if not self._make_room(path, num_bytes, limit_bytes):
                    return None
                others = [file.stat() for file in self.folder.glob(f"*{DATA}") if file != path]
                unwritten = sum(map(_unwritten_bytes, others))
                free = shutil.disk_usage(self.folder).free - unwritten - SPARE_BYTES
                if num_bytes > free:
                    self.tell(f"{num_bytes / 2**30:.1f} GiB are needed and {max(0, free) / 2**30:.1f} are free")
                    return None
                with path.open("wb") as file:
                    file.truncate(num_bytes)
                with replacing(path.with_suffix(STATE)) as temporary:
                    np.zeros((len(chunks), 2), np.int64).tofile(temporary)
            self._use(path)
        found = FeatureFile(self, path, chunks)
        return None if found.has_failed else found

    def _make_room(self, path: Path, num_bytes: int, limit_bytes: float) -> bool:
        """Remove the files that nobody uses, the least recently used first, until a new one fits; none if that is not enough."""
        there = {file: file.stat().st_size for file in self.folder.glob(f"*{DATA}") if file != path}
        excess, used = num_bytes + sum(there.values()) - limit_bytes, self._used()
        free = [file.with_suffix(STATE) for file in there if file.stem not in used]
        removed = []
        for state in sorted(free, key=lambda state: state.stat().st_mtime if state.exists() else 0):
            if excess <= 0:
                break
            removed.append(state)
            excess -= there[state.with_suffix(DATA)]
        if excess > 0:
            own = self._uses.read_text().split() if self._uses.exists() else []
            taken = sum(there[file] for file in there if file.stem in used.difference(own))
            if taken and num_bytes <= limit_bytes:
                why = f"those of other processes take {taken / 2**30:.1f} of {limit_bytes / 2**30:.1f} GiB"
                self.tell(why, "raise backbone.cache_gib")
            return False
        for state in removed:
            _remove(state)
        return True

    def find(self, name: str, chunks: list[range]) -> FeatureFile | None:
        """Return the file of this name if all of it is computed."""
        path = self.folder / f"{name}{DATA}"
        if path.with_suffix(STATE).exists():
            with suppress(OSError), self.alone():  # somebody may remove it at this moment
                if (found := FeatureFile(self, path, chunks)).is_done and path.exists():
                    self._use(path)
                    return found
        return None

    def fail(self, file: FeatureFile, error: OSError) -> None:
        """Give up a file that cannot be written, and free its place on the disk."""
        with self.alone():
            file.state[:, 0] = FAILED
            file.path.unlink(missing_ok=True)
        self.tell(str(error))

    def tell(self, why: str, remedy: str = "set LIFT_CACHE to a larger disk") -> None:
        """Note why features are not cached, for the first of several problems."""
        self.problem = self.problem or f"{self.folder}: features of the frozen blocks are not cached: {why}; {remedy}"


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
        exchange = self.shared.exchange
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
                    claimed = self._claim()
                except OSError as error:
                    self.shared.tell(str(error))
                    return False
                if claimed is None:
                    time.sleep(WAIT_S if exchange is None else 10 * WAIT_S)
                    continue
                number, is_there = claimed
                if exchange is not None and is_there:
                    fits = self._fetch_chunk(file, number, exchange)
                else:
                    fits = self._fill_chunk(file, number, compute, tell)
                if not fits:
                    return False
        return True

    def _fill_chunk(
        self,
        file: FileIO,
        number: int,
        compute: Callable[[range], Iterable[torch.Tensor]],
        tell: Callable[[int], None],
    ) -> bool:
        """Compute a claimed chunk and write it. Returns False if the disk is full."""
        chunk, exchange = self.chunks[number], self.shared.exchange
        at = chunk.start
        try:
            for part in compute(chunk):
                data = part.cpu().contiguous().flatten().view(torch.uint8).numpy()
                if not self._write(file, data, at):
                    return False
                at += len(part)
                self.state[number, 1] = at - chunk.start
                if exchange is not None:
                    exchange.renew(self.path.stem, number)
                tell(self._num_done())
            if exchange is not None:
                with suppress(OSError):  # another process found the disk full, and removed the file
                    exchange.give(self.path.stem, number, self._bytes_of(chunk))
            self._done(number)
        finally:
            if self._leave(number) and exchange is not None:
                exchange.drop(self.path.stem, number)
        return True

    def _fetch_chunk(self, file: FileIO, number: int, exchange: Exchange) -> bool:
        """Write a claimed chunk that another node has computed. Returns False if the disk is full."""
        chunk = self.chunks[number]
        try:
            if (found := exchange.fetch(self.path.stem, number)) is not None:
                if not self._write(file, found, chunk.start):
                    return False
                self.state[number, 1] = len(chunk)
                self._done(number)
        finally:
            self._leave(number)
        return True

    def _done(self, number: int) -> None:
        if not self.has_failed:
            self.state[number, 0] = DONE

    def _leave(self, number: int) -> bool:
        """Free a chunk that is claimed and not done. Returns whether it was."""
        is_left = bool(self.state[number, 0] == self.shared.number)
        if is_left:
            self.state[number] = FREE, 0
        return is_left

    @cached_property
    def _image_bytes(self) -> int:
        return self.path.stat().st_size // self.chunks[-1].stop

    def _bytes_of(self, chunk: range) -> NDArray[np.uint8]:
        return np.fromfile(self.path, np.uint8, len(chunk) * self._image_bytes, offset=chunk.start * self._image_bytes)

    def _write(self, file: FileIO, data: NDArray[np.uint8], at: int) -> bool:
        """Write the features of samples from number `at` on. Returns False if the disk is full; a mapped file would end the process."""
        left = data.data
        try:
            file.seek(at * self._image_bytes)
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            self.shared.fail(self, error)
            return False
        return True

    def _num_done(self) -> int:
        return int(self.state[:, 1].sum())

    def _claim(self) -> tuple[int, bool] | None:
        """Return a chunk that is now this process's, and whether another node has computed it.

        None if all are done or others work on them.
        """
        exchange, owners = self.shared.exchange, self.state[:, 0]
        while True:
            with self.shared.alone():
                for owner in set(owners.tolist()) - {FREE, DONE, FAILED}:
                    if not self.shared.is_alive(owner):
                        self.state[owners == owner] = FREE, 0
                if not len(free := np.flatnonzero(owners == FREE)):
                    return None
                if exchange is None:
                    owners[free[0]] = self.shared.number
                    return int(free[0]), False
            # other nodes are asked without the lock: the answer may take a while
            if (found := exchange.choose(self.path.stem, free.tolist())) is None:
                return None
            with self.shared.alone():
                if owners[found[0]] == FREE:
                    owners[found[0]] = self.shared.number
                    return found

    def tensor(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """Return all features, (N, *shape), mapped from the file: processes share its pages, and changes stay in this one."""
        whole = (self.chunks[-1].stop, *shape)
        return torch.from_file(str(self.path), False, int(np.prod(whole)), dtype=dtype).view(whole)


def _unwritten_bytes(file: os.stat_result) -> int:
    """Return the bytes that a file will still take from the disk. Windows takes all of them when it sets the size of a file."""
    return max(0, file.st_size - 512 * file.st_blocks) if hasattr(file, "st_blocks") else 0


def _remove(state: Path) -> None:
    """Remove a file and its state; what is mapped stays readable. Windows does not remove what is mapped."""
    with suppress(OSError):
        state.with_suffix(DATA).unlink(missing_ok=True)
        state.unlink(missing_ok=True)


def _is_held(file: Path) -> bool:
    """Return True if a process holds the lock of a file that exists."""
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
