"""CIFAR as published: its checksums are compared before anything is unpickled, and other pickles never run."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from struct import pack
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from embedded import OnePixel, jpegs
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from lift_ray import convert as verb
from lift_ray.data.convert import cifar
from lift_ray.data.convert.cifar import longtailed_rows, scan_cifar
from lift_ray.data.convert.index import ImageIndex
from lift_ray.data.longtail import summary
from lift_ray.data.open import open_dataset
from lift_ray.epoch_metrics import GROUPS
from lift_ray.errors import BadInput
from lift_ray.evaluation.metrics import ClassGroups

PER_BATCH = 20
TEN = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
HUNDRED = [b"aquarium_fish" if number == 1 else b"fine %d" % number for number in range(100)]
Files = dict[str, dict[bytes, Any]]


@cache
def images() -> np.ndarray:
    """Return 12 images of 32 px, uint8, (12, 32, 32, 3)."""
    return np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((32, 32))) for jpeg in jpegs()])


class Python2(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes bytes as Python 2 wrote its strings, so that what comes out is what was published."""

    def save_string(self, value: bytes) -> None:
        short = len(value) < 256
        self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) if short else pickle.BINSTRING + pack("<i", len(value)))
        self.write(value)
        self.memoize(value)

    def save_text(self, value: str) -> None:
        self.save_string(value.encode())

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string, str: save_text}  # type: ignore[attr-defined]  # noqa: RUF012


def published(content: Any) -> bytes:
    file = io.BytesIO()
    Python2(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def rewritten(content: Any) -> bytes:
    """As a script of today would write it again."""
    return pickle.dumps(content, protocol=2)


def batch(first: int, count: int) -> dict[bytes, Any]:
    chosen = images()[np.arange(first, first + count) % 12]
    return {
        b"batch_label": b"training batch",
        b"data": np.ascontiguousarray(chosen.transpose(0, 3, 1, 2)).reshape(count, 3072),
        b"filenames": [b"image_%d.png" % (first + number) for number in range(count)],
    }


def ten() -> Files:
    labels = {b"labels": [number % 10 for number in range(PER_BATCH)]}
    files = {f"data_batch_{n}": {**batch(n, PER_BATCH), **labels} for n in range(1, 6)}
    return {
        **files,
        "test_batch": {**batch(7, PER_BATCH), **labels},
        "batches.meta": {b"num_cases_per_batch": PER_BATCH, b"label_names": TEN, b"num_vis": 3072},
    }


def hundred() -> Files:
    def labelled(first: int, count: int) -> dict[bytes, Any]:
        fine = [number % 100 for number in range(count)]
        return {**batch(first, count), b"fine_labels": fine, b"coarse_labels": [label // 5 for label in fine]}

    names = {b"fine_label_names": HUNDRED, b"coarse_label_names": [b"group_%d" % number for number in range(20)]}
    test = labelled(3, 100)
    return {"train": labelled(0, 1000), "test": {**test, b"data": np.asfortranarray(test[b"data"])}, "meta": names}


def archive(path: Path, files: dict[str, bytes], folder: str = "cifar-python") -> str:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def pixels(index: ImageIndex, split: str) -> np.ndarray[Any, Any]:
    """The images of a split, read as another process would."""
    reader = pickle.loads(pickle.dumps(index.read))
    read = [Image.open(io.BytesIO(reader(reference))) for reference, _ in index.splits[split]]
    assert {image.format for image in read} == {"PNG"}
    return np.stack([np.asarray(image) for image in read])


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> None:
    cifar._loaded.cache_clear()


@pytest.fixture
def ours_are_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the checksums of torchvision be those of the files made here, because the published archives are not at hand."""
    for kind, files in ((CIFAR10, ten()), (CIFAR100, hundred())):
        for split in ("train_list", "test_list"):
            listed = [[name, md5(published(files[name]))] for name, _ in getattr(kind, split)]
            monkeypatch.setattr(kind, split, listed)
        monkeypatch.setitem(kind.meta, "md5", md5(published(files[kind.meta["filename"]])))


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def as_published(files: Files) -> dict[str, bytes]:
    return {name: published(content) for name, content in files.items()}


@pytest.mark.usefixtures("ours_are_published")
def test_cifar10_is_read_from_the_published_archive(tmp_path: Path) -> None:
    index = scan_cifar(archive(tmp_path / "cifar-10-python.tar.gz", as_published(ten())))
    assert index.class_names == tuple(name.decode() for name in TEN)
    assert [label for _, label in index.splits["train"]] == list(range(10)) * 10
    expected = [(n + row) % 12 for n in range(1, 6) for row in range(PER_BATCH)]
    assert np.array_equal(pixels(index, "train"), images()[expected])
    assert np.array_equal(pixels(index, "test"), images()[[(7 + row) % 12 for row in range(PER_BATCH)]])
    assert index.splits["test"][3] == ("test_batch/3", 3)


@pytest.mark.usefixtures("ours_are_published")
def test_cifar100_has_fine_and_coarse_labels_in_a_folder_in_any_store(tmp_path: Path) -> None:
    for name, content in as_published(hundred()).items():
        fsspec.filesystem("memory").pipe_file(f"/cifar-100/{name}", content)
    fsspec.filesystem("memory").pipe_file("/cifar-100/file.txt~", b"not one of its files")
    index = scan_cifar("memory://cifar-100")
    assert index.class_names[:3] == ("fine 0", "aquarium fish", "fine 2")
    assert [label for _, label in index.splits["test"]] == list(range(100))
    assert np.array_equal(pixels(index, "test")[:9], images()[3:12])
    coarse = scan_cifar("memory://cifar-100", coarse=True)
    assert coarse.class_names[19] == "group 19"
    assert [label for _, label in coarse.splits["test"]] == [number // 5 for number in range(100)]
    cut = scan_cifar("memory://cifar-100", imbalance=10)
    assert np.bincount([label for _, label in cut.splits["train"]])[[0, 50, 99]].tolist() == [10, 3, 1]
    assert cut.discarded is not None
    assert sorted([*cut.discarded, *cut.splits["train"]]) == sorted(index.splits["train"])
    assert index.discarded is None
    assert cut.splits["test"] == index.splits["test"]


@pytest.mark.parametrize(
    ("num_classes", "imbalance", "total", "groups"),
    [
        (100, 10, 19573, (69, 31, 0)),
        (100, 50, 12608, (41, 41, 18)),
        (100, 100, 10847, (35, 35, 30)),
        (10, 100, 12406, (8, 2, 0)),
    ],
)
def test_the_long_tail_is_the_one_of_the_literature(
    num_classes: int, imbalance: float, total: int, groups: tuple[int, int, int]
) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(50000) % num_classes)
    rows = longtailed_rows(labels, num_classes, imbalance)
    assert len(set(rows.tolist())) == len(rows) == total
    names = ClassGroups.of(np.bincount(labels[rows]), (20, 100)).names
    assert tuple((names == group).sum() for group in GROUPS) == groups
    np.random.seed(0)  # the published code, which goes through the classes with NumPy's global generator
    expected = []
    for label in range(num_classes):
        found = np.where(labels == label)[0]
        np.random.shuffle(found)
        count = int(50000 / num_classes * ((1 / imbalance) ** (label / (num_classes - 1.0))))
        expected.append(found[:count])
    assert np.array_equal(rows, np.concatenate(expected))


def test_cifar_100_lt_has_the_published_training_images_and_validation_from_those_that_the_cut_discards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(50000) % 100)
    content: dict[str, dict[str, Any]] = {
        "meta": {"fine_label_names": [f"class_{label}" for label in range(100)]},
        "train": {"fine_labels": labels.tolist()},
        "test": {"fine_labels": (np.arange(10000) % 100).tolist()},
    }
    monkeypatch.setattr(cifar, "_loaded", lambda source, md5s: content)
    monkeypatch.setattr(cifar, "scan_cifar", lambda *a, **k: replace(scan_cifar(*a, **k), read=OnePixel()))
    out = f"{tmp_path}/out"
    verb.main(["cifar", f"{tmp_path}/cifar", out, "--imbalance", "100", "--at-once", "1", "--rows-per-shard", "50000"])
    dataset = open_dataset(out)
    assert {name: split.num_samples for name, split in dataset.splits.items()} == {
        "train": 10847,
        "validation": 4918,
        "test": 10000,
    }
    train, held = (listed(f"{out}/{name}-00000-of-00001.parquet") for name in ("train", "validation"))
    assert train == {f"train/{row}" for row in longtailed_rows(labels, 100, 100)}
    assert not train & held
    assert dataset.validation == "separate"
    assert dataset.split("validation").class_counts(100).tolist() == [0, 23, 45] + 97 * [50]
    assert dataset.labelled_counts is not None
    assert dataset.labelled_counts.tolist() == dataset.split("train").class_counts(100).tolist()
    found = summary(dataset.labelled_counts)
    assert (found.largest, found.smallest) == (500, 5)
    assert (
        str(ClassGroups.of(dataset.labelled_counts)) == "35 many (over 100), 35 medium (20 to 100), 30 few (under 20)"
    )
    assert "1 of 100 classes has no validation image: the search does not see 'class 0'\n" in capsys.readouterr().out


def listed(file: str) -> set[str]:
    """The images of a shard, by name."""
    return {cell["path"] for cell in pq.read_table(file, columns=["image"]).column("image").to_pylist()}


class Evil:
    """Runs a command when it is unpickled without care."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.usefixtures("ours_are_published")
@pytest.mark.parametrize("place", ["batches.meta", "data_batch_3"])
def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path: Path, place: str) -> None:
    touched = tmp_path / "touched"
    attacks = (
        (os.system, f"touch {touched}"),
        (eval, f"open({str(touched)!r}, 'w')"),
        (getattr, np.ndarray, "tofile"),
        (np.load, "x"),
        (np.ndarray, (2, 2)),
    )
    for call, *arguments in attacks:
        files = as_published(ten())
        files[place] = pickle.dumps({b"data": Evil(call, *arguments)}, protocol=2)
        with pytest.raises(BadInput) as caught:
            scan_cifar(archive(tmp_path / "x.tar.gz", files))
        assert str(caught.value) == refused(f"{tmp_path}/x.tar.gz/{place}", files[place], ten()[place])
    assert not touched.exists()
    pickle.loads(pickle.dumps(Evil(*attacks[0])))
    assert touched.exists()  # so the attack was a real one


def refused(place: str, given: bytes, expected: Any) -> str:
    return (
        f"{place}: must be as published, with the MD5 {md5(published(expected))}, but got {md5(given)}; "
        "download the python version again"
    )


@pytest.mark.usefixtures("ours_are_published")
@pytest.mark.parametrize("in_archive", [True, False])
@pytest.mark.parametrize("name", [*ten(), *hundred()])
def test_no_file_with_another_checksum_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, in_archive: bool
) -> None:
    content = (ten() if name in ten() else hundred())[name]
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("was unpickled"))
    good = published(content)
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for bad in (flipped, good[:-1], b"", good + b"\0", rewritten(content), published([1])):
        source = str(tmp_path / "x")
        if in_archive:
            archive(tmp_path / "x", {name: bad})
        else:
            (tmp_path / "x").mkdir(exist_ok=True)
            (tmp_path / "x" / name).write_bytes(bad)
        with pytest.raises(BadInput) as caught:
            scan_cifar(source)
        assert str(caught.value) == refused(f"{source}/{name}", bad, content)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),  # pragma: allowlist secret
        ("data_batch_1", "c99cafc152244af753f735de768cd75f"),  # pragma: allowlist secret
        ("test_batch", "40351d587109b95175f43aff81a1287e"),  # pragma: allowlist secret
        ("meta", "7973b15100ade9c7d40fb424638fde48"),  # pragma: allowlist secret
        ("train", "16019d7e3df5f24257cddd939b257f8d"),  # pragma: allowlist secret
        ("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),  # pragma: allowlist secret
    ],
)
def test_the_checksums_are_the_published_ones(tmp_path: Path, name: str, expected: str) -> None:
    source = archive(tmp_path / "x.tar.gz", {name: published({})})
    with pytest.raises(BadInput, match=f"^.*/{name}: must be as published, with the MD5 {expected}, but got "):
        scan_cifar(source)


def only(*names: str) -> dict[str, bytes]:
    return {name: published(content) for name, content in {**ten(), **hundred()}.items() if name in names}


IMBALANCE = "imbalance: must be between 1 and 10, the number of images per class, but got "
FAULTS: list[tuple[Callable[[], dict[str, bytes]], dict[str, Any], str]] = [
    (
        lambda: {"readme": b""},
        {},
        "x.tar.gz: must contain batches.meta (CIFAR-10) or meta (CIFAR-100), but got neither; give cifar-10-",
    ),
    (
        lambda: only("batches.meta"),
        {},
        "x.tar.gz: must contain all CIFAR files, but got no data_batch_1; ",
    ),
    (
        lambda: only("meta", "train"),
        {},
        "x.tar.gz: must contain all CIFAR files, but got no test; ",
    ),
    (
        lambda: as_published(ten()),
        {"coarse": True},
        "coarse: requires CIFAR-100, but got CIFAR-10, which has no superclasses; ",
    ),
    (lambda: as_published(ten()), {"imbalance": 0.5}, f"{IMBALANCE}0.5; "),
    (lambda: as_published(ten()), {"imbalance": float("nan")}, f"{IMBALANCE}nan; "),
    (lambda: as_published(ten()), {"imbalance": 11}, f"{IMBALANCE}11; "),
]


@pytest.mark.usefixtures("ours_are_published")
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_in_an_archive_gives_a_one_line_error(tmp_path: Path, number: int) -> None:
    files, options, message = FAULTS[number]
    source = archive(tmp_path / "x.tar.gz", files())
    with pytest.raises(BadInput, match=re.escape(message) + ".*$"):
        scan_cifar(source, **options)


@pytest.mark.usefixtures("ours_are_published")
def test_a_file_that_is_no_archive_or_too_large_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"no archive")
    with pytest.raises(BadInput, match=r"^.*/x: must be CIFAR as published, but got .*; download the python"):
        scan_cifar(str(tmp_path / "x"))
    with pytest.raises(BadInput, match=r"^.*/none: must be CIFAR as published, but nothing is there; check the path$"):
        scan_cifar(str(tmp_path / "none"))
    monkeypatch.setattr(cifar, "MOST_BYTES", 30_000)
    with pytest.raises(BadInput, match=r"x/data_batch_1: must have at most 30000 bytes, but got 6\d{4}; download"):
        scan_cifar(archive(tmp_path / "y.tar.gz", as_published(ten()), folder="x"))
    (tmp_path / "folder").mkdir()
    for name, content in as_published(ten()).items():
        (tmp_path / "folder" / name).write_bytes(content)
    with pytest.raises(BadInput, match=r"folder/\w+: must have at most 30000 bytes, but got 6\d{4}; download"):
        scan_cifar(str(tmp_path / "folder"))


@pytest.mark.usefixtures("ours_are_published")
def test_an_imbalance_of_one_keeps_every_image(tmp_path: Path) -> None:
    source = archive(tmp_path / "x.tar.gz", as_published(ten()))
    assert sorted(scan_cifar(source, imbalance=1).splits["train"]) == sorted(scan_cifar(source).splits["train"])
