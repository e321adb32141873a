"""Footers and columns of Parquet shards, read as byte ranges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lift_ray.data.layout import CONVERT, RECONVERT
from lift_ray.data.longtail import Int64s
from lift_ray.errors import BadInput
from lift_ray.storage.store import fetch, is_remote, locate, reached, retried
from lift_ray.text import count

TAIL_BYTES = 2**16  # most footers fit; larger ones take a second request
RULE, REMEDY = "must be readable Parquet", f"copy it again, or {RECONVERT}"


@dataclass(frozen=True, eq=False)
class Content:
    """Metadata and labels of a shard.

    Attributes:
        columns: names and types of all columns.
        image_column: name of the image column.
        class_names: in label order.
        row_groups: number of rows of each row group.
        row_group_bytes: uncompressed bytes of the images of each row group.
        labels: label of every row, (N,).
        groups: group of every row, (N,); None if there are none.
    """

    columns: str
    image_column: str
    class_names: tuple[str, ...]
    row_groups: tuple[int, ...]
    row_group_bytes: tuple[int, ...]
    labels: Int64s
    groups: Int64s | None = None


def read_content(url: str, num_bytes: int | None, patience_s: float, has_groups: bool = False) -> Content:
    """Read and check a shard's footer, labels, and groups if there are any.

    Args:
        num_bytes: size of the file if the store reports it.
        has_groups: read the int64 column `group`.

    Raises:
        BadInput: the shard cannot be read, is shorter than its footer says, or does not contain images with class labels.
    """
    metadata = read_footer(url, patience_s)
    _check_length(url, metadata, num_bytes)
    schema = metadata.schema.to_arrow_schema()
    image, label = _columns(url, schema)
    class_names = _class_names(url, schema, label)
    labels = _integers(url, metadata, label, "label", patience_s)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise BadInput(
            url,
            f"labels must be 0 to {len(class_names) - 1} ({count(len(class_names), 'class name')})",
            f"{labels[wrong[0]]} in row {wrong[0]}",
            "fix the label or the class names",
        )
    if has_groups and ("group" not in schema.names or not pa.types.is_integer(schema.field("group").type)):
        raise BadInput(url, "must have the int64 column group, as the manifest says", but="has none", remedy=RECONVERT)
    groups = _integers(url, metadata, "group", "group", patience_s) if has_groups else None
    rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    columns = schema.remove_metadata().to_string(show_field_metadata=False)
    return Content(columns, image, class_names, rows, image_bytes(metadata, image), labels, groups)


def _integers(url: str, metadata: Any, column: str, what: str, patience_s: float) -> Int64s:
    """Return a column of integers without missing values, (N,)."""
    cells = read_columns(url, metadata, range(metadata.num_row_groups), column, patience_s).column(column)
    if cells.null_count:
        raise BadInput(url, f"every row must have a {what}", f"{cells.null_count} without one", RECONVERT)
    return np.from_dlpack(cells.combine_chunks()).astype(np.int64)  # to_numpy imports pandas


def read_footer(url: str, patience_s: float) -> Any:
    """Return the `FileMetaData` of a Parquet file, in one or two requests. Raises BadInput for other files."""
    tail = fetch(url, -TAIL_BYTES, None, patience_s)
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if needed > len(tail) and tail[-4:] == b"PAR1":
        tail = fetch(url, -needed, None, patience_s)
    with reached(url, RULE, REMEDY):
        return pq.read_metadata(pa.BufferReader(tail))


def read_images(url: str, metadata: Any, group: int, column: str, patience_s: float) -> Any:
    """Return the encoded images of a row group as a binary array, in one request. Raises BadInput."""
    table = read_columns(url, metadata, [group], f"{column}.bytes", patience_s)
    images = pc.struct_field(table.column(column), "bytes")
    return images.chunk(0) if images.num_chunks == 1 else images


def read_columns(url: str, metadata: Any, groups: Sequence[int], leaf: str, patience_s: float) -> Any:
    """Return a table of one leaf column of some row groups: one request per row group, for exactly its bytes, checksums verified.

    Raises BadInput when it cannot be read, or a remote store keeps delivering broken data for `patience_s`.
    """

    def work(left_s: float) -> Any:
        spans = [_span(_chunk(metadata, group, leaf)) for group in groups]
        file = pa.PythonFile(_Pieces({start: fetch(url, start, end, patience_s) for start, end in spans}), mode="r")
        parquet = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, pre_buffer=False)
        return parquet.read_row_groups(list(groups), columns=[leaf], use_threads=False)

    return retried(work, url, RULE, REMEDY, patience_s if is_remote(locate(url)[0]) else 0.0)


def image_bytes(metadata: Any, column: str) -> tuple[int, ...]:
    """Return the image bytes of each row group: the uncompressed size of the column chunk, close to the memory that reading takes."""
    groups = range(metadata.num_row_groups)
    return tuple(_chunk(metadata, group, f"{column}.bytes").total_uncompressed_size for group in groups)


class _Pieces:
    """File object made of a few pieces, by start offset, with the methods that Arrow calls."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self._pieces, self._at, self.closed = pieces, 0, False
        self._end = max((start + len(piece) for start, piece in pieces.items()), default=0)

    def read(self, size: int) -> memoryview:
        start = max(start for start in self._pieces if start <= self._at)
        found = memoryview(self._pieces[start])[self._at - start :][:size]
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> None:
        self._at = offset + (0, self._at, self._end)[whence]

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self.closed = True


def _chunk(metadata: Any, group: int, leaf: str) -> Any:
    row_group = metadata.row_group(group)
    return next(chunk for chunk in map(row_group.column, range(row_group.num_columns)) if chunk.path_in_schema == leaf)


def _span(chunk: Any) -> tuple[int, int]:
    """Return the start and end of a column chunk in the file."""
    start: int = chunk.data_page_offset
    if chunk.dictionary_page_offset:  # None or 0 when there is no dictionary
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def _check_length(url: str, metadata: Any, num_bytes: int | None) -> None:
    ends = [0]
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        ends += [_span(group.column(column))[1] for column in range(group.num_columns)]
    needed = max(ends) + metadata.serialized_size + 8
    if num_bytes is not None and needed > num_bytes:
        raise BadInput(url, f"must be {needed} bytes long according to its footer", num_bytes, REMEDY)


def _columns(url: str, schema: Any) -> tuple[str, str]:
    """Return the names of the image and label columns."""
    types = {field.name: field.type for field in schema}
    features = _features((schema.metadata or {}).get(b"huggingface", b""))
    image = _column(url, types, features, "Image", "image")
    label = _column(url, types, features, "ClassLabel", "label")
    if not {image, label} <= set(types):
        got = ", ".join(types) or "no columns"
        raise BadInput(url, "must have the columns image and label", got, f"rename them, or {RECONVERT}")
    parts = {field.name: field.type for field in types[image]} if pa.types.is_struct(types[image]) else {}
    data = parts.get("bytes", pa.null())
    if not (pa.types.is_binary(data) or pa.types.is_large_binary(data)):
        wanted = "struct<bytes: binary, path: string>"
        raise BadInput(url, f"the {image} column must be {wanted}", types[image], RECONVERT)
    if not pa.types.is_integer(types[label]):
        raise BadInput(url, f"the {label} column must be int64", types[label], RECONVERT)
    return image, label


def _column(url: str, types: dict[str, Any], features: dict[str, Any], kind: str, usual: str) -> str:
    """Return the column with the usual name, or else the only one with this kind of Hugging Face feature."""
    there = [name for name in types if isinstance(features.get(name), dict) and features[name].get("_type") == kind]
    if usual in there or not there:
        return usual
    if len(there) > 1:
        raise BadInput(
            url,
            f"must have one {usual} column",
            ", ".join(there),
            f"choose with python -m lift_ray.convert parquet ... --{usual}-column {there[0]}",
        )
    return there[0]


def _class_names(url: str, schema: Any, label: str) -> tuple[str, ...]:
    rule = "must name its classes in the schema metadata, like Hugging Face ClassLabel"
    feature = _features((schema.metadata or {}).get(b"huggingface", b"")).get(label)
    if not isinstance(feature, dict) or "names" not in feature:
        raise BadInput(url, rule, "none", CONVERT)
    names = feature["names"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadInput(url, rule, f"{str(names)[:60]!r}", CONVERT)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(url, "class names must be unique", f"{twice!r} twice", "rename one")
    return tuple(names)


@lru_cache(maxsize=4)  # hundreds of shards repeat the same thousands of class names
def _features(huggingface: bytes) -> dict[str, Any]:
    """Return the features that Hugging Face `datasets` writes into schema metadata; empty if there are none."""
    try:
        features = json.loads(huggingface)["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}
