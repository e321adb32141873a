"""python -m lift_ray.convert folder: real images in, a data set out, and one line for whatever is wrong."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deep_images import png16
from embedded import jpegs
from PIL import Image

from lift_ray import convert as verb
from lift_ray.data.convert.conversion import convert
from lift_ray.data.convert.folder import scan_folder
from lift_ray.data.convert.index import ImageIndex
from lift_ray.data.convert.splitting import Division
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput

CLASSES = ("accordion", "car_side", "yin_yang")
EIGHT = ("anchor", "ant", "bass", "beaver", "bonsai", "brain", "chair", "crab")
NO_SPLITS = ["--validation-frac", "0", "--test-frac", "0"]


def photos(folder: Path, per_class: tuple[int, ...] = (12, 8, 1)) -> Path:
    """A directory of three or eight class directories with real images."""
    rest = iter(jpegs(60))
    for name, count in zip(EIGHT if len(per_class) == 8 else CLASSES, per_class, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"image_{number:04d}.jpg").write_bytes(next(rest))
    return folder


def contents(uri: str) -> dict[str, list[tuple[int, bytes]]]:
    """(label, image) pairs of every split."""
    splits = open_dataset(uri).splits
    read = {name: RowReader(split).read(np.arange(split.num_samples)) for name, split in splits.items()}
    return {name: list(zip(split.labels.tolist(), read[name], strict=True)) for name, split in splits.items()}


def test_a_folder_of_real_images_keeps_every_byte_and_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photos(tmp_path / "photos")
    fractions = ["--validation-frac", "0.25", "--test-frac", "0"]
    assert not verb.main(["folder", str(source), f"{tmp_path}/out", *fractions])
    dataset = open_dataset(f"{tmp_path}/out")
    assert dataset.class_names == ("accordion", "car side", "yin yang")
    assert dataset.split("train").class_counts(3).tolist() == [9, 6, 1]
    assert dataset.split("validation").class_counts(3).tolist() == [3, 2, 0]
    expected = [(label, path.read_bytes()) for label, name in enumerate(CLASSES) for path in (source / name).iterdir()]
    assert sorted(chain(*contents(f"{tmp_path}/out").values())) == sorted(expected)
    printed = capsys.readouterr().out
    assert [line.split("│")[1:3] for line in printed.splitlines() if "│ validation" in line] == [
        [" validation ", "      5 "]
    ]
    assert "1 of 3 classes has no validation image (a single image): the search does not see 'yin yang'\n" in printed


def test_a_folder_without_splits_gets_validation_and_test_and_its_manifest_counts_all_labelled_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = photos(tmp_path / "photos", (20, 10, 5, 4, 3, 2, 1, 1))
    assert not verb.main(["folder", str(source), f"{tmp_path}/out"])
    dataset = open_dataset(f"{tmp_path}/out")
    assert {name: split.class_counts(8).tolist() for name, split in dataset.splits.items()} == {
        "train": [14, 7, 3, 2, 1, 1, 1, 1],
        "validation": [2, 1, 1, 1, 1, 1, 0, 0],
        "test": [4, 2, 1, 1, 1, 0, 0, 0],
    }
    assert dataset.validation == "drawn"
    assert dataset.labelled_counts is not None
    assert dataset.labelled_counts.tolist() == [20, 10, 5, 4, 3, 2, 1, 1]
    printed = capsys.readouterr().out
    assert "labeled: 8 classes, 46 images: 20 to 1 a class" in printed
    assert (
        "2 of 8 classes have no validation image (a single image): the search does not see 'chair', 'crab'\n" in printed
    )


def test_validation_of_a_cut_or_of_the_source_is_separate_and_the_labelled_images_are_those_of_training(
    tmp_path: Path,
) -> None:
    source = photos(tmp_path / "photos", (20, 12, 8))
    for split, per_class in (("train", (6, 4, 2)), ("val", (2, 1, 1))):
        photos(tmp_path / "own" / split, per_class)
    verb.main(["folder", str(source), f"{tmp_path}/cut", "--imbalance", "4"])
    verb.main(["folder", f"{tmp_path}/own", f"{tmp_path}/listed", "--test-frac", "0.5"])
    cut, listed = open_dataset(f"{tmp_path}/cut"), open_dataset(f"{tmp_path}/listed")
    assert (cut.validation, listed.validation) == ("separate", "separate")
    assert cut.split("train").class_counts(3).tolist() == cut.labelled_counts.tolist()  # type: ignore[union-attr]
    assert cut.split("train").class_counts(3).tolist() == [16, 8, 4]
    assert cut.split("validation").class_counts(3).tolist() == [0, 1, 1]
    assert cut.split("test").class_counts(3).tolist() == [4, 2, 2]
    assert listed.split("train").class_counts(3).tolist() == [3, 2, 1]
    assert listed.labelled_counts.tolist() == [6, 4, 2]  # type: ignore[union-attr]


def sequences(folder: Path, sizes: dict[str, tuple[int, ...]]) -> Path:
    """Class directories with directories of so many images each."""
    rest = iter(jpegs(60))
    for name, here in sizes.items():
        for number, count in enumerate(here):
            (folder / name / f"{name}-{number}").mkdir(parents=True)
            for image in range(count):
                (folder / name / f"{name}-{number}" / f"{image}.jpg").write_bytes(next(rest))
    return folder


def test_directories_that_are_groups_stay_whole_and_others_read_the_files_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    source = sequences(tmp_path / "photos", {"cat": (3,) * 8, "dog": (2,) * 5, "owl": (4,), "yak": (1, 1)})
    assert not verb.main(["folder", str(source), f"{tmp_path}/out", "--group", "folder:1"])
    dataset = open_dataset(f"{tmp_path}/out")
    found = {}
    for name, split in dataset.splits.items():
        tables = [pq.read_table(shard.url, columns=["image", "group"]) for shard in split.shards]
        paths = [cell["path"] for table in tables for cell in table.column("image").to_pylist()]
        assert split.groups is not None
        assert split.groups.tolist() == [group for table in tables for group in table.column("group").to_pylist()]
        found[name] = {(path.split("/")[1], group) for path, group in zip(paths, split.groups.tolist(), strict=True)}
    pairs = set.union(*found.values())
    assert len(pairs) == len({directory for directory, _ in pairs}) == len({group for _, group in pairs}) == 16
    assert sum(map(len, found.values())) == 16
    assert dataset.split("train").class_counts(4).tolist()[2] == 4
    assert (
        "1 of 4 classes has no validation image (a single image, or a single group): the search does not see 'owl'\n"
        in (capsys.readouterr().out)
    )
    loaded = datasets.load_dataset(
        "parquet", data_files={"train": f"{tmp_path}/out/train-*.parquet"}, cache_dir=f"{tmp_path}/cache"
    )["train"]
    assert loaded["group"][:] == dataset.split("train").groups.tolist()  # type: ignore[union-attr]
    assert loaded.features["label"].names == ["cat", "dog", "owl", "yak"]


def test_split_directories_are_kept_apart_and_nested_images_count(tmp_path: Path) -> None:
    photos(tmp_path / "p" / "train", (4, 4, 2))
    photos(tmp_path / "p" / "val", (2, 1, 1))
    (tmp_path / "p" / "train" / "accordion" / "more").mkdir()
    (tmp_path / "p" / "train" / "accordion" / "more" / "x.jpeg").write_bytes(jpegs(60)[50])
    index = scan_folder(f"{tmp_path}/p")
    assert {name: len(rows) for name, rows in index.splits.items()} == {"train": 11, "validation": 4}
    convert(index, "memory://convert-splits")
    dataset = open_dataset("memory://convert-splits")
    assert dataset.split("train").class_counts(3).tolist() == [4, 3, 2]
    assert dataset.split("validation").class_counts(3).tolist() == [2, 1, 1]
    assert dataset.split("test").class_counts(3).tolist() == [1, 1, 0]


def test_source_and_destination_may_be_any_fsspec_url(tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(f"{photos(tmp_path / 'photos')}/", "/convert-source/", recursive=True)
    assert not verb.main(["folder", "memory://convert-source", "memory://convert-target/deep"])
    assert sum(map(len, contents("memory://convert-target/deep").values())) == 21


def test_the_seed_decides_the_split_and_the_order(tmp_path: Path) -> None:
    index = scan_folder(str(photos(tmp_path / "photos")))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(index, f"{tmp_path}/{name}", division=Division(seed=seed))
    assert contents(f"{tmp_path}/a") == contents(f"{tmp_path}/b") != contents(f"{tmp_path}/c")
    labels = open_dataset(f"{tmp_path}/a").split("train").labels
    assert labels.tolist() != sorted(labels.tolist())


def test_short_side_shrinks_larger_images_only_and_keeps_them_upright(tmp_path: Path) -> None:
    (tmp_path / "p" / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (200, 100)).save(tmp_path / "p" / "a" / "1.jpg", exif=exif)
    Image.new("P", (100, 64)).save(tmp_path / "p" / "a" / "2.png")
    Image.new("L", (40, 20)).save(tmp_path / "p" / "a" / "3.webp")
    verb.main(["folder", f"{tmp_path}/p", f"{tmp_path}/out", "--short-side", "32", *NO_SPLITS])
    decoded = [Image.open(io.BytesIO(data)) for _, data in contents(f"{tmp_path}/out")["train"]]
    assert {image.size for image in decoded} == {(32, 64), (50, 32), (40, 20)}
    assert {(image.format, image.mode) for image in decoded} == {("JPEG", "RGB")}


def test_a_bad_image_stops_with_its_path_unless_it_is_to_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    bad = source / "accordion" / "bad.jpg"
    bad.write_bytes(b"no image")
    (source / "car_side" / "cut.jpg").write_bytes(jpegs(60)[0][: len(jpegs(60)[0]) // 2])
    (source / "car_side" / "notes.txt").write_text("left out")
    with pytest.raises(BadInput, match=r"must be an intact image, but got .*; remove it or pass --skip-bad$"):
        verb.main(["folder", str(source), str(out)])
    assert not out.exists()
    verb.main(["folder", str(source), str(out), "--skip-bad"])
    lines = sorted((out / "skipped.txt").read_text().splitlines())
    assert lines[0] == f"{bad}: must be an intact image, but got bytes of no known format"
    assert lines[1].startswith(f"{source}/car_side/cut.jpg: must be an intact image, but got image file is truncated")
    assert len(lines) == 2
    printed = capsys.readouterr().out
    assert f"2 bad images were skipped: {out}/skipped.txt" in printed
    assert f"left out 1 file (1 .txt): {out}/left_out.txt\n" in printed
    assert (out / "left_out.txt").read_text() == "car_side/notes.txt: no image suffix\n"
    assert sum(map(len, contents(str(out)).values())) == 21


@dataclass(frozen=True)
class Fails:
    """A source that has good images, and one that raises."""

    error: Exception

    def __call__(self, reference: str) -> bytes:
        if reference == "2":
            raise self.error
        return jpegs(60)[int(reference)]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk error"), PermissionError("no"), RuntimeError("lost")])
def test_a_source_that_fails_stops_the_conversion_and_leaves_no_image_out(tmp_path: Path, error: Exception) -> None:
    index = ImageIndex("photos", ("a",), {"train": [(str(row), 0) for row in range(9)]}, Fails(error))
    with pytest.raises(BadInput, match=r"^photos/2: must be readable, but .*(disk error|denied|lost).*; check"):
        convert(index, str(tmp_path / "out"), skip_bad=True)
    found = convert(replace(index, read=Fails(FileNotFoundError("2"))), str(tmp_path / "out"), skip_bad=True)
    assert found.skipped == ("photos/2: must be an intact image, but got no file",)


def test_a_bad_image_of_a_table_has_a_path_that_exists_as_far_as_possible(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    name = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "photos").rglob("*.jpg"))[0]
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    table, out = tmp_path / "t.csv", tmp_path / "out"
    rows = f"path,label,split\n{name},a,train\nmissing.png,a,test\nphotos,a,test\nnull.jpg,a,val\n"
    table.write_text(rows)
    with pytest.raises(
        BadInput, match=rf"^{tmp_path}/(missing.png|photos|null.jpg): must be an intact image, but got no file"
    ):
        verb.main(["csv", str(table), str(out)])
    verb.main(["csv", str(table), str(out), "--skip-bad"])
    assert sorted((out / "skipped.txt").read_text().splitlines()) == [
        f"{tmp_path}/{each}: must be an intact image, but got no file" for each in ("missing.png", "null.jpg", "photos")
    ]
    pq.write_table(pa.table({"image": [b"", jpegs(60)[0]], "label": ["a", "a"]}), tmp_path / "A.parquet")
    with pytest.raises(BadInput, match=rf"^{tmp_path}/A.parquet:0:0: must be an intact image, but got 0 bytes; remove"):
        verb.main(["parquet", str(tmp_path / "A.parquet"), str(out), "--overwrite"])


def test_the_range_of_deep_images_is_found_although_one_is_missing(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png16(np.full((4, 4), 100 * number, np.uint16)))
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{number}.png,a\n" for number in range(9)))
    with pytest.raises(BadInput) as caught:
        verb.main(["csv", f"{tmp_path}/t.csv", f"{tmp_path}/out", *NO_SPLITS])
    assert str(caught.value).endswith(
        " (8 such images have 0 to 700); convert with --window auto|minmax|percentile|LO,HI"
    )


def test_an_image_whose_decoder_is_not_installed_says_so_beside_skipping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    (source / "accordion" / "1.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    monkeypatch.setattr("lift_ray.data.decode.READABLE", ("JPEG", "PNG"))
    message = f"{source}/accordion/1.heic: must be an intact image, but got HEIC, which requires pip install 'lift_ray[heif]'; "
    with pytest.raises(BadInput) as caught:
        verb.main(["folder", str(source), str(out)])
    assert str(caught.value) == f"{message}install it or pass --skip-bad"
    verb.main(["folder", str(source), str(out), "--skip-bad"])
    assert (out / "skipped.txt").read_text() == f"{message}install it\n"


def test_a_shard_of_bad_images_only_may_be_a_source_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photos(tmp_path / "p", (5, 1, 1))
    for path in (source / "accordion").iterdir():
        path.write_bytes(b"")
    index = scan_folder(str(source))
    index = replace(
        index,
        class_names=index.class_names[1:],
        splits={"train": [(name, max(0, label - 1)) for name, label in index.splits["train"]]},
    )
    convert(index, str(tmp_path / "out"), skip_bad=True, rows_per_shard=1, division=Division(0.0, 0.0))
    dataset = open_dataset(f"{tmp_path}/out")
    assert (len(dataset.split("train").shards), dataset.split("train").num_samples) == (7, 2)
    monkeypatch.setattr("lift_ray.data.convert.tasks.SUSPICIOUS", 1)
    with pytest.raises(
        BadInput, match=r"got 0 bytes, like all of the shard \(1 image\); check that every machine can access"
    ):
        convert(index, str(tmp_path / "new"), skip_bad=True, rows_per_shard=1, division=Division(0.0, 0.0))


def test_a_semi_supervised_set_and_its_distribution_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = photos(tmp_path / "photos", (12, 8, 6)), str(tmp_path / "out")
    options = ["--validation-frac", "0", "--labelled", "4", "--unlabelled", "8", "--gamma-l", "4"]
    assert not verb.main(["folder", str(source), out, *options])
    dataset = open_dataset(out)
    assert dataset.split("train").class_counts(3).tolist() == [4, 2, 1]
    assert dataset.split("unlabelled").class_counts(3).tolist() == [12, 6, 3]
    held = contents(out)
    assert set(held["train"]) <= set(held["unlabelled"])
    printed = capsys.readouterr()
    assert "labeled: 3 classes, 7 images: 4 to 1 a class, imbalance 4.0\n" in printed.out
    assert (
        "groups: 1 many (over 3), 1 medium (2 to 3), 1 few (under 2); these are thirds of the classes\n" in printed.out
    )
    assert "4 █" in printed.out


def test_progress_is_printed_as_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_ray.terminal.image_progress.LINE_EVERY_S", 0.0)
    verb.main(["folder", str(photos(tmp_path / "photos")), f"{tmp_path}/out"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert re.fullmatch(r"21 of 21 images, [\d,]+ images/s, 0 s left", lines[-1])


def test_overwrite_replaces_the_whole_set(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    verb.main(["folder", str(photos(tmp_path / "a")), out, "--rows-per-shard", "4"])
    verb.main(["folder", str(photos(tmp_path / "b", (2, 2, 2))), out, "--overwrite", *NO_SPLITS])
    assert sorted(path.name for path in Path(out).iterdir()) == ["manifest.json", "train-00000-of-00001.parquet"]


def no_classes(folder: Path) -> list[str]:
    empty = folder / "none"
    empty.mkdir()
    (empty / "x.jpg").write_bytes(jpegs(60)[0])
    return [str(empty)]


def no_images(folder: Path) -> list[str]:
    (folder / "none" / "cat").mkdir(parents=True)
    return [f"{folder}/none"]


def one_empty_class(folder: Path) -> list[str]:
    (folder / "photos" / "dodo").mkdir()
    return [f"{folder}/photos"]


def stray_directory(folder: Path) -> list[str]:
    photos(folder / "p" / "train", (1, 1, 1))
    (folder / "p" / "meta").mkdir()
    return [f"{folder}/p"]


def new_class_in_test(folder: Path) -> list[str]:
    photos(folder / "p" / "train", (1, 1, 1))
    (folder / "p" / "test" / "dodo").mkdir(parents=True)
    return [f"{folder}/p"]


def own_validation(folder: Path) -> list[str]:
    photos(folder / "p" / "train", (1, 1, 1))
    photos(folder / "p" / "val", (1, 1, 1))
    return [f"{folder}/p", "--validation-frac", "0.2"]


def test_splits_for_which_there_is_nothing_to_draw_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(sequences(tmp_path / "photos", {"cat": (4,), "dog": (5,)}))
    verb.main(["folder", source, f"{tmp_path}/out", "--group", "folder:1"])
    assert list(open_dataset(f"{tmp_path}/out").splits) == ["train"]
    lines = capsys.readouterr().out.splitlines()
    assert "no validation split: there are no images or groups to draw it from" in lines
    assert "no test split: there are no images or groups to draw it from" in lines
    verb.main(["folder", source, f"{tmp_path}/out", "--overwrite", *NO_SPLITS])
    assert "no test split" not in capsys.readouterr().out


def straddling(folder: Path) -> list[str]:
    for split in ("train", "val"):
        sequences(folder / "p" / split, {"cat": (1, 1), "dog": (1,)})
    return [f"{folder}/p", "--group", "folder:1"]


def same_names(folder: Path) -> list[str]:
    (folder / "photos" / "car side").mkdir()
    return [f"{folder}/photos"]


def taken(folder: Path) -> list[str]:
    convert(scan_folder(f"{folder}/photos"), f"{folder}/out")
    return [f"{folder}/photos"]


def only_bad(folder: Path) -> list[str]:
    (folder / "photos" / "yin_yang" / "image_0000.jpg").write_bytes(b"")
    return [f"{folder}/photos", "--skip-bad"]


BROKEN: list[tuple[Callable[[Path], list[str]], str]] = [
    (
        lambda folder: [f"{folder}/no"],
        "{0}/no: must be a folder of class directories, but nothing is there; check the path",
    ),
    (no_classes, "{0}/none: must be a folder of class directories, but got none; give each class a directory"),
    (
        no_images,
        "{0}/none: must contain images (.avif .bmp .gif .heic .heif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp), "
        "but got none; check the path",
    ),
    (
        one_empty_class,
        "{0}/photos: every class must have an image, but 'dodo' has none; add images or remove these classes",
    ),
    (stray_directory, "{0}/p: must contain nothing next to train, val and test, but got 'meta'; move it elsewhere"),
    (new_class_in_test, "{0}/p/test: must contain only classes of train, but got 'dodo'; add it to train"),
    (own_validation, "validation-frac: must not be given, but {0}/p has its own validation images; remove it"),
    (
        straddling,
        "{0}/p: each group must be in one split, but got 'cat-0' in train and validation; move its images to one split, "
        "or leave out --group",
    ),
    (
        lambda folder: [f"{folder}/photos", "--group", "folder:1"],
        "group: folder:1 requires images 1 directories deep below the class directory, but there are none; check N",
    ),
    (
        lambda folder: [f"{folder}/photos", "--group", "location"],
        "group: must be folder:N, because there are no columns, but got 'location'; for example, folder:1",
    ),
    (
        lambda folder: [str(sequences(folder / "p", {"cat": (2, 2)})), "--group", "folder:1", "--imbalance", "2"],
        "group: cannot be combined with imbalance, which takes single images; remove one",
    ),
    (same_names, "{0}/photos: class names must be unique, but got 'car side' twice; rename a directory"),
    (taken, "{0}/out: must not contain a dataset, but got one; pass --overwrite or choose another folder"),
    (only_bad, "{0}/photos: every class must keep a training image, but 'yin yang' has no readable one; add one"),
    (
        lambda folder: [f"{folder}/photos", "--validation-frac", "1.5"],
        "validation-frac: must be at least 0 and below 1, but got 1.5; for example, 0.1",
    ),
    (
        lambda folder: [f"{folder}/photos", "--labelled", "5"],
        "labelled: requires gamma-l, but got none; add --gamma-l",
    ),
    (
        lambda folder: [f"{folder}/photos", "--quality", "80"],
        "--quality: requires --short-side, but got none (the bytes are kept); add --short-side",
    ),
]


@pytest.mark.parametrize(("prepare", "message"), BROKEN)
def test_bad_input_gives_a_one_line_error(tmp_path: Path, prepare: Callable[[Path], list[str]], message: str) -> None:
    photos(tmp_path / "photos")
    source, *options = prepare(tmp_path)
    with pytest.raises(BadInput) as caught:
        verb.main(["folder", source, f"{tmp_path}/out", *options])
    assert str(caught.value) == message.format(tmp_path)


def test_a_destination_inside_the_source_is_bad_input(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    with pytest.raises(BadInput, match="must be outside the source"):
        verb.main(["folder", str(source), f"{source}/out"])


@pytest.mark.parametrize(
    "argv",
    [[], ["folder"], ["foldr", "a", "b"], ["folder", "a", "b", "--sead", "1"], ["folder", "a", "b", "--seed", "x"]],
)
def test_wrong_usage_gives_a_one_line_error(argv: list[str]) -> None:
    with pytest.raises(BadInput, match=r"^convert: .* See python -m lift_ray\.convert --help$"):
        verb.main(argv)


def test_the_process_ends_with_2_and_one_line_for_bad_input(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lift_ray.convert", "folder", f"{tmp_path}/no", f"{tmp_path}/out"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr == f"{tmp_path}/no: must be a folder of class directories, but nothing is there; check the path\n"
    )


@pytest.mark.parametrize("kind", ["folder", "list", "inat", "cifar", "csv", "parquet", "torchvision"])
def test_every_kind_takes_the_shared_options_and_shows_an_example(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.main([kind, "--help"])
    printed = capsys.readouterr().out
    assert f"python -m lift_ray.convert {kind} " in printed
    for field in fields(verb.Options):
        assert f"--{field.name.replace('_', '-')} " in printed


def test_help_gives_an_example_and_loads_nothing_heavy() -> None:
    code = "import sys; from lift_ray.convert import main; main(['folder', '--help']); print(sorted(sys.modules))"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert "python -m lift_ray.convert folder photos/" in done.stdout
    for heavy in ("'pyarrow'", "'numpy'", "'PIL'", "'torch'", "'ray'"):
        assert heavy not in done.stdout
