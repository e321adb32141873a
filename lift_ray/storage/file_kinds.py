"""Kind of a file by its first bytes, for the message when weights or a checkpoint turn out to be something else."""

from __future__ import annotations

import json
import zipfile
from contextlib import suppress
from pathlib import Path

SAFETENSORS, TORCH_SAVE = "a safetensors file", "a file of torch.save"
LFS_POINTER, CUT_SAFETENSORS, CUT_ZIP = (
    "a Git LFS pointer",
    "a safetensors file that is cut off",
    "a zip archive that is cut off",
)
PICKLE, TORCH_SCRIPT, EMPTY, JSON = "a pickle", "a TorchScript archive", "an empty file", "a JSON document"
FIRST_BYTES = 512
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
OLD_TORCH_SAVE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before torch 1.6, pickled
STARTS = {
    b"version https://git-lfs": LFS_POINTER,
    b"/annex/objects/": "a git-annex pointer",
    OLD_TORCH_SAVE: TORCH_SAVE,
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
}
MARKUP = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML document",
    b"<": "a page of markup",
}
MEMBERS = {  # part of a name in a zip archive -> kind, the first that fits
    "constants.pkl": TORCH_SCRIPT,
    "archive_format": "a program of torch.export",
    "serialized_exported_program": "a program of torch.export",
    "data.pkl": TORCH_SAVE,
    ".npy": "a NumPy archive",
    "[Content_Types].xml": "an Office document",
}


def file_kind(path: Path) -> str:
    """Return the kind of a file with its article: "a Git LFS pointer", "an HTML page", "a TorchScript archive".

    Raises OSError if it cannot be read.
    """
    if path.is_dir():
        return "a folder"
    with path.open("rb") as file:
        start = file.read(FIRST_BYTES)
    if not start:
        return EMPTY
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    found = next((kind for magic, kind in STARTS.items() if start.startswith(magic)), None)
    return found or _safetensors_kind(path, start) or _pickle_kind(start) or _text_kind(start)


def remedy(kind: str) -> str:
    """Return how to get a safetensors file if the file is of this kind."""
    if kind == LFS_POINTER:
        return "run git lfs pull"
    if kind in (TORCH_SAVE, TORCH_SCRIPT, PICKLE):
        return "save its tensors as safetensors, because lift_ray runs no code of a file"
    return "copy or download it again"


def _safetensors_kind(path: Path, start: bytes) -> str | None:
    """Return the kind of a file that starts with the length of a JSON header and that header; None for others."""
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > LARGEST_HEADER:
        return None
    with path.open("rb") as file, suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        file.seek(8)
        header = json.loads(file.read(length))
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        return SAFETENSORS if path.stat().st_size >= 8 + length + max(ends, default=0) else CUT_SAFETENSORS
    return CUT_SAFETENSORS


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return CUT_ZIP
    return next((kind for part, kind in MEMBERS.items() if any(part in name for name in names)), "a zip archive")


def _pickle_kind(start: bytes) -> str | None:
    return PICKLE if start[0] == 0x80 and start[1:2] <= b"\x05" else None


def _text_kind(start: bytes) -> str:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, kind in MARKUP.items():
        if text.lower().startswith(magic):
            return "an HTML page" if b"<html" in text.lower() else kind
    if text[:1] in (b"{", b"["):
        return JSON
    is_text = not any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in start)
    return "a text file" if is_text else "a file of an unknown kind"
