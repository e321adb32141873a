"""Labelled images that are somewhere, not read yet: what every kind of source is turned into before a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lift_ray.data.store import join, locate


class ReadImage(Protocol):
    """Reads one image of a source. It is sent to other processes, so it holds names and numbers, no open files."""

    def __call__(self, reference: str) -> bytes:
        """The encoded image behind a reference; whatever goes wrong is raised."""
        ...


@dataclass(frozen=True)
class FilesIn:
    """Reads images that are files under a URL; references are relative paths."""

    source: str

    def __call__(self, reference: str) -> bytes:
        """The file's bytes."""
        file_system, root = locate(self.source)
        data: bytes = file_system.cat_file(join(root, reference))
        return data


@dataclass(frozen=True)
class ImageIndex:
    """Labelled images that are somewhere, not read yet.

    Attributes:
        source: URL that messages name.
        class_names: in label order.
        splits: (reference, label) pairs of each split that the source defines, by split name.
        read: turns a reference into an encoded image.
        num_ignored: files that are not images by their suffix.
    """

    source: str
    class_names: tuple[str, ...]
    splits: dict[str, list[tuple[str, int]]]
    read: ReadImage
    num_ignored: int = 0
