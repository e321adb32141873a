"""Column chunks of a Parquet footer, read from its Thrift bytes.

Arrow's own accessor, `RowGroupMetaData.column`, ends the process (std::terminate) for every chunk that it does not accept: an encrypted
one, or one with damaged statistics. So it is never called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Fields of the structs in parquet.thrift: field id -> fields of that struct, or None for a value that is needed whole
META_DATA: dict[int, Any] = {3: None, 5: None, 6: None, 7: None, 9: None, 11: None, 12: {3: None}}
COLUMN_CHUNK: dict[int, Any] = {3: META_DATA, 8: {}}
ROW_GROUP: dict[int, Any] = {1: COLUMN_CHUNK, 2: None, 3: None}
FILE_META_DATA: dict[int, Any] = {4: ROW_GROUP}
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
INTEGERS = (4, 5, 6)  # of 16, 32 and 64 bits
NUM_BYTES = {TRUE: 1, FALSE: 1, BYTE: 1, DOUBLE: 8, UUID: 16}  # of an element of a list; a boolean field has none


@dataclass(frozen=True)
class ColumnChunk:
    """Column of a row group.

    Attributes:
        start, end: its bytes in the file.
        num_values: number of values, missing ones included.
        uncompressed_bytes: size of its pages without compression.
        num_missing: number of missing values; None if the file does not say.
    """

    start: int
    end: int
    num_values: int
    uncompressed_bytes: int
    num_missing: int | None


@dataclass(frozen=True)
class RowGroup:
    """Row group of a Parquet file: its rows, uncompressed bytes, and column chunks by path; None for one that is encrypted."""

    num_rows: int
    num_bytes: int
    columns: dict[str, ColumnChunk | None]


def row_groups(footer: bytes) -> tuple[RowGroup, ...]:
    """Return the row groups of a footer (Thrift compact protocol). Raises ValueError if it is damaged."""
    try:
        return tuple(map(_row_group, _struct(footer, 0, FILE_META_DATA)[0][4]))
    except (LookupError, TypeError, AttributeError, RecursionError, UnicodeDecodeError):
        raise ValueError("a damaged footer") from None


def _row_group(fields: Mapping[int, Any]) -> RowGroup:
    group = RowGroup(fields[3], fields[2], dict(map(_column_chunk, fields[1])))
    if min(group.num_rows, group.num_bytes) < 0:
        raise LookupError
    # a row has at least one value in every column, also an empty list or a missing struct
    if any(chunk and chunk.num_values < group.num_rows for chunk in group.columns.values()):
        raise LookupError
    return group


def _column_chunk(fields: Mapping[int, Any]) -> tuple[str, ColumnChunk | None]:
    if 8 in fields and 3 not in fields:
        return "", None  # an encrypted chunk may hide even its path
    about = fields[3]
    path = b".".join(about[3]).decode()
    if 8 in fields:
        return path, None
    start = min(about[9], about.get(11) or about[9])  # 0 and None: there is no dictionary
    end = start + about[7]
    if not 0 <= start <= end or min(about[5], about[6]) < 0:
        raise LookupError
    num_missing = about.get(12, {}).get(3)
    if num_missing is not None and not 0 <= num_missing <= about[5]:
        raise LookupError
    return path, ColumnChunk(start, end, about[5], about[6], num_missing)


def _struct(data: bytes, at: int, wanted: Mapping[int, Any]) -> tuple[dict[int, Any], int]:
    """Return the wanted fields of the struct at `at` by id, and where it ends. Integers are read here: most fields are."""
    found: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        value: Any
        if kind in INTEGERS:
            value = data[at]
            if value < 128:
                value, at = (value >> 1) ^ -(value & 1), at + 1
            else:
                value, at = _integer(data, at)
        elif kind in (TRUE, FALSE):
            value = kind == TRUE
        else:
            value, at = _value(data, at, kind, wanted.get(number))
        if number in wanted:
            found[number] = value
    return found, at + 1


def _value(data: bytes, at: int, kind: int, wanted: Mapping[int, Any] | None) -> tuple[Any, int]:
    """Return the value at `at`, and where it ends."""
    if kind == BINARY:
        size, at = _varint(data, at)
        return _piece(data, at, size)
    if kind == STRUCT:
        return _struct(data, at, wanted or {})
    if kind in INTEGERS:
        return _integer(data, at)
    if kind in NUM_BYTES:
        return _piece(data, at, NUM_BYTES[kind])
    kinds: tuple[int, ...] = ()
    if kind in (LIST, SET):
        kinds, size, at = (data[at] & 15,), data[at] >> 4, at + 1
        if size == 15:
            size, at = _varint(data, at)
    elif kind == MAP:
        size, at = _varint(data, at)
        if size:
            kinds, at = (data[at] >> 4, data[at] & 15), at + 1
    else:
        raise LookupError(kind)
    values = []
    for _ in range(size):
        for each in kinds:
            value, at = _value(data, at, each, wanted)
            values.append(value)
    return values, at


def _piece(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    if size > len(data) - at:
        raise LookupError(size)
    return data[at : at + size], at + size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # 64 bits
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise LookupError


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
