"""What a data set holds: splits, shards, class names and labels, from Parquet footers and the label column only."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lift_ray.data.longtail import Int64s, keep_first, longtail_counts
from lift_ray.data.store import join, locate, reached
from lift_ray.errors import BadInput, did_you_mean

SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SHARD_NAME = re.compile(r"(train|validation|test)-(\d{5,})-of-(\d{5,})(?:-[0-9a-f]+)?\.parquet")

CONVERT = "make it with python -m lift_ray.convert"
RECONVERT = "run convert again"


@dataclass(frozen=True)
class Shard:
    """One Parquet file: its URL and the rows of each of its row groups."""

    url: str
    row_groups: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the whole file."""
        return sum(self.row_groups)


@dataclass(frozen=True, eq=False)
class Split:
    """The kept samples of one split, in storage order.

    Attributes:
        name: train, validation or test.
        shards: its files, by name.
        labels: label of every kept sample, (N,).
        rows: global row number, counted through the shards, of every kept sample, (N,), ascending.
    """

    name: str
    shards: tuple[Shard, ...]
    labels: Int64s
    rows: Int64s

    @property
    def num_samples(self) -> int:
        """N, the number of kept samples."""
        return len(self.labels)

    def class_counts(self, num_classes: int) -> Int64s:
        """Kept samples of each class, (K,)."""
        return np.bincount(self.labels, minlength=num_classes).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened data set: where it is, its class names (K of them) and its splits by name."""

    uri: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    def split(self, name: str) -> Split:
        """The split of this name. Raises BadInput, naming what is there, when it is absent."""
        if name not in self.splits:
            there = ", ".join(self.splits)
            raise BadInput(f"{self.uri}: must hold the split {name!r}, but got only {there}; choose one of these")
        return self.splits[name]


def open_dataset(uri: str, base: Path | None = None) -> Dataset:
    """Open Hugging Face style Parquet: `<split>-00000-of-0000N.parquet` in a folder or in its `data/` subfolder.

    Args:
        uri: a path, any fsspec URL, or `embedded:NAME` for data that ships inside the package.
        base: the folder that relative paths start from; by default the working directory.

    Raises:
        BadInput: one line, when the data cannot be reached or read, or is not a data set for classification:
            columns, class names, labels in [0, K), the same schema everywhere, a training image of every class.
    """
    if not uri:
        raise BadInput("dataset: must be a path or URL, but got nothing; give a folder, or embedded:caltech101")
    if uri.startswith("embedded:"):
        return _open_embedded(uri)
    if "://" not in uri and "::" not in uri:
        uri = os.path.normpath((base or Path.cwd()) / Path(uri).expanduser())
    return _open_folder(uri, uri)


def shard_names(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of shards among `names`, sorted, by split."""
    matches = [match for match in map(SHARD_NAME.fullmatch, sorted(names)) if match]
    return {split: here for split in SPLITS if (here := [m[0] for m in matches if m[1] == split])}


def schema_metadata(class_names: Iterable[str]) -> dict[bytes, bytes]:
    """Schema metadata that names the classes as Hugging Face `datasets` writes it."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def _open_embedded(uri: str) -> Dataset:
    name = uri.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise BadInput(f"{uri}: must name data in the package, but got {name!r}; {did_you_mean(name, EMBEDDED)}")
    folder, profile = EMBEDDED[name]
    whole = _open_folder(uri, str(files("lift_ray") / "assets" / folder))
    if profile is None:
        return whole
    train = whole.split("train")
    rows = keep_first(train.labels, longtail_counts(train.class_counts(whole.num_classes), *profile))
    cut = replace(train, labels=train.labels[rows], rows=train.rows[rows])
    return replace(whole, splits={**whole.splits, "train": cut})


def _open_folder(uri: str, url: str) -> Dataset:
    """`uri` is what the user typed and messages name; `url` is where the files are."""
    by_split, url, has_manifest = _list_shards(uri, url)
    urls = [join(url, name) for names in by_split.values() for name in names]
    with ThreadPoolExecutor(max_workers=min(8, len(urls))) as pool:
        contents = dict(zip(urls, pool.map(_read_shard, urls), strict=True))
    first = contents[urls[0]]
    for shard_url, content in contents.items():
        if content.class_names != first.class_names or not content.schema.equals(first.schema):
            what = "class names" if content.class_names != first.class_names else "columns"
            raise BadInput(
                f"{shard_url}: every shard must have the same {what}, but got others than {urls[0]}; {RECONVERT}"
            )
    splits = {}
    for split, names in by_split.items():
        parts = [contents[join(url, name)] for name in names]
        labels = np.concatenate([part.labels for part in parts])
        shards = tuple(Shard(join(url, name), part.row_groups) for name, part in zip(names, parts, strict=True))
        splits[split] = Split(split, shards, labels, np.arange(len(labels), dtype=np.int64))
    dataset = Dataset(uri, first.class_names, splits)
    if has_manifest:
        _check_manifest(dataset, join(url, MANIFEST))
    _check_training(dataset)
    return dataset


def _list_shards(uri: str, url: str) -> tuple[dict[str, list[str]], str, bool]:
    """Shard names by split, the folder they are in, and whether a manifest lies beside them."""
    file_system, path = locate(url)
    rule = "must be a folder of Parquet shards"
    with reached(uri, rule, "check the path"):
        if file_system.isfile(path):
            raise BadInput(f"{uri}: {rule}, but got a file; give the folder it is in")
        names = _names_in(file_system, path)
        if not (by_split := shard_names(names)) and "data" in names:
            url, path = join(url, "data"), join(path, "data")
            names = _names_in(file_system, path)
            by_split = shard_names(names)
    if not by_split:
        got = f"{len(names)} other names ({', '.join(names[:3])})" if names else "an empty folder"
        raise BadInput(f"{uri}: must hold shards named train-00000-of-00001.parquet, but got {got}; {CONVERT}")
    for split, there in by_split.items():
        matches = [match for match in map(SHARD_NAME.fullmatch, there) if match]
        totals = {int(match[3]) for match in matches}
        if totals != {len(there)} or [int(match[2]) for match in matches] != list(range(len(there))):
            raise BadInput(
                f"{join(uri, split)}: the names say {' or '.join(map(str, sorted(totals)))} shards, but "
                f"{len(there)} are there ({there[0]} to {there[-1]}); copy the missing ones, or {RECONVERT}"
            )
    return by_split, url, MANIFEST in names


def _names_in(file_system: Any, path: str) -> list[str]:
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in file_system.ls(path, detail=False))


@dataclass(frozen=True, eq=False)
class _Content:
    schema: Any
    class_names: tuple[str, ...]
    row_groups: tuple[int, ...]
    labels: Int64s


def _read_shard(url: str) -> _Content:
    file_system, path = locate(url)
    with (
        reached(url, "must be readable Parquet", f"copy it again, or {RECONVERT}"),
        file_system.open(path, "rb") as file,
    ):
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        schema = parquet.schema_arrow
        _check_columns(url, schema)
        class_names = _class_names(url, schema.metadata or {})
        column = parquet.read(columns=["label"]).column("label")
        row_groups = tuple(parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))
    if column.null_count:
        raise BadInput(f"{url}: every row must have a label, but got {column.null_count} without; {RECONVERT}")
    labels = column.to_numpy().astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise BadInput(
            f"{url}: labels must be 0 to {len(class_names) - 1} ({len(class_names)} class names), "
            f"but got {labels[wrong[0]]} in row {wrong[0]}; mend the label or the class names"
        )
    return _Content(schema.remove_metadata(), class_names, row_groups, labels)


def _check_columns(url: str, schema: Any) -> None:
    columns = {field.name: field.type for field in schema}
    if not {"image", "label"} <= set(columns):
        got = ", ".join(columns) or "no columns"
        raise BadInput(f"{url}: must have the columns image and label, but got {got}; rename them, or {RECONVERT}")
    for name, wanted in (("image", "struct<bytes: binary, path: string>"), ("label", "int64")):
        kind = columns[name]
        if name == "label":
            good = pa.types.is_integer(kind)
        else:
            inner = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
            data = inner.get("bytes")
            good = data is not None and (pa.types.is_binary(data) or pa.types.is_large_binary(data))
        if not good:
            raise BadInput(f"{url}: the column {name} must be {wanted}, but got {kind}; {RECONVERT}")


def _class_names(url: str, metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    rule = "must name its classes in the schema metadata, as Hugging Face ClassLabel does"
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{url}: {rule}, but got none; {CONVERT}") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{url}: {rule}, but got {str(names)[:60]!r}; {CONVERT}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(f"{url}: class names must differ, but got {twice!r} twice; rename one")
    return tuple(names)


def _check_manifest(dataset: Dataset, url: str) -> None:
    file_system, path = locate(url)
    rule = f"must be a manifest of format {FORMAT_VERSION}"
    with reached(url, rule, RECONVERT):
        manifest = json.loads(file_system.cat_file(path))
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            version = manifest.get("format_version") if isinstance(manifest, dict) else None
            raise BadInput(f"{url}: {rule}, but got format {version}; use the lift_ray that wrote it")
        class_names = tuple(manifest["class_names"])
        rows = {name: int(record["rows"]) for name, record in manifest["splits"].items()}
    if class_names != dataset.class_names:
        raise BadInput(
            f"{dataset.uri}: the manifest and the shards must name the same classes, "
            f"but got {len(class_names)} and {dataset.num_classes} that differ; {RECONVERT}"
        )
    for name in SPLITS:
        held = dataset.splits[name].num_samples if name in dataset.splits else 0
        told = rows.get(name, 0)
        if told != held:
            raise BadInput(
                f"{join(dataset.uri, name)}: the manifest says {told} rows, but the shards hold {held}; {RECONVERT}"
            )


def _check_training(dataset: Dataset) -> None:
    for name, split in dataset.splits.items():
        if split.num_samples == 0:
            raise BadInput(f"{join(dataset.uri, name)}: must hold images, but got 0 rows; {RECONVERT}")
    if "train" not in dataset.splits:
        return
    missing = np.flatnonzero(dataset.splits["train"].class_counts(dataset.num_classes) == 0)
    if len(missing):
        names = ", ".join(repr(dataset.class_names[index]) for index in missing[:3])
        more = ", ..." if len(missing) > 3 else ""
        raise BadInput(
            f"{join(dataset.uri, 'train')}: every class must have an image, but {len(missing)} of "
            f"{dataset.num_classes} have none ({names}{more}); add images, or drop these class names"
        )


# name -> folder in assets/, and (largest, imbalance) of the long-tailed cut of its training split
EMBEDDED: dict[str, tuple[str, tuple[int, float] | None]] = {
    "caltech101": ("caltech101", None),
    "caltech101-lt": ("caltech101", (200, 50.0)),
}
