"""Parquet and Arrow files as people bring them: encrypted, damaged, of any layout, with paths of their machine, saved to disk."""

from __future__ import annotations

import base64
import errno
import json
import random
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from embedded import jpegs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from lift_ray import convert as verb
from lift_ray.data import thrift
from lift_ray.data.convert.index import ImageIndex
from lift_ray.data.convert.tables import scan_table
from lift_ray.data.footers import read_footer
from lift_ray.data.open import open_dataset
from lift_ray.data.paths import image_paths
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.inference.image_files import ImageReader, find_images

NAMES = ["crab", "newt"]
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}
LABELS = [0, 1, 0, 1]
METADATA = {"huggingface": json.dumps({"info": {"features": FEATURES}})}


def structs(images: Sequence[bytes | None], paths: Sequence[str | None] | None = None, kind: Any = None) -> Any:
    """A column as `datasets` writes it."""
    cells = [{"bytes": image, "path": path} for image, path in zip(images, paths or [None] * len(images), strict=True)]
    return pa.array(cells, pa.struct([("bytes", kind or pa.binary()), ("path", pa.string())]))


def table_of(image: Any = None, label: Any = None, **more: Any) -> pa.Table:
    image = structs(jpegs(4)) if image is None else image
    columns = {"image": image, "label": LABELS if label is None else label, **more}
    return pa.table(columns).replace_schema_metadata(METADATA)


def written(folder: Path, table: pa.Table, name: str = "train-00000-of-00001.parquet", **options: Any) -> Path:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(table, folder / name, **{"row_group_size": 2, **options})
    return folder / name


def trained(folder: Path) -> list[bytes]:
    """The images that training reads."""
    split = open_dataset(str(folder)).split("train")
    return RowReader(split).read(np.arange(split.num_samples))


def converted(folder: Path, **options: Any) -> list[bytes]:
    """The images that `convert parquet` reads."""
    return images_of(scan_table(str(folder), kind="parquet", **options))


def images_of(index: ImageIndex, split: str = "train") -> list[bytes]:
    return [index.read(reference) for reference, _ in index.splits[split]]


def predicted(folder: Path, column: str | None = None) -> list[bytes | None]:
    """The images that `predict` reads."""
    found = find_images([str(folder)], column)
    reader = ImageReader(found)
    try:
        return list(reader.read(0, len(found)))
    finally:
        reader.close()


READERS = (trained, converted, predicted)


# ---- encryption


class Keys(pe.KmsClient):  # type: ignore[misc]
    """Keys that are no secret."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


def encrypted(folder: Path, columns: list[str], plaintext_footer: bool) -> Path:
    config = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": columns}, plaintext_footer=plaintext_footer
    )
    factory = pe.CryptoFactory(lambda _: Keys())
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
    table = table_of(secret=["a"] * 4)
    file = folder / "train-00000-of-00001.parquet"
    with pq.ParquetWriter(file, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return file


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("columns", "plaintext_footer", "what"),
    [(["image.bytes"], True, "column image.bytes"), (["secret"], False, "footer")],
)
def test_encrypted_images_and_footers_are_one_line_and_do_not_abort_the_process(
    tmp_path: Path, read: Callable[[Path], object], columns: list[str], plaintext_footer: bool, what: str
) -> None:
    file = encrypted(tmp_path, columns, plaintext_footer)
    with pytest.raises(BadInput) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{file}: must be readable Parquet without encryption, but got an encrypted {what}; write it again without encryption"
    )


@pytest.mark.parametrize("read", [trained, converted])
def test_encrypted_labels_are_one_line_too(tmp_path: Path, read: Callable[[Path], object]) -> None:
    encrypted(tmp_path, ["label"], True)
    with pytest.raises(BadInput, match=r"but got an encrypted column label; write it again without encryption$"):
        read(tmp_path)


@pytest.mark.parametrize("read", READERS)
def test_other_columns_may_be_encrypted(tmp_path: Path, read: Callable[[Path], object]) -> None:
    encrypted(tmp_path, ["secret"], True)
    assert read(tmp_path) == jpegs(4)


# ---- footers


def test_column_chunks_are_those_that_arrow_finds(tmp_path: Path) -> None:
    file = written(tmp_path, table_of(structs([*jpegs(3), None])), compression="zstd")
    found, footer = read_footer(str(file), 0.0).row_groups, pq.read_metadata(file)
    assert len(found) == footer.num_row_groups == 2
    for number, group in enumerate(found):
        theirs = footer.row_group(number)
        assert (group.num_rows, group.num_bytes) == (theirs.num_rows, theirs.total_byte_size)
        assert list(group.columns) == [theirs.column(column).path_in_schema for column in range(theirs.num_columns)]
        for column, chunk in enumerate(group.columns.values()):
            other = theirs.column(column)
            start = other.dictionary_page_offset or other.data_page_offset
            assert chunk == thrift.ColumnChunk(
                start,
                start + other.total_compressed_size,
                other.num_values,
                other.total_uncompressed_size,
                other.statistics.null_count,
            )


def test_a_footer_that_is_cut_anywhere_is_a_value_error(tmp_path: Path) -> None:
    data = written(tmp_path, table_of()).read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert len(thrift.row_groups(footer)) == 2
    for end in range(0, len(footer) - 1, 31):
        with pytest.raises(ValueError, match=r"^a damaged footer$"):
            thrift.row_groups(footer[:end])


@pytest.mark.parametrize("byte", [0x33, 0x36, 0xFF])
def test_numbers_of_a_footer_are_plausible_whatever_byte_is_changed(tmp_path: Path, byte: int) -> None:
    data = written(tmp_path, table_of(structs([b"x"] * 4))).read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    for place in range(len(footer)):
        with suppress(ValueError):
            for group in thrift.row_groups(footer[:place] + bytes([byte]) + footer[place + 1 :]):
                for chunk in group.columns.values():
                    assert chunk is None or chunk.num_values >= group.num_rows
                    assert chunk is None or chunk.num_missing is None or 0 <= chunk.num_missing <= chunk.num_values


@pytest.mark.parametrize("read", READERS)
def test_rows_of_lists_may_have_no_value_or_several(tmp_path: Path, read: Callable[[Path], object]) -> None:
    lists = pa.array([[], None, [1, None, 3], [4]])
    nested = pa.array(
        [None, {"a": []}, {"a": [{"b": None}]}, {"a": None}],
        pa.struct([("a", pa.list_(pa.struct([("b", pa.int8())])))]),
    )
    written(tmp_path, table_of(boxes=lists, nested=nested, empty=pa.nulls(4)))
    assert read(tmp_path) == jpegs(4)


def error_of(read: Callable[[Path], object], folder: Path) -> str:
    try:
        read(folder)
    except BadInput as error:
        return str(error)
    except ValueError as error:
        assert read is converted, "training and predict raise BadInput only"
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_footer_is_one_line_or_read_and_never_ends_the_process(tmp_path: Path, seed: int) -> None:
    data = written(tmp_path, table_of(structs([b"x" * 50] * 4))).read_bytes()
    numbers = random.Random(seed)
    start, refused = len(data) - 8 - int.from_bytes(data[-8:-4], "little"), 0
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(numbers.randint(1, 3)):
            broken[numbers.randrange(start, len(data))] = numbers.choice([0, 255, numbers.randrange(256)])
        (tmp_path / "train-00000-of-00001.parquet").write_bytes(broken)
        errors = [error for read in READERS if (error := error_of(read, tmp_path))]
        assert not any("\n" in error for error in errors)
        refused += len(errors)
    assert refused > 30


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-9], "Parquet magic bytes not found in footer"),
        (lambda data: data[: len(data) // 2], "Parquet magic bytes not found in footer"),
        (lambda data: b"", "Parquet file size is 0 bytes"),
        (lambda data: data[:-8] + (len(data) + 99).to_bytes(4, "little") + b"PAR1", "footer"),
        (lambda data: data[:-8] + b"\xff\xff\xff\x7f" + b"PAR1", "a footer of at most 256 MiB"),
    ],
)
def test_a_parquet_file_that_is_cut_or_has_an_absurd_footer_is_one_line(
    tmp_path: Path, read: Callable[[Path], object], change: Callable[[bytes], bytes], reason: str
) -> None:
    file = written(tmp_path, table_of())
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(BadInput, match=f"^{re.escape(str(file))}: must be readable Parquet.*{reason}[^\n]*$"):
        read(tmp_path)


# ---- Arrow types

LAYOUTS = {
    "view": pa.binary_view(),
    "large": pa.large_binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
    "dictionary of large": pa.dictionary(pa.int8(), pa.large_binary()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("read", READERS)
def test_images_of_every_layout_of_bytes_are_read(
    tmp_path: Path, read: Callable[[Path], list[bytes]], layout: str
) -> None:
    flat = pa.array(jpegs(4)).cast(LAYOUTS[layout]) if "dictionary" not in layout else None
    flat = pa.array(jpegs(4), LAYOUTS[layout].value_type).dictionary_encode() if flat is None else flat
    image = pa.StructArray.from_arrays([flat, pa.array(["a"] * 4, pa.string_view())], ["bytes", "path"])
    written(tmp_path, table_of(image), row_group_size=4)  # Arrow cannot cut views
    assert read(tmp_path) == jpegs(4)
    assert image_paths(open_dataset(str(tmp_path)).split("train")) == ["a"] * 4


@pytest.mark.parametrize("read", [converted, predicted])
def test_images_of_one_size_need_no_struct(tmp_path: Path, read: Callable[[Path], list[bytes]]) -> None:
    images = [bytes([number]) * 90 for number in range(4)]
    written(tmp_path, table_of(pa.array(images, pa.binary(90))))
    assert read(tmp_path) == images


@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
)
def test_labels_paths_splits_and_groups_of_every_layout_of_text_are_read(tmp_path: Path, kind: Any) -> None:
    def text(values: list[str]) -> Any:
        values = pa.array(values)
        return values.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else values.cast(kind)

    for number, image in enumerate(jpegs(4)):
        (tmp_path / f"{number}.jpg").write_bytes(image)
    columns = {
        "image": text([f"{number}.jpg" for number in range(4)]),
        "label": text([NAMES[label] for label in LABELS]),
        "split": text(["train", "train", "val", "val"]),
        "site": text(["x", "y", "z", "z"]),
    }
    file = written(tmp_path, pa.table(columns), "t.parquet", row_group_size=4)
    index = scan_table(str(file), kind="parquet", group="site")
    assert index.class_names == tuple(NAMES)
    assert images_of(index) == jpegs(4)[:2]
    assert images_of(index, "validation") == jpegs(4)[2:]
    assert index.groups == {"0.jpg": "x", "1.jpg": "y", "2.jpg": "z", "3.jpg": "z"}


# ---- local files


def local_images(folder: Path, paths: Sequence[str | None]) -> Path:
    """A table whose first image has bytes, and whose others only have paths; the files lie in `folder/photos`."""
    (folder / "photos").mkdir(parents=True)
    for number, image in enumerate(jpegs(4)):
        (folder / "photos" / f"{number}.jpg").write_bytes(image)
    written(folder, table_of(structs([jpegs(4)[0], None, None, None], ["0.jpg", *paths])))
    return folder


@pytest.mark.parametrize("read", [converted, predicted])
def test_rows_without_bytes_are_read_from_the_file_that_they_name(
    tmp_path: Path, read: Callable[[Path], list[bytes]]
) -> None:
    local_images(tmp_path, ["photos/1.jpg", f"{tmp_path}/photos/2.jpg", "./photos/3.jpg"])
    assert read(tmp_path) == jpegs(4)


def test_a_root_moves_the_relative_paths(tmp_path: Path) -> None:
    local_images(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    assert converted(tmp_path, root=f"{tmp_path}/photos") == jpegs(4)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("photos/none.jpg", "no image in this row, and no file {0}/photos/none.jpg"),
        ("/dev/null", "no image in this row, and no file /dev/null"),  # and not /dev/zero, which would be read for ever
        ("photos", "no image in this row, and no file {0}/photos"),
        ("photos/1.jpg/1.jpg", "no image in this row, and no file {0}/photos/1.jpg/1.jpg"),
        ("x" * 300, f"no image in this row, and no file {{0}}/{'x' * 300}"),
        ("a\0b", "no image in this row, and no file {0}/a\0b"),
        ("../photos/1.jpg", "no image in this row, and a path outside of {0}: '../photos/1.jpg'"),
        ("s3://bucket/1.jpg", "no image in this row, and a path outside of {0}: 's3://bucket/1.jpg'"),
        (None, "no image in this row"),
    ],
)
def test_a_row_that_names_no_file_is_a_bad_image_with_its_reason(tmp_path: Path, path: str | None, reason: str) -> None:
    folder = local_images(tmp_path / "t", [path, "photos/2.jpg", "photos/3.jpg"])
    with pytest.raises(BadInput) as caught:
        verb.main(["parquet", str(folder), f"{tmp_path}/out", "--test-frac", "0"])
    place = f"{folder}/train-00000-of-00001.parquet:0:1"
    assert str(caught.value) == (
        f"{place}: must be an intact image, but got {reason.format(folder)[:300]}; remove it or pass --skip-bad"
    )
    assert predicted(folder) == [jpegs(4)[0], None, *jpegs(4)[2:]]


@pytest.mark.parametrize("read", [converted, predicted])
def test_a_named_file_that_cannot_be_read_is_no_row_without_an_image(
    tmp_path: Path, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    local_images(tmp_path, ["photos/1.jpg", "photos/2.jpg", "photos/3.jpg"])

    def cat_file(self: Any, path: str, *args: Any, **options: Any) -> bytes:
        if path.endswith("2.jpg"):
            raise OSError(errno.EIO, "disk error")
        return AbstractFileSystem.cat_file(self, path, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    with pytest.raises(
        BadInput, match=rf"^{tmp_path}/photos/2.jpg: must be readable, but got .*disk error.*; check the"
    ):
        read(tmp_path)


def test_a_dataset_of_paths_points_to_convert(tmp_path: Path) -> None:
    local_images(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    with pytest.raises(BadInput) as caught:
        open_dataset(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/train-00000-of-00001.parquet: every row must contain the bytes of its image, but got 3 without them, "
        "perhaps with a path only; make it with python -m lift_ray.convert parquet"
    )


# ---- save_to_disk


def saved(folder: Path, table: pa.Table, split: str = "", **state: Any) -> Path:
    """Write a table as `datasets` does: two Arrow streams and two JSON files."""
    here = folder / split
    here.mkdir(parents=True)
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for number, name in enumerate(names):
        with pa.OSFile(str(here / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(2 * number, 2), max_chunksize=1)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split or None, **state}
    (here / "state.json").write_text(json.dumps(state))
    (here / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    if split:
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return folder


def test_a_dataset_that_was_saved_to_disk_is_a_source(tmp_path: Path) -> None:
    index = scan_table(str(saved(tmp_path / "saved", table_of())), kind="arrow")
    assert index.class_names == tuple(NAMES)
    assert [label for _, label in index.splits["train"]] == LABELS
    assert images_of(index) == jpegs(4)


def test_a_dataset_dict_with_train_and_test_only_gets_validation_from_train(tmp_path: Path) -> None:
    source, repeated = tmp_path / "saved", table_of(structs(jpegs(12)), LABELS * 3)
    saved(source, repeated, "train")
    saved(source, table_of(), "test")
    assert not verb.main(["arrow", str(source), f"{tmp_path}/out"])
    dataset = open_dataset(f"{tmp_path}/out")
    assert {name: split.num_samples for name, split in dataset.splits.items()} == {
        "train": 2,
        "validation": 2,
        "test": 4,
    }
    assert dataset.validation == "drawn"


def test_parquet_with_train_and_test_only_gets_validation_from_train(tmp_path: Path) -> None:
    written(tmp_path / "p", table_of(structs(jpegs(12)), LABELS * 3))
    written(tmp_path / "p", table_of(), "test-00000-of-00001.parquet")
    assert not verb.main(["parquet", f"{tmp_path}/p", f"{tmp_path}/out"])
    found = {name: split.num_samples for name, split in open_dataset(f"{tmp_path}/out").splits.items()}
    assert found == {"train": 10, "validation": 2, "test": 4}


def test_saved_rows_may_name_files_and_have_other_columns(tmp_path: Path) -> None:
    image = structs([None] * 4, [f"{tmp_path}/{number}.jpg" for number in range(4)])
    for number, data in enumerate(jpegs(4)):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    table = table_of(image).rename_columns(["photo", "species"])
    index = scan_table(
        str(saved(tmp_path / "saved", table.replace_schema_metadata({}))),
        kind="arrow",
        image_column="photo",
        label_column="species",
        class_names=str(names_file(tmp_path)),
    )
    assert images_of(index) == jpegs(4)


def names_file(folder: Path) -> Path:
    (folder / "names.txt").write_text("crab\nnewt\n")
    return folder / "names.txt"


def test_only_convert_arrow_takes_a_saved_folder_and_the_others_say_so(tmp_path: Path) -> None:
    source = saved(tmp_path / "saved", table_of())
    with pytest.raises(BadInput) as caught:
        open_dataset(str(source))
    assert str(caught.value) == (
        f"{source}: must be a folder of Parquet shards, but got one that datasets wrote with save_to_disk; "
        "convert it with python -m lift_ray.convert arrow"
    )
    with pytest.raises(BadInput) as caught:
        scan_table(str(source), kind="parquet")
    assert str(caught.value) == (
        f"{source}: must contain Parquet files, but got Arrow files of save_to_disk; use convert arrow"
    )
    with pytest.raises(BadInput) as caught:
        find_images([str(source)])
    assert str(caught.value) == (
        f"{source}: must be images, a folder of images, or Parquet shards, but got Arrow files, as save_to_disk writes them; "
        "convert them with python -m lift_ray.convert arrow"
    )


RULE = "must be a folder that datasets wrote with save_to_disk"
UNFIT: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "state.json").unlink(), f"{{0}}: {RULE}, but got no state.json; check the path"),
    (
        lambda folder: (folder / "state.json").write_text("{"),
        f"{{0}}/state.json: {RULE}, but got 'Expecting property name",
    ),
    (
        lambda folder: (folder / "state.json").write_text("[]"),
        f"{{0}}: {RULE}, but got ",
    ),
    (
        lambda folder: (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]})),
        "{0}: must name a file in the source, but got '../x.arrow', a path outside the source; fix it",
    ),
    (
        lambda folder: (folder / "state.json").write_text(json.dumps({"_indices_data_files": ["i.arrow"]})),
        "{0}: must store its rows in their order, but got indices; call flatten_indices() before save_to_disk",
    ),
    (
        lambda folder: (folder / "data-00001-of-00002.arrow").unlink(),
        "{0}/data-00001-of-00002.arrow: must be readable Arrow, but nothing is there; check the path",
    ),
    (
        lambda folder: (folder / "data-00001-of-00002.arrow").write_bytes(b"ARROW1 and more"),
        "{0}/data-00001-of-00002.arrow: must be readable Arrow, but got ",
    ),
]


@pytest.mark.parametrize(("damage", "message"), UNFIT)
def test_a_saved_folder_that_is_unfit_is_one_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    source = saved(tmp_path / "saved", table_of())
    damage(source)
    with pytest.raises(BadInput, match="^" + re.escape(message.format(source)) + "[^\n]*$"):
        scan_table(str(source), kind="arrow")


def test_a_saved_folder_is_read_on_this_machine_only() -> None:
    with pytest.raises(BadInput) as caught:
        scan_table("s3://bucket/saved", kind="arrow")
    assert str(caught.value) == f"s3://bucket/saved: {RULE} on this machine, but got a URL; copy it here"
