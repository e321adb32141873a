"""Encoded images into Parquet shards at any fsspec URL, under temporary names until all of them are there."""

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

from lift_ray.data.layout import MANIFEST, SHARD_NAME
from lift_ray.data.open import FORMAT_VERSION, schema_metadata
from lift_ray.errors import BadInput
from lift_ray.storage.store import join, locate, reached

ROW_GROUP_BYTES = 256 * 2**20  # pictures kept at full size may not fill memory, nor a 2 GiB Arrow array
PLAN = ".plan.json"
RULE = "must be a writable folder"
PARTIAL = ".partial"

Sample = tuple[bytes, str, int]
"""An encoded image, its path and its label."""


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, which waits for `publish` under a temporary name.

    Attributes:
        split, number: which shard it is, numbers from 0.
        partial: the temporary name.
        rows, bytes, sha256: of the file.
        class_counts: in class order, (K,).
        skipped: one line for each image that was left out.
    """

    split: str
    number: int
    partial: str
    rows: int
    bytes: int
    sha256: str
    class_counts: tuple[int, ...]
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: dict[str, Any]) -> ShardRecord:
        """The record whose fields went through JSON."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class SplitRecord:
    """The finished shards of one split, by number."""

    shards: tuple[ShardRecord, ...]

    @property
    def rows(self) -> int:
        """Images of the split."""
        return sum(shard.rows for shard in self.shards)

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Images of each class, (K,)."""
        return tuple(map(sum, zip(*(shard.class_counts for shard in self.shards), strict=True)))

    @property
    def files(self) -> dict[str, ShardRecord]:
        """The shards by their final name."""
        return {shard_name(shard.split, shard.number, len(self.shards)): shard for shard in self.shards}


def write_split(
    destination: str,
    split: str,
    samples: Iterable[Sample],
    class_names: Iterable[str],
    *,
    rows_per_shard: int = 4096,
    row_group_rows: int = 256,
    compression: str = "none",
) -> SplitRecord:
    """Write samples as Parquet shards under temporary names, ready for `publish`.

    When anything fails, all temporary files at the destination are removed.

    Raises BadInput when the destination cannot be written; whatever `samples` raises passes through.
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
    row_group_rows: int = 256,
    compression: str = "none",
) -> ShardRecord:
    """Write samples, perhaps none, as one Parquet file under a temporary name of its own.

    A row group ends at `row_group_rows` samples, or at 256 MiB of images. When anything fails, the file is removed.

    Raises BadInput when the destination cannot be written; whatever `samples` raises passes through.
    """
    schema = _schema(class_names)
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
            use_dictionary=["label"],
            write_statistics=["label"],
            write_page_checksum=True,
        )
    try:
        for group in _row_groups(iter(samples), row_group_rows):
            counts += np.bincount([label for _, _, label in group], minlength=len(class_names))
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
    """The final name of a shard: `train-00000-of-00002.parquet`."""
    return f"{split}-{number:05d}-of-{total:05d}.parquet"


def write_file(destination: str, name: str, data: bytes) -> None:
    """Write a small file so that it is there as a whole or not at all. Raises BadInput when that is refused."""
    file_system, folder = locate(destination)
    temporary = join(folder, f".{name.lstrip('.')}-{_token()}{PARTIAL}")
    with _writing(destination):
        file_system.pipe_file(temporary, data)
        file_system.mv(temporary, join(folder, name))


def sizes(destination: str) -> dict[str, int]:
    """Size of each file in the folder, by name, as it is now; none when there is no folder yet.

    Raises BadInput when it cannot be listed.
    """
    file_system, folder = locate(destination)
    with _writing(destination):
        file_system.invalidate_cache(folder)  # other processes write there too
        try:
            found = file_system.ls(folder, detail=True)
        except FileNotFoundError:  # object stores have no empty folders
            return {}
    return {info["name"].rsplit("/", 1)[-1]: info["size"] for info in found if info["type"] == "file"}


def publish(destination: str, class_names: Iterable[str], splits: Mapping[str, SplitRecord]) -> None:
    """Give the written shards their names in place of any data set there, and write manifest.json last.

    A reader never sees a half-written shard, and sees a manifest only when every shard is in place. What was cut short
    may be called again: a shard whose temporary name is gone has its own name already.

    Raises BadInput when the destination cannot be written.
    """
    file_system, folder = locate(destination)
    files = {name: shard for record in splits.values() for name, shard in record.files.items()}
    there = sizes(destination)
    moved = {name for name, shard in files.items() if shard.partial not in there}
    if lost := sorted(moved - there.keys()):
        raise BadInput(destination, "must keep the written files", but=f"{lost[0]} is gone", remedy="start again")
    with _writing(destination):
        for name in sorted(there, key=lambda name: name != MANIFEST):
            if name == MANIFEST or (SHARD_NAME.fullmatch(name) and name not in moved):
                file_system.rm_file(join(folder, name))
        for name, shard in files.items():
            if name not in moved:
                file_system.mv(join(folder, shard.partial), join(folder, name))
    write_file(destination, MANIFEST, _manifest(class_names, splits))
    discard(destination)


def discard(destination: str, keep: Collection[str] = ()) -> None:
    """Remove temporary files of writing that did not end, but for some. Raises BadInput when that is refused.

    The plan goes first: files without a plan are nobody's.
    """
    file_system, folder = locate(destination)
    with _writing(destination):
        for name in sorted(sizes(destination).keys() - set(keep), key=lambda name: name != PLAN):
            if name == PLAN or (name.startswith(".") and name.endswith(PARTIAL)):
                file_system.rm_file(join(folder, name))


class _HashedFile:
    """The few methods that Arrow asks of a file; what passes through is counted and hashed."""

    def __init__(self, sink: Any) -> None:
        self.sink, self.num_bytes, self.digest = sink, 0, hashlib.sha256()
        self.closed = False

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        self.sink.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        self.closed = True


def _manifest(class_names: Iterable[str], splits: Mapping[str, SplitRecord]) -> bytes:
    manifest = {
        "format_version": FORMAT_VERSION,
        "class_names": list(class_names),
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


def _schema(class_names: Sequence[str]) -> Any:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema([("image", image), ("label", pa.int64())], metadata=schema_metadata(class_names))


def _table(group: list[Sample], schema: Any) -> Any:
    images, paths, labels = zip(*group, strict=True)
    image = pa.StructArray.from_arrays([pa.array(images, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"])
    return pa.Table.from_arrays([image, pa.array(labels, pa.int64())], schema=schema)


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
    """Part of a temporary name, so that two writers never share a file."""
    return uuid4().hex[:8]


def _writing(destination: str) -> Any:
    return reached(destination, RULE, "check the disk and your permissions")
