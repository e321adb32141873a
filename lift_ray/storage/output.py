"""Result folder of a search or a run: a local folder, or object storage with a local copy."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ArrowException, fs

from lift_ray.errors import BadInput, RunFailed, one_line
from lift_ray.storage.retry import retry

PATIENCE_S = 120.0  # how long failing object storage is retried
Result = TypeVar("Result")


class Output:
    """The result folder of a search or a run.

    Files that only one process writes go to `folder`. For a URL (s3://, gs://, any that pyarrow or fsspec supports) `folder` is a
    local copy that `publish` uploads. Checkpoints, which other processes read, go through `staged` and `fetched`.

    Args:
        where: a path or a URL.
        option: name of the option that set it, for messages.

    Attributes:
        url: the URL, or the absolute path.
        shown: the same without credentials, for messages.

    Raises:
        BadInput: the protocol is unknown, or the storage cannot be reached.
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
                option,
                "must be a folder or a URL of object storage",
                f"{self.shown} ({one_line(error)})",
                "try s3://bucket/folder",
            ) from None
        self.folder = Path(tempfile.mkdtemp(prefix="lift_ray-"))

    def inside(self, name: str) -> Output:
        """Return a folder in this one."""
        url, mark, query = self.url.partition("?")
        return Output(f"{url.rstrip('/')}/{name}{mark}{query}", self.option)

    def publish(self) -> None:
        """Upload new and changed files; does nothing for a local folder. Raises RunFailed when the upload fails."""
        if self._remote is None:
            return
        filesystem, path = self._remote
        self._tried(lambda: _copy(self.folder, filesystem, path), f"; the results are in {self.folder}")

    def holds(self, name: str) -> bool:
        """Return True if the file exists. Raises BadInput when the storage cannot be reached."""
        if self._remote is None:
            return (self.folder / name).exists()
        filesystem, path = self._remote
        try:
            return bool(filesystem.get_file_info(f"{path}/{name}").type != fs.FileType.NotFound)
        except (ArrowException, OSError) as error:
            raise BadInput(
                self.option,
                "must be reachable storage",
                but=f"{self.shown} says: {one_line(error)}",
                remedy="check bucket, region and credentials",
            ) from None

    def names(self, folder: str) -> list[str]:
        """Return the sorted names in a folder; empty if it does not exist. Raises RunFailed when the storage cannot be reached."""
        filesystem, path = self._remote or (fs.LocalFileSystem(), str(self.folder))
        selector = fs.FileSelector(f"{path}/{folder}", allow_not_found=True)
        return sorted({info.base_name for info in self._tried(lambda: filesystem.get_file_info(selector))} - {""})

    @contextmanager
    def staged(self, name: str, last: str) -> Iterator[Path]:
        """Yield a local path to write a folder to; the folder then becomes `name`, whole or not at all.

        Args:
            last: the file that is uploaded last: if it exists, the folder is complete.

        Raises RunFailed when the disk is full, or the storage keeps failing.
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
        """Yield a local path of an existing folder or file, "" for everything. Raises RunFailed when the storage cannot be reached."""
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

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Return columns of a Parquet file, all by default; of a remote one, only these are read. Raises RunFailed if that fails."""
        filesystem, path = self._remote or (fs.LocalFileSystem(), str(self.folder))
        return self._tried(lambda: pq.read_table(f"{path}/{name}", columns=columns, filesystem=filesystem))

    def remove(self, name: str) -> None:
        """Delete a folder or a file if it exists. Raises RunFailed when the storage cannot be reached."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        with suppress(OSError):
            (self.folder / name).unlink()
        if self._remote is None:
            return
        filesystem, path = self._remote
        kind = self._tried(lambda: filesystem.get_file_info(f"{path}/{name}")).type
        if kind == fs.FileType.File:
            self._tried(lambda: filesystem.delete_file(f"{path}/{name}"))
        elif kind == fs.FileType.Directory:
            self._tried(lambda: filesystem.delete_dir(f"{path}/{name}"))

    def _tried(self, work: Callable[[], Result], kept: str = "") -> Result:
        """Return the result of `work`, retried while remote storage fails. Raises RunFailed when it keeps failing."""
        patience_s = PATIENCE_S if self._remote else 0.0
        try:
            return retry(lambda _: work(), _may_pass, patience_s, first_pause_s=0.25)
        except (ArrowException, OSError) as error:
            raise RunFailed(f"{self.shown}: the storage failed: {one_line(error)}{kept}") from None

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            got = "the disk is full" if full else one_line(error)
            what = "free some space" if full else "check the disk"
            raise RunFailed(
                f"{self.shown}: cannot write a checkpoint: {got}; {what}, then continue with --resume"
            ) from None

    def __str__(self) -> str:
        """Return the folder as the user would type it."""
        if self._remote is None and self.folder.is_relative_to(Path.cwd()):
            return str(self.folder.relative_to(Path.cwd()))
        return self.shown


def _may_pass(error: Exception) -> bool:
    return isinstance(error, ArrowException | OSError) and not isinstance(error, FileNotFoundError | PermissionError)


def _file_system(url: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URL: pyarrow's if it knows the protocol, otherwise that of fsspec."""
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
