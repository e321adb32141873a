"""Find labeled images in CSV or Parquet tables, whose rows have an image or its path, and a label."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import pyarrow as pa

from lift_ray.data.convert.folder import SPLIT_DIRECTORIES
from lift_ray.data.convert.groups import folder_level, group_by_folder, with_groups
from lift_ray.data.convert.index import (
    FilesIn,
    ImageIndex,
    absolute,
    distinct,
    index_of_files,
    inside,
    notes_on_names,
    one_spelling,
    read_lines,
    readable,
)
from lift_ray.data.convert.lists import read_class_names
from lift_ray.data.convert.table_files import TableFile, open_table, reading, saved_files
from lift_ray.data.footers import is_bytes, is_text
from lift_ray.data.layout import is_saved
from lift_ray.data.local_files import read_named, with_slashes
from lift_ray.data.walk import walk
from lift_ray.errors import BadInput, did_you_mean, one_line
from lift_ray.storage.store import join, locate, reached

IMAGE_COLUMNS = frozenset(
    {"image", "img", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image_file"}
)
LABEL_COLUMNS = frozenset({"label", "class", "category", "target", "label_name", "class_name", "category_name"})
SPLIT_COLUMNS = frozenset({"split"})
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
BOOLEANS = {"false": 0.0, "true": 1.0}
EMPTY = frozenset({"", "nan", "NaN", "<NA>"})  # pandas writes missing values as these
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
class Naming:
    """Class names if a file gives them, notes on them, and the choice for names that differ only in case or spaces."""

    names: tuple[str, ...] | None
    notes: tuple[str, ...]
    similar: str | None


@dataclass(frozen=True)
class ImagesInTables:
    """Reader of images in cells of Parquet or Arrow files; a reference is `file:row group:row of the group`.

    Row groups are read as a whole, and each process caches the last `num_kept`. A row may name a file instead of holding its bytes.

    Attributes:
        base: folder of the table files.
        leaf: column of bytes.
        paths: column of paths, for rows without bytes; "" if there is none.
        root: folder that these paths are relative to; "" for the folder of the table file.
        num_kept: number of row groups to cache.
    """

    base: str
    leaf: str
    paths: str
    root: str
    num_kept: int

    def __call__(self, reference: str) -> bytes:
        """Return the image of a row. Raises ValueError for a row without one."""
        file, group, row = reference.rsplit(":", 2)
        url = join(self.base, file)
        cell = self._cell(url, self.leaf, int(group), int(row))
        if cell is not None:
            return bytes(cell)
        path = self._cell(url, self.paths, int(group), int(row)) if self.paths else None
        if path is None:
            raise ValueError("no image in this row")
        return read_named(self.root or _folder_of(url), path)

    def _cell(self, url: str, leaf: str, group: int, row: int) -> Any:
        with _ONE_AT_A_TIME:  # otherwise threads that start together would all read it
            cell = _row_groups(self.num_kept)(url, leaf, group)[row]
        return cell.as_py()


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
    similar_names: str | None = None,
) -> ImageIndex:
    """List the images in the rows of a table.

    Labels are class names, or integers from 0 that index `class_names` or the ClassLabel that Hugging Face stores. 1.0, 1e0 and
    True are the integer 1. Without such a list, the class names are sorted. Underscores in names become spaces.

    Args:
        source: for "csv" a file with a header, separated by commas, semicolons or tabs; for "parquet" a file, a folder
            or a pattern with `*`, any fsspec URL; for "arrow" a folder of this machine that `datasets` wrote with save_to_disk.
        kind: "csv", "parquet" or "arrow".
        image_column: column of paths; in Parquet and Arrow also of bytes, or of the Hugging Face struct {bytes, path}, whose
            path counts if there are no bytes. None finds it by name.
        label_column: column of labels. None finds it by name.
        split_column: column of train, val or test, with the same synonyms as split folders. None uses the column `split`, else
            the file names of Parquet (train-00000-of-00002.parquet, test/0.parquet), else all rows are for training.
        root: folder that paths are relative to, which may have the backslashes of Windows; default: the folder of the table.
        class_names: file with one class name per line, in label order.
        group: column of groups (text or integers; rows without a value are groups of their own), or `folder:N` for the N-th
            directory of the paths.
        similar_names: labels that differ only in case or spaces: "merge" them, "keep" them apart, or None to refuse them.

    Raises BadInput, with the line or row, for ambiguous columns, a row without an image or a label, an unknown
    label or split, a path outside the root, an image listed twice, a class without a training image, or groups in several splits.
    """
    by_folder = group is not None and folder_level(group) is not None
    given = Columns(image_column or "", label_column or "", split_column, None if by_folder else group)
    names, notes = read_class_names(class_names) if class_names is not None else (None, ())
    index, told = KINDS[kind](source, given, root, Naming(names, notes, similar_names))
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
    return {inside(row.image, row.where) if is_path else row.image: row.group for row in told if row.group not in EMPTY}


def _scan_csv(source: str, given: Columns, root: str | None, naming: Naming) -> tuple[ImageIndex, list[Told]]:
    folder = _folder_of(source) if root is None else root
    told = _with_slashes(_csv_rows(source, given), folder)
    names, labels, notes = _labelled(source, told, naming)
    rows = ((*row[:3], label) for row, label in zip(told, labels, strict=True))
    return index_of_files(source, folder, names, rows, notes), told


def _csv_rows(source: str, given: Columns) -> Iterator[Told]:
    """Read CSV rows with the standard library, which reports the line of each row even if cells contain line breaks."""
    text = "\n".join(read_lines(source))
    csv.field_size_limit(sys.maxsize)  # the file is in memory already; other columns may hold long texts
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        yield from _csv_told(source, reader, given)
    except csv.Error as error:
        where = f"{source}:{reader.line_num}"
        raise BadInput(where, "must be CSV with a header", f"{one_line(error)!r}", "check the file") from None


def _csv_told(source: str, reader: Any, given: Columns) -> Iterator[Told]:
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


def _scan_parquet(source: str, given: Columns, root: str | None, naming: Naming) -> tuple[ImageIndex, list[Told]]:
    base, files = _parquet_files(source)
    return _scan_files(source, base, files, given, root, naming)


def _scan_arrow(source: str, given: Columns, root: str | None, naming: Naming) -> tuple[ImageIndex, list[Told]]:
    return _scan_files(source, source, saved_files(source), given, root, naming)


def _scan_files(
    source: str,
    base: str,
    files: list[str],
    given: Columns,
    root: str | None,
    naming: Naming,
) -> tuple[ImageIndex, list[Told]]:
    open_table.cache_clear()  # files may have been written again since an earlier scan by this process
    _row_groups.cache_clear()
    split_of = _splits_by_name(source, files)
    schema = open_table(join(base, files[0])).schema
    columns = _columns(source, schema.names, given)
    leaf, paths = _leaves(source, schema, columns.image)
    _check_type(source, schema, columns.label, "pass --label-column")
    if columns.group is not None:
        _check_type(source, schema, columns.group, "choose another --group")
    told: list[Told] = []
    most_bytes = 1
    for file in files:
        url = join(base, file)
        table = open_table(url)
        with reading(url):
            if _used(table.schema, columns) != _used(schema, columns):
                raise ValueError(f"columns or class names that differ from those of {files[0]}")
            most_bytes = max([most_bytes, *table.group_bytes])
            told += _rows_of(table, url, file, split_of.get(file, "train"), columns, leaf)
    if naming.names is None and (named := _class_label_names(schema.metadata or {}, columns.label)):
        names, notes = distinct(named, source)
        naming = replace(naming, names=names, notes=(*notes, *notes_on_names(names)))
    folder = base if root is None else root
    if leaf is None:
        told = _with_slashes(told, folder)
    names, labels, notes = _labelled(source, told, naming)
    rows = [(*row[:3], label) for row, label in zip(told, labels, strict=True)]
    if leaf is None:
        return index_of_files(source, folder, names, rows, notes), told
    splits: dict[str, list[tuple[str, int]]] = {}
    for _, split, reference, label in rows:
        splits.setdefault(split, []).append((reference, label))
    named_in = "" if root is None else absolute(root)
    read = ImagesInTables(absolute(base), leaf, paths, named_in, max(1, CACHE_BYTES // most_bytes))
    return ImageIndex(source, names, splits, read, notes=notes, root=base), told


def _rows_of(table: TableFile, url: str, file: str, split: str, columns: Columns, leaf: str | None) -> Iterator[Told]:
    groups = range(len(table.rows))
    if leaf:
        table.check(leaf)  # before labels are read: Arrow 25 and earlier refuse them with an unclear error
    labels = table.cells(columns.label, groups).to_pylist()
    splits = table.cells(columns.split, groups).to_pylist() if columns.split else None
    owners = table.cells(columns.group, groups).to_pylist() if columns.group else [None] * len(labels)
    if leaf:
        images = [f"{file}:{number}:{row}" for number, rows in enumerate(table.rows) for row in range(rows)]
    else:
        images = table.cells(columns.image, groups).to_pylist()
    for number, (image, label, owner) in enumerate(zip(images, labels, owners, strict=True)):
        where = f"{url} row {number}"
        part = split if splits is None else _split_named(str(splits[number]), where)
        yield _checked(Told(where, part, image or "", _text(label), _text(owner)), columns)


def _with_slashes(told: Iterable[Told], folder: str) -> list[Told]:
    """Return rows of paths, those of Windows with slashes."""
    return [row._replace(image=with_slashes(folder, row.image)) for row in told]


def _text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def _checked(row: Told, columns: Columns) -> Told:
    for cell, column in ((row.image, columns.image), (row.label, columns.label)):
        if cell in EMPTY:
            rule, remedy = f"must have a value in the column {column!r}", "fill it or remove the row"
            raise BadInput(row.where, rule, f"{cell!r}" if cell else "none", remedy)
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
        if columns.count(given) > 1:
            raise BadInput(source, f"must have one column {given!r}", columns.count(given), "rename the others")
        return given
    found = [name for name in columns if name.lower() in known]
    if len(found) != 1 and (found or what != "split"):
        got = f"the columns {', '.join(columns)}" if columns else "no columns"
        raise BadInput(source, f"the {what} column must be unambiguous", got, f"pass --{what}-column")
    return found[0] if found else ""


def _labelled(source: str, told: list[Told], naming: Naming) -> tuple[tuple[str, ...], list[int], tuple[str, ...]]:
    """Return the class names, the label of each row, and notes on the names."""
    if not told:
        raise BadInput(source, "must contain images", "no rows", "check the file")
    numbers = [_number(row.label) for row in told]
    if None not in numbers:
        return *_numbered(
            source, told, [number for number in numbers if number is not None], naming.names
        ), naming.notes
    if decimal := next((row for row in told if NUMBER.fullmatch(row.label) and not _is_integer(row.label)), None):
        got = f"{decimal.label!r} and {told[numbers.index(None)].label!r}"
        raise BadInput(decimal.where, "labels must be all numbers or all names", got, "fix one of them")
    spelled = {row.label for row in told}
    if naming.names is None:
        name_of = one_spelling(spelled, source, naming.similar)
        names = tuple(sorted(set(name_of.values())))
        notes = notes_on_names(names)
    else:
        name_of, names, notes = {label: readable(label) for label in spelled}, naming.names, naming.notes
    labels = {name: label for label, name in enumerate(names)}
    rows = [labels.get(name_of[row.label]) for row in told]
    if None in rows:
        first = told[rows.index(None)]
        rule, remedy = "the label must be a class name", f"check the {len(names)} class names"
        raise BadInput(first.where, rule, f"{first.label!r}", remedy)
    return names, [label for label in rows if label is not None], notes


def _numbered(
    source: str, told: list[Told], numbers: list[float], names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[int]]:
    """Return the class names, and the label of each row. Raises BadInput unless all labels are integers that index the names."""
    if broken := next((row for row, number in zip(told, numbers, strict=True) if not number.is_integer()), None):
        raise BadInput(
            broken.where,
            "the label must be an integer or a name",
            f"{broken.label!r}",
            "fix it, or pass --label-column",
        )
    if names is None:
        raise BadInput(source, "numeric labels require class names", "none", "pass --class-names FILE")
    for row, number in zip(told, numbers, strict=True):
        if not 0 <= number < len(names):
            rule, remedy = f"the label must be 0 to {len(names) - 1}", f"check the {len(names)} class names"
            raise BadInput(row.where, rule, f"{row.label!r}", remedy)
    return names, [int(number) for number in numbers]


def _number(label: str) -> float | None:
    """Return the value of a label that is a number (1, 1.0, 1e0) or a boolean; None for a name."""
    if label.lower() in BOOLEANS:
        return BOOLEANS[label.lower()]
    return float(label) if NUMBER.fullmatch(label) else None


def _is_integer(label: str) -> bool:
    return label.lstrip("+-").isdecimal()


def _parquet_files(source: str) -> tuple[str, list[str]]:
    """Return the folder of the Parquet files, and their paths in it."""
    base = _folder_of(source.partition("*")[0] if "*" in source else source)
    file_system, path = locate(source)
    with reached(source, "must be a Parquet file, a folder of them, or a pattern", "check the path"):
        if "*" in source:
            found = file_system.glob(path)
        elif file_system.isdir(path):
            base = source
            found = [join(path, name) for name in walk(file_system, path).files if name.endswith(".parquet")]
            if not found and is_saved({name.rsplit("/", 1)[-1] for name in file_system.ls(path, detail=False)}):
                raise BadInput(source, "must contain Parquet files", "Arrow files of save_to_disk", "use convert arrow")
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


def _leaves(source: str, schema: Any, image: str) -> tuple[str | None, str]:
    """Return the leaf column of the bytes of images, None if the column contains paths, and the one of paths beside the bytes."""
    kind = schema.field(image).type
    if is_text(kind):
        return None, ""
    if is_bytes(kind):
        return image, ""
    inner = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if "bytes" in inner and is_bytes(inner["bytes"]):
        return f"{image}.bytes", f"{image}.path" if "path" in inner and is_text(inner["path"]) else ""
    raise BadInput(
        source, f"the column {image!r} must contain paths, bytes or struct<bytes, path>", kind, "pass --image-column"
    )


def _used(schema: Any, columns: Columns) -> Any:
    used = (columns.image, columns.label, columns.split, columns.group)
    names = [name for name in used if name in schema.names]
    return [schema.field(name).type for name in names], _class_label_names(schema.metadata or {}, columns.label)


def _check_type(source: str, schema: Any, column: str, remedy: str) -> None:
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(values) or is_text(kind)):
        raise BadInput(source, f"the column {column!r} must contain integers or text", kind, remedy)


def _class_label_names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


@cache
def _row_groups(num_kept: int) -> Callable[[str, str, int], Any]:
    return lru_cache(maxsize=num_kept)(_row_group)


def _row_group(url: str, leaf: str, group: int) -> Any:
    """Return the cells of a column of a row group, (rows,)."""
    return open_table(url).cells(leaf, [group])


KINDS = {"csv": _scan_csv, "parquet": _scan_parquet, "arrow": _scan_arrow}
