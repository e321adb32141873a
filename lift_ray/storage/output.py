"""Where the files of a search or a run go: a folder, or object storage by way of a local copy."""

from __future__ import annotations

import errno
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import fsspec
from pyarrow import ArrowException, fs

from lift_ray.errors import BadInput, RunFailed

PATIENCE_S = 120.0  # object storage may fail for so long
LONGEST_PAUSE_S = 8.0
Result = TypeVar("Result")


class Output:
    """The result folder of a search or a run.

    What one process writes alone goes to `folder`; for a URL (s3://, gs://, any that pyarrow or fsspec knows) that is a local
    copy, which `publish` uploads. Checkpoints, which other processes read, go through `staged` and `fetched`.

    Args:
        where: a path or a URL.
        option: what the user gave it as.

    Attributes:
        url: where, a path in full.
        shown: the same without credentials, for messages.

    Raises:
        BadInput: an unknown kind of URL, or storage that does not answer.
    """

    def __init__(self, where: str, option: str = "--out") -> None:
        self.option = option
        self._remote: tuple[fs.FileSystem, str] | None = None
        if "://" not in where:
            self.folder = Path(where).absolute()
            self.url = self.shown = str(self.folder)
            return
        self.url = where
        self.shown = re.sub("//[^/]*@", "//", where)
        try:
            self._remote = _file_system(where)
        except (ArrowException, ValueError, OSError, ImportError) as error:
            raise BadInput(
                f"{option}: must be a folder or a URL of object storage, but got {self.shown} "
                f"({_one_line(error)}); try s3://bucket/folder"
            ) from None
        self.folder = Path(tempfile.mkdtemp(prefix="lift_ray-"))

    def publish(self) -> None:
        """Upload what is new or changed; nothing to do for a local folder. Raises RunFailed when the storage refuses."""
        if self._remote is None:
            return
        filesystem, path = self._remote
        self._tried(lambda: _copy(self.folder, filesystem, path), f"; they are in {self.folder}")

    def holds(self, name: str) -> bool:
        """Whether there is such a file. Raises BadInput when the storage does not answer."""
        if self._remote is None:
            return (self.folder / name).exists()
        filesystem, path = self._remote
        try:
            return bool(filesystem.get_file_info(f"{path}/{name}").type != fs.FileType.NotFound)
        except (ArrowException, OSError) as error:
            raise BadInput(
                f"{self.option}: must be storage that answers, but {self.shown} says: {_one_line(error)}; "
                "check bucket, region and credentials"
            ) from None

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; none when it is not there. Raises RunFailed when the storage does not answer."""
        filesystem, path = self._remote or (fs.LocalFileSystem(), str(self.folder))
        selector = fs.FileSelector(f"{path}/{folder}", allow_not_found=True)
        return sorted({info.base_name for info in self._tried(lambda: filesystem.get_file_info(selector))} - {""})

    @contextmanager
    def staged(self, name: str, last: str) -> Iterator[Path]:
        """A path for a folder to write; it becomes `name`, whole or not at all.

        Args:
            last: the file in it that is uploaded last: where it is, the folder is whole.

        Raises RunFailed when the disk is full, or the storage keeps refusing.
        """
        if self._remote is None:
            with self._written():
                yield self.folder / name
            return
        filesystem, path = self._remote
        with self._written(), tempfile.TemporaryDirectory(prefix="lift_ray-") as temporary:
            local = Path(temporary) / "folder"
            yield local
            files = sorted(local.iterdir(), key=lambda file: file.name == last)
            self._tried(lambda: filesystem.create_dir(f"{path}/{name}", recursive=True))
            for file in files:
                self._tried(lambda file=file: _copy(file, filesystem, f"{path}/{name}/{file.name}"))  # type: ignore[misc]

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A local path of a folder or file that is there, "" for all. Raises RunFailed when the storage does not answer."""
        if self._remote is None:
            yield self.folder / name
            return
        filesystem, path = self._remote
        with tempfile.TemporaryDirectory(prefix="lift_ray-") as temporary:
            source, local = f"{path}/{name}".rstrip("/"), Path(temporary) / (Path(name).name or "folder")
            if self._tried(lambda: filesystem.get_file_info(source)).type == fs.FileType.Directory:
                local.mkdir()
            self._tried(
                lambda: fs.copy_files(
                    source, str(local), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
                )
            )
            yield local

    def remove(self, name: str) -> None:
        """Delete a folder, if it is there. Raises RunFailed when the storage does not answer."""
        if self._remote is None:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            return
        filesystem, path = self._remote
        if self._tried(lambda: filesystem.get_file_info(f"{path}/{name}")).type != fs.FileType.NotFound:
            self._tried(lambda: filesystem.delete_dir(f"{path}/{name}"))

    def _tried(self, work: Callable[[], Result], kept: str = "") -> Result:
        """What `work` returns; called again, after growing pauses, while remote storage fails."""
        ends = time.monotonic() + (PATIENCE_S if self._remote else 0.0)
        pause_s = 0.25
        while True:
            try:
                return work()
            except (ArrowException, OSError) as error:
                if time.monotonic() + pause_s > ends or isinstance(error, FileNotFoundError | PermissionError):
                    raise RunFailed(f"{self.shown}: must take the results, but: {_one_line(error)}{kept}") from None
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            got = "the disk is full" if full else _one_line(error)
            what = "make room" if full else "check the disk"
            raise RunFailed(
                f"{self.shown}: must take a checkpoint, but {got}; {what}, then go on with --resume"
            ) from None

    def __str__(self) -> str:
        """As the user would type it."""
        if self._remote is None and self.folder.is_relative_to(Path.cwd()):
            return str(self.folder.relative_to(Path.cwd()))
        return self.shown


def _file_system(url: str) -> tuple[fs.FileSystem, str]:
    """Of pyarrow where it knows the protocol, else of fsspec."""
    try:
        filesystem, path = fs.FileSystem.from_uri(url)
    except ArrowException:
        if url.startswith(("s3://", "gs://")):
            raise
        found, path = fsspec.core.url_to_fs(url)
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(found))
    return filesystem, path.rstrip("/")


def _copy(source: Path, filesystem: fs.FileSystem, target: str) -> None:
    fs.copy_files(str(source), target, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
