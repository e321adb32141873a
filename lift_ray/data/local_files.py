"""Image files that rows of a table name, as `datasets` stores images of the own machine: no bytes, and a path."""

from __future__ import annotations

from pathlib import PurePosixPath

from lift_ray.storage.store import is_remote, join, locate


def named_file(folder: str, path: str) -> str:
    """Return the URL of the file that a row names.

    A relative path is taken from `folder` and may not lead out of it. `datasets` also writes absolute paths, which only a table on this
    machine may name.

    Raises ValueError for any other path.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") and not is_remote(locate(folder)[0]):
        return path
    if not parts or path.startswith("/") or ".." in parts or "://" in path:
        raise ValueError(f"no image in this row, and a path outside of {folder}: {path!r}")
    return join(folder, path)
