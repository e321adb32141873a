"""Folders as people have them: links, loops, system folders, and files that are no images."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
from embedded import jpegs

from lift_ray import convert as verb
from lift_ray.data.convert.folder import scan_folder
from lift_ray.data.decode import FORMATS
from lift_ray.data.walk import counted, walk
from lift_ray.errors import BadInput
from lift_ray.inference.image_files import find_images, left_out_lines, write_left_out

SYSTEM = ("__MACOSX", "@eaDir", ".git", ".ipynb_checkpoints", "#recycle", "$RECYCLE.BIN", "lost+found")


def image_at(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpegs(60)[number])
    return path


def labelled(folder: Path) -> Path:
    for number, name in enumerate(("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/deep/2.jpg")):
        image_at(folder / name, number)
    return folder


def names_of(source: Path | str) -> list[str]:
    return sorted(name for rows in scan_folder(str(source)).splits.values() for name, _ in rows)


PLAIN = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/deep/2.jpg"]


@pytest.mark.parametrize("name", SYSTEM)
def test_a_system_folder_is_no_class_and_its_images_are_not_used(tmp_path: Path, name: str) -> None:
    source = labelled(tmp_path / "p")
    image_at(source / name / "1.jpg")
    image_at(source / "cat" / name / "1.jpg")
    image_at(source / "cat" / "._1.jpg")
    index = scan_folder(str(source))
    assert index.class_names == ("cat", "dog")
    assert names_of(source) == PLAIN
    assert not index.left_out
    assert find_images([str(source)]).files == tuple(f"{source}/{each}" for each in PLAIN)


def test_system_folders_are_ignored_in_a_store_too(tmp_path: Path) -> None:
    source = labelled(tmp_path / "p")
    image_at(source / "__MACOSX" / "cat" / "1.jpg")
    image_at(source / "cat" / "@eaDir" / "1.jpg")
    (source / "readme.txt").write_text("")
    fsspec.filesystem("memory").put(f"{source}/", "/walked/", recursive=True)
    assert names_of("memory://walked") == PLAIN
    assert scan_folder("memory://walked").left_out == [("readme.txt", "no image suffix")]
    assert find_images(["memory://walked"]).files == tuple(f"memory:///walked/{each}" for each in PLAIN)


def test_links_to_files_and_to_folders_are_followed_alike_and_counted(tmp_path: Path) -> None:
    source = labelled(tmp_path / "p")
    elsewhere = labelled(tmp_path / "elsewhere")
    (source / "cat" / "3.jpg").symlink_to(elsewhere / "cat" / "1.jpg")
    (source / "owl").symlink_to(elsewhere / "dog")
    (source / "cat" / "more").symlink_to(elsewhere / "cat")
    expected = sorted([*PLAIN, "cat/3.jpg", "cat/more/1.jpg", "cat/more/2.jpg", "owl/1.jpg", "owl/deep/2.jpg"])
    index = scan_folder(str(source))
    assert index.class_names == ("cat", "dog", "owl")
    assert names_of(source) == expected
    assert index.num_links == 3
    assert all(index.read(name).startswith(b"\xff\xd8") for name in expected)
    found = find_images([str(source)])
    assert found.files == tuple(f"{source}/{each}" for each in expected)
    assert left_out_lines(found, tmp_path / "o.csv") == ["followed 3 symbolic links, to files and folders alike"]


def test_loops_broken_links_and_what_is_no_file_are_left_out_and_named(tmp_path: Path) -> None:
    source = labelled(tmp_path / "p")
    (source / "cat" / "up").symlink_to(source)
    (source / "dog" / "self").symlink_to(source / "dog")
    (source / "dog" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (source / "dog" / "itself.jpg").symlink_to(source / "dog" / "itself.jpg")
    os.mkfifo(source / "dog" / "pipe.jpg")  # reading it would wait for ever
    assert names_of(source) == PLAIN
    assert scan_folder(str(source)).left_out == [
        ("cat/up", "a link to a folder that is already listed"),
        ("dog/broken.jpg", "a broken link"),
        ("dog/itself.jpg", "a broken link"),
        ("dog/pipe.jpg", "not a regular file"),
        ("dog/self", "a link to a folder that is already listed"),
    ]
    assert find_images([str(source)]).files == tuple(f"{source}/{each}" for each in PLAIN)


def test_folders_that_link_to_each_other_are_listed_once(tmp_path: Path) -> None:
    names = [str(number) for number in range(12)]  # their paths are more than a computer can list
    for name in names:
        image_at(tmp_path / name / "1.jpg")
    pairs = [(name, other) for name in names for other in names if name != other]
    for name, other in pairs:
        (tmp_path / name / f"to {other}").symlink_to(tmp_path / other)
    found = walk(fsspec.filesystem("file"), str(tmp_path))
    assert found.files == sorted(f"{name}/1.jpg" for name in names)
    assert found.folders == sorted(names)
    reason = "a link to a folder that is already listed"
    assert found.left_out == sorted((f"{name}/to {other}", reason) for name, other in pairs)
    assert found.num_links == 0


def test_a_folder_that_several_links_lead_to_is_listed_under_the_first_name(tmp_path: Path) -> None:
    labelled(tmp_path / "out")
    source = tmp_path / "p"
    image_at(source / "own" / "1.jpg")
    for name, target in (
        ("owl", "out/dog/deep"),
        ("newt", "out/dog"),
        ("crab", "out/dog"),
        ("all", "."),
        ("see", "p/own"),
    ):
        (source / name).symlink_to(tmp_path / target)
    found = walk(fsspec.filesystem("file"), str(source))
    assert found.files == [
        *(f"all/out/{name}" for name in PLAIN),
        "own/1.jpg",
    ]
    again = "a link to a folder that is already listed"
    assert found.left_out == [
        ("all/p", "a folder that is already listed"),
        *((name, again) for name in ("crab", "newt", "owl", "see")),
    ]
    (source / "all").unlink()
    found = walk(fsspec.filesystem("file"), str(source))
    assert found.files == ["crab/1.jpg", "crab/deep/2.jpg", "own/1.jpg"]
    assert found.left_out == [(name, again) for name in ("newt", "owl", "see")]
    assert found.num_links == 1


def test_a_conversion_counts_what_is_left_out_by_suffix_and_lists_it_beside_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = labelled(tmp_path / "p"), tmp_path / "out"
    image_at(source / "loose.jpg")
    for name in ("notes.TXT", "cat/a.txt", "cat/LICENSE", "dog/film.mp4"):
        (source / name).write_text("")
    (source / "dog" / "3.jpg").symlink_to(source / "cat" / "1.jpg")
    verb.main(["folder", str(source), str(out), "--validation-frac", "0", "--test-frac", "0"])
    printed = capsys.readouterr().out
    assert "followed 1 symbolic link, to files and folders alike\n" in printed
    assert f"left out 5 files (2 .txt, 1 without a suffix, 1 .mp4, 1 .jpg): {out}/left_out.txt\n" in printed
    assert (out / "left_out.txt").read_text().splitlines() == [
        "cat/LICENSE: no image suffix",
        "cat/a.txt: no image suffix",
        "dog/film.mp4: no image suffix",
        "loose.jpg: in no class directory",
        "notes.TXT: no image suffix",
    ]
    for name in ("notes.TXT", "cat/a.txt", "cat/LICENSE", "dog/film.mp4", "loose.jpg"):
        (source / name).unlink()
    verb.main(["folder", str(source), str(out), "--validation-frac", "0", "--test-frac", "0", "--overwrite"])
    assert "left out" not in capsys.readouterr().out
    assert not (out / "left_out.txt").exists()


def test_images_to_predict_that_are_left_out_are_counted_and_listed_beside_the_predictions(tmp_path: Path) -> None:
    source = labelled(tmp_path / "p")
    (source / "a.txt").write_text("")
    out = tmp_path / "o.csv"
    found = find_images([str(source), str(image_at(tmp_path / "one.jpg"))])
    assert len(found) == 5
    assert left_out_lines(found, out) == [f"left out 1 file (1 .txt): {out}.left_out.txt"]
    write_left_out(found, out)
    assert (tmp_path / "o.csv.left_out.txt").read_text() == f"{source}/a.txt: no image suffix\n"
    nothing = find_images([str(tmp_path / "one.jpg")])
    assert left_out_lines(nothing, out) == []
    write_left_out(nothing, out)
    assert not (tmp_path / "o.csv.left_out.txt").exists()


def test_every_suffix_of_a_format_that_is_read_is_an_image_in_any_case(tmp_path: Path) -> None:
    suffixes = [suffix for each in FORMATS.values() for suffix in each]
    for number, suffix in enumerate(suffixes):
        image_at(tmp_path / "p" / "cat" / f"{number}{suffix}")
        image_at(tmp_path / "p" / "cat" / f"{number}{suffix.upper()}")
    assert len(find_images([str(tmp_path / "p")])) == len(names_of(tmp_path / "p")) == 2 * len(suffixes) > 30


def test_a_folder_without_images_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "p" / "__MACOSX").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"must be a folder of class directories, but got none"):
        scan_folder(str(tmp_path / "p"))
    (tmp_path / "p" / "cat").mkdir()
    with pytest.raises(BadInput, match=r"must contain images \(\.avif .*\), but got none"):
        scan_folder(str(tmp_path / "p"))
    with pytest.raises(BadInput, match=r"must be images, a folder of images, or Parquet shards, but got none"):
        find_images([str(tmp_path / "p")])


def test_suffixes_are_counted_with_the_most_frequent_first() -> None:
    names = ["a.txt", "b.TXT", "c.pdf", "d", "e.txt"]
    assert counted([(name, "") for name in names]) == "5 files (3 .txt, 1 .pdf, 1 without a suffix)"
