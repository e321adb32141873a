"""Files of tables with images: Parquet, and the Arrow streams that `datasets` writes with save_to_disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa

from lift_ray.data.convert.index import inside
from lift_ray.data.footers import Footer, column_chunk, inner_values, read_cells, read_footer
from lift_ray.data.layout import SAVED_DICT, SAVED_STATE, is_saved
from lift_ray.errors import BadInput
from lift_ray.storage.store import PATIENCE_S, fetch, join, locate, reached

REMEDY = "check the file"
SAVED_RULE = "must be a folder that datasets wrote with save_to_disk"


class TableFile(Protocol):
    """An open table file. `rows` has the number of rows of each of its row groups, `group_bytes` their size in memory."""

    @property
    def schema(self) -> Any:
        """Arrow schema."""
        ...

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of rows of each row group."""
        ...

    @property
    def group_bytes(self) -> tuple[int, ...]:
        """Uncompressed bytes of each row group; () if reading it takes no memory."""
        ...

    def cells(self, leaf: str, groups: Sequence[int]) -> Any:
        """Return the values of a leaf column (`image.bytes`) of some row groups, (rows,). Raises BadInput."""
        ...

    def check(self, leaf: str) -> None:
        """Raise BadInput if a leaf column is encrypted."""
        ...


@dataclass(frozen=True, eq=False)
class ParquetTable:
    """A Parquet file."""

    url: str
    footer: Footer

    @property
    def schema(self) -> Any:
        """Arrow schema."""
        return self.footer.schema

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of rows of each row group."""
        return self.footer.rows

    @property
    def group_bytes(self) -> tuple[int, ...]:
        """Uncompressed bytes of each row group."""
        return tuple(group.num_bytes for group in self.footer.row_groups)

    def cells(self, leaf: str, groups: Sequence[int]) -> Any:
        """Return the values of a leaf column of some row groups, (rows,). Raises BadInput."""
        return read_cells(self.url, self.footer, groups, leaf, PATIENCE_S, REMEDY)

    def check(self, leaf: str) -> None:
        """Raise BadInput if a leaf column is encrypted."""
        for group in range(len(self.rows)):
            column_chunk(self.url, self.footer, group, leaf)


@dataclass(frozen=True, eq=False)
class ArrowTable:
    """An Arrow stream on this machine, mapped into memory; its record batches are the row groups."""

    url: str
    schema: Any
    batches: tuple[Any, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of rows of each record batch."""
        return tuple(batch.num_rows for batch in self.batches)

    @property
    def group_bytes(self) -> tuple[int, ...]:
        """(): nothing is copied."""
        return ()

    def check(self, leaf: str) -> None:
        """Accept every column: Arrow streams are never encrypted."""

    def cells(self, leaf: str, groups: Sequence[int]) -> Any:
        """Return the values of a leaf column of some record batches, (rows,). Raises BadInput for invalid offsets."""
        name, _, inner = leaf.partition(".")
        with reading(self.url):
            whole = pa.chunked_array(
                [self.batches[group].column(name) for group in groups], self.schema.field(name).type
            )
            whole.validate(full=True)
            parts = [chunk.field(inner) for chunk in whole.chunks] if inner else whole.chunks
            return inner_values(pa.chunked_array(parts, parts[0].type) if parts else whole)


@lru_cache(maxsize=64)
def open_table(url: str) -> TableFile:
    """Open a table file by its suffix: `.arrow` is an Arrow stream, everything else Parquet. Raises BadInput."""
    if not url.endswith(".arrow"):
        return ParquetTable(url, read_footer(url, PATIENCE_S, REMEDY))
    with reading(url), pa.memory_map(locate(url)[1]) as file:
        reader = pa.ipc.open_stream(file)
        return ArrowTable(url, reader.schema, tuple(reader))


def reading(url: str) -> AbstractContextManager[None]:
    """Turn any failure to read a table file into BadInput."""
    return reached(url, f"must be readable {'Arrow' if url.endswith('.arrow') else 'Parquet'}", REMEDY)


def saved_files(source: str) -> list[str]:
    """Return the paths of the Arrow files in a folder that `datasets` wrote with save_to_disk: a Dataset or a DatasetDict.

    Raises BadInput for other folders, and for one that is not on this machine: the streams are mapped into memory.
    """
    if "://" in source.removeprefix("file://"):
        raise BadInput(source, f"{SAVED_RULE} on this machine", "a URL", "copy it here")
    file_system, path = locate(source)
    with reached(source, SAVED_RULE, "check the path"):
        names = {name.rsplit("/", 1)[-1] for name in file_system.ls(path, detail=False)}
        if not is_saved(names):
            raise BadInput(source, SAVED_RULE, f"no {SAVED_STATE}", "check the path")
        splits = _json(source, SAVED_DICT)["splits"] if SAVED_DICT in names else [""]
        return [
            inside(f"{split}/{name}".lstrip("/"), source) for split in splits for name in _data_files(source, split)
        ]
    raise AssertionError("unreachable")


def _data_files(source: str, split: str) -> list[str]:
    folder = join(source, split) if split else source
    state = _json(folder, SAVED_STATE)
    if state.get("_indices_data_files"):
        rule = "must store its rows in their order"
        raise BadInput(folder, rule, "indices", "call flatten_indices() before save_to_disk")
    return [each["filename"] for each in state["_data_files"]]


def _json(folder: str, name: str) -> Any:
    url = join(folder, name)
    content = fetch(url, None, None, PATIENCE_S)
    with reached(url, SAVED_RULE, "check the folder"):
        return json.loads(content)
