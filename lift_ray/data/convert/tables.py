"""Find labeled images in CSV or Parquet tables, whose rows have an image or its path, and a label."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lift_ray.data.convert.folder import SPLIT_DIRECTORIES
from lift_ray.data.convert.groups import folder_level, group_by_folder, with_groups
from lift_ray.data.convert.index import (
    FilesIn,
    ImageIndex,
    absolute,
    check_trained,
    distinct,
    index_of_files,
    inside,
    read_lines,
    readable,
)
from lift_ray.data.convert.lists import read_class_names
from lift_ray.errors import BadInput, did_you_mean
from lift_ray.storage.store import join, locate, reached

IMAGE_COLUMNS = frozenset(
    {"image", "img", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image_file"}
)
LABEL_COLUMNS = frozenset({"label", "class", "category", "target", "label_name", "class_name", "category_name"})
SPLIT_COLUMNS = frozenset({"split"})
NUMBER = re.compile(r"-?[0-9]+")
CACHE_BYTES = 512 * 2**20
_ONE_AT_A_TIME = threading.Lock()


class Told(NamedTuple):
    """A row: its place (for messages), split, image reference, and label as text; its group, or "" if it has none."""

    where: str
    split: str
    image: str
    label: str
    group: str


@dataclass(frozen=True)
class Columns:
    """Names of the used columns; `split` is None if the table has no split column, `group` if no groups are wanted."""

    image: str
    label: str
    split: str | None
    group: str | None


@dataclass(frozen=True)
class ImagesInParquet:
    """Reader of images in cells of Parquet files; a reference is `file:row group:row of the group`.

    Row groups are read as a whole, and each process caches the last `num_kept`.
    """

    base: str
    leaf: str
    num_kept: int

    def __call__(self, reference: str) -> bytes:
        """Return the bytes in the cell. Raises ValueError for an empty cell."""
        file, group, row = reference.rsplit(":", 2)
        with _ONE_AT_A_TIME:  # otherwise threads that start together would all read it
            cell = _row_groups(self.num_kept)(join(self.base, file), self.leaf, int(group))[int(row)]
        if not cell.is_valid:
            raise ValueError("no image in this row")
        data: bytes = cell.as_py()
        return data


def scan_table(
    source: str,
    *,
    kind: str,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    root: str | None = None,
    class_names: str | None = None,
    group: str | None = None,
) -> ImageIndex:
    """List the images in the rows of a table.

    Labels are class names, or integers from 0 that index `class_names` or the ClassLabel that Hugging Face stores in Parquet.
    Without such a list, the class names are sorted. Underscores in names become spaces.

    Args:
        source: for "csv" a file with a header, separated by commas, semicolons or tabs; for "parquet" a file, a folder
            or a pattern with `*`. Any fsspec URL.
        kind: "csv" or "parquet".
        image_column: column of paths; in Parquet also of bytes, or of the Hugging Face struct {bytes, path}. None finds it by name.
        label_column: column of labels. None finds it by name.
        split_column: column of train, val or test, with the same synonyms as split folders. None uses the column `split`, else
            the file names of Parquet (train-00000-of-00002.parquet, test/0.parquet), else all rows are for training.
        root: folder that paths are relative to; default: the folder of the table.
        class_names: file with one class name per line, in label order.
        group: column of groups (text or integers; rows without a value are groups of their own), or `folder:N` for the N-th
            directory of the paths.

    Raises BadInput, with the line or row, for ambiguous columns, a row without an image or a label, an unknown
    label or split, a path outside the root, an image listed twice, a class without a training image, or groups in several splits.
    """
    by_folder = group is not None and folder_level(group) is not None
    given = Columns(image_column or "", label_column or "", split_column, None if by_folder else group)
    names, notes = read_class_names(class_names) if class_names is not None else (None, ())
    index, told = KINDS[kind](source, given, root, names, notes)
    if group is None:
        return index
    if not by_folder:
        return with_groups(index, _groups(index, told))
    if not isinstance(index.read, FilesIn):
        raise BadInput("group", f"{group} requires a column of paths", "a column of images", "give a column")
    return group_by_folder(index, group)


def _groups(index: ImageIndex, told: list[Told]) -> dict[str, str]:
    """Return the group of each reference that has one."""
    is_path = isinstance(index.read, FilesIn)
    return {inside(row.image, row.where) if is_path else row.image: row.group for row in told if row.group}


def _scan_csv(
    source: str, given: Columns, root: str | None, names: tuple[str, ...] | None, notes: tuple[str, ...]
) -> tuple[ImageIndex, list[Told]]:
    told = list(_csv_rows(source, given))
    names, labels = _labelled(source, told, names)
    rows = ((*row[:3], label) for row, label in zip(told, labels, strict=True))
    return index_of_files(source, _folder_of(source) if root is None else root, names, rows, notes), told


def _csv_rows(source: str, given: Columns) -> Iterator[Told]:
    """Read CSV rows with the standard library, which reports the line of each row even if cells contain line breaks."""
    text = "\n".join(read_lines(source))
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    with reached(source, "must be CSV with a header", "check the file"):
        header = [name.strip() for name in next(reader, [])]
        columns = _columns(source, header, given)
        image, label = header.index(columns.image), header.index(columns.label)
        split = None if columns.split is None else header.index(columns.split)
        group = None if columns.group is None else header.index(columns.group)
        for cells in reader:
            where = f"{source}:{reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise BadInput(where, f"must have {len(header)} cells, like the header", len(cells), "fix it")
            part = "train" if split is None else _split_named(cells[split], where)
            own = "" if group is None else cells[group].strip()
            yield _checked(Told(where, part, cells[image].strip(), cells[label].strip(), own), columns)


def _scan_parquet(
    source: str, given: Columns, root: str | None, names: tuple[str, ...] | None, notes: tuple[str, ...]
) -> tuple[ImageIndex, list[Told]]:
    base, files = _parquet_files(source)
    split_of = _splits_by_name(source, files)
    with _readable(join(base, files[0])), _opened(join(base, files[0])) as parquet:
        schema = parquet.schema_arrow
    columns = _columns(source, schema.names, given)
    leaf = _leaf(source, schema, columns.image)
    _check_type(source, schema, columns.label, "pass --label-column")
    if columns.group is not None:
        _check_type(source, schema, columns.group, "choose another --group")
    told: list[Told] = []
    most_bytes = 1
    for file in files:
        with _readable(join(base, file)), _opened(join(base, file)) as parquet:
            if _used(parquet.schema_arrow, columns) != _used(schema, columns):
                raise ValueError(f"columns or class names that differ from those of {files[0]}")
            groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
            most_bytes = max([most_bytes, *(group.total_byte_size for group in groups)])
            told += _parquet_rows(parquet, groups, join(base, file), file, split_of.get(file, "train"), columns, leaf)
    if names is None and (named := _class_label_names(schema.metadata or {}, columns.label)):
        names, notes = distinct(named, source)
    names, labels = _labelled(source, told, names)
    rows = [(*row[:3], label) for row, label in zip(told, labels, strict=True)]
    if leaf is None:
        return index_of_files(source, base if root is None else root, names, rows, notes), told
    splits: dict[str, list[tuple[str, int]]] = {}
    for _, split, reference, label in rows:
        splits.setdefault(split, []).append((reference, label))
    check_trained(source, names, splits)
    read = ImagesInParquet(absolute(base), leaf, max(1, CACHE_BYTES // most_bytes))
    return ImageIndex(source, names, splits, read, notes=notes), told


def _parquet_rows(
    parquet: Any, groups: list[Any], url: str, file: str, split: str, columns: Columns, leaf: str | None
) -> Iterator[Told]:
    wanted = [columns.label, columns.split, columns.group, None if leaf else columns.image]
    table = parquet.read(columns=[name for name in wanted if name])
    labels = table.column(columns.label).to_pylist()
    splits = table.column(columns.split).to_pylist() if columns.split else None
    owners = table.column(columns.group).to_pylist() if columns.group else [None] * len(labels)
    if leaf:
        images = [f"{file}:{number}:{row}" for number, group in enumerate(groups) for row in range(group.num_rows)]
    else:
        images = table.column(columns.image).to_pylist()
    for number, (image, label, owner) in enumerate(zip(images, labels, owners, strict=True)):
        where = f"{url} row {number}"
        part = split if splits is None else _split_named(str(splits[number]), where)
        yield _checked(Told(where, part, image or "", _text(label), _text(owner)), columns)


def _text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def _checked(row: Told, columns: Columns) -> Told:
    for cell, column in ((row.image, columns.image), (row.label, columns.label)):
        if not cell:
            raise BadInput(
                row.where, f"must have a value in the column {column!r}", "none", "fill it or remove the row"
            )
    return row


def _split_named(name: str, where: str) -> str:
    split = SPLIT_DIRECTORIES.get(name.strip().lower())
    if split is None:
        raise BadInput(where, "the split must be train, val or test", f"{name!r}", "rename it")
    return split


def _columns(source: str, columns: list[str], given: Columns) -> Columns:
    return Columns(
        _column(source, columns, given.image, "image", IMAGE_COLUMNS),
        _column(source, columns, given.label, "label", LABEL_COLUMNS),
        _column(source, columns, given.split or "", "split", SPLIT_COLUMNS) or None,
        None if given.group is None else _column(source, columns, given.group, "group", frozenset()),
    )


def _column(source: str, columns: list[str], given: str, what: str, known: frozenset[str]) -> str:
    """Return the given column, or else the only one with a known name; a split column is optional."""
    if given:
        if given not in columns:
            raise BadInput(
                source, f"must have the column {given!r}", but="it is missing", remedy=did_you_mean(given, columns)
            )
        return given
    found = [name for name in columns if name.lower() in known]
    if len(found) != 1 and (found or what != "split"):
        got = f"the columns {', '.join(columns)}" if columns else "no columns"
        raise BadInput(source, f"the {what} column must be unambiguous", got, f"pass --{what}-column")
    return found[0] if found else ""


def _labelled(source: str, told: list[Told], names: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[int]]:
    """Return the class names, and the label of each row."""
    if not told:
        raise BadInput(source, "must contain images", "no rows", "check the file")
    numbers = all(NUMBER.fullmatch(row.label) for row in told)
    if numbers and names is None:
        raise BadInput(source, "numeric labels require class names", "none", "pass --class-names FILE")
    names = names or tuple(sorted({readable(row.label) for row in told}))
    labels = {str(label) if numbers else name: label for label, name in enumerate(names)}
    rows = [labels.get(row.label if numbers else readable(row.label)) for row in told]
    if None in rows:
        first = told[rows.index(None)]
        rule = f"the label must be 0 to {len(names) - 1}" if numbers else "the label must be a class name"
        raise BadInput(first.where, rule, f"{first.label!r}", f"check the {len(names)} class names")
    return names, [label for label in rows if label is not None]


def _parquet_files(source: str) -> tuple[str, list[str]]:
    """Return the folder of the Parquet files, and their paths in it."""
    base = _folder_of(source.partition("*")[0] if "*" in source else source)
    file_system, path = locate(source)
    with reached(source, "must be a Parquet file, a folder of them, or a pattern", "check the path"):
        if "*" in source:
            found = file_system.glob(path)
        elif file_system.isdir(path):
            base, found = source, [name for name in file_system.find(path) if name.endswith(".parquet")]
        else:
            found = [file_system.info(path)["name"]]
    if not found:
        raise BadInput(source, "must contain Parquet files", "none", "check the path")
    base_path = locate(base)[1].rstrip("/")
    return base, sorted(name[len(base_path) :].lstrip("/") for name in found)


def _folder_of(url: str) -> str:
    folder, slash, _ = url.rpartition("/")
    return folder or slash or "."


def _splits_by_name(source: str, files: Iterable[str]) -> dict[str, str]:
    """Return the split of each file, if a part of its path begins with a split name; all files must have one, or none."""
    splits = {}
    for file in files:
        for part in file.split("/"):
            if split := SPLIT_DIRECTORIES.get(re.split(r"[-_.]", part)[0].lower()):
                splits[file] = split
    if splits and (others := [file for file in files if file not in splits]):
        raise BadInput(source, "every file name must state its split, or none may", f"{others[0]!r}", "rename it")
    return splits


def _leaf(source: str, schema: Any, image: str) -> str | None:
    """Return the Parquet column with the bytes of the images, or None if the column contains paths."""
    kind = _plain_type(schema.field(image).type)
    inner = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if _is_text(kind):
        return None
    if _is_bytes(kind) or ("bytes" in inner and _is_bytes(inner["bytes"])):
        return f"{image}.bytes" if inner else image
    raise BadInput(
        source, f"the column {image!r} must contain paths, bytes or struct<bytes, path>", kind, "pass --image-column"
    )


def _used(schema: Any, columns: Columns) -> Any:
    used = (columns.image, columns.label, columns.split, columns.group)
    names = [name for name in used if name in schema.names]
    return [schema.field(name).type for name in names], _class_label_names(schema.metadata or {}, columns.label)


def _check_type(source: str, schema: Any, column: str, remedy: str) -> None:
    kind = _plain_type(schema.field(column).type)
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        raise BadInput(source, f"the column {column!r} must contain integers or text", kind, remedy)


def _plain_type(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_label_names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _readable(url: str) -> AbstractContextManager[None]:
    return reached(url, "must be readable Parquet", "check the file")


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    file_system, path = locate(url)
    with file_system.open(path, "rb") as file:
        yield pq.ParquetFile(file)


@cache
def _row_groups(num_kept: int) -> Callable[[str, str, int], Any]:
    return lru_cache(maxsize=num_kept)(_row_group)


def _row_group(url: str, leaf: str, group: int) -> Any:
    """Return the cells of a column of bytes, (rows,)."""
    with _opened(url) as parquet:
        column = parquet.read_row_group(group, columns=[leaf]).column(0)
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


KINDS = {"csv": _scan_csv, "parquet": _scan_parquet}
