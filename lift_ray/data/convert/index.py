"""Index of labeled images, the common form of all sources before a conversion; no image is read yet."""

from __future__ import annotations

import codecs
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from lift_ray.data.local_files import read_file
from lift_ray.data.walk import LeftOut
from lift_ray.errors import BadInput, first_few
from lift_ray.storage.store import DRIVE, PATIENCE_S, check_drive, fetch, join, reached

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
        return read_file(join(self.source, reference))


@dataclass(frozen=True)
class ImageIndex:
    """Index of labeled images; no image is read yet.

    Attributes:
        source: URL of the source in messages.
        class_names: in label order.
        splits: (reference, label) pairs of each split that the source defines, by split name. References that are
            cheap to read together are next to each other.
        read: returns the encoded image of a reference.
        left_out: files in the source that are not used, with the reasons.
        num_links: number of symbolic links that were followed.
        notes: messages to the user about the source.
        discarded: training images that the long-tailed cut of the literature leaves out; None if there is no cut.
        groups: name of the group of each reference, which no split may divide; an image without a name is a group of its own.
            None if there are no groups.
        root: URL that references are relative to in messages; "" for `source`.
    """

    source: str
    class_names: tuple[str, ...]
    splits: dict[str, list[tuple[str, int]]]
    read: ReadImage
    left_out: Sequence[LeftOut] = ()
    num_links: int = 0
    notes: tuple[str, ...] = ()
    discarded: Sequence[tuple[str, int]] | None = None
    groups: Mapping[str, str] | None = None
    root: str = ""


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

    Raises BadInput for a path outside the root or an image that is listed twice.
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
    return ImageIndex(source, class_names, splits, FilesIn(absolute(root)), notes=notes, root=root)


def inside(path: str, where: str) -> str:
    """Normalize a relative path. Raises BadInput if it leads out of its folder."""
    if DRIVE.match(path):
        got = f"{path!r}, which has a drive letter"
        raise BadInput(where, "must name a file in the source", got, "write it relative to the folder of the images")
    parts = path.replace("\\", "/").split("/")
    plain = "/".join(part for part in path.split("/") if part not in ("", "."))
    if not plain or not parts[0] or parts[0].endswith(":") or ".." in parts:
        raise BadInput(where, "must name a file in the source", f"{path!r}, a path outside the source", "fix it")
    return plain


def absolute(url: str) -> str:
    """Make a local path absolute, because other processes may run in another folder; other URLs are unchanged.

    Raises BadInput for a path of Windows on another system.
    """
    check_drive(url)
    return url if "://" in url or "::" in url else os.path.abspath(os.path.expanduser(url))


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
    """Return a class name as the text tower should see it: with spaces for underscores, and letters in one form of Unicode.

    macOS stores an accented letter as two characters (NFD), others as one (NFC).
    """
    return unicodedata.normalize("NFC", name).replace("_", " ").strip()


def folded(name: str) -> str:
    """Return a class name without differences of case and spaces, to compare names."""
    return " ".join(readable(name).split()).casefold()


def one_spelling(names: Iterable[str], source: str, similar: str | None) -> dict[str, str]:
    """Return the class name of each given name, for classes that have no names but those of their directories or labels.

    Args:
        names: names as they are in the source; order does not matter.
        source: URL of the source in messages.
        similar: for names that differ only in case or spaces: "merge" them, "keep" them apart, or None to refuse them.

    Raises BadInput for such names if `similar` is None, and for a name that is not UTF-8.
    """
    spellings: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        if name != valid_text(name):
            raise BadInput(source, "class names must be UTF-8", f"'{valid_text(name)}'", "rename it")
        found = spellings.setdefault(folded(name), [])
        if readable(name) not in found:
            found.append(readable(name))
    if similar is None and (unclear := [found for found in spellings.values() if len(found) > 1]):
        more = f", and {len(unclear) - 1} more" if len(unclear) > 1 else ""
        got = " and ".join(map(repr, unclear[0][:2])) + more
        rule = "class names must differ in more than case and spaces"
        raise BadInput(source, rule, got, "pass --similar-names merge (they are one class) or keep (they are two)")
    first = {spelling: found[0] for found in spellings.values() for spelling in found}
    return {name: first[readable(name)] if similar == "merge" else readable(name) for name in set(names)}


def notes_on_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return a note if class names are numbers, which tell the text tower nothing."""
    numbers = [name for name in class_names if not any(map(str.isalpha, name))]
    if not numbers:
        return ()
    prompt = f'the prompt will be "a photo of a {numbers[0]}."'
    remedy = "pass --class-names FILE, one name per line in this order"
    return (f"class names that are numbers: {len(numbers)} ({first_few(numbers)}); {prompt}; {remedy}",)


def valid_text(text: str) -> str:
    """Return text that can be written as UTF-8, with escapes for the bytes of a file name that is not."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_lines(url: str) -> list[str]:
    """Return the lines of a text file (UTF-8, or UTF-16 with its mark) without line ends.

    Raises BadInput, with the line, when it is other text or cannot be read.
    """
    data = fetch(url, 0, None, PATIENCE_S)
    rule, remedy = "must be a text file in UTF-8", "save it as UTF-8"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # from Excel and PowerShell
        with reached(url, rule, remedy):
            data = data.decode("utf-16").encode()
    if b"\0" in data:  # UTF-16 without its mark, or no text
        line = 1 + data.count(b"\n", 0, data.index(b"\0"))
        raise BadInput(f"{url}:{line}", rule, "a NUL byte", remedy)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise BadInput(f"{url}:{line}", rule, f"the byte 0x{data[error.start]:02x}", remedy) from None
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def encode_lossless(image: Image.Image) -> bytes:
    """Encode an image as PNG, or as TIFF if PNG has no such samples: lossless and deterministic."""
    encoded = io.BytesIO()
    if image.mode in TIFF_MODES:
        image.save(encoded, "TIFF")
    else:
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(encoded, "PNG")
    return encoded.getvalue()
