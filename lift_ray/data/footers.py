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
from lift_ray.data.thrift import ColumnChunk, RowGroup, row_groups
from lift_ray.errors import BadInput
from lift_ray.storage.store import fetch, is_remote, locate, reached, retried
from lift_ray.text import count

TAIL_BYTES = 2**16  # most footers fit; larger ones take a second request
LARGEST_FOOTER = 2**28
RULE, REMEDY = "must be readable Parquet", f"copy it again, or {RECONVERT}"


@dataclass(frozen=True, eq=False)
class Footer:
    """Footer of a Parquet file: Arrow's `FileMetaData`, for the schema and for reading, and the row groups with their column chunks."""

    metadata: Any
    row_groups: tuple[RowGroup, ...]

    @property
    def schema(self) -> Any:
        """Arrow schema of the file."""
        return self.metadata.schema.to_arrow_schema()

    @property
    def leaves(self) -> set[str]:
        """Paths of all leaf columns, such as `image.bytes`."""
        return {self.metadata.schema.column(number).path for number in range(self.metadata.num_columns)}

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of rows of each row group."""
        return tuple(group.num_rows for group in self.row_groups)


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
    footer = read_footer(url, patience_s)
    _check_length(url, footer, num_bytes)
    schema = footer.schema
    image, label = _columns(url, schema)
    class_names = _class_names(url, schema, label)
    _check_images(url, footer, image)
    labels = _integers(url, footer, label, "label", patience_s)
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
    groups = _integers(url, footer, "group", "group", patience_s) if has_groups else None
    columns = schema.remove_metadata().to_string(show_field_metadata=False)
    return Content(columns, image, class_names, footer.rows, image_bytes(url, footer, image), labels, groups)


def _integers(url: str, footer: Footer, column: str, what: str, patience_s: float) -> Int64s:
    """Return a column of integers without missing values, (N,)."""
    cells = read_cells(url, footer, range(len(footer.row_groups)), column, patience_s)
    if cells.null_count:
        raise BadInput(url, f"every row must have a {what}", f"{cells.null_count} without one", RECONVERT)
    return np.from_dlpack(cells.combine_chunks()).astype(np.int64)  # to_numpy imports pandas


def read_footer(url: str, patience_s: float, remedy: str = REMEDY) -> Footer:
    """Return the footer of a Parquet file, in one or two requests. Raises BadInput for other files, and for an encrypted footer."""
    tail = fetch(url, -TAIL_BYTES, None, patience_s)
    magic, needed = tail[-4:], int.from_bytes(tail[-8:-4], "little") + 8
    if magic == b"PARE":
        raise _encrypted(url, "footer")
    if magic == b"PAR1" and needed > LARGEST_FOOTER:
        raise BadInput(url, f"{RULE}, with a footer of at most {LARGEST_FOOTER >> 20} MiB", f"{needed} bytes", remedy)
    if needed > len(tail) and magic == b"PAR1":
        tail = fetch(url, -needed, None, patience_s)
    with reached(url, RULE, remedy):
        return Footer(pq.read_metadata(pa.BufferReader(tail)), row_groups(tail[-needed:-8]))


def read_images(url: str, footer: Footer, group: int, column: str, patience_s: float) -> Any:
    """Return the encoded images of a row group as a binary array, in one request. Raises BadInput."""
    images = read_cells(url, footer, [group], f"{column}.bytes", patience_s)
    return images.chunk(0) if images.num_chunks == 1 else images


def read_cells(
    url: str, footer: Footer, groups: Sequence[int], leaf: str, patience_s: float, remedy: str = REMEDY
) -> Any:
    """Return the values of one leaf column of some row groups, (rows,): one request per row group, for exactly its bytes.

    Page checksums are verified. Bytes and text that Arrow stores as views, dictionaries or with a fixed size become plain arrays.

    Raises BadInput when it cannot be read, is encrypted, or a remote store keeps delivering broken data for `patience_s`.
    """
    chunks = [column_chunk(url, footer, group, leaf) for group in groups]

    def work(left_s: float) -> Any:
        pieces = {chunk.start: fetch(url, chunk.start, chunk.end, patience_s) for chunk in chunks}
        file = pa.PythonFile(_Pieces(pieces), mode="r")
        parquet = pq.ParquetFile(file, metadata=footer.metadata, page_checksum_verification=True, pre_buffer=False)
        column = parquet.read_row_groups(list(groups), columns=[leaf], use_threads=False).column(0)
        if len(column) != sum(footer.rows[group] for group in groups):
            raise ValueError(f"{len(column)} values in the column {leaf}, not one per row")
        return column

    column = retried(work, url, RULE, remedy, patience_s if is_remote(locate(url)[0]) else 0.0)
    return inner_values(column)


def inner_values(column: Any) -> Any:
    """Return the values inside structs of a single field, as plain text or bytes if they are views or dictionaries."""
    while pa.types.is_struct(column.type):
        column = pc.struct_field(column, [0])
    kind = column.type
    if pa.types.is_dictionary(kind):
        chunks = [_plain(chunk.dictionary).take(chunk.indices) for chunk in column.chunks]
        return pa.chunked_array(chunks, _plain(pa.array([], kind.value_type)).type)
    return _plain(column)


def _plain(values: Any) -> Any:
    """Return views as plain text or bytes, which all functions of Arrow support."""
    if pa.types.is_string_view(values.type):
        return values.cast(pa.large_string())
    if pa.types.is_binary_view(values.type) or pa.types.is_fixed_size_binary(values.type):
        return values.cast(pa.large_binary())
    return values


def is_text(kind: Any) -> bool:
    """Return True for an Arrow type of text, of any layout."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: Any) -> bool:
    """Return True for an Arrow type of bytes, of any layout."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    sized = pa.types.is_fixed_size_binary(kind)
    return bool(sized or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def image_bytes(url: str, footer: Footer, column: str) -> tuple[int, ...]:
    """Return the image bytes of each row group: the uncompressed size of the column chunk, close to the memory that reading takes.

    Raises BadInput if they are encrypted.
    """
    groups = range(len(footer.row_groups))
    return tuple(column_chunk(url, footer, group, f"{column}.bytes").uncompressed_bytes for group in groups)


def column_chunk(url: str, footer: Footer, group: int, leaf: str) -> ColumnChunk:
    """Return a column chunk by the path of its leaf column. Raises BadInput if it is encrypted, or missing."""
    columns = footer.row_groups[group].columns
    chunk = columns.get(leaf)
    if chunk is None and (leaf in columns or "" in columns):
        raise _encrypted(url, f"column {leaf}")
    if chunk is None:
        raise BadInput(url, RULE, f"no column {leaf} in row group {group}", REMEDY)
    return chunk


def _encrypted(url: str, what: str) -> BadInput:
    return BadInput(url, f"{RULE} without encryption", f"an encrypted {what}", "write it again without encryption")


def _check_images(url: str, footer: Footer, image: str) -> None:
    """Raise BadInput for images that are encrypted, or stored as a path without bytes, as `datasets` stores local images."""
    chunks = [column_chunk(url, footer, group, f"{image}.bytes") for group in range(len(footer.row_groups))]
    if missing := sum(chunk.num_missing or 0 for chunk in chunks):
        rule = "every row must contain the bytes of its image"
        raise BadInput(url, rule, f"{missing} without them, perhaps with a path only", f"{CONVERT} parquet")


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


def _check_length(url: str, footer: Footer, num_bytes: int | None) -> None:
    ends = [chunk.end for group in footer.row_groups for chunk in group.columns.values() if chunk]
    needed = max(ends, default=0) + footer.metadata.serialized_size + 8
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
    if not is_bytes(data):
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
