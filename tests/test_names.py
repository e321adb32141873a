"""Names of classes and files as people write them: numbers, spellings, encodings, and text files of other programs."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from embedded import jpegs

from lift_ray import convert as verb
from lift_ray.data.convert.folder import scan_folder
from lift_ray.data.convert.index import read_lines
from lift_ray.data.convert.tables import scan_table
from lift_ray.data.open import open_dataset
from lift_ray.data.paths import image_paths
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.inference.image_files import find_images

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
NO_SPLITS = ["--validation-frac", "0", "--test-frac", "0"]
PROMPT = 'the prompt will be "a photo of a {0}."; pass --class-names FILE, one name per line in this order'


def csv_of(folder: Path, text: str | bytes) -> str:
    for number, image in enumerate(jpegs(4)):
        (folder / f"{number}.jpg").write_bytes(image)
    (folder / "t.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return f"{folder}/t.csv"


def labelled(*labels: str) -> str:
    return "image,label\n" + "".join(f"{number}.jpg,{label}\n" for number, label in enumerate(labels))


def classes(folder: Path, *names: str) -> str:
    for name, image in zip(names, jpegs(4), strict=False):
        (folder / "p" / name).mkdir(parents=True)
        (folder / "p" / name / "1.jpg").write_bytes(image)
    return f"{folder}/p"


def names_file(folder: Path, *names: str) -> str:
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in names))
    return f"{folder}/names.txt"


# ---- labels that are numbers

NUMBERS = [
    ("0", "1", "0"),
    ("0.0", "1.0", "0.0"),
    ("0", "1.0", "-0"),
    ("0.000000000000000000e+00", "1.000000000000000000e+00", "0E0"),
    ("False", "True", "false"),
    ("0", "TRUE", "0."),
    ("00", "+1", ".0"),
]


@pytest.mark.parametrize("labels", NUMBERS)
def test_numbers_in_any_form_are_labels_and_never_names(tmp_path: Path, labels: tuple[str, ...]) -> None:
    source = csv_of(tmp_path, labelled(*labels))
    with pytest.raises(BadInput) as caught:
        scan_table(source, kind="csv")
    assert str(caught.value) == f"{source}: numeric labels require class names, but got none; pass --class-names FILE"
    index = scan_table(source, kind="csv", class_names=names_file(tmp_path, "crab", "newt"))
    assert (index.class_names, index.notes) == (("crab", "newt"), ())
    assert [label for _, label in index.splits["train"]] == [0, 1, 0]


LABEL_FAULTS = [
    (("0", "1.5"), ":3: the label must be an integer or a name, but got '1.5'; fix it, or pass --label-column"),
    (("0", "1e999"), ":3: the label must be an integer or a name, but got '1e999'; fix it, or pass --label-column"),
    (("0", "9" * 400), f":3: the label must be an integer or a name, but got '{'9' * 400}'; fix it, or pass"),
    (("crab", "1.0"), ":3: labels must be all numbers or all names, but got '1.0' and 'crab'; fix one of them"),
    (("0", "nan"), ":3: must have a value in the column 'label', but got 'nan'; fill it or remove the row"),
    (("crab", "NaN"), ":3: must have a value in the column 'label', but got 'NaN'; fill it or remove the row"),
    (("crab", ""), ":3: must have a value in the column 'label', but got none; fill it or remove the row"),
    (("crab", "  "), ":3: must have a value in the column 'label', but got none; fill it or remove the row"),
]


@pytest.mark.parametrize(("labels", "message"), LABEL_FAULTS)
def test_a_label_that_is_neither_integer_nor_name_is_one_line_with_its_row(
    tmp_path: Path, labels: tuple[str, ...], message: str
) -> None:
    source = csv_of(tmp_path, labelled(*labels))
    with pytest.raises(BadInput, match="^" + re.escape(source + message)):
        scan_table(source, kind="csv")


def test_numbers_beyond_the_class_names_are_named(tmp_path: Path) -> None:
    source, names = csv_of(tmp_path, labelled("0.0", "1e3")), names_file(tmp_path, "crab", "newt")
    with pytest.raises(BadInput) as caught:
        scan_table(source, kind="csv", class_names=names)
    assert str(caught.value) == f"{source}:3: the label must be 0 to 1, but got '1e3'; check the 2 class names"


def test_classes_that_are_numbers_are_pointed_out_with_the_prompt_that_they_make(tmp_path: Path) -> None:
    index = scan_folder(classes(tmp_path, "00012", "3-4", "crab"))
    assert index.class_names == ("00012", "3-4", "crab")
    assert index.notes == (f"class names that are numbers: 2 (00012, 3-4); {PROMPT.format('00012')}",)
    assert scan_table(csv_of(tmp_path, labelled("crab", "12")), kind="csv").notes == (
        f"class names that are numbers: 1 (12); {PROMPT.format('12')}",
    )


def test_a_file_names_the_classes_of_directories_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, names = classes(tmp_path, "00001", "00000"), names_file(tmp_path, "stop", "give_way")
    assert not verb.main(["folder", source, f"{tmp_path}/out", "--class-names", names, *NO_SPLITS])
    train = open_dataset(f"{tmp_path}/out").split("train")
    assert open_dataset(f"{tmp_path}/out").class_names == ("stop", "give way")
    images = RowReader(train).read(np.arange(2))
    assert sorted(zip(train.labels.tolist(), images, strict=True)) == [(0, jpegs(4)[1]), (1, jpegs(4)[0])]
    assert capsys.readouterr().err == ""
    with pytest.raises(BadInput) as caught:
        scan_folder(source, class_names=names_file(tmp_path, "stop"))
    assert str(caught.value) == (
        f"{names}: must name the 2 classes in the order of their directories, but got 1 names; add or remove names"
    )


# ---- spellings


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path: Path) -> None:
    index = scan_folder(classes(tmp_path, NFC, "b", NFD))
    assert index.class_names == ("b", NFC)
    assert sorted(label for _, label in index.splits["train"]) == [0, 1, 1]
    table = csv_of(tmp_path, labelled(NFC, NFD, "b"))
    for names in (None, names_file(tmp_path, "b", NFD)):
        index = scan_table(table, kind="csv", class_names=names)
        assert (index.class_names, [label for _, label in index.splits["train"]]) == (("b", NFC), [1, 1, 0])


def test_splits_may_spell_a_class_in_different_forms(tmp_path: Path) -> None:
    for split, names in (("train", (NFC, "b")), ("test", (NFD,))):
        classes(tmp_path / split, *names)
        (tmp_path / split / "p").rename(tmp_path / f"new-{split}")
        (tmp_path / split).rmdir()
        (tmp_path / f"new-{split}").rename(tmp_path / split)
    index = scan_folder(str(tmp_path))
    assert {split: [label for _, label in rows] for split, rows in index.splits.items()} == {
        "train": [0, 1],
        "test": [1],
    }


@pytest.mark.parametrize(
    "pair", [("Crab", "crab"), ("sea  crab", "sea crab"), ("Sea_Crab", "sea crab"), ("STRASSE", "straße")]
)
def test_names_that_differ_in_case_or_spaces_only_are_asked_about(tmp_path: Path, pair: tuple[str, str]) -> None:
    folder, table = classes(tmp_path, *pair, "newt"), csv_of(tmp_path, labelled(*pair, "newt"))
    shown = " and ".join(repr(name.replace("_", " ")) for name in pair)
    rule, remedy = "class names must differ in more than case and spaces", "(they are one class) or keep (they are two)"
    for source, scan in ((folder, scan_folder), (table, lambda *a, **o: scan_table(*a, kind="csv", **o))):
        with pytest.raises(BadInput) as caught:
            scan(source)  # type: ignore[operator]
        assert str(caught.value) == f"{source}: {rule}, but got {shown}; pass --similar-names merge {remedy}"
        assert len(scan(source, similar_names="merge").class_names) == 2  # type: ignore[operator]
        assert len(scan(source, similar_names="keep").class_names) == 3  # type: ignore[operator]


def test_merged_names_are_one_class_with_all_images(tmp_path: Path) -> None:
    source = classes(tmp_path, "crab", "Crab", "newt")
    assert not verb.main(["folder", source, f"{tmp_path}/out", "--similar-names", "merge", *NO_SPLITS])
    dataset = open_dataset(f"{tmp_path}/out")
    assert dataset.class_names == ("Crab", "newt")
    assert dataset.split("train").class_counts(2).tolist() == [2, 1]


def test_published_lists_may_have_names_that_differ_in_case(tmp_path: Path) -> None:
    index = scan_table(
        csv_of(tmp_path, labelled("cardigan", "Cardigan")),
        kind="csv",
        class_names=names_file(tmp_path, "Cardigan", "cardigan"),
    )
    assert [label for _, label in index.splits["train"]] == [1, 0]


# ---- encodings


def test_a_file_name_that_is_not_utf8_is_converted_and_shown_with_escapes(tmp_path: Path) -> None:
    source = classes(tmp_path, "a", "b")
    (tmp_path / "p" / "a" / "1.jpg").rename(os.fsdecode(os.fsencode(f"{source}/a/caf") + b"\xe9.jpg"))
    assert not verb.main(["folder", source, f"{tmp_path}/out", *NO_SPLITS])
    train = open_dataset(f"{tmp_path}/out").split("train")
    assert sorted(RowReader(train).read(np.arange(2))) == sorted(jpegs(4)[:2])
    assert "a/caf\\udce9.jpg" in image_paths(train)
    assert find_images([f"{source}/a"]).places(0, 1)[0] == [f"{source}/a/caf\\udce9.jpg"]


def test_a_bad_image_whose_name_is_not_utf8_is_listed(tmp_path: Path) -> None:
    source = classes(tmp_path, "a", "b")
    Path(os.fsdecode(os.fsencode(f"{source}/a/caf") + b"\xe9.jpg")).write_bytes(b"nothing")
    assert not verb.main(["folder", source, f"{tmp_path}/out", "--skip-bad", *NO_SPLITS])
    assert (tmp_path / "out" / "skipped.txt").read_text().startswith(f"{source}/a/caf\\udce9.jpg: must be an intact")


def test_a_class_directory_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    source = classes(tmp_path, "a", "b")
    os.rename(os.fsencode(f"{source}/a"), os.fsencode(f"{source}/caf") + b"\xe9")
    with pytest.raises(BadInput) as caught:
        scan_folder(source)
    assert str(caught.value) == f"{source}: class names must be UTF-8, but got 'caf\\udce9'; rename it"


TABLE = f"image;label\n0.jpg;crab\n1.jpg;{NFC}\n"
TAKEN = {
    "UTF-8 with a mark": TABLE.encode("utf-8-sig"),
    "UTF-16 of Excel": TABLE.encode("utf-16"),
    "UTF-16 big endian": b"\xfe\xff" + TABLE.encode("utf-16-be"),
    "tabs and line ends of Windows": TABLE.replace(";", "\t").replace("\n", "\r\n").encode(),
    "line ends of old Macs": TABLE.replace("\n", "\r").encode(),
    "quoted line breaks": b'label,image,note\ncrab,0.jpg,"two\r\nlines"\n' + f"{NFC},1.jpg,\n".encode(),
    "a cell of 300 kB": f"image,label,note\n0.jpg,crab,{'x' * 300_000}\n1.jpg,{NFC},\n".encode(),
    "no last line end": TABLE.strip().encode(),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_csv_files_of_other_programs_are_taken(tmp_path: Path, kind: str) -> None:
    index = scan_table(csv_of(tmp_path, TAKEN[kind]), kind="csv")
    assert (index.class_names, index.splits) == (("café", "crab"), {"train": [("0.jpg", 1), ("1.jpg", 0)]})


REFUSED = [
    (
        "image,label\n0.jpg,crab\n1.jpg,café\n".encode("latin-1"),
        ":3: must be a text file in UTF-8, but got the byte 0xe9; save it as UTF-8",
    ),
    (TABLE.encode("utf-16-le"), ":1: must be a text file in UTF-8, but got a NUL byte; save it as UTF-8"),
    (b"image,label\n0.jpg,cr\0ab\n", ":2: must be a text file in UTF-8, but got a NUL byte; save it as UTF-8"),
    (b'image,label\n0.jpg,"crab" x\n', ":2: must be CSV with a header, but got "),
    (
        b"image,label,label\n0.jpg,crab,newt\n",
        ": the label column must be unambiguous, but got the columns image, label, label; pass --label-column",
    ),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_other_csv_files_are_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    source = csv_of(tmp_path, data)
    with pytest.raises(BadInput, match="^" + re.escape(source + message) + "[^\n]*$"):
        scan_table(source, kind="csv")


def test_a_column_that_is_there_twice_cannot_be_chosen(tmp_path: Path) -> None:
    source = csv_of(tmp_path, b"image,label,label\n0.jpg,crab,newt\n")
    with pytest.raises(BadInput) as caught:
        scan_table(source, kind="csv", label_column="label")
    assert str(caught.value) == f"{source}: must have one column 'label', but got 2; rename the others"


def test_empty_lines_stay_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\n\nb\r\rc")
    assert read_lines(f"{tmp_path}/a.txt") == ["a", "", "b", "", "c"]
