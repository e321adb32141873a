"""Read the published CIFAR-10 and CIFAR-100, optionally with the long-tailed training split of the literature."""

from __future__ import annotations

import hashlib
import math
import pickle
import tarfile
import threading
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from lift_ray.data.convert.index import ImageIndex, absolute, distinct, encode_lossless
from lift_ray.data.longtail import Int64s
from lift_ray.errors import BadInput
from lift_ray.storage.store import PATIENCE_S, is_remote, join, locate, retried

MOST_BYTES = 256 * 2**20  # per file; the largest published one has 155 MB
DOWNLOAD = "download the python version again"
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class CifarImages:
    """Reader of the images of an archive, as PNG; a reference is `file/row`. Each process keeps the pixels of the archive (184 MB).

    Attributes:
        md5s: name and published MD5 of each file, so that the processes that read need not import torchvision.
    """

    source: str
    md5s: tuple[tuple[str, str], ...]

    def __call__(self, reference: str) -> bytes:
        """Return the image as PNG."""
        file, row = reference.split("/")
        pixels = self.load()[file]["data"][int(row)].reshape(3, 32, 32)
        return encode_lossless(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))))

    def load(self) -> dict[str, dict[str, Any]]:
        """Return the content of every file by name. Raises BadInput for a file that is not the published one."""
        with _ONE_AT_A_TIME:  # otherwise threads that start together would all read it
            return _loaded(self.source, self.md5s)


def scan_cifar(source: str, *, imbalance: float | None = None, coarse: bool = False) -> ImageIndex:
    """List the images of CIFAR-10 or CIFAR-100.

    With `imbalance`, the training images are reduced as in the literature (`longtailed_rows`); the others are `discarded`.

    Args:
        source: cifar-10-python.tar.gz, cifar-100-python.tar.gz, or a folder with their content; any fsspec URL.
        imbalance: ratio of the images of the first class to those of the last, >= 1; the literature uses 10, 50 and 100.
        coarse: use the 20 superclasses of CIFAR-100.

    Raises BadInput for a missing file or one that is not as published, an imbalance out of range, and coarse labels of CIFAR-10.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    listed = {
        each: [(each.meta["filename"], each.meta["md5"]), *map(tuple, each.train_list + each.test_list)]
        for each in (CIFAR10, CIFAR100)
    }
    read = CifarImages(absolute(source), (*listed[CIFAR10], *listed[CIFAR100]))
    files = read.load()
    published = CIFAR10 if CIFAR10.meta["filename"] in files else CIFAR100
    if published.meta["filename"] not in files:
        raise BadInput(
            source,
            "must contain batches.meta (CIFAR-10) or meta (CIFAR-100)",
            "neither",
            "give cifar-10-python.tar.gz, cifar-100-python.tar.gz, or the folder in it",
        )
    if missing := [name for name, _ in listed[published] if name not in files]:
        raise BadInput(source, "must contain all CIFAR files", f"no {missing[0]}", DOWNLOAD)
    if coarse and published is CIFAR10:
        raise BadInput("coarse", "requires CIFAR-100", "CIFAR-10, which has no superclasses", "remove it")
    kind = "label" if published is CIFAR10 else "coarse_label" if coarse else "fine_label"
    names, notes = distinct(files[published.meta["filename"]][f"{kind}_names"], source)
    train, test = (
        [(f"{name}/{row}", label) for name, _ in split for row, label in enumerate(files[name][f"{kind}s"])]
        for split in (published.train_list, published.test_list)
    )
    discarded = None
    if imbalance is not None:
        labels = np.array([label for _, label in train], dtype=np.int64)
        kept = longtailed_rows(labels, len(names), imbalance)
        discarded = [train[row] for row in np.setdiff1d(np.arange(len(train)), kept)]
        train = [train[row] for row in kept]
    return ImageIndex(source, names, {"train": train, "test": test}, read, notes=notes, discarded=discarded)


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


@lru_cache(maxsize=1)
def _loaded(source: str, md5s: tuple[tuple[str, str], ...]) -> dict[str, dict[str, Any]]:
    file_system, path = locate(source)
    published = dict(md5s)

    def work(_: float) -> dict[str, dict[str, Any]]:
        raw_files = (_in_folder if file_system.isdir(path) else _in_archive)(source, published)
        return {name: _unpickled(join(source, name), raw, published[name]) for name, raw in raw_files}

    patience_s = PATIENCE_S if is_remote(file_system) else 0.0
    return retried(work, source, "must be CIFAR as published", DOWNLOAD, patience_s)


def _in_folder(source: str, names: Container[str]) -> Iterator[tuple[str, bytes]]:
    file_system, path = locate(source)
    for entry in file_system.ls(path, detail=True):
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        if name in names and entry["type"] == "file":
            _check_size(join(source, name), entry["size"])
            yield name, file_system.cat_file(entry["name"])


def _in_archive(source: str, names: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Read the files from the archive as a stream, without extracting it."""
    file_system, path = locate(source)
    with file_system.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            _check_size(join(source, member.name), member.size)
            name = member.name.rsplit("/", 1)[-1]
            if name in names and (content := archive.extractfile(member)) is not None:
                yield name, content.read()


def _check_size(where: str, num_bytes: int) -> None:
    if num_bytes > MOST_BYTES:
        raise BadInput(where, f"must have at most {MOST_BYTES} bytes", num_bytes, DOWNLOAD)


def _unpickled(where: str, raw: bytes, published_md5: str) -> dict[str, Any]:
    # Unpickling can run any code, so it is done for the published bytes only. Nobody can make other bytes with their MD5.
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if md5 != published_md5:
        raise BadInput(where, f"must be as published, with the MD5 {published_md5}", md5, DOWNLOAD)
    content: dict[str, Any] = pickle.loads(raw, encoding="latin1")
    return content
