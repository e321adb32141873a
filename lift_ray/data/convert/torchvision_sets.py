"""Read the classification datasets of torchvision.datasets by class name."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lift_ray.data.convert.index import (
    FilesIn,
    ImageIndex,
    ReadImage,
    absolute,
    distinct,
    encode_lossless,
    inside,
)
from lift_ray.errors import BadInput, did_you_mean, one_line
from lift_ray.storage.store import join, reached

LABELS = ("targets", "labels", "_labels", "y")
PAIRS = ("samples", "_samples", "imgs")  # of path and label
PATHS = ("_image_files", "_images")
SPOT_CHECKS = 3
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class TorchvisionImages:
    """Reader of the images of a dataset, as PNG; a reference is `split/number`. Each process opens a split on first use."""

    name: str
    root: str

    def __call__(self, reference: str) -> bytes:
        """Return the image as PNG."""
        split, number = reference.split("/")
        with _ONE_AT_A_TIME:  # otherwise threads that start together would all open it
            dataset = _opened(self.name, self.root, split)
        return encode_lossless(dataset[int(number)][0])


def scan_torchvision(name: str, *, root: str, download: bool = False) -> ImageIndex:
    """List the images of a torchvision dataset.

    Images that are files keep their bytes, others become PNG. If the only labeled images outside train are called val (ImageNet,
    Imagenette, Places365), they become the test split, as in the literature. A dataset without class names gets `class 0`,
    `class 1`, ..., and a note.

    Args:
        name: class in torchvision.datasets, a key of SETS.
        root: local folder of the dataset, torchvision's argument `root`.
        download: let torchvision download the dataset first.

    Raises BadInput if the dataset is unknown, does not exist, or requires a missing package (SciPy, h5py).
    """
    if name not in SETS:
        raise BadInput(name, "must be a torchvision dataset with one label per image", remedy=did_you_mean(name, SETS))
    if "://" in root:
        raise BadInput(
            root,
            "must be a folder on this machine, because torchvision reads only local files",
            remedy="copy the dataset there",
        )
    if download and name in NO_DOWNLOAD:
        raise BadInput(
            "download",
            "must not be given",
            but=f"torchvision cannot download {name}",
            remedy=f"put its files in {root}",
        )
    remedy = "check the folder" if download or name in NO_DOWNLOAD else "check the folder, or pass --download"
    here = absolute(root)
    with reached(root, f"must contain {name} as torchvision stores it", remedy):
        datasets = {split: _open(name, here, split, download) for split in SETS[name]}
        labels = {split: _labels(dataset) for split, dataset in datasets.items()}
        paths = {split: _paths(dataset, here) for split, dataset in datasets.items()}
    if not all(labels.values()):
        raise BadInput(root, f"must contain {name} as torchvision stores it", "no images", remedy)
    given, notes = _class_names(name, datasets["train"], labels)
    names, more = distinct(given, name)
    read: ReadImage = TorchvisionImages(name, here)
    relative_to = ""
    if all(paths.values()):
        read, relative_to = FilesIn(here), root
    else:
        paths = {split: [f"{split}/{number}" for number in range(len(labels[split]))] for split in labels}
    splits = {split: list(zip(paths[split], labels[split], strict=True)) for split in labels}
    return ImageIndex(join(root, name), names, splits, read, notes=(*notes, *more), root=relative_to)


def _open(name: str, root: str, split: str, download: bool) -> Any:
    import torchvision.datasets

    more = {} if name in NO_DOWNLOAD else {"download": download}
    try:
        return getattr(torchvision.datasets, name)(root, **SETS[name][split], **more)
    except ImportError as error:
        raise BadInput(name, "requires a package", f"{one_line(error)!r}", "install it") from None


@lru_cache(maxsize=3)
def _opened(name: str, root: str, split: str) -> Any:
    return _open(name, root, split, download=False)


def _labels(dataset: Any) -> list[int]:
    """Return the labels by number, from an attribute of the dataset, or else from its items."""
    total = len(dataset)
    pairs, held = _first(dataset, PAIRS), _first(dataset, LABELS)
    if pairs is not None:
        labels = [int(label) for _, label in pairs]
    elif held is not None:
        labels = np.asarray(held).astype(np.int64).tolist()
    else:
        return [int(dataset[number][1]) for number in range(total)]
    for number in np.linspace(0, total - 1, SPOT_CHECKS).astype(int).tolist() if total else []:
        if int(dataset[number][1]) != labels[number]:
            raise ValueError(
                "labels that differ from those of its images; this version of torchvision is not supported"
            )
    return labels


def _paths(dataset: Any, root: str) -> list[str]:
    """Return the paths of the images in the root; empty if they are not files."""
    paths = _first(dataset, PATHS)
    if paths is None:
        paths = [path for path, _ in _first(dataset, PAIRS) or []]
    if not all(isinstance(path, str | os.PathLike) for path in paths):
        return []
    return [inside(os.path.relpath(path, root), root) for path in paths]


def _first(dataset: Any, attributes: tuple[str, ...]) -> Any:
    return next((getattr(dataset, name) for name in attributes if getattr(dataset, name, None) is not None), None)


def _class_names(name: str, train: Any, labels: dict[str, list[int]]) -> tuple[list[str], tuple[str, ...]]:
    given = _first(train, ("classes", "categories"))
    if given is not None:
        return [each if isinstance(each, str) else ", ".join(each) for each in given], ()
    num_classes = 1 + max(label for here in labels.values() for label in here)
    note = f"{name}: has no class names in torchvision, so they are 'class 0' to 'class {num_classes - 1}'"
    return [f"class {label}" for label in range(num_classes)], (note,)


TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
TRAIN_VAL = {"train": {"split": "train"}, "test": {"split": "val"}}
TRAIN_VAL_TEST = {"train": {"split": "train"}, "validation": {"split": "val"}, "test": {"split": "test"}}
FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
UNSPLIT: dict[str, dict[str, Any]] = {"train": {}}

# class in torchvision.datasets -> our split -> its arguments
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": FLAG,
    "CIFAR100": FLAG,
    "Caltech101": UNSPLIT,
    "Caltech256": UNSPLIT,
    "Country211": {"train": {"split": "train"}, "validation": {"split": "valid"}, "test": {"split": "test"}},
    "DTD": TRAIN_VAL_TEST,
    "EMNIST": {"train": {"split": "byclass", "train": True}, "test": {"split": "byclass", "train": False}},
    "EuroSAT": UNSPLIT,
    "FER2013": TRAIN_TEST,
    "FGVCAircraft": TRAIN_VAL_TEST,
    "FashionMNIST": FLAG,
    "Flowers102": TRAIN_VAL_TEST,
    "Food101": TRAIN_TEST,
    "GTSRB": TRAIN_TEST,
    "ImageNet": TRAIN_VAL,
    "Imagenette": TRAIN_VAL,
    "KMNIST": FLAG,
    "MNIST": FLAG,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "PCAM": TRAIN_VAL_TEST,
    "Places365": {"train": {"split": "train-standard"}, "test": {"split": "val"}},
    "RenderedSST2": TRAIN_VAL_TEST,
    "SEMEION": UNSPLIT,
    "STL10": TRAIN_TEST,
    "SUN397": UNSPLIT,
    "SVHN": TRAIN_TEST,
    "StanfordCars": TRAIN_TEST,
    "USPS": FLAG,
}
NO_DOWNLOAD = frozenset({"FER2013", "ImageNet", "StanfordCars"})
