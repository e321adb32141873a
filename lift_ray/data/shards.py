"""Encoded images into Parquet shards at any fsspec URL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lift_ray.data.catalog import FORMAT_VERSION, MANIFEST, SHARD_NAME, schema_metadata
from lift_ray.data.store import join, locate, reached
from lift_ray.errors import BadInput

ROW_GROUP_BYTES = 256 * 2**20  # pictures kept at full size may not fill memory, nor a 2 GiB Arrow array


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitRecord:
    """What the manifest says of one split; class_counts is in class order, (K,)."""

    rows: int
    class_counts: tuple[int, ...]
    shards: tuple[ShardRecord, ...]


def write_split(
    destination: str,
    split: str,
    samples: Iterable[tuple[bytes, str, int]],
    class_names: Iterable[str],
    *,
    rows_per_shard: int = 4096,
    row_group_rows: int = 256,
    compression: str = "none",
) -> SplitRecord:
    """Write (encoded image, path, label) samples as Parquet shards under temporary names, ready for `publish`.

    The number of shards stands in their names, so final names come when all samples are written. A row group also
    ends at 256 MiB of images. When anything fails, the temporary files are removed.

    Raises BadInput when the destination cannot be written; whatever `samples` raises passes through.
    """
    names = tuple(class_names)
    counts = np.zeros(len(names), dtype=np.int64)
    written: list[tuple[int, int, str]] = []
    file_system, path = locate(destination)
    rest = iter(samples)
    try:
        while True:
            shard = _Shard(destination, join(path, _partial_name(split, len(written))), file_system)
            with shard:
                for group in _row_groups(rest, rows_per_shard, row_group_rows):
                    counts += np.bincount([label for _, _, label in group], minlength=len(names))
                    shard.write(group, names, compression)
            if shard.rows == 0:
                break
            written.append((shard.rows, shard.num_bytes, shard.digest.hexdigest()))
    except BaseException:
        discard(destination)
        raise
    shards = tuple(
        ShardRecord(f"{split}-{number:05d}-of-{len(written):05d}.parquet", rows, num_bytes, sha256)
        for number, (rows, num_bytes, sha256) in enumerate(written)
    )
    return SplitRecord(sum(shard.rows for shard in shards), tuple(counts.tolist()), shards)


def publish(destination: str, class_names: Iterable[str], splits: Mapping[str, SplitRecord]) -> None:
    """Give the written shards their names in place of any data set there, and write manifest.json last.

    A reader never sees a half-written shard, and sees a manifest only when every shard is in place.
    Raises BadInput when the destination cannot be written.
    """
    file_system, path = locate(destination)
    manifest = {
        "format_version": FORMAT_VERSION,
        "class_names": list(class_names),
        "splits": {name: asdict(record) for name, record in splits.items()},
    }
    with _writing(destination):
        there = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in file_system.ls(path, detail=False)]
        for name in sorted(there, key=lambda name: name != MANIFEST):
            if name == MANIFEST or SHARD_NAME.fullmatch(name):
                file_system.rm_file(join(path, name))
        for split, record in splits.items():
            for number, shard in enumerate(record.shards):
                file_system.mv(join(path, _partial_name(split, number)), join(path, shard.name))
        partial = join(path, f".{MANIFEST}.partial")
        file_system.pipe_file(partial, (json.dumps(manifest, indent=1) + "\n").encode())
        file_system.mv(partial, join(path, MANIFEST))
    discard(destination)


def discard(destination: str) -> None:
    """Remove the temporary files of writing that did not end. Raises BadInput when that is refused."""
    file_system, path = locate(destination)
    with _writing(destination):
        if file_system.isdir(path):
            for entry in file_system.ls(path, detail=False):
                name = entry.rsplit("/", 1)[-1]
                if name.startswith(".") and name.endswith(".partial"):
                    file_system.rm_file(join(path, name))


class _Shard:
    """One Parquet file being written, hashed on its way; nothing is created before the first row group."""

    def __init__(self, destination: str, path: str, file_system: Any) -> None:
        self.destination, self.path, self.file_system = destination, path, file_system
        self.rows = self.num_bytes = 0
        self.digest = hashlib.sha256()
        self._sink: Any = None
        self._writer: Any = None

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._writer is None:
            return
        try:
            with _writing(self.destination):
                self._writer.close()
                self._sink.close()
        except BadInput:
            if kind is None:
                raise

    def write(self, group: list[tuple[bytes, str, int]], class_names: tuple[str, ...], compression: str) -> None:
        images, paths, labels = zip(*group, strict=True)
        image = pa.StructArray.from_arrays(
            [pa.array(images, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
        )
        schema = pa.schema([("image", image.type), ("label", pa.int64())], metadata=schema_metadata(class_names))
        table = pa.Table.from_arrays([image, pa.array(labels, pa.int64())], schema=schema)
        with _writing(self.destination):
            if self._writer is None:
                self.file_system.makedirs(self.path.rsplit("/", 1)[0], exist_ok=True)
                self._sink = self.file_system.open(self.path, "wb")
                self._writer = pq.ParquetWriter(
                    pa.PythonFile(_Tee(self), mode="w"),
                    schema,
                    compression=compression,
                    compression_level=19 if compression == "zstd" else None,
                    use_dictionary=["label"],
                    write_statistics=["label"],
                    write_page_checksum=True,
                )
            self._writer.write_table(table, row_group_size=len(group))
        self.rows += len(group)

    def take(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        self._sink.write(data)
        return len(data)


class _Tee:
    """The few methods that Arrow asks of a file."""

    def __init__(self, shard: _Shard) -> None:
        self.write, self.closed = shard.take, False

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        self.closed = True


def _row_groups(
    samples: Iterator[tuple[bytes, str, int]], rows_per_shard: int, row_group_rows: int
) -> Iterator[list[tuple[bytes, str, int]]]:
    """Row groups of one shard: the next `rows_per_shard` samples."""
    left = rows_per_shard
    while left:
        group: list[tuple[bytes, str, int]] = []
        num_bytes = 0
        while len(group) < min(left, row_group_rows) and num_bytes < ROW_GROUP_BYTES:
            if (sample := next(samples, None)) is None:
                break
            group.append(sample)
            num_bytes += len(sample[0])
        if not group:
            return
        left -= len(group)
        yield group


def _partial_name(split: str, number: int) -> str:
    return f".{split}-{number:05d}.partial"


def _writing(destination: str) -> Any:
    return reached(destination, "must be a folder that can be written", "check the disk and your rights")
