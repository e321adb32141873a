"""`init`: a search space that fits the images, which the other verbs take as it is."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import jpegs
from PIL import Image

from lift_ray import cli, init, train, tune
from lift_ray.data.convert.sources import ReadOptions, find_source
from lift_ray.data.open import open_dataset
from lift_ray.errors import BadInput
from lift_ray.searching.first_space import Fit, name_for, space_text
from lift_ray.settings.checks import read_space
from lift_ray.settings.space import SpaceFile

LONG_TAIL = {"red fox": 60, "hare": 24, "badger": 12, "otter": 6, "marten": 4, "wolf": 2, "lynx": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class directories with 109 images, 60 down to 1 of a class, and a table and a list of them."""
    folder = tmp_path_factory.mktemp("own") / "photos"
    images = iter(jpegs(sum(LONG_TAIL.values())))
    rows, lines = ["file,species"], []
    for label, (name, number) in enumerate(LONG_TAIL.items()):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            (folder / name / f"{index}.jpg").write_bytes(next(images))
            rows.append(f"{name}/{index}.jpg,{name}")
            lines.append(f"{name}/{index}.jpg {label}")
    for file, text in (("labels.csv", rows), ("labels.txt", lines), ("names.txt", list(LONG_TAIL))):
        (folder.parent / file).write_text("\n".join(text) + "\n")
    return folder


@pytest.fixture
def here(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, next to the images, on a machine without a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for path in photos.parent.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(text: str) -> list[list[str]]:
    """Return the commands that a file says to run first, without `lift-ray`."""
    shown = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   lift-ray ")]
    return [shlex.split(line)[1:] for line in shown]


def run_shown(file: str, capsys: pytest.CaptureFixture[str]) -> SpaceFile:
    """Run the commands of a file, up to the dry run, and return its search."""
    *convert, dry, search = commands(Path(file).read_text(encoding="utf-8"))
    for command in convert:
        assert cli.main(command) is None
    assert (dry, search) == (["tune", file, "--dry-run"], ["tune", file])
    assert cli.main(dry) is None
    assert capsys.readouterr().out.endswith("checked: no errors found\n")
    return read_space(file)


def test_a_folder_of_images_becomes_a_search(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init.main(["photos/"])
    assert capsys.readouterr().out.splitlines() == [
        "photos/: a folder of class directories, not converted yet",
        "images: 109 labeled for training in 7 classes, from 60 ('red fox') to 1 ('lynx')",
        "rare classes: 5 classes with fewer than 20 images, 3 classes with fewer than 5",
        f"size: {_size(here / 'photos')} px, the median of 9 images",
        "splits: 76 train, 12 validation, 21 test (as convert will draw them)",
        "wrote photos.yaml; next:",
        "  lift-ray convert folder photos/ data/photos",
        "  lift-ray tune photos.yaml --dry-run",
        "  lift-ray tune photos.yaml",
    ]
    space = run_shown("photos.yaml", capsys)
    assert open_dataset("data/photos").split("train").num_samples == 76
    assert (space.name, space.search.folds, space.search.confirm is not None) == ("photos", 4, True)
    assert space.config({}).optim.global_batch_size == 8
    lines = [line for line in Path("photos.yaml").read_text().splitlines() if not line.endswith(":")]
    assert {line.split()[0] for line in lines if "#" not in line} == {
        "name:",
        "seed:",
        "-",
        "loss.tau:",
    }  # - a baseline


def _size(folder: Path) -> str:
    files = sorted(str(path) for path in folder.resolve().rglob("*.jpg"))
    source = find_source(str(folder))
    found = [
        source.origin.read(source.origin.splits["train"][at][0]) for at in np.linspace(0, 108, 9).round().astype(int)
    ]
    sizes = [Image.open(io.BytesIO(data)).size for data in found]
    assert len(files) == 109
    return " x ".join(str(round(float(np.median(side)))) for side in zip(*sizes, strict=True))


def test_the_counts_are_those_that_convert_draws(here: Path) -> None:
    source = find_source("photos")
    cli.main(["convert", "folder", "photos", "data/photos"])
    made = open_dataset("data/photos")
    for name, split in made.splits.items():
        assert source.splits[name].tolist() == split.class_counts(made.num_classes).tolist()
    assert made.labelled_counts is not None
    assert source.labelled.tolist() == made.labelled_counts.tolist()
    again = find_source("data/photos")
    assert again.is_converted
    assert again.labelled.tolist() == source.labelled.tolist()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (
            ["labels.csv", "--root", "photos", "--label-column", "species"],
            "convert csv labels.csv data/labels --label-column species --root photos",
        ),
        (
            ["labels.txt", "--root", "photos", "--class-names", "names.txt"],
            "convert list photos data/labels --train labels.txt --class-names names.txt",
        ),
    ],
    ids=["csv", "list"],
)
def test_tables_and_lists_become_searches(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], command: str
) -> None:
    init.main(words)
    assert "images: 109 labeled for training in 7 classes" in capsys.readouterr().out
    assert commands(Path("labels.yaml").read_text())[0] == command.split()
    run_shown("labels.yaml", capsys)


def test_parquet_tables_and_shards_are_told_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = jpegs(40)
    table = pa.table({"image": pa.array(images, pa.binary()), "label": ["hen", "cock"] * 20})
    Path("raw").mkdir()
    pq.write_table(table, "raw/train.parquet")  # the name of a shard, but without class names
    init.main(["raw"])
    assert "raw: a table in Parquet, not converted yet" in capsys.readouterr().out
    assert run_shown("raw.yaml", capsys).dataset.endswith("data/raw")
    init.main(["data/raw", "--out", "again.yaml"])
    assert "data/raw: a dataset\n" in capsys.readouterr().out
    assert [command[0] for command in commands(Path("again.yaml").read_text())] == ["tune", "tune"]


def test_split_directories_keep_their_splits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = iter(jpegs(60))
    for split, number in (("train", 20), ("val", 6), ("test", 4)):
        for name in ("hen", "cock"):
            Path("own", split, name).mkdir(parents=True)
            for index in range(number):
                Path("own", split, name, f"{index}.jpg").write_bytes(next(images))
    init.main(["own"])
    out = capsys.readouterr().out
    assert "images: 40 labeled for training in 2 classes" in out
    assert "splits: 40 train, 12 validation, 8 test (as convert will draw them)" in out
    run_shown("own.yaml", capsys)
    assert open_dataset("data/own").validation == "separate"


def test_what_datasets_saved_is_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": image, "path": None} for image in jpegs(20)], "label": ["hen", "cock"] * 10}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk("saved")
    init.main(["saved"])
    assert "saved: a folder of save_to_disk, not converted yet" in capsys.readouterr().out
    assert commands(Path("saved.yaml").read_text())[0] == ["convert", "arrow", "saved", "data/saved"]
    run_shown("saved.yaml", capsys)


def test_the_embedded_dataset_is_searched_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init.main(["embedded:caltech101-lt"])
    assert "images: 4,267 labeled for training in 100 classes, from 200 ('airplanes') to 4" in capsys.readouterr().out
    space = run_shown("caltech101-lt.yaml", capsys)
    assert space.dataset == "embedded:caltech101-lt"
    assert (space.config({}).backbone.model, space.search.folds) == ("embedded:lift-small", 1)


def test_with_a_gpu_it_is_clip(here: Path) -> None:
    source = find_source("embedded:caltech101-lt")
    for gpus, wanted in (0, "embedded:lift-small"), (2, "ViT-B-16"):
        fit = Fit.of(source, [(300, 200)], gpus, Path("mine.yaml"), "mine")
        Path("mine.yaml").write_text(space_text(fit))
        backbone = read_space("mine.yaml").config({}).backbone
        assert backbone.model == wanted
    space = read_space("mine.yaml")
    assert (backbone.pretrained, backbone.precision, space.scale.use_gpu) == ("openai", "bf16", True)
    assert (
        space.baseline_values()[0]["tuner.bottleneck"] == 4
    )  # the published rule for 100 classes, as in cifar100_lt.yaml
    assert tune.main(["mine.yaml", "--dry-run"]) is None
    assert read_space("cifar100_lt").baseline_values()[0]["tuner.bottleneck"] == 4


def test_class_names_that_are_numbers_start_from_class_means(here: Path) -> None:
    source = replace(find_source("photos"), class_names=("1", "2", "3", "4", "5", "6", "lynx"))
    Path("mine.yaml").write_text(space_text(Fit.of(source, [], 1, Path("mine.yaml"), "mine")))
    assert read_space("mine.yaml").config({}).head.init == "class_mean"


def test_large_images_are_shrunk_and_the_resolution_is_a_choice(here: Path) -> None:
    for name in ("a", "b"):
        Path("large", name).mkdir(parents=True)
        for index in range(9):
            Image.new("RGB", (640, 480), (index, 0, 0)).save(f"large/{name}/{index}.jpg")
    init.main(["large"])
    text = Path("large.yaml").read_text()
    assert commands(text)[0] == ["convert", "folder", "large", "data/large", "--short-side", "256"]
    assert "# It sees 84 px of your 640 x 480.\n" in text


@pytest.mark.parametrize("number", [1, 2, 3, 5, 20, 50, 200, 3000])
def test_a_batch_and_the_folds_fit_any_number_of_images(here: Path, number: int) -> None:
    """Two classes, the second with three images: `tune --dry-run` refuses a batch that is too large and a fold without images."""
    source = find_source("photos")
    counts = {"train": np.array([number, 3]), "validation": np.array([1, 1])}
    fit = Fit.of(
        replace(source, class_names=("a", "b"), labelled=counts["train"], splits=counts), [], 0, Path("x"), "x"
    )
    assert 1 <= fit.batch <= max(1, (number + 3) // 8)
    assert fit.batch <= 128
    assert fit.folds is (number >= 20)


def test_a_tiny_folder_passes_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = jpegs(5)
    for name, number in (("hen", 3), ("cock", 2)):
        Path("tiny", name).mkdir(parents=True)
        for index in range(number):
            Path("tiny", name, f"{index}.jpg").write_bytes(images[index])
    init.main(["tiny"])
    run_shown("tiny.yaml", capsys)


def test_a_dataset_without_a_test_split_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["convert", "folder", "photos", "data/none", "--test-frac", "0", "--validation-frac", "0"])
    init.main(["data/none"])
    assert run_shown("none.yaml", capsys).test == "none"


def test_from_copies_a_shipped_space_with_this_dataset(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["convert", "folder", "photos", "data/photos"])
    init.main(["data/photos", "--from", "inat", "--out", "mine.yaml"])
    ours, theirs = read_space("mine.yaml"), read_space("inat")
    assert (ours.name, Path(ours.dataset)) == ("photos", Path("data/photos"))
    assert ours.plan.training_images == 76
    same = {"name": "", "dataset": "", "plan": theirs.plan}
    assert ours.model_copy(update=same) == theirs.model_copy(update=same)
    init.main(["data/photos", "--from", "quickstart", "--out", "quick.yaml"])
    capsys.readouterr()
    assert tune.main(["quick.yaml", "base.optim.global_batch_size=8", "--dry-run"]) is None
    init.main(["photos", "--from", "recipes/cifar100_lt/lift", "--out", "run.yaml"])
    text = Path("run.yaml").read_text()
    assert [command[0] for command in commands(text)] == ["convert", "train", "train"]
    assert "schema" not in text
    assert commands(text)[0][-1] == "data/photos-2"  # data/photos is taken


def test_a_run_file_from_a_shipped_one_is_read_by_train(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init.main(["embedded:caltech101-lt", "--from", "lift_plus", "--out", "run.yaml"])
    capsys.readouterr()
    assert train.main(["run.yaml", "--dry-run"]) is None
    assert capsys.readouterr().out.startswith("name: caltech101-lt\ndataset: embedded:caltech101-lt\n")


def test_nothing_is_overwritten(here: Path) -> None:
    Path("photos.yaml").write_text("mine\n")
    with pytest.raises(BadInput, match=r"^photos\.yaml: must be a new file, but it is there; give another --out FILE$"):
        init.main(["photos"])
    assert Path("photos.yaml").read_text() == "mine\n"
    with pytest.raises(BadInput, match=r"^--out: must be a writable file, but got "):
        init.main(["photos", "--out", "nowhere/x.yaml"])


def test_the_dataset_is_found_from_the_folder_of_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.main(["convert", "folder", "photos", "data/photos"])
    Path("spaces").mkdir()
    init.main(["data/photos", "--out", "spaces/mine.yaml"])
    assert "dataset: ../data/photos " in Path("spaces/mine.yaml").read_text()
    monkeypatch.chdir("/")
    assert open_dataset(read_space(here / "spaces/mine.yaml").dataset).num_classes == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: must be a dataset, a folder of class directories, a CSV"),
        (["photos/lynx"], "photos/lynx: must be a folder of class directories"),
        (["labels.csv"], "labels.csv: the label column must be unambiguous"),
        (["labels.txt"], "--class-names: is required for a list"),
        (["photos", "--root", "."], "--root: cannot be used with photos, but it is a folder of class directories"),
        (["photos", "--from", "int"], "int: must be the name of a space or run file of lift_ray, but is not; did you"),
        (["pho\ntos"], "'pho\\ntos': must consist of printable characters; rename it"),
        (["embedded:caltech"], "embedded:caltech: must name a dataset in the package"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(here: Path, words: list[str], message: str) -> None:
    before = sorted(os.listdir())
    with pytest.raises(BadInput) as error:
        init.main(words)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir()) == before


def test_images_that_no_search_can_use_are_refused(here: Path) -> None:
    for name in ("hen", "cock"):
        Path("single", name).mkdir(parents=True)
        shutil.copy("photos/lynx/0.jpg", f"single/{name}/0.jpg")
    with pytest.raises(BadInput, match=r"^single: must have a class with two training images"):
        init.main(["single"])
    shutil.rmtree("single/hen")
    with pytest.raises(BadInput, match=r"^single: must have at least 2 classes"):
        init.main(["single"])


def test_an_image_that_cannot_be_read_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hen", "cock"):
        Path("broken", name).mkdir(parents=True)
        Path("broken", name, "0.jpg").write_bytes(b"no image")
        shutil.copy("photos/lynx/0.jpg", f"broken/{name}/1.jpg")
    init.main(["broken"])
    out = capsys.readouterr().out
    assert "px, the median of 2 images\nan image cannot be read: " in out


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("photos/", "photos"),
        ("s3://bucket/raw birds/*.parquet", "raw-birds"),
        ("data/labels.CSV", "labels"),
        ("embedded:caltech101-lt", "caltech101-lt"),
        ("фото", "mine"),
        ("_x.v2", "x.v2"),
    ],
)
def test_the_name_is_that_of_the_images(place: str, name: str) -> None:
    assert name_for(place) == name


def test_the_folder_that_one_is_in_has_a_name_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here / "photos")
    assert (name_for("."), name_for("./")) == ("photos", "photos")


def test_paths_and_names_of_any_characters_on_a_terminal_in_ascii(here: Path) -> None:
    for name in ("grün: #1", "{ёж}"):
        Path("Fotos … ä #1", name).mkdir(parents=True)
        for index in range(6):
            Path("Fotos … ä #1", name, f"{index}.jpg").write_bytes(jpegs(6)[index])
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lift_ray", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=ascii_only)

    done = run("init", "Fotos … ä #1", "--out", "ä.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Fotos ... \\xe4 #1: a folder" in done.stdout
    convert, dry, _ = commands(Path("ä.yaml").read_text(encoding="utf-8"))
    for command in (convert, dry):
        done = run(*command)
        assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert find_source("data/Fotos-1", ReadOptions()).class_names == ("grün: #1", "{ёж}")


def test_options_are_for_the_sources_that_have_them() -> None:
    with pytest.raises(BadInput, match=r"^--label-column: cannot be used with x, but it is a list"):
        ReadOptions(label_column="a").given("list", "x")
    assert ReadOptions(root="a", class_names="b").given("list", "x") == {"root": "a", "class_names": "b"}
