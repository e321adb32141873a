"""CSV files and Parquet as sources: what is found, what is read, and one line for what is wrong."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import jpegs

from lift_ray.data.convert import tables
from lift_ray.data.convert.index import ImageIndex
from lift_ray.data.convert.splitting import Division, divide
from lift_ray.data.convert.tables import scan_table
from lift_ray.data.open import EMBEDDED, open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput

LABELS = ["car_side", "yin yang", "car side", "yin_yang", "car_side", "yin yang"]
NUMBERS = [0, 1, 0, 1, 0, 1]


def read(index: ImageIndex, split: str = "train") -> list[tuple[bytes, int]]:
    """The images of a split, read as another process would."""
    reader = pickle.loads(pickle.dumps(index.read))
    return [(reader(reference), label) for reference, label in index.splits[split]]


def write_csv(folder: Path, text: str) -> str:
    (folder / "photos").mkdir(exist_ok=True)
    for number, image in enumerate(jpegs()):
        (folder / "photos" / f"{number}.jpg").write_bytes(image)
    (folder / "names.txt").write_text("car_side\nyin_yang\n")
    (folder / "t.csv").write_text(text)
    return f"{folder}/t.csv"


def write_parquet(folder: Path, name: str = "t.parquet", huggingface: object = None, **columns: Any) -> str:
    columns = {"image": jpegs()[:6], "label": LABELS, **columns}
    table = pa.table({column: values for column, values in columns.items() if values is not None})
    if huggingface:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": huggingface}})})
    (folder / name).parent.mkdir(exist_ok=True)
    pq.write_table(table, folder / name, row_group_size=2)
    return f"{folder}/{name}"


# ---- CSV


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csv_names_images_beside_it_and_classes(tmp_path: Path, mark: str) -> None:
    rows = [["id", "Path", "label"], ["1", "photos/1.jpg", "yin_yang"], ["2", "photos/0.jpg", "car side"]]
    index = scan_table(write_csv(tmp_path, "\n".join(mark.join(row) for row in rows)), kind="csv")
    assert index.class_names == ("car side", "yin yang")
    assert read(index) == [(jpegs()[1], 1), (jpegs()[0], 0)]


def test_a_csv_may_have_splits_numbers_quotes_and_another_root(tmp_path: Path) -> None:
    text = (
        'split,file,caption,class\nTraining,0.jpg,"a, b",0\ntrain,1.jpg,"two\nlines",1\n\nval,2.jpg,,1\ntest,3.jpg,,0\n'
    )
    index = scan_table(
        write_csv(tmp_path, text), kind="csv", root=f"{tmp_path}/photos", class_names=f"{tmp_path}/names.txt"
    )
    assert index.class_names == ("car side", "yin yang")
    found = [read(index, split) for split in ("train", "validation", "test")]
    assert found == [[(jpegs()[0], 0), (jpegs()[1], 1)], [(jpegs()[2], 1)], [(jpegs()[3], 0)]]


def test_a_class_name_file_orders_labels_that_are_names(tmp_path: Path) -> None:
    source = write_csv(tmp_path, "image,label\nphotos/0.jpg,b\nphotos/1.jpg,a\n")
    (tmp_path / "names.txt").write_text("b\na\n")
    assert read(scan_table(source, kind="csv", class_names=f"{tmp_path}/names.txt")) == [
        (jpegs()[0], 0),
        (jpegs()[1], 1),
    ]


GROUPED = "image,label,site\nphotos/0.jpg,a,north\n"
GROUPED += "./photos/1.jpg,b, north \nphotos/2.jpg,a,\nphotos/3.jpg,b,south\nphotos/4.jpg,a,nan\n"


def test_a_column_of_a_csv_names_groups_and_rows_without_a_value_are_alone(tmp_path: Path) -> None:
    index = scan_table(write_csv(tmp_path, GROUPED), kind="csv", group="site")
    assert index.groups == {"photos/0.jpg": "north", "photos/1.jpg": "north", "photos/3.jpg": "south"}
    assert index.notes == ("images without a group: 2; each is a group of its own",)


def test_a_directory_of_the_paths_in_a_csv_is_a_group_too(tmp_path: Path) -> None:
    index = scan_table(write_csv(tmp_path, GROUPED), kind="csv", group="folder:1")
    assert index.groups == {f"photos/{number}.jpg": "photos" for number in range(5)}


def test_a_table_without_group_has_none(tmp_path: Path) -> None:
    assert scan_table(write_csv(tmp_path, GROUPED), kind="csv").groups is None


NAMES = {"class_names": "{0}/names.txt"}
CSV_FAULTS: list[tuple[str, dict[str, str], str]] = [
    ("", {}, ": the image column must be unambiguous, but got no columns; pass --image-column"),
    ("id,label\n", {}, ": the image column must be unambiguous, but got the columns id, label; pass --image-column"),
    (
        "image,label,class\n",
        {},
        ": the label column must be unambiguous, but got the columns image, label, class; pass --label-column",
    ),
    (
        "image,label\n",
        {"label_column": "lable"},
        ": must have the column 'lable', but it is missing; did you mean 'label'?",
    ),
    ("image,label\n", {}, ": must contain images, but got no rows; check the file"),
    ("image,label\na,b,c\n", {}, ":2: must have 2 cells, like the header, but got 3; fix it"),
    (
        "image,label\na,b\n ,b\n",
        {},
        ":3: must have a value in the column 'image', but got none; fill it or remove the row",
    ),
    (
        'image,label\n"a\nb",b\nc,\n',
        {},
        ":4: must have a value in the column 'label', but got none; fill it or remove the row",
    ),
    (
        "image,label,split\na,b,train\nc,b,eval\n",
        {},
        ":3: the split must be train, val or test, but got 'eval'; rename it",
    ),
    ("image,label\na,b\na,b\n", {}, ":3: each image must be listed once, but 'a' is in {0}/t.csv:2 too; remove one"),
    (
        "image,label\na,0\nb,1\n",
        {},
        ": numeric labels require class names, but got none; pass --class-names FILE",
    ),
    ("image,label\na,0\nb,2\n", NAMES, ":3: the label must be 0 to 1, but got '2'; check the 2 class names"),
    ("image,label\na,x\n", NAMES, ":2: the label must be a class name, but got 'x'; check the 2 class names"),
    (
        "image,label,split\na,x,train\nb,y,val\n",
        {},
        ": every class must have an image, but 'y' has none; add images or remove these classes",
    ),
    (
        "image,label,site\na,b,x\n",
        {"group": "sit"},
        ": must have the column 'sit', but it is missing; did you mean 'site'?",
    ),
    (
        "image,label,site,split\na,b,x,train\nb,b,y,val\nc,b,x,val\n",
        {"group": "site"},
        ": each group must be in one split, but got 'x' in train and validation; move its images to one split, "
        "or leave out --group",
    ),
    ('image,label\n"a,b\n', {}, ":2: must be CSV with a header, but got 'unexpected end of data'; check the file"),
]


@pytest.mark.parametrize(("text", "options", "message"), CSV_FAULTS)
def test_a_fault_in_a_csv_gives_a_one_line_error(
    tmp_path: Path, text: str, options: dict[str, str], message: str
) -> None:
    source = write_csv(tmp_path, text)
    given = {name: value.format(tmp_path) for name, value in options.items()}
    with pytest.raises(BadInput, match="^" + re.escape(source + message.format(tmp_path)) + "$"):
        divide(scan_table(source, kind="csv", **given), Division())  # type: ignore[arg-type]


# ---- Parquet


def test_the_embedded_dataset_is_found_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset("embedded:caltech101-lt")
    folder = Path(str(files("lift_ray"))) / "assets" / EMBEDDED["caltech101-lt"][0]
    index = scan_table(str(folder), kind="parquet")
    assert index.class_names == tuple(name.replace("_", " ") for name in dataset.class_names)
    assert sorted(index.splits) == sorted(dataset.splits)
    for name, split in dataset.splits.items():
        assert [label for _, label in index.splits[name]] == split.labels.tolist()
        rows = np.arange(0, split.num_samples, 97)
        with RowReader(split) as reader:
            assert [index.read(index.splits[name][row][0]) for row in rows] == reader.read(rows)


def structs() -> list[dict[str, Any]]:
    return [{"bytes": image, "path": "x.jpg"} for image in jpegs()[:6]]


SHAPES: dict[str, Callable[[], dict[str, Any]]] = {
    "bytes": dict,
    "large bytes": lambda: {"image": pa.array(jpegs()[:6], pa.large_binary())},
    "struct": lambda: {"image": structs()},
    "categories": lambda: {"label": pa.array(LABELS).dictionary_encode()},
    "numbers": lambda: {"label": NUMBERS, "huggingface": {"label": {"names": ["car_side", "yin_yang"]}}},
    "other names": lambda: {"image": None, "label": None, "img": structs(), "class": LABELS, "id": LABELS},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parquet_holds_images_as_bytes_or_as_hugging_face_does(tmp_path: Path, shape: str) -> None:
    index = scan_table(write_parquet(tmp_path, **SHAPES[shape]()), kind="parquet")
    assert index.class_names == ("car side", "yin yang")
    assert read(index) == list(zip(jpegs()[:6], NUMBERS, strict=True))
    assert [reference for reference, _ in index.splits["train"]][1:3] == ["t.parquet:0:1", "t.parquet:1:0"]


def test_parquet_may_hold_paths(tmp_path: Path) -> None:
    write_csv(tmp_path, "")
    source = write_parquet(tmp_path, image=None, file_name=[f"photos/{number}.jpg" for number in range(6)])
    assert read(scan_table(source, kind="parquet")) == list(zip(jpegs()[:6], NUMBERS, strict=True))


@pytest.mark.parametrize(
    ("train", "test"),
    [("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"), ("train/0.parquet", "test/0.parquet")],
)
def test_parquet_files_tell_their_split_by_name(tmp_path: Path, train: str, test: str) -> None:
    write_parquet(tmp_path, train)
    write_parquet(tmp_path, test, image=jpegs()[6:])
    index = scan_table(str(tmp_path), kind="parquet")
    assert read(index) == list(zip(jpegs()[:6], NUMBERS, strict=True))
    assert read(index, "test") == list(zip(jpegs()[6:], NUMBERS, strict=True))
    only = scan_table(f"{tmp_path}/{train.replace('0', '*', 1)}", kind="parquet")
    assert {split: len(rows) for split, rows in only.splits.items()} == {"train": 6}


def test_a_split_column_goes_before_file_names_and_a_store_is_as_good_as_a_disk(tmp_path: Path) -> None:
    write_parquet(tmp_path, "a.parquet", split=["train", "train", "val", "test", "test", "test"])
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/tabled/", recursive=True)
    for source in ("memory://tabled", "memory://tabled/a.parquet", "memory://tabled/*.parquet"):
        index = scan_table(source, kind="parquet")
        assert [image for split in ("train", "validation", "test") for image, _ in read(index, split)] == jpegs()[:6]


def test_row_groups_are_read_once_while_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    real: Callable[[str, str, int], Any] = tables._row_group
    monkeypatch.setattr(tables, "_row_group", lambda *given: (groups.append(given[2]), real(*given))[1])
    index = scan_table(write_parquet(tmp_path), kind="parquet")
    order = [0, 2, 4, 1, 3, 5]
    assert [index.read(index.splits["train"][row][0]) for row in order] == [jpegs()[row] for row in order]
    assert groups == [0, 1, 2]
    group_bytes = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0).total_byte_size
    monkeypatch.setattr(tables, "CACHE_BYTES", group_bytes // 2)
    assert scan_table(write_parquet(tmp_path), kind="parquet").read.num_kept == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("values", [["x", "y", None, "x", "", "y"], [7, 8, None, 7, None, 8]])
def test_a_column_of_text_or_integers_in_parquet_names_groups(tmp_path: Path, values: list[Any]) -> None:
    images = scan_table(write_parquet(tmp_path, site=values), kind="parquet", group="site")
    paths = write_parquet(tmp_path, "paths.parquet", image=[f"{number}.jpg" for number in range(6)], site=values)
    first, second = str(values[0]), str(values[1])
    for index in (images, scan_table(paths, kind="parquet", group="site")):
        references = [reference for reference, _ in index.splits["train"]]
        expected = {0: first, 1: second, 3: first, 5: second}
        assert index.groups == {references[row]: name for row, name in expected.items()}
        assert index.notes == ("images without a group: 2; each is a group of its own",)


PARQUET_FAULTS: list[tuple[dict[str, Any], dict[str, str], str]] = [
    (
        {"image": NUMBERS},
        {},
        ": the column 'image' must contain paths, bytes or struct<bytes, path>, but got int64; pass --image-column",
    ),
    (
        {"label": [0.5] * 6},
        {},
        ": the column 'label' must contain integers or text, but got double; pass --label-column",
    ),
    ({"label": NUMBERS}, {}, ": numeric labels require class names, but got none; pass --class-names FILE"),
    (
        {"label": ["a", "b", "a", None, "a", "b"]},
        {},
        " row 3: must have a value in the column 'label', but got none; fill it or remove the row",
    ),
    (
        {"image": ["a", "b", None, "c", "d", "e"]},
        {},
        " row 2: must have a value in the column 'image', but got none; fill it or remove the row",
    ),
    (
        {"image": ["a", "b", "../c", "d", "e", "f"]},
        {},
        " row 2: must name a file in the source, but got '../c', a path outside the source; fix it",
    ),
    (
        {"label": [0, 1, 0, 1, -1, 1], "huggingface": {"label": {"names": ["a", "b"]}}},
        {},
        " row 4: the label must be 0 to 1, but got '-1'; check the 2 class names",
    ),
    ({"split": ["train"] * 5 + ["all"]}, {}, " row 5: the split must be train, val or test, but got 'all'; rename it"),
    (
        {"site": [0.5] * 6},
        {"group": "site"},
        ": the column 'site' must contain integers or text, but got double; choose another --group",
    ),
    ({}, {"image_column": "imag"}, ": must have the column 'imag', but it is missing; did you mean 'image'?"),
]


@pytest.mark.parametrize(("columns", "options", "message"), PARQUET_FAULTS)
def test_a_fault_in_parquet_gives_a_one_line_error(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    source = write_parquet(tmp_path, **columns)
    with pytest.raises(BadInput, match="^" + re.escape(source + message) + "$"):
        scan_table(source, kind="parquet", **options)


def test_a_column_of_images_has_no_directories(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        scan_table(write_parquet(tmp_path), kind="parquet", group="folder:1")
    assert str(caught.value) == "group: folder:1 requires a column of paths, but got a column of images; give a column"


def test_files_that_do_not_fit_together_give_a_one_line_error(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train-0.parquet")
    write_parquet(tmp_path, "test-0.parquet", image=["x"] * 6)
    with pytest.raises(
        BadInput, match=r"train-0.parquet: must be readable .*differ from those of test-0.parquet'; check"
    ):
        scan_table(str(tmp_path), kind="parquet")
    write_parquet(tmp_path, "more.parquet")
    with pytest.raises(
        BadInput, match=r"every file name must state its split, or none may, but got 'more.parquet'; rename it$"
    ):
        scan_table(str(tmp_path), kind="parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"broken/x.parquet: must be readable Parquet, but got .*; check the file$"):
        scan_table(f"{tmp_path}/broken", kind="parquet")
    for nothing in (f"{tmp_path}/none", f"{tmp_path}/none/*.parquet", f"{tmp_path}/photos"):
        with pytest.raises(BadInput, match=r"^[^ ]*: must .* Parquet .*; check the path$"):
            scan_table(nothing, kind="parquet")


def test_an_empty_image_cell_is_reported_when_it_is_read(tmp_path: Path) -> None:
    index = scan_table(write_parquet(tmp_path, image=[None, *jpegs()[1:6]]), kind="parquet")
    with pytest.raises(ValueError, match="no image in this row"):
        index.read(index.splits["train"][0][0])
    assert index.read(index.splits["train"][1][0]) == jpegs()[1]


def test_hidden_and_system_folders_hold_no_tables(tmp_path: Path) -> None:
    for name in ("1.parquet", "more/2.parquet", "@eaDir/1.parquet", ".cache/1.parquet", "more/.2.parquet"):
        write_parquet(tmp_path / "t", name)
    shown = ["1.parquet:0:0", "more/2.parquet:0:0"]
    fsspec.filesystem("memory").put(f"{tmp_path}/t/", "/hidden-tables/", recursive=True)
    for source in (f"{tmp_path}/t", f"{tmp_path}/t/", "memory://hidden-tables"):
        index = scan_table(source, kind="parquet")
        assert [reference for reference, _ in index.splits["train"]][::6] == shown
        assert [data for data, _ in read(index)] == 2 * jpegs()[:6]
