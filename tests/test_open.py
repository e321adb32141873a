"""Opening data sets: the embedded one, folders, memory://, and every broken one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lift_ray.data.longtail import longtail_counts
from lift_ray.data.open import open_dataset, schema_metadata
from lift_ray.errors import BadInput

EMBEDDED = Path(str(files("lift_ray"))) / "assets" / "caltech101"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_shard(
    path: Path, labels: list[int | None], class_names: list[str] | None = None, label_type: pa.DataType | None = None
) -> None:
    """A shard whose images are one byte each: opening reads labels only."""
    images = [{"bytes": b"x", "path": f"{row}.jpg"} for row in range(len(labels))]
    names = ["cat", "dog"] if class_names is None else class_names
    schema = pa.schema([("image", IMAGE), ("label", label_type or pa.int64())], metadata=schema_metadata(names))
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}, schema=schema), path, row_group_size=2)


def small(folder: Path) -> Path:
    write_shard(folder / "train-00000-of-00002.parquet", [0, 1, 0])
    write_shard(folder / "train-00001-of-00002.parquet", [1, 1])
    write_shard(folder / "test-00000-of-00001.parquet", [1])
    return folder


def test_the_embedded_data_is_a_long_tail_of_caltech101() -> None:
    dataset = open_dataset("embedded:caltech101-lt")
    counts = dataset.split("train").class_counts(dataset.num_classes)
    assert dataset.num_classes == 100
    assert [dataset.split(name).num_samples for name in ("train", "validation", "test")] == [4267, 500, 1000]
    assert [(counts > 100).sum(), ((counts >= 20) & (counts <= 100)).sum(), (counts < 20).sum()] == [7, 52, 41]
    profile = np.round(200 * 50.0 ** -(np.arange(100) / 99))
    assert (np.sort(counts)[::-1] <= profile).all()
    assert (counts.max(), counts.min()) == (200, 4)
    assert longtail_counts(counts, 200, 50.0).tolist() == counts.tolist()
    assert set(dataset.split("validation").class_counts(100)) == {5}
    assert set(dataset.split("test").class_counts(100)) == {10}
    assert len(dataset.split("train").shards) == 4


def test_the_embedded_data_fits_the_package_and_says_where_it_is_from() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 22_000_000
    readme = (EMBEDDED / "README.md").read_text()
    assert "CC BY 4.0" in readme
    assert "10.22002/D1.20086" in readme


def test_row_groups_and_rows_are_counted_through_the_shards(tmp_path: Path) -> None:
    train = open_dataset(str(small(tmp_path))).split("train")
    assert [shard.row_groups for shard in train.shards] == [(2, 1), (2,)]
    assert [shard.num_rows for shard in train.shards] == [3, 2]
    assert train.labels.tolist() == [0, 1, 0, 1, 1]
    assert train.rows.tolist() == [0, 1, 2, 3, 4]
    assert train.labels.dtype == train.rows.dtype == np.int64


def test_a_data_subfolder_and_hashes_in_names_work_as_in_hugging_face_repositories(tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet", [0, 1])
    assert open_dataset(str(tmp_path)).split("train").num_samples == 2


def test_a_relative_path_starts_at_the_base(tmp_path: Path) -> None:
    small(tmp_path / "pets")
    assert open_dataset("pets", base=tmp_path).uri == str(tmp_path / "pets")
    assert open_dataset("../pets", base=tmp_path / "spaces").num_classes == 2


def test_any_fsspec_url_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(small(tmp_path / "m")) + "/", "/catalog-any/", recursive=True)
    for uri in ("memory://catalog-any", f"file://{tmp_path}/m", f"simplecache::file://{tmp_path}/m"):
        dataset = open_dataset(uri)
        assert dataset.split("train").num_samples == 5
        assert dataset.split("train").shards[0].url == f"{uri}/train-00000-of-00002.parquet"


def test_a_set_without_a_training_split_opens_for_evaluation(tmp_path: Path) -> None:
    write_shard(tmp_path / "test-00000-of-00001.parquet", [1, 1])
    dataset = open_dataset(str(tmp_path))
    assert dataset.split("test").num_samples == 2
    with pytest.raises(BadInput) as caught:
        dataset.split("train")
    assert (
        str(caught.value)
        == f"{tmp_path}: must have a train split, but got only test; convert again with training images"
    )
    assert dataset.labelled_counts is None


@pytest.mark.parametrize(
    ("split", "remedy"),
    [
        ("test", "convert again with --test-frac 0.2, or set test: none"),
        ("validation", "convert again with --validation-frac 0.1"),
        ("unlabelled", "convert again with --labelled, --unlabelled and --gamma-l"),
    ],
)
def test_the_message_about_a_missing_split_says_what_makes_it(tmp_path: Path, split: str, remedy: str) -> None:
    write_shard(tmp_path / "train-00000-of-00001.parquet", [0, 1])
    with pytest.raises(BadInput) as caught:
        open_dataset(str(tmp_path)).split(split)
    assert str(caught.value) == f"{tmp_path}: must have a {split} split, but got only train; {remedy}"


def manifest(folder: Path, **changes: object) -> None:
    record = {"format_version": 1, "class_names": ["cat", "dog"], "splits": {"train": {"rows": 5}, "test": {"rows": 1}}}
    (folder / "manifest.json").write_text(json.dumps({**record, **changes}))


def test_a_manifest_that_agrees_is_accepted(tmp_path: Path) -> None:
    manifest(small(tmp_path))
    assert open_dataset(str(tmp_path)).split("train").num_samples == 5


def test_what_the_manifest_says_of_validation_and_of_labelled_images_is_kept(tmp_path: Path) -> None:
    manifest(small(tmp_path), validation="drawn", labelled_counts=[4, 7])
    dataset = open_dataset(str(tmp_path))
    assert (dataset.validation, dataset.labelled_counts.tolist()) == ("drawn", [4, 7])  # type: ignore[union-attr]


@pytest.mark.parametrize("has_manifest", [False, True])
def test_without_it_validation_is_separate_and_the_training_images_are_counted(
    tmp_path: Path, has_manifest: bool
) -> None:
    small(tmp_path)
    if has_manifest:
        manifest(tmp_path)
    dataset = open_dataset(str(tmp_path))
    assert (dataset.validation, dataset.labelled_counts.tolist()) == ("separate", [2, 3])  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "total"), [("caltech101-lt", 4267), ("caltech101-half", 497)])
def test_embedded_validation_is_separate_and_the_training_images_are_counted(name: str, total: int) -> None:
    dataset = open_dataset(f"embedded:{name}")
    assert dataset.validation == "separate"
    assert dataset.labelled_counts is not None
    assert dataset.labelled_counts.tolist() == dataset.split("train").class_counts(dataset.num_classes).tolist()
    assert dataset.labelled_counts.sum() == total


def with_groups(folder: Path, groups: list[int | None]) -> None:
    """Give the first training shard a column `group`."""
    path = small(folder) / "train-00000-of-00002.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("group", pa.array(groups, pa.int64())), path)
    for name in ("train-00001-of-00002.parquet", "test-00000-of-00001.parquet"):
        table = pq.read_table(folder / name)
        groups = list(range(100, 100 + len(table)))
        pq.write_table(table.append_column("group", pa.array(groups, pa.int64())), folder / name)


def test_groups_are_read_if_the_manifest_says_so_and_ignored_in_the_data_of_others(tmp_path: Path) -> None:
    with_groups(tmp_path, [7, 8, 7])
    assert open_dataset(str(tmp_path)).split("train").groups is None
    manifest(tmp_path, groups=True)
    dataset = open_dataset(str(tmp_path))
    assert {name: split.groups.tolist() for name, split in dataset.splits.items()} == {  # type: ignore[union-attr]
        "train": [7, 8, 7, 100, 101],
        "test": [100],
    }
    assert dataset.split("train").take(np.array([1, 3])).groups.tolist() == [8, 100]  # type: ignore[union-attr]


def test_groups_that_are_promised_and_missing_are_bad_input(tmp_path: Path) -> None:
    manifest(small(tmp_path), groups=True)
    message = r"\.parquet: must have the int64 column group, as the manifest says, but has none; run convert again$"
    with pytest.raises(BadInput, match=message):
        open_dataset(str(tmp_path))
    with_groups(tmp_path, [7, None, 7])
    message = r"train-00000-of-00002\.parquet: every row must have a group, but got 1 without one; run convert again$"
    with pytest.raises(BadInput, match=message):
        open_dataset(str(tmp_path))


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def other_files(folder: Path) -> None:
    empty(folder)
    (folder / "cat.jpg").write_bytes(b"x")


def lose_a_shard(folder: Path) -> None:
    (folder / "train-00000-of-00002.parquet").unlink()


def truncate(folder: Path) -> None:
    path = folder / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def no_label_column(folder: Path) -> None:
    pq.write_table(pa.table({"image": ["x"], "y": [1]}), folder / "train-00001-of-00002.parquet")


def text_labels(folder: Path) -> None:
    write_shard(folder / "train-00001-of-00002.parquet", ["0"], label_type=pa.string())  # type: ignore[list-item]


def paths_for_images(folder: Path) -> None:
    schema = pa.schema([("image", pa.string()), ("label", pa.int64())], metadata=schema_metadata(["cat", "dog"]))
    pq.write_table(pa.table({"image": ["a.jpg"], "label": [1]}, schema=schema), folder / "train-00001-of-00002.parquet")


def no_class_names(folder: Path) -> None:
    path = folder / "train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def empty_shards(folder: Path) -> None:
    for number in range(2):
        write_shard(folder / f"train-0000{number}-of-00002.parquet", [])


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (remove, "{0}: must be a folder of Parquet shards, but nothing is there; check the path"),
    (
        empty,
        "{0}: must contain shards named train-00000-of-00001.parquet, but got an empty folder; "
        "make it with python -m lift_ray.convert",
    ),
    (
        other_files,
        "{0}: must contain shards named train-00000-of-00001.parquet, but got 1 other names (cat.jpg); "
        "make it with python -m lift_ray.convert",
    ),
    (
        lose_a_shard,
        "{0}/train: the names say 2 shards, but got 1 shard (train-00001-of-00002.parquet); "
        "copy the missing ones, or run convert again",
    ),
    (
        truncate,
        "{0}/train-00001-of-00002.parquet: must be readable Parquet, but got 'Parquet magic bytes not found in footer. "
        "Either the file is corrupted or this is not a parquet file'; copy it again, or run convert again",
    ),
    (
        no_label_column,
        "{0}/train-00001-of-00002.parquet: must have the columns image and label, but got image, y; "
        "rename them, or run convert again",
    ),
    (
        text_labels,
        "{0}/train-00001-of-00002.parquet: the label column must be int64, but got string; run convert again",
    ),
    (
        paths_for_images,
        "{0}/train-00001-of-00002.parquet: the image column must be struct<bytes: binary, path: string>, "
        "but got string; run convert again",
    ),
    (
        no_class_names,
        "{0}/train-00001-of-00002.parquet: must name its classes in the schema metadata, like Hugging Face ClassLabel, "
        "but got none; make it with python -m lift_ray.convert",
    ),
    (
        lambda folder: write_shard(folder / "train-00001-of-00002.parquet", [1, 0, 2]),
        "{0}/train-00001-of-00002.parquet: labels must be 0 to 1 (2 class names), but got 2 in row 2; "
        "fix the label or the class names",
    ),
    (
        lambda folder: write_shard(folder / "train-00001-of-00002.parquet", [1, None]),
        "{0}/train-00001-of-00002.parquet: every row must have a label, but got 1 without one; run convert again",
    ),
    (
        lambda folder: write_shard(folder / "train-00001-of-00002.parquet", [1], ["cat", "cow"]),
        "{0}/train-00001-of-00002.parquet: every shard must have the same class names, but got others than in "
        "{0}/train-00000-of-00002.parquet; run convert again",
    ),
    (
        lambda folder: write_shard(folder / "train-00001-of-00002.parquet", [1], label_type=pa.int32()),
        "{0}/train-00001-of-00002.parquet: every shard must have the same columns, but got others than in "
        "{0}/train-00000-of-00002.parquet; run convert again",
    ),
    (
        lambda folder: write_shard(folder / "train-00000-of-00002.parquet", [1], ["cat", "cat"]),
        "{0}/train-00000-of-00002.parquet: class names must be unique, but got 'cat' twice; rename one",
    ),
    (
        empty_shards,
        "{0}/train: must contain images, but got 0 rows; run convert again",
    ),
    (
        lambda folder: write_shard(folder / "train-00000-of-00002.parquet", [1, 1, 1]),
        "{0}/train: every class must have an image, but 1 of 2 has none ('cat'); "
        "add images or remove these class names",
    ),
    (
        lambda folder: manifest(folder, splits={"train": {"rows": 7}, "test": {"rows": 1}}),
        "{0}/train: the manifest says 7 rows, but the shards contain 5; run convert again",
    ),
    (
        lambda folder: manifest(folder, splits={"train": {"rows": 5}, "validation": {"rows": 3}, "test": {"rows": 1}}),
        "{0}/validation: the manifest says 3 rows, but the shards contain 0; run convert again",
    ),
    (
        lambda folder: manifest(folder, labelled_counts=[3, 1, 1]),
        "{0}: the manifest must count the labeled images of 2 classes, but got 3; run convert again",
    ),
    (
        lambda folder: manifest(folder, class_names=["dog", "cat"]),
        "{0}: the manifest and the shards must name the same classes, but got 2 and 2 that differ; run convert again",
    ),
    (
        lambda folder: manifest(folder, format_version=2),
        "{0}/manifest.json: must be a manifest of format 1, but got format 2; use the lift_ray that wrote it",
    ),
    (
        lambda folder: (folder / "manifest.json").write_text("{"),
        "{0}/manifest.json: must be a manifest of format 1, but got 'Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)'; run convert again",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_broken_dataset_gives_a_one_line_error(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = small(tmp_path / "pets")
    damage(folder)
    with pytest.raises(BadInput) as caught:
        open_dataset(str(folder))
    assert str(caught.value) == message.format(folder)


def test_at_most_three_classes_without_images_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-00000-of-00001.parquet", [5], list("abcdef"))
    with pytest.raises(BadInput, match=r"but 5 of 6 have none \('a', 'b', 'c', \.\.\.\); add images"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "dataset: must be a path or URL, but got nothing; give a folder, or embedded:caltech101-lt"),
        (
            "embedded:caltech101",
            "embedded:caltech101: must name a dataset in the package, but got 'caltech101'; did you mean 'caltech101-lt'?",
        ),
        (
            "nowhere://x",
            "nowhere://x: must be a path or an fsspec URL, but got 'Protocol not known: nowhere'; check the protocol",
        ),
        (
            "memory://absent",
            "memory://absent: must be a folder of Parquet shards, but nothing is there; check the path",
        ),
        (
            f"{EMBEDDED}/manifest.json",
            f"{EMBEDDED}/manifest.json: must be a folder of Parquet shards, but got a file; give the folder it is in",
        ),
    ],
)
def test_a_uri_that_leads_nowhere_gives_a_one_line_error(uri: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        open_dataset(uri)
    assert str(caught.value) == message


def test_a_store_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(BadInput) as caught:
        open_dataset("s3://bucket/pets")
    assert str(caught.value) == (
        "s3://bucket/pets: s3 requires a package, but got 'Install s3fs to access S3'; pip install 'lift_ray[s3]'"
    )
