"""Open datasets: splits, shards, class names and labels, read from Parquet footers and the label column only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lift_ray.data.bit_depth import AS_STORED, Rendering
from lift_ray.data.cache import load_index, shard_limit_bytes, store_index
from lift_ray.data.dataset import Dataset, Shard, Split
from lift_ray.data.footers import Content, read_content
from lift_ray.data.layout import MANIFEST, RECONVERT, SPLITS, Listing, find_shards
from lift_ray.data.longtail import Int64s, keep_first, semi_supervised_counts
from lift_ray.errors import BadInput, did_you_mean, first_few
from lift_ray.storage.store import PATIENCE_S, fetch, is_remote, join, locate, reached

FORMAT_VERSION = 1
INDEX_VERSION = 2  # format of the cached index
READERS = 16  # shards opened at the same time, because opening waits for the store


def open_dataset(uri: str, base: Path | None = None, patience_s: float = PATIENCE_S) -> Dataset:
    """Open Parquet shards in the format of Hugging Face `datasets`; `layout.find_shards` lists the supported file names.

    The image column has the Hugging Face feature Image and the label column ClassLabel. They are named image and label, or are the
    only columns with these features. The index of a remote dataset is cached in LIFT_CACHE: opening it again only lists files.

    Args:
        uri: a path, any fsspec URL, or `embedded:NAME` for data included in the package.
        base: folder that relative paths start from; default: the working directory.
        patience_s: how long requests to a remote store are retried.

    Raises:
        BadInput: the data cannot be read, or is not a classification dataset: it requires both columns, class names, labels in
            [0, K), the same schema in all shards, and a training image of every class.
    """
    if not uri:
        raise BadInput("dataset", "must be a path or URL", "nothing", "give a folder, or embedded:caltech101-lt")
    if uri.startswith("embedded:"):
        return _open_embedded(uri)
    if "://" not in uri and "::" not in uri:
        uri = os.path.normpath((base or Path.cwd()) / os.path.expanduser(uri))
    shard_limit_bytes()  # reports an invalid LIFT_CACHE_GB before anything starts
    return _open_folder(uri, uri, patience_s)


def schema_metadata(class_names: Iterable[str], has_groups: bool = False) -> dict[bytes, bytes]:
    """Return the schema metadata that Hugging Face `datasets` writes for these class names, and a column `group` if there is one."""
    features: dict[str, object] = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
    }
    if has_groups:
        features["group"] = {"dtype": "int64", "_type": "Value"}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def _open_embedded(uri: str) -> Dataset:
    name = uri.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise BadInput(uri, "must name a dataset in the package", f"{name!r}", did_you_mean(name, EMBEDDED))
    folder, cut = EMBEDDED[name]
    return cut(_open_folder(uri, str(files("lift_ray") / "assets" / folder), 0.0))


def _half_labelled(whole: Dataset, gamma_u: float, flipped: bool = False) -> Dataset:
    """Keep the 40 largest classes, with 40 to 2 labeled images each, and up to 47 more in the unlabeled pool, if there are as many."""
    natural = whole.split("train").class_counts(whole.num_classes)
    classes = np.sort(np.argsort(-natural, kind="stable")[:40])
    label_of = np.full(whole.num_classes, -1)
    label_of[classes] = np.arange(len(classes))
    splits = {}
    for name, split in whole.splits.items():
        here = split.take(np.flatnonzero(label_of[split.labels] >= 0))
        splits[name] = replace(here, labels=label_of[here.labels])
    train = splits["train"]
    counts, further = semi_supervised_counts(natural[classes], 40, 47, 20.0, gamma_u, flipped=flipped)
    splits["train"] = train.take(keep_first(train.labels, counts))
    pool = train.take(keep_first(train.labels, counts + further))
    splits["unlabelled"] = replace(pool, name="unlabelled")
    return Dataset(whole.uri, tuple(whole.class_names[k] for k in classes), splits, labelled_counts=counts)


def _open_folder(uri: str, url: str, patience_s: float) -> Dataset:
    """Open the folder `url`; `uri` is its name in messages, as the user typed it."""
    listing = find_shards(uri, url, patience_s)
    fingerprint = f"{INDEX_VERSION} {listing.fingerprint}" if listing.fingerprint else ""
    if fingerprint and (arrays := load_index(listing.url, fingerprint)):
        return _from_arrays(uri, arrays)
    manifest = _read_manifest(listing, patience_s) if listing.manifest else _Manifest()
    _check_files(listing, manifest)
    sizes = {join(listing.url, entry.name): entry.num_bytes for split in listing.shards.values() for entry in split}
    with ThreadPoolExecutor(max_workers=min(READERS, len(sizes))) as pool:
        found = pool.map(lambda shard: read_content(shard, sizes[shard], patience_s, manifest.has_groups), sizes)
        contents = dict(zip(sizes, found, strict=True))
    _check_same(contents)
    splits = {name: _split(name, listing, contents, manifest) for name in listing.shards}
    class_names = next(iter(contents.values())).class_names
    dataset = Dataset(
        uri,
        class_names,
        splits,
        manifest.validation,
        _labelled_counts(splits, len(class_names), manifest),
        manifest.rendering,
    )
    if listing.manifest:
        _check_manifest(dataset, manifest)
    _check_training(dataset)
    if fingerprint:
        store_index(listing.url, fingerprint, _to_arrays(dataset))
    return dataset


def _split(name: str, listing: Listing, contents: dict[str, Content], manifest: _Manifest) -> Split:
    remote = is_remote(locate(listing.url)[0])
    shards, labels = [], []
    groups: list[Int64s] = []
    for entry in listing.shards[name]:
        url = join(listing.url, entry.name)
        content, told = contents[url], manifest.shards.get(entry.name)
        if told and told.rows != len(content.labels):
            raise BadInput(url, f"the manifest says {told.rows} rows", len(content.labels), RECONVERT)
        labels.append(content.labels)
        groups += [] if content.groups is None else [content.groups]
        shards.append(
            Shard(
                url,
                content.row_groups,
                content.row_group_bytes,
                entry.num_bytes or 0,
                entry.identity if remote else "",
                told.sha256 if told else "",
            )
        )
    joined = np.concatenate(labels)
    rows = np.arange(len(joined), dtype=np.int64)
    return Split(name, tuple(shards), joined, rows, content.image_column, np.concatenate(groups) if groups else None)


def _labelled_counts(splits: dict[str, Split], num_classes: int, manifest: _Manifest) -> Int64s | None:
    if manifest.labelled_counts is not None:
        return np.array(manifest.labelled_counts, dtype=np.int64)
    return splits["train"].class_counts(num_classes) if "train" in splits else None


def _check_same(contents: dict[str, Content]) -> None:
    first_url, first = next(iter(contents.items()))
    for url, content in contents.items():
        if content.class_names != first.class_names or content.columns != first.columns:
            what = "class names" if content.class_names != first.class_names else "columns"
            raise BadInput(url, f"every shard must have the same {what}", f"others than in {first_url}", RECONVERT)


def _to_arrays(dataset: Dataset) -> dict[str, Any]:
    """Convert a dataset to plain arrays, one of them JSON, for the cached index."""
    splits = {
        name: {"image_column": split.image_column, "shards": [asdict(shard) for shard in split.shards]}
        for name, split in dataset.splits.items()
    }
    about = {
        "class_names": dataset.class_names,
        "splits": splits,
        "validation": dataset.validation,
        "rendering": dataset.rendering.to_dict(),
    }
    arrays: dict[str, Any] = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    if dataset.labelled_counts is not None:
        arrays["labelled_counts"] = dataset.labelled_counts
    for name, split in dataset.splits.items():
        arrays[f"labels_{name}"] = split.labels.astype(np.int32)
        if split.groups is not None:
            arrays[f"groups_{name}"] = split.groups
    return arrays


def _from_arrays(uri: str, arrays: dict[str, Any]) -> Dataset:
    about = json.loads(arrays["about"].tobytes())
    splits = {}
    for name, about_split in about["splits"].items():
        shards = tuple(
            Shard(
                shard["url"],
                tuple(shard["row_groups"]),
                tuple(shard["row_group_bytes"]),
                shard["num_bytes"],
                shard["identity"],
                shard["sha256"],
            )
            for shard in about_split["shards"]
        )
        labels = arrays[f"labels_{name}"].astype(np.int64)
        rows = np.arange(len(labels), dtype=np.int64)
        splits[name] = Split(name, shards, labels, rows, about_split["image_column"], arrays.get(f"groups_{name}"))
    return Dataset(
        uri,
        tuple(about["class_names"]),
        splits,
        about["validation"],
        arrays.get("labelled_counts"),
        Rendering.of(about.get("rendering", {})),
    )


@dataclass(frozen=True)
class _Told:
    """Manifest entry of a shard."""

    rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    """Content of manifest.json.

    Attributes:
        class_names: in label order.
        rows: rows of each split.
        shards: shards by name; empty if it does not list them.
        validation, labelled_counts: as in Dataset, if it says so.
        has_groups: the shards have a column `group`. A column of that name in a dataset of others means something else.
        rendering: as in Dataset.
    """

    class_names: tuple[str, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)
    shards: dict[str, _Told] = field(default_factory=dict)
    validation: Literal["drawn", "separate"] = "separate"
    labelled_counts: tuple[int, ...] | None = None
    has_groups: bool = False
    rendering: Rendering = AS_STORED


def _read_manifest(listing: Listing, patience_s: float) -> _Manifest:
    url = join(listing.url, MANIFEST)
    rule = f"must be a manifest of format {FORMAT_VERSION}"
    data = fetch(url, None, None, patience_s)
    with reached(url, rule, RECONVERT):
        manifest = json.loads(data)
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            version = manifest.get("format_version") if isinstance(manifest, dict) else None
            raise BadInput(url, rule, f"format {version}", "use the lift_ray that wrote it")
        rows = {name: int(record["rows"]) for name, record in manifest["splits"].items()}
        shards = {
            shard["name"]: _Told(int(shard["rows"]), int(shard["bytes"]), str(shard["sha256"]))
            for record in manifest["splits"].values()
            for shard in record.get("shards", ())
        }
        counts = manifest.get("labelled_counts")
        return _Manifest(
            tuple(manifest["class_names"]),
            rows,
            shards,
            "drawn" if manifest.get("validation") == "drawn" else "separate",
            None if counts is None else tuple(map(int, counts)),
            bool(manifest.get("groups")),
            Rendering.of(manifest.get("rendering", {})),
        )
    raise AssertionError("unreachable")


def _check_files(listing: Listing, manifest: _Manifest) -> None:
    """Check that the manifest and the listing agree, before any shard is read."""
    for entry in [entry for split in listing.shards.values() for entry in split if manifest.shards]:
        url = join(listing.url, entry.name)
        if entry.name not in manifest.shards:
            raise BadInput(
                url, "must be in the manifest", but="is not", remedy=f"remove one of the two, or {RECONVERT}"
            )
        told = manifest.shards[entry.name].num_bytes
        if entry.num_bytes not in (None, told):
            raise BadInput(url, f"the manifest says {told} bytes", entry.num_bytes, f"copy it again, or {RECONVERT}")


def _check_manifest(dataset: Dataset, manifest: _Manifest) -> None:
    if manifest.class_names != dataset.class_names:
        raise BadInput(
            dataset.uri,
            "the manifest and the shards must name the same classes",
            f"{len(manifest.class_names)} and {dataset.num_classes} that differ",
            RECONVERT,
        )
    if manifest.labelled_counts is not None and len(manifest.labelled_counts) != dataset.num_classes:
        raise BadInput(
            dataset.uri,
            f"the manifest must count the labeled images of {dataset.num_classes} classes",
            len(manifest.labelled_counts),
            RECONVERT,
        )
    for name in SPLITS:
        split = dataset.splits.get(name)
        held, told = split.num_samples if split else 0, manifest.rows.get(name, 0)
        if told != held:
            raise BadInput(
                join(dataset.uri, name),
                f"the manifest says {told} rows",
                but=f"the shards contain {held}",
                remedy=RECONVERT,
            )


def _check_training(dataset: Dataset) -> None:
    for name, split in dataset.splits.items():
        if split.num_samples == 0:
            raise BadInput(join(dataset.uri, name), "must contain images", "0 rows", RECONVERT)
    if "train" not in dataset.splits:
        return
    missing = np.flatnonzero(dataset.splits["train"].class_counts(dataset.num_classes) == 0)
    if len(missing):
        names = first_few([repr(dataset.class_names[index]) for index in missing])
        raise BadInput(
            join(dataset.uri, "train"),
            "every class must have an image",
            but=f"{len(missing)} of {dataset.num_classes} {'has' if len(missing) == 1 else 'have'} none ({names})",
            remedy="add images or remove these class names",
        )


# name -> folder in assets/, and the function that selects its images
EMBEDDED: dict[str, tuple[str, Callable[[Dataset], Dataset]]] = {
    "caltech101-lt": ("caltech101", lambda whole: whole),
    "caltech101-half": ("caltech101", partial(_half_labelled, gamma_u=20.0)),
    "caltech101-half-uniform": ("caltech101", partial(_half_labelled, gamma_u=1.0)),
    "caltech101-half-reversed": ("caltech101", partial(_half_labelled, gamma_u=20.0, flipped=True)),
}
