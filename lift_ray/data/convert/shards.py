"""Write encoded images to Parquet shards at any fsspec URL, under temporary names until all shards are complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lift_ray.data.convert.index import valid_text
from lift_ray.data.layout import MANIFEST, SHARD_NAME
from lift_ray.data.open import FORMAT_VERSION, schema_metadata
from lift_ray.errors import BadInput
from lift_ray.storage.store import join, locate, reached

ROWS_PER_SHARD, ROW_GROUP_ROWS = 4096, 256
ROW_GROUP_BYTES = 256 * 2**20  # full-size images must not fill the memory or exceed a 2 GiB Arrow array
PLAN = ".plan.json"
RULE = "must be a writable folder"
PARTIAL = ".partial"

Sample = tuple[bytes, str, int, *tuple[int, ...]]
"""A sample: encoded image, path and label, and the number of its group if there are groups."""


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, under a temporary name until `publish`.

    Attributes:
        split, number: split and number of the shard, from 0.
        partial: the temporary name.
        rows, bytes, sha256: rows, size and checksum of the file.
        class_counts: number of images of each class, (K,).
        skipped: one line for each skipped image.
        num_paged: number of images whose source has several pages, of which one is stored or used.
    """

    split: str
    number: int
    partial: str
    rows: int
    bytes: int
    sha256: str
    class_counts: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    num_paged: int = 0

    @classmethod
    def of(cls, content: dict[str, Any]) -> ShardRecord:
        """Return the record from its fields in JSON."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class SplitRecord:
    """The finished shards of a split, by number."""

    shards: tuple[ShardRecord, ...]

    @property
    def rows(self) -> int:
        """Number of images of the split."""
        return sum(shard.rows for shard in self.shards)

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Number of images of each class, (K,)."""
        return tuple(map(sum, zip(*(shard.class_counts for shard in self.shards), strict=True)))

    @property
    def files(self) -> dict[str, ShardRecord]:
        """The shards by final name."""
        return {shard_name(shard.split, shard.number, len(self.shards)): shard for shard in self.shards}


def write_split(
    destination: str,
    split: str,
    samples: Iterable[Sample],
    class_names: Iterable[str],
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    row_group_rows: int = ROW_GROUP_ROWS,
    compression: str = "none",
) -> SplitRecord:
    """Write samples as Parquet shards under temporary names, ready for `publish`.

    After a failure, all temporary files at the destination are removed.

    Raises BadInput if the destination cannot be written; exceptions of `samples` are not caught.
    """
    names, rest = tuple(class_names), iter(samples)
    shards: list[ShardRecord] = []
    try:
        for number in count():
            if (first := next(rest, None)) is None:
                return SplitRecord(tuple(shards))
            here = chain([first], islice(rest, rows_per_shard - 1))
            shards.append(
                write_shard(
                    destination, split, number, here, names, row_group_rows=row_group_rows, compression=compression
                )
            )
    except BaseException:
        discard(destination)
        raise
    raise AssertionError("unreachable")


def write_shard(
    destination: str,
    split: str,
    number: int,
    samples: Iterable[Sample],
    class_names: Sequence[str],
    *,
    row_group_rows: int = ROW_GROUP_ROWS,
    compression: str = "none",
    has_groups: bool = False,
) -> ShardRecord:
    """Write samples, possibly none, to one Parquet file under a unique temporary name.

    A row group ends at `row_group_rows` samples, or at 256 MiB of images. After a failure, the file is removed.

    Raises BadInput if the destination cannot be written; exceptions of `samples` are not caught.
    """
    schema = _schema(class_names, has_groups)
    counts = np.zeros(len(class_names), dtype=np.int64)
    name = f".{split}-{number:05d}-{_token()}{PARTIAL}"
    file_system, folder = locate(destination)
    with _writing(destination):
        file_system.makedirs(folder, exist_ok=True)
        file = _HashedFile(file_system.open(join(folder, name), "wb"))
        writer = pq.ParquetWriter(
            pa.PythonFile(file, mode="w"),
            schema,
            compression=compression,
            compression_level=19 if compression == "zstd" else None,
            use_dictionary=["label", *(["group"] if has_groups else [])],
            write_statistics=["label"],
            write_page_checksum=True,
        )
    try:
        for group in _row_groups(iter(samples), row_group_rows):
            counts += np.bincount([sample[2] for sample in group], minlength=len(class_names))
            with _writing(destination):
                writer.write_table(_table(group, schema), row_group_size=len(group))
        with _writing(destination):
            writer.close()
            file.sink.close()
    except BaseException:
        for end in (writer.close, file.sink.close, partial(file_system.rm_file, join(folder, name))):
            with suppress(Exception):
                end()
        raise
    return ShardRecord(
        split, number, name, int(counts.sum()), file.num_bytes, file.digest.hexdigest(), tuple(counts.tolist())
    )


def shard_name(split: str, number: int, total: int) -> str:
    """Return the final name of a shard: `train-00000-of-00002.parquet`."""
    return f"{split}-{number:05d}-of-{total:05d}.parquet"


def write_file(destination: str, name: str, data: bytes) -> None:
    """Write a small file, whole or not at all. Raises BadInput if it cannot be written."""
    file_system, folder = locate(destination)
    temporary = join(folder, f".{name.lstrip('.')}-{_token()}{PARTIAL}")
    with _writing(destination):
        file_system.pipe_file(temporary, data)
        file_system.mv(temporary, join(folder, name))


def sizes(destination: str) -> dict[str, int]:
    """Return the size of each file in the folder by name; empty if the folder does not exist.

    Raises BadInput if it cannot be listed.
    """
    file_system, folder = locate(destination)
    with _writing(destination):
        file_system.invalidate_cache(folder)  # other processes write there too
        try:
            found = file_system.ls(folder, detail=True)
        except FileNotFoundError:  # object stores have no empty folders
            return {}
    return {info["name"].rsplit("/", 1)[-1]: info["size"] for info in found if info["type"] == "file"}


def publish(
    destination: str,
    class_names: Iterable[str],
    splits: Mapping[str, SplitRecord],
    about: Mapping[str, object] | None = None,
) -> None:
    """Rename the written shards to their final names, replacing any existing dataset, and write manifest.json last.

    Readers never see a half-written shard, and see a manifest only after every shard is in place. An interrupted call can be
    repeated: a shard whose temporary name is gone has its final name already. `about` has further keys of the manifest.

    Raises BadInput if the destination cannot be written.
    """
    file_system, folder = locate(destination)
    files = {name: shard for record in splits.values() for name, shard in record.files.items()}
    there = sizes(destination)
    moved = {name for name, shard in files.items() if shard.partial not in there}
    if lost := sorted(moved - there.keys()):
        raise BadInput(destination, "must keep the written files", but=f"{lost[0]} is gone", remedy="start again")
    with _writing(destination):
        # the manifest goes first: no reader may take the old one for the new shards
        for name in sorted(there, key=lambda name: name != MANIFEST):
            if name == MANIFEST or (SHARD_NAME.fullmatch(name) and name not in moved):
                file_system.rm_file(join(folder, name))
        for name, shard in files.items():
            if name not in moved:
                file_system.mv(join(folder, shard.partial), join(folder, name))
    write_file(destination, MANIFEST, _manifest(class_names, splits, about or {}))
    discard(destination)


def discard(destination: str, keep: Collection[str] = ()) -> None:
    """Remove the temporary files of unfinished conversions, except `keep`. Raises BadInput if that fails.

    The plan is removed first, because temporary files without a plan belong to no conversion: an interruption here is harmless.
    """
    file_system, folder = locate(destination)
    with _writing(destination):
        for name in sorted(sizes(destination).keys() - set(keep), key=lambda name: name != PLAN):
            if name == PLAN or (name.startswith(".") and name.endswith(PARTIAL)):
                file_system.rm_file(join(folder, name))


class _HashedFile:
    """File object with the methods that Arrow calls; it counts and hashes the bytes written."""

    def __init__(self, sink: Any) -> None:
        self.sink, self.num_bytes, self.digest = sink, 0, hashlib.sha256()
        self.closed = False

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        self.sink.write(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: nothing is buffered here."""

    def close(self) -> None:
        self.closed = True


def _manifest(class_names: Iterable[str], splits: Mapping[str, SplitRecord], about: Mapping[str, object]) -> bytes:
    manifest = {
        "format_version": FORMAT_VERSION,
        "class_names": list(class_names),
        **about,
        "splits": {
            split: {
                "rows": record.rows,
                "class_counts": record.class_counts,
                "shards": [
                    {"name": name, "rows": shard.rows, "bytes": shard.bytes, "sha256": shard.sha256}
                    for name, shard in record.files.items()
                ],
            }
            for split, record in splits.items()
        },
    }
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _schema(class_names: Sequence[str], has_groups: bool) -> Any:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [("image", image), ("label", pa.int64()), *([("group", pa.int64())] if has_groups else [])]
    return pa.schema(columns, metadata=schema_metadata(class_names, has_groups))


def _table(group: list[Sample], schema: Any) -> Any:
    images, paths, *numbers = zip(*group, strict=True)
    image = pa.StructArray.from_arrays(
        [pa.array(images, pa.binary()), pa.array(map(valid_text, paths), pa.string())], ["bytes", "path"]
    )
    return pa.Table.from_arrays([image, *(pa.array(column, pa.int64()) for column in numbers)], schema=schema)


def _row_groups(samples: Iterator[Sample], row_group_rows: int) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    num_bytes = 0
    for sample in samples:
        group.append(sample)
        num_bytes += len(sample[0])
        if len(group) == row_group_rows or num_bytes >= ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _token() -> str:
    """Return a random part of a temporary name, so that two writers never share a file."""
    return uuid4().hex[:8]


def _writing(destination: str) -> Any:
    return reached(destination, RULE, "check the disk and your permissions")
