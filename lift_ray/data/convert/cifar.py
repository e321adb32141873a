"""Read the published CIFAR-10 and CIFAR-100, optionally with the long-tailed training split of the literature."""

from __future__ import annotations

import io
import math
import pickle
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from lift_ray.data.convert.index import ImageIndex, absolute, check_trained, distinct, encode_png
from lift_ray.data.longtail import Int64s
from lift_ray.errors import BadInput
from lift_ray.storage.store import PATIENCE_S, is_remote, join, locate, reached, retried

MOST_BYTES = 256 * 2**20  # per file; the largest published one has 155 MB
DOWNLOAD = "download the python version again"
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Layout:
    """File names of a published set, and the keys of its labels and class names."""

    meta: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    keys: tuple[str, str]
    coarse_keys: tuple[str, str] | None


CIFAR10 = Layout(
    "batches.meta", tuple(f"data_batch_{n}" for n in range(1, 6)), ("test_batch",), ("labels", "label_names"), None
)
CIFAR100 = Layout(
    "meta", ("train",), ("test",), ("fine_labels", "fine_label_names"), ("coarse_labels", "coarse_label_names")
)
FILES = frozenset(name for layout in (CIFAR10, CIFAR100) for name in (layout.meta, *layout.train, *layout.test))


@dataclass(frozen=True)
class CifarImages:
    """Reader of the images of an archive, as PNG; a reference is `file/row`. Each process keeps the pixels of the archive (184 MB)."""

    source: str

    def __call__(self, reference: str) -> bytes:
        """Return the image as PNG."""
        file, row = reference.split("/")
        pixels = _load(self.source)[file]["data"].pixels()[int(row)]
        return encode_png(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))))


def scan_cifar(source: str, *, imbalance: float | None = None, coarse: bool = False) -> ImageIndex:
    """List the images of CIFAR-10 or CIFAR-100.

    With `imbalance`, the training images are reduced as in the literature (`longtailed_rows`).

    Args:
        source: cifar-10-python.tar.gz, cifar-100-python.tar.gz, or a folder with their content; any fsspec URL.
        imbalance: ratio of the images of the first class to those of the last, >= 1; the literature uses 10, 50 and 100.
        coarse: use the 20 superclasses of CIFAR-100.

    Raises BadInput for other content, an imbalance out of range, and coarse labels of CIFAR-10.
    """
    files = _load(absolute(source))
    layout = CIFAR10 if CIFAR10.meta in files else CIFAR100
    if coarse and layout.coarse_keys is None:
        raise BadInput("coarse", "requires CIFAR-100", "CIFAR-10, which has no superclasses", "remove it")
    label_key, name_key = layout.coarse_keys if coarse and layout.coarse_keys else layout.keys
    with reached(source, "must be CIFAR as published", DOWNLOAD):
        given = [name.decode() if isinstance(name, bytes) else str(name) for name in files[layout.meta][name_key]]
        names, notes = distinct(given, source)
        train = _rows(files, layout.train, label_key, len(names))
        test = _rows(files, layout.test, label_key, len(names))
    if imbalance is not None:
        labels = np.array([label for _, label in train], dtype=np.int64)
        train = [train[row] for row in longtailed_rows(labels, len(names), imbalance)]
    splits = {"train": train, "test": test}
    check_trained(source, names, splits)
    return ImageIndex(source, names, splits, CifarImages(absolute(source)), notes=notes)


def longtailed_rows(labels: Int64s, num_classes: int, imbalance: float) -> Int64s:
    """Return the rows of a long-tailed subset of a balanced set, exactly like IMBALANCECIFAR of LDAM-DRW (arXiv 1906.07413).

    Class c of K keeps n_c = int(N / K * (1 / imbalance) ** (c / (K - 1))) images: the first after a shuffle. One NumPy
    RandomState(0) shuffles the classes one after another.

    Args:
        labels: label of every image, (N,), each in [0, K).
        num_classes: K, at least 2.
        imbalance: ratio of the images of the first class to those of the last, >= 1.

    Returns:
        Indices into `labels`, class after class. Raises BadInput if the last class would keep no image.
    """
    largest = len(labels) / num_classes
    if not (math.isfinite(imbalance) and 1 <= imbalance <= largest):
        raise BadInput(
            "imbalance",
            f"must be between 1 and {largest:g}, the number of images per class",
            f"{imbalance:g}",
            "for example, 100",
        )
    rng = np.random.RandomState(0)
    kept = []
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)
        rng.shuffle(rows)
        kept.append(rows[: int(largest * (1 / imbalance) ** (label / (num_classes - 1)))])
    return np.concatenate(kept)


def _rows(
    files: dict[str, dict[str, Any]], names: tuple[str, ...], label_key: str, num_classes: int
) -> list[tuple[str, int]]:
    rows = []
    for name in names:
        labels = [int(label) for label in files[name][label_key]]
        if len(labels) != len(files[name]["data"].pixels()) or not all(0 <= label < num_classes for label in labels):
            raise ValueError(f"labels of {name} that do not fit its images or class names")
        rows += [(f"{name}/{row}", label) for row, label in enumerate(labels)]
    return rows


def _load(source: str) -> dict[str, dict[str, Any]]:
    with _ONE_AT_A_TIME:  # otherwise threads that start together would all read it
        return _loaded(source)


@lru_cache(maxsize=1)
def _loaded(source: str) -> dict[str, dict[str, Any]]:
    """Return the content of every file of a set by file name."""
    file_system, path = locate(source)

    def work(_: float) -> dict[str, dict[str, Any]]:
        raw_files = _in_folder(source) if file_system.isdir(path) else _in_archive(source)
        return {name: _unpickled(join(source, name), raw) for name, raw in raw_files}

    patience_s = PATIENCE_S if is_remote(file_system) else 0.0
    files = retried(work, source, "must be CIFAR as published", DOWNLOAD, patience_s)
    for layout in (CIFAR10, CIFAR100):
        if layout.meta in files:
            missing = [name for name in (*layout.train, *layout.test) if name not in files]
            if missing:
                raise BadInput(source, "must contain all CIFAR files", f"no {missing[0]}", DOWNLOAD)
            return files
    raise BadInput(
        source,
        f"must contain {CIFAR10.meta} (CIFAR-10) or {CIFAR100.meta} (CIFAR-100)",
        "neither",
        "give cifar-10-python.tar.gz, cifar-100-python.tar.gz, or the folder in it",
    )


def _in_folder(source: str) -> Iterator[tuple[str, bytes]]:
    file_system, path = locate(source)
    for entry in file_system.ls(path, detail=True):
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        if name in FILES and entry["type"] == "file":
            _check_size(join(source, name), entry["size"])
            yield name, file_system.cat_file(entry["name"])


def _in_archive(source: str) -> Iterator[tuple[str, bytes]]:
    """Read the files from the archive as a stream, without extracting it."""
    file_system, path = locate(source)
    with file_system.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            _check_size(join(source, member.name), member.size)
            name = member.name.rsplit("/", 1)[-1]
            if name in FILES and (content := archive.extractfile(member)) is not None:
                yield name, content.read()


def _check_size(where: str, num_bytes: int) -> None:
    if num_bytes > MOST_BYTES:
        raise BadInput(where, f"must have at most {MOST_BYTES} bytes", num_bytes, DOWNLOAD)


class _Array:
    """Replacement for numpy.ndarray in the pickles: keeps the description of the array, and builds nothing while unpickling."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.type, self.by_columns, self.bytes = state

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return the images as (N, 3, 32, 32). Raises ValueError for other arrays."""
        if getattr(self.type, "code", None) not in ("u1", b"u1"):
            raise ValueError("an array that is not of bytes")
        rows = np.frombuffer(self.bytes, dtype=np.uint8).reshape(self.shape, order="F" if self.by_columns else "C")
        return rows.reshape(-1, 3, 32, 32)


class _Type:
    """Replacement for numpy.dtype in the pickles."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which do not matter for single bytes."""


def _new_array(*_: object) -> _Array:
    return _Array()


def _encode(text: str, _: str) -> bytes:
    """Decode the form in which Python 3 writes bytes to old pickle protocols."""
    return text.encode("latin1")


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, where: str, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="bytes")
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise BadInput(self._where, "must contain only numbers, names and arrays", f"{module}.{name}", DOWNLOAD)
        return ALLOWED[module, name]


def _unpickled(where: str, raw: bytes) -> dict[str, Any]:
    content = _Unpickler(where, raw).load()
    if not isinstance(content, dict):
        raise BadInput(where, "must contain a dictionary", type(content).__name__, DOWNLOAD)
    named = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    return cast("dict[str, Any]", named)
