"""Walk through a folder of images: symbolic links are followed, system folders are ignored, and what is left out is named."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from lift_ray.text import count

# thumbnails, recycle bins and snapshots of storage systems, and the resource forks in archives that macOS packs
SYSTEM_FOLDERS = frozenset(
    {
        "__macosx",
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "lost+found",
        "system volume information",
    }
)

LeftOut = tuple[str, str]
"""The name of a file that is not used, and the reason."""


@dataclass(frozen=True)
class Walked:
    """Contents of a folder and its subfolders, without hidden and system files and folders.

    Attributes:
        files: names relative to the folder, sorted.
        folders: relative names of the subfolders, sorted; in a store only of those with files.
        left_out: what is there but cannot be read.
        num_links: number of symbolic links, to files and to folders, that were followed.
    """

    files: list[str]
    folders: list[str]
    left_out: list[LeftOut]
    num_links: int = 0


def walk(file_system: Any, root: str) -> Walked:
    """List a folder at any fsspec URL. Raises OSError and the exceptions of the store if it cannot be listed."""
    root = root.rstrip("/") or "/"
    if isinstance(file_system, LocalFileSystem):
        return _walk_here(root)
    files = sorted(name[len(root) :].lstrip("/") for name in file_system.find(root))
    files = [name for name in files if not any(map(is_ignored, name.split("/")))]
    folders = {str(folder) for name in files for folder in PurePosixPath(name).parents}
    return Walked(files, sorted(folders - {"."}), [])


def _walk_here(root: str) -> Walked:
    """List a local folder. Each folder is listed once: links to folders come last, sorted, and only lead to new ones."""
    files: list[str] = []
    folders: list[str] = []
    left_out: list[LeftOut] = []
    num_links = 0
    listed = {_identity(root)}
    waiting = [("", False)]  # folders to list, and whether a link led there
    links: list[str] = []  # a heap

    while waiting or links:
        if not waiting:
            name = heapq.heappop(links)
            if (linked := _identity(os.path.join(root, name))) in listed:
                left_out.append((name, "a link to a folder that is already listed"))
                continue
            listed.add(linked)
            folders.append(name)
            waiting.append((f"{name}/", True))
            num_links += 1
        folder, through_link = waiting.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name, is_link = folder + entry.name, entry.is_symlink()
                if is_ignored(entry.name):
                    continue
                # an entry raises an error for a link to itself
                if os.path.isdir(entry.path) if is_link else entry.is_dir():
                    if is_link:
                        heapq.heappush(links, name)
                        continue
                    inner = _identity(entry.path)
                    if through_link and inner in listed:
                        left_out.append((name, "a folder that is already listed"))
                        continue
                    listed.add(inner)
                    folders.append(name)
                    waiting.append((f"{name}/", through_link))
                elif os.path.isfile(entry.path) if is_link else entry.is_file():
                    files.append(name)
                    num_links += is_link
                else:
                    left_out.append((name, "a broken link" if is_link else "not a regular file"))
    return Walked(sorted(files), sorted(folders), sorted(left_out), num_links)


def is_ignored(name: str) -> bool:
    """Return True for the name of a hidden file or folder, or of a system folder."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def counted(left_out: Iterable[LeftOut]) -> str:
    """Return how many files are left out, by suffix: `3 files (2 .txt, 1 without a suffix)`."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "without a suffix" for name, _ in left_out)
    return f"{count(counts.total(), 'file')} ({', '.join(f'{n:,} {suffix}' for suffix, n in counts.most_common())})"


def links_line(num_links: int) -> str:
    """Return the line that says how many symbolic links were followed."""
    return f"followed {count(num_links, 'symbolic link')}, to files and folders alike"


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
