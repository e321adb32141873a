"""Image files that table rows name: `datasets` stores local images as a path without bytes."""

from __future__ import annotations

import errno
import os
from pathlib import PurePosixPath

from lift_ray.storage.store import DRIVE, PATIENCE_S, is_remote, join, locate, retried

NO_FILE = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # a path that no file can have


def read_file(url: str) -> bytes:
    """Return the bytes of a file.

    Raises FileNotFoundError if there is none, also for a FIFO or a device, which could be read forever; other exceptions of the store
    are raised.
    """
    file_system, path = locate(url)
    try:
        if not is_remote(file_system) and file_system.info(path)["type"] != "file":
            raise FileNotFoundError(path)
        return bytes(file_system.cat_file(path))
    except OSError as error:
        if error.errno in NO_FILE:
            raise FileNotFoundError(path) from None
        raise


def read_named(folder: str, path: str) -> bytes:
    """Return the image file that a row names. Raises ValueError if there is none, BadInput if it cannot be read."""
    url = named_file(folder, path)
    file_system, place = locate(url)

    def work(_: float) -> bytes | None:
        try:
            return read_file(url)
        except (FileNotFoundError, ValueError):  # ValueError: a NUL character in the path
            return None

    patience_s = PATIENCE_S if is_remote(file_system) else 0.0
    data = retried(work, url, "must be readable", "check the source, and start again", patience_s)
    if data is None:
        raise ValueError(f"no image in this row, and no file {place}")
    return data


def with_slashes(folder: str, path: str) -> str:
    """Return a relative path of Windows (`train\\ewer\\a.jpg`) with slashes, unless `folder` has a file with backslashes in its name.

    Such files are looked for on this machine only: a request to a store for each row would take hours.
    """
    if "\\" not in path or DRIVE.match(path):  # no relative path has a drive letter
        return path
    file_system, place = locate(join(folder, path))
    if os.sep == "/" and not is_remote(file_system) and file_system.exists(place):
        return path
    return path.replace("\\", "/")


def named_file(folder: str, path: str) -> str:
    """Return the URL of the file that a row names.

    A relative path, also one of Windows, is taken from `folder` and may not lead out of it. `datasets` also writes absolute paths,
    which only a table on this machine may name.

    Raises ValueError for any other path.
    """
    path = with_slashes(folder, path)
    parts = PurePosixPath(path).parts
    if path.startswith("/") and not is_remote(locate(folder)[0]):
        return path
    if not parts or path.startswith("/") or ".." in parts or "://" in path or DRIVE.match(path):
        raise ValueError(f"no image in this row, and a path outside of {folder}: {path!r}")
    return join(folder, path)
