"""Hugging Face sets as they are: names of files, folders and columns; and files that are not what others say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import jpegs

from lift_ray.data.layout import SPLITS, shard_names
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, image: str = "image", labels: tuple[str, ...] = ("label",), features: Any = None) -> None:
    """6 images of cats and dogs, and a column that is neither."""
    kinds = {image: {"_type": "Image"}, **{name: {"names": ["cat", "dog"], "_type": "ClassLabel"} for name in labels}}
    about = {b"huggingface": json.dumps({"info": {"features": kinds if features is None else features}}).encode()}
    types = [("id", pa.string()), (image, IMAGE), *[(name, pa.int64()) for name in labels]]
    columns = {
        "id": list("abcdef"),
        image: [{"bytes": data, "path": None} for data in jpegs()[:6]],
        **{name: [0, 1] * 3 for name in labels},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(columns, schema=pa.schema(types, metadata=about)), path, row_group_size=4, write_statistics=False
    )


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "val-00000-of-00001.parquet"],
        ["train/0000.parquet", "train/0001.parquet", "valid/0000.parquet"],
        ["data/train/0000.parquet", "data/train/0001.parquet", "data/dev/0000.parquet"],
        [
            "data/train-00000-of-00002-0123abcd.parquet",
            "data/train-00001-of-00002-0123abcd.parquet",
            "data/dev.parquet",
        ],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation.parquet", "notes/0000.parquet"],
    ],
)
def test_names_of_hugging_face_are_understood(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name)
    dataset = open_dataset(str(tmp_path))
    assert list(dataset.splits) == ["train", "validation"]
    assert [shard.url for shard in dataset.split("train").shards] == [f"{tmp_path}/{name}" for name in names[:2]]
    assert RowReader(dataset.split("validation")).read(np.arange(6)) == jpegs()[:6]


def test_more_than_ten_numbered_files_keep_their_order(tmp_path: Path) -> None:
    for number in (*range(9, 12), *range(9)):
        write(tmp_path / "train" / f"{number:04d}.parquet")
    names = [Path(shard.url).name for shard in open_dataset(str(tmp_path)).split("train").shards]
    assert names == [f"{number:04d}.parquet" for number in range(12)]


def test_folders_of_splits_are_read_from_any_store(tmp_path: Path) -> None:
    write(tmp_path / "train" / "0000.parquet")
    fsspec.filesystem("memory").put(str(tmp_path) + "/", "/layout-any/", recursive=True)
    for uri in ("memory://layout-any", f"file://{tmp_path}"):
        assert RowReader(open_dataset(uri).split("train")).read(np.arange(6)) == jpegs()[:6]


def test_an_unlabelled_pool_is_a_split(tmp_path: Path) -> None:
    for split in SPLITS:
        write(tmp_path / f"{split}-00000-of-00001.parquet")
    dataset = open_dataset(str(tmp_path))
    assert list(dataset.splits) == ["train", "validation", "test", "unlabelled"]
    assert dataset.split("unlabelled").labels.tolist() == [0, 1] * 3


def test_the_names_of_shards_are_sorted_by_split() -> None:
    names = ["val-00000-of-00001.parquet", "train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "a.parquet"]
    assert shard_names(names) == {
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        "validation": ["val-00000-of-00001.parquet"],
    }


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("img", ("label",)),
        ("image", ("fine_label",)),
        ("photo", ("species",)),
        ("image", ("label", "superclass")),
    ],
)
def test_the_columns_are_found_by_their_kind(tmp_path: Path, image: str, labels: tuple[str, ...]) -> None:
    write(tmp_path / "train-00000-of-00001.parquet", image, labels)
    train = open_dataset(str(tmp_path)).split("train")
    assert (train.image_column, train.labels.tolist()) == (image, [0, 1] * 3)
    assert RowReader(train).read(np.array([5, 0])) == [jpegs()[5], jpegs()[0]]


def test_what_datasets_itself_writes_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    columns = {
        "img": [{"bytes": data, "path": None} for data in jpegs()],
        "fine_label": [2, 1, 0] * 4,
        "id": list(range(12)),
    }
    here = datasets.Dataset.from_dict(columns).cast_column("img", datasets.Image())
    here = here.cast_column("fine_label", datasets.ClassLabel(names=["ape", "bee", "cow"]))
    (tmp_path / "set" / "train").mkdir(parents=True)
    here.to_parquet(str(tmp_path / "set" / "train" / "0000.parquet"), batch_size=5)
    dataset = open_dataset(str(tmp_path / "set"))
    assert dataset.class_names == ("ape", "bee", "cow")
    assert dataset.split("train").labels.tolist() == [2, 1, 0] * 4
    assert RowReader(dataset.split("train")).read(np.arange(12)) == jpegs()


def two_validation_folders(folder: Path) -> None:
    write(folder / "train" / "0000.parquet")
    write(folder / "val" / "0000.parquet")
    write(folder / "dev" / "0000.parquet")


def gap(folder: Path) -> None:
    write(folder / "train" / "0000.parquet")
    write(folder / "train" / "0002.parquet")


SHARD = "train-00000-of-00001.parquet"
BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (two_validation_folders, "{0}: must have one folder for validation, but got val and dev; move one elsewhere"),
    (
        gap,
        "{0}/train: the shards must be numbered from 0000 without gaps, but got 2 shards (0000.parquet to 0002.parquet); "
        "copy the missing ones",
    ),
    (
        lambda folder: write(folder / SHARD, "img", ("fine_label", "coarse_label")),
        f"{{0}}/{SHARD}: must have one label column, but got fine_label, coarse_label; "
        "choose with python -m lift_ray.convert parquet ... --label-column fine_label",
    ),
    (
        lambda folder: write(folder / SHARD, "img", features={name: {"_type": "Image"} for name in ("id", "img")}),
        f"{{0}}/{SHARD}: must have one image column, but got id, img; "
        "choose with python -m lift_ray.convert parquet ... --image-column id",
    ),
    (
        lambda folder: write(folder / SHARD, "img", ("species",), features={"img": {"_type": "Image"}}),
        f"{{0}}/{SHARD}: must have the columns image and label, but got id, img, species; rename them, or run convert again",
    ),
    (
        lambda folder: write(folder / SHARD, features={"label": {"names": {"0": "cat"}, "_type": "ClassLabel"}}),
        f"{{0}}/{SHARD}: must name its classes in the schema metadata, like Hugging Face ClassLabel, "
        "but got \"{{'0': 'cat'}}\"; make it with python -m lift_ray.convert",
    ),
]


@pytest.mark.parametrize(("make", "message"), BROKEN)
def test_an_ambiguous_layout_is_bad_input(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path)
    with pytest.raises(BadInput) as caught:
        open_dataset(str(tmp_path))
    assert str(caught.value) == message.format(tmp_path)


def manifest(folder: Path, **of_shard: int | str) -> None:
    """One shard, and a manifest that tells the truth of it but for some entries."""
    write(folder / SHARD)
    shard = {"name": SHARD, "rows": 6, "bytes": (folder / SHARD).stat().st_size, "sha256": "0" * 64, **of_shard}
    splits = {"train": {"rows": 6, "shards": [shard]}}
    text = json.dumps({"format_version": 1, "class_names": ["cat", "dog"], "splits": splits})
    (folder / "manifest.json").write_text(text)


def test_the_manifest_gives_the_shards_their_checksums(tmp_path: Path) -> None:
    manifest(tmp_path)
    [shard] = open_dataset(str(tmp_path)).split("train").shards
    assert (shard.sha256, shard.num_bytes, shard.identity) == ("0" * 64, (tmp_path / SHARD).stat().st_size, "")
    sizes = [sum(map(len, jpegs()[:4])), sum(map(len, jpegs()[4:6]))]
    assert [0 < told - size < 300 for told, size in zip(shard.row_group_bytes, sizes, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("of_shard", "message"),
    [
        ({"rows": 7}, "the manifest says 7 rows, but got 6; run convert again"),
        ({"bytes": 7}, "the manifest says 7 bytes, but got {num_bytes}; copy it again, or run convert again"),
        (
            {"name": "train-00001-of-00001.parquet"},
            "must be in the manifest, but is not; remove one of the two, or run convert again",
        ),
    ],
)
def test_a_shard_that_is_not_what_the_manifest_says_is_bad_input(
    tmp_path: Path, of_shard: dict[str, int | str], message: str
) -> None:
    manifest(tmp_path, **of_shard)
    with pytest.raises(BadInput) as caught:
        open_dataset(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}/{SHARD}: " + message.format(num_bytes=(tmp_path / SHARD).stat().st_size)


def test_a_shard_that_lost_bytes_before_its_footer_is_bad_input(tmp_path: Path) -> None:
    write(tmp_path / SHARD)
    whole = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(whole[:100] + whole[130:])
    with pytest.raises(BadInput) as caught:
        open_dataset(str(tmp_path))
    got = f"must be {len(whole)} bytes long according to its footer, but got {len(whole) - 30}"
    assert str(caught.value) == f"{tmp_path}/{SHARD}: {got}; copy it again, or run convert again"
