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
STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
NUM_BYTES = {BYTE: 1, DOUBLE: 8, UUID: 16}
LONGEST_SHIFT = 63  # of a varint of 64 bits


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
        return tuple(map(_row_group, _Compact(footer).struct(FILE_META_DATA)[4]))
    except (LookupError, TypeError, AttributeError, RecursionError, UnicodeDecodeError):
        raise ValueError("a damaged footer") from None


def _row_group(fields: Mapping[int, Any]) -> RowGroup:
    group = RowGroup(fields[3], fields[2], dict(map(_column_chunk, fields[1])))
    if min(group.num_rows, group.num_bytes) < 0:
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
    return path, ColumnChunk(start, end, about[5], about[6], about.get(12, {}).get(3))


class _Compact:
    """Reader of the Thrift compact protocol. IndexError and LookupError mean damaged bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, wanted: Mapping[int, Any]) -> dict[int, Any]:
        """Return the wanted fields of a struct by id."""
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            value = (kind == TRUE) if kind in (TRUE, FALSE) else self._value(kind, wanted.get(number, {}))
            if number in wanted:
                found[number] = value
        return found

    def _value(self, kind: int, wanted: Mapping[int, Any] | None) -> Any:
        if kind == STRUCT:
            return self.struct(wanted or {})
        if kind in (LIST, SET):
            head = self._byte()
            size = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15 if head & 15 != FALSE else TRUE, wanted) for _ in range(size)]
        if kind == MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            return [(self._value(kinds >> 4, None), self._value(kinds & 15, None)) for _ in range(size)]
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind in (TRUE, *NUM_BYTES):
            return self._bytes(NUM_BYTES.get(kind, 1))
        if kind in (4, 5, 6):  # i16, i32, i64
            return self._integer()
        raise LookupError(kind)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, number: int) -> bytes:
        if number > len(self._data) - self._at:
            raise LookupError(number)
        self._at += number
        return self._data[self._at - number : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while shift <= LONGEST_SHIFT:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise LookupError

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
