"""Lists and tables that were written on Windows find their images here."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import jpegs

from lift_ray.cli import main
from lift_ray.data.convert.lists import scan_list
from lift_ray.data.convert.tables import scan_table
from lift_ray.data.open import open_dataset
from lift_ray.errors import BadInput
from lift_ray.storage.store import fetch, locate

ROWS = [("train\\ewer\\a.jpg", "ewer"), ("train\\ewer\\b b.jpg", "ewer"), ("train\\.\\crab\\c.jpg", "crab")]
PLAIN = ["train/ewer/a.jpg", "train/ewer/b b.jpg", "train/crab/c.jpg"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three real images in folders of their classes."""
    folder = tmp_path / "photos"
    for name, image in zip(PLAIN, jpegs(3), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    return folder


def written(folder: Path, kind: str) -> Path:
    """A list or table of the images, as a program on Windows writes it."""
    path = folder / f"images.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"path": [path for path, _ in ROWS], "label": [name for _, name in ROWS]}), path)
    elif kind == "txt":
        (folder / "names.txt").write_text("ewer\r\ncrab\r\n")
        path.write_text("".join(f"{path} {int(name == 'crab')}\r\n" for path, name in ROWS))
    else:
        mark = {"csv": ";", "tsv": "\t"}[kind]
        path.write_text("".join(f"{path}{mark}{name}\r\n" for path, name in [("path", "label"), *ROWS]))
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "parquet"])
def test_images_are_found_by_paths_with_backslashes(photos: Path, tmp_path: Path, kind: str) -> None:
    lines, out = written(tmp_path, kind), tmp_path / "out"
    if kind == "txt":
        given = ["list", photos, out, "--train", lines, "--class-names", tmp_path / "names.txt"]
    else:
        given = [kind.replace("tsv", "csv"), lines, out, "--root", photos]
    main(["convert", *map(str, given), "--validation-frac", "0", "--test-frac", "0"])
    assert open_dataset(str(out)).splits["train"].num_samples == 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_their_directories_are_groups_and_their_names_references(photos: Path, tmp_path: Path, kind: str) -> None:
    index = scan_table(str(written(tmp_path, kind)), kind=kind, root=str(photos), group="folder:2")
    assert [reference for reference, _ in index.splits["train"]] == PLAIN
    assert index.groups is not None
    assert sorted(set(index.groups.values())) == ["crab", "ewer"]
    assert index.read("train/crab/c.jpg") == (photos / "train/crab/c.jpg").read_bytes()


def test_a_file_with_a_backslash_in_its_name_is_itself(photos: Path, tmp_path: Path) -> None:
    (photos / "train\\ewer\\a.jpg").write_bytes(b"another")
    index = scan_table(str(written(tmp_path, "csv")), kind="csv", root=str(photos))
    assert [reference for reference, _ in index.splits["train"]] == ["train\\ewer\\a.jpg", *PLAIN[1:]]
    assert index.read("train\\ewer\\a.jpg") == b"another"


def test_a_row_without_bytes_may_name_its_file_so(photos: Path, tmp_path: Path) -> None:
    images = [{"bytes": None, "path": path} for path, _ in ROWS] + [{"bytes": None, "path": "C:\\a.jpg"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": ["ewer", "ewer", "crab", "crab"]})
    pq.write_table(table, tmp_path / "t.parquet")
    index = scan_table(str(tmp_path / "t.parquet"), kind="parquet", root=str(photos))
    references = [reference for reference, _ in index.splits["train"]]
    assert [index.read(one) for one in references[:3]] == [(photos / name).read_bytes() for name in PLAIN]
    with pytest.raises(ValueError, match="a path outside of "):
        index.read(references[3])


@pytest.mark.parametrize("path", ["C:\\photos\\a.jpg", "c:/photos/a.jpg"])
def test_a_drive_letter_is_one_clear_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "t.csv").write_text(f"path,label\na.jpg,x\n{path},y\n")
    (tmp_path / "t.txt").write_text(f"a.jpg 0\n{path} 1\n")
    (tmp_path / "names.txt").write_text("x\ny\n")
    rest = f"{path!r}, which has a drive letter; write it relative to the folder of the images"
    with pytest.raises(BadInput) as caught:
        scan_table(f"{tmp_path}/t.csv", kind="csv")
    assert str(caught.value) == f"{tmp_path}/t.csv:3: must name a file in the source, but got {rest}"
    with pytest.raises(BadInput) as caught:
        scan_list(str(tmp_path), train=f"{tmp_path}/t.txt", class_names=f"{tmp_path}/names.txt")
    assert str(caught.value) == f"{tmp_path}/t.txt:2: must name a file in the source, but got {rest}"


@pytest.mark.parametrize(
    "verb", ["convert folder {} out", "convert csv {} out", "init {}", "predict {} {} --out x.csv"]
)
def test_a_place_with_a_drive_letter_is_no_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    place = "C:\\photos"
    with pytest.raises(BadInput) as caught:
        main(verb.format(place, place).split())
    assert str(caught.value) == (
        f"{place}: must be a path of this machine, but it has a drive letter, which only Windows knows; give its path here"
    )


def test_a_folder_named_like_a_drive_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:").mkdir()
    (tmp_path / "C:/a.txt").write_bytes(b"here")
    assert fetch("C:/a.txt", None, None, 0) == b"here"
    with pytest.raises(BadInput, match="has a drive letter"):
        locate("C:/b.txt")
