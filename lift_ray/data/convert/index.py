"""Index of labeled images, the common form of all sources before a conversion; no image is read yet."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from lift_ray.errors import BadInput, first_few
from lift_ray.storage.store import PATIENCE_S, fetch, join, locate, reached

PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
TIFF_MODES = frozenset({"I", "F"})

Row = tuple[str, str, str, int]
"""An image: the place that lists it (for messages), its split, path and label."""


class ReadImage(Protocol):
    """Reader of single images of a source. It is sent to other processes, so it contains names and numbers, no open files."""

    def __call__(self, reference: str) -> bytes:
        """Return the encoded image of a reference; any exception is raised."""
        ...


@dataclass(frozen=True)
class FilesIn:
    """Reader of image files under a URL; references are relative paths."""

    source: str

    def __call__(self, reference: str) -> bytes:
        """Return the bytes of the file."""
        file_system, root = locate(self.source)
        data: bytes = file_system.cat_file(join(root, reference))
        return data


@dataclass(frozen=True)
class ImageIndex:
    """Index of labeled images; no image is read yet.

    Attributes:
        source: URL of the source in messages.
        class_names: in label order.
        splits: (reference, label) pairs of each split that the source defines, by split name. References that are
            cheap to read together are next to each other.
        read: returns the encoded image of a reference.
        num_ignored: number of files without an image suffix.
        notes: messages to the user about the source.
        discarded: training images that the long-tailed cut of the literature leaves out; None if there is no cut.
        groups: name of the group of each reference, which no split may divide; an image without a name is a group of its own.
            None if there are no groups.
    """

    source: str
    class_names: tuple[str, ...]
    splits: dict[str, list[tuple[str, int]]]
    read: ReadImage
    num_ignored: int = 0
    notes: tuple[str, ...] = ()
    discarded: Sequence[tuple[str, int]] | None = None
    groups: Mapping[str, str] | None = None


def index_of_files(
    source: str, root: str, class_names: tuple[str, ...], rows: Iterable[Row], notes: tuple[str, ...] = ()
) -> ImageIndex:
    """Return the index of image files listed by path.

    Args:
        source: URL of the source in messages.
        root: URL of the folder that the paths are relative to.
        class_names: in label order.
        rows: the listed images; labels in [0, K).
        notes: messages to the user.

    Raises BadInput for a path outside the root, an image that is listed twice, or a class without a training image.
    """
    listed: dict[str, str] = {}
    splits: dict[str, list[tuple[str, int]]] = {}
    for where, split, path, label in rows:
        reference = inside(path, where)
        if first := listed.get(reference):
            raise BadInput(
                where, "each image must be listed once", but=f"{reference!r} is in {first} too", remedy="remove one"
            )
        listed[reference] = where
        splits.setdefault(split, []).append((reference, label))
    check_trained(source, class_names, splits)
    return ImageIndex(source, class_names, splits, FilesIn(absolute(root)), notes=notes)


def inside(path: str, where: str) -> str:
    """Normalize a relative path. Raises BadInput if it leads out of its folder."""
    parts = path.replace("\\", "/").split("/")
    plain = "/".join(part for part in path.split("/") if part not in ("", "."))
    if not plain or not parts[0] or parts[0].endswith(":") or ".." in parts:
        raise BadInput(where, "must name a file in the source", f"{path!r}, a path outside the source", "fix it")
    return plain


def absolute(url: str) -> str:
    """Make a local path absolute, because other processes may run in another folder; other URLs are unchanged."""
    return url if "://" in url or "::" in url else os.path.abspath(os.path.expanduser(url))


def check_trained(source: str, class_names: Sequence[str], splits: dict[str, list[tuple[str, int]]]) -> None:
    """Raise BadInput unless every class has a training image."""
    found = {label for _, label in splits.get("train", [])}
    if bare := [name for label, name in enumerate(class_names) if label not in found]:
        shown = first_few(list(map(repr, bare)))
        raise BadInput(
            source,
            "every class must have an image",
            but=f"{shown} have none",
            remedy="add images or remove these classes",
        )


def distinct(class_names: Iterable[str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return class names with spaces for underscores and numbers after repeated names, and a note if there are any.

    Published lists do repeat names: the usual 1,000 names of ImageNet contain 'missile' and 'sunglasses' twice.
    """
    names: dict[str, None] = {}
    changed = []
    for label, given in enumerate(class_names):
        name, copy = readable(given), 1
        while name in names:
            copy += 1
            name = f"{readable(given)} ({copy})"
        if copy > 1:
            changed.append(f"class {label} is called {name!r}")
        names[name] = None
    shown = first_few(changed)
    return tuple(names), (f"{where}: repeated class names ({len(changed)}): {shown}",) if changed else ()


def readable(name: str) -> str:
    """Return a class name as the text tower should see it: with spaces for underscores."""
    return name.replace("_", " ").strip()


def read_lines(url: str) -> list[str]:
    """Return the lines of a UTF-8 text file without line ends. Raises BadInput when it cannot be read."""
    data = fetch(url, 0, None, PATIENCE_S)
    with reached(url, "must be a text file", "check the file"):
        lines = data.decode("utf-8-sig").split("\n")
    return [line.rstrip("\r") for line in (lines if lines[-1] else lines[:-1])]


def encode_lossless(image: Image.Image) -> bytes:
    """Encode an image as PNG, or as TIFF if PNG has no such samples: lossless and deterministic."""
    encoded = io.BytesIO()
    if image.mode in TIFF_MODES:
        image.save(encoded, "TIFF")
    else:
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(encoded, "PNG")
    return encoded.getvalue()
