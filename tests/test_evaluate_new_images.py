"""python -m lift_ray.evaluate RUN --data: labeled images that are not converted, with some of the classes of the model."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_json import flat_evaluation
from PIL import Image

from lift_ray import evaluate
from lift_ray.data.bit_depth import Rendering
from lift_ray.data.convert.conversion import convert
from lift_ray.data.convert.folder import scan_folder
from lift_ray.data.convert.images import Encoding
from lift_ray.data.convert.shards import publish, write_split
from lift_ray.data.convert.splitting import Division
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.evaluation.metrics import ClassGroups
from lift_ray.inference.new_images import SourceOptions, match_classes, opened_images
from lift_ray.methods.world import Ranks
from lift_ray.reporting.confidence import Interval, accuracy_intervals
from lift_ray.reporting.old_test import NewResults, OldTest, compare, difference, read_old_test
from lift_ray.reporting.study_files import Predictions, predictions_of
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import RECORD
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

pytestmark = pytest.mark.usefixtures("same_threads")
Photos = list[tuple[str, str, bytes]]  # file name, class and bytes of each image
Evaluate = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def run(small_data: str, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that has trained nothing: a checkpoint of 8 classes."""
    out = tmp_path_factory.mktemp("run")
    config = {"backbone": {"model": small_clip}, "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.01}}
    Run(RunConfig.model_validate(config), Workspace(small_data, Ranks.alone(use_gpu=False, num_cpus=1))).save(
        out / "checkpoint"
    )
    return out


@pytest.fixture(scope="module")
def names(small_data: str) -> list[str]:
    """The 8 class names of the model, in label order."""
    return list(open_dataset(small_data).class_names)


@pytest.fixture(scope="module")
def photos(small_data: str, names: list[str]) -> Photos:
    """The test images of the first three classes, three of each."""
    split = open_dataset(small_data).split("test")
    rows = np.flatnonzero(split.labels < 3)
    with RowReader(split) as reader:
        images = reader.read(rows)
    return [(f"{row}.jpg", names[split.labels[row]], data) for row, data in zip(rows, images, strict=True)]


@pytest.fixture
def asked(run: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """A function that evaluates the model, and returns the JSON and the notes."""

    def ask(*words: object) -> tuple[dict[str, Any], str]:
        evaluate.main([str(run), *map(str, words), "--json"])
        printed = capsys.readouterr()
        lines = takewhile(lambda line: line.startswith(("note: ", "  ")), printed.err.splitlines(keepends=True))
        return flat_evaluation(printed.out), "".join(lines)  # the tables follow on stderr

    return ask


def in_folders(photos: Photos, folder: Path, renamed: Callable[[str], str] = lambda name: name) -> Path:
    for file, name, data in photos:
        (folder / renamed(name)).mkdir(parents=True, exist_ok=True)
        (folder / renamed(name) / file).write_bytes(data)
    return folder


def in_table(photos: Photos, folder: Path, **columns: list[str]) -> Path:
    (folder / "files").mkdir(parents=True)
    for file, _, data in photos:
        (folder / "files" / file).write_bytes(data)
    rows = {"path": [f"files/{file}" for file, _, _ in photos], "species": [name for _, name, _ in photos], **columns}
    with (folder / "season.csv").open("w") as file:
        csv.writer(file).writerows([list(rows), *zip(*rows.values(), strict=True)])
    return folder / "season.csv"


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.startswith("test/")}


def test_every_kind_of_source_of_the_same_images_gives_the_same_figures(
    asked: Evaluate, photos: Photos, names: list[str], tmp_path: Path
) -> None:
    table = in_table(photos, tmp_path / "table")
    (tmp_path / "table" / "test.txt").write_text("".join(f"files/{f} {names.index(n)}\n" for f, n, _ in photos))
    (tmp_path / "table" / "names.txt").write_text("\n".join(names))
    parquet = tmp_path / "season.parquet"
    pq.write_table(
        pa.table({"image": [data for *_, data in photos], "label": [name for _, name, _ in photos]}), parquet
    )
    shutil.copytree(in_folders(photos, tmp_path / "photos"), tmp_path / "splits" / "Test")
    sources = [
        (tmp_path / "photos",),
        (tmp_path / "splits",),
        (f"file://{tmp_path}/photos",),
        (table, "--label-column", "species"),
        (tmp_path / "table" / "test.txt", "--class-names", tmp_path / "table" / "names.txt"),
        (parquet,),
        (f"{tmp_path}/seas*.parquet",),
    ]
    found = [asked("--data", *words)[0] for words in sources]
    first = figures(found[0])
    assert {"test/accuracy", "test/mean_class_accuracy", "test/many"} <= set(first)
    for each in found:
        assert figures(each) == pytest.approx(first, abs=1e-6)
        assert each["classes"] == {"with_images": 3, "of_model": 8, "unknown": {}, "by_case": {}}


def test_figures_are_those_of_the_test_split_if_the_images_are_the_same(
    asked: Evaluate, small_data: str, photos: Photos, tmp_path: Path
) -> None:
    split = open_dataset(small_data).split("test")
    names = open_dataset(small_data).class_names
    with RowReader(split) as reader:
        images = reader.read(np.arange(split.num_samples))
    all_photos = [
        (f"{i}.jpg", names[label], image) for i, (label, image) in enumerate(zip(split.labels, images, strict=True))
    ]
    found, notes = asked("--data", in_folders(all_photos, tmp_path / "photos"))
    assert figures(found) == pytest.approx(figures(asked()[0]), abs=1e-6)
    assert notes == ""


def test_missing_unknown_and_differently_written_classes_are_named(
    asked: Evaluate, photos: Photos, names: list[str], tmp_path: Path
) -> None:
    folder = in_folders(photos, tmp_path / "photos", lambda name: name.upper() if name == names[0] else name)
    in_folders([(f, "dodo", data) for f, _, data in photos[:2]], folder)
    (folder / names[5]).mkdir()
    found, notes = asked("--data", folder)
    assert found["classes"] == {
        "with_images": 3,
        "of_model": 8,
        "unknown": {"dodo": 2},
        "by_case": {names[0].upper(): names[0]},
    }
    missing = ", ".join(map(repr, names[3:6]))
    assert notes == (
        f"note: 5 of the model's 8 classes have no images here ({missing}, ...); metrics are over the other 3\n"
        f"note: names that differ in case or spaces only are the same class: {names[0].upper()!r} is {names[0]!r}\n"
        "note: left out 2 images of 1 class that the model does not have: 'dodo' (2)\n"
    )


@pytest.mark.parametrize(
    ("theirs", "labels"),
    [
        (["crab", "Ara"], [1, 0]),
        (["CRAB"], [1]),
        (["Red_fox", "red fox"], None),
        (["red_fox"], [2]),
        ([unicodedata.normalize("NFD", "bébé")], [3]),
        ([unicodedata.normalize("NFD", "bébé"), "bébé"], [3, 3]),
        (["Owl", "owl"], [4, 5]),
        (["OWL"], [-1]),
        (["STRASSE"], [6]),
        (["crab "], [1]),
        (["cra"], [-1]),
        (["crab", "Crab"], None),
    ],
)
def test_names_match_exactly_first_and_then_without_case_if_only_one_class_does(
    theirs: list[str], labels: list[int] | None
) -> None:
    ours = ["Ara", "crab", "red fox", "bébé", "Owl", "owl", "straße"]
    if labels is None:
        with pytest.raises(BadInput, match="photos: each class must be written in one way, but got '"):
            match_classes(theirs, ours, "photos")
    else:
        assert match_classes(theirs, ours, "photos").labels.tolist() == labels


def test_a_dataset_with_some_of_the_classes_in_another_order_is_read_where_it_is(
    asked: Evaluate, photos: Photos, names: list[str], tmp_path: Path
) -> None:
    order = [names[2], "dodo", names[0], names[1]]
    samples = [(data, file, order.index(name)) for file, name, data in photos] + [(photos[0][2], "d.jpg", 1)]
    publish(str(tmp_path / "data"), order, {"test": write_split(str(tmp_path / "data"), "test", samples, order)})
    with opened_images(str(tmp_path / "data"), names) as images:
        assert not images.is_temporary
        labels = images.dataset.split("test").labels.tolist()
    assert labels == [names.index(name) for _, name, _ in photos]
    found, notes = asked("--data", tmp_path / "data")
    assert found["classes"]["unknown"] == {"dodo": 1}
    assert "left out 1 image of 1 class" in notes
    expected, _ = asked("--data", in_folders(photos, tmp_path / "photos"))
    assert figures(found) == pytest.approx(figures(expected), abs=1e-6)


def test_a_source_without_splits_counts_as_test_and_otherwise_one_split_is_taken(
    asked: Evaluate, photos: Photos, tmp_path: Path
) -> None:
    splits = ["train", "train", "val", "val", "val", "test", "test", "test", "test"]
    table = in_table(photos, tmp_path / "table", split=splits)

    with pytest.raises(
        BadInput, match="must have a test split, but got only train, validation; choose one with --split"
    ):
        asked("--data", in_table(photos[:5], tmp_path / "two", split=splits[:5]), "--label-column", "species")
    found = {}
    for split in (None, "test", "validation", "train"):
        with opened_images(str(table), sorted({n for _, n, _ in photos}), split, options("species")) as images:
            found[split] = (images.split, images.dataset.split(images.split).num_samples)
    assert found == {None: ("test", 4), "test": ("test", 4), "validation": ("validation", 3), "train": ("train", 2)}


def options(label_column: str) -> SourceOptions:
    return SourceOptions(label_column=label_column)


def test_a_bad_image_is_named_or_skipped_and_counted(asked: Evaluate, photos: Photos, tmp_path: Path) -> None:
    folder = in_folders(photos, tmp_path / "photos")
    broken = folder / photos[0][1] / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(BadInput) as caught:
        asked("--data", folder)
    assert str(caught.value) == (
        f"{broken}: must be an intact image, but got bytes of no known format; remove it or pass --skip-bad"
    )
    found, notes = asked("--data", folder, "--skip-bad")
    assert len(found["skipped"]) == 1
    assert notes.splitlines()[1:] == [
        "note: left out 1 bad image:",
        f"  {broken}: must be an intact image, but got bytes of no known format",
    ]
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"photos: must have an image that can be decoded, but got none \("):
        asked("--data", folder, "--skip-bad")


def test_new_images_are_rendered_as_those_of_the_model_whatever_the_source(
    run: Path, photos: Photos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pixels that are transparent lie over the background of the model in all sources, and in a dataset over its own."""
    shutil.copytree(run, tmp_path / "run")
    record = tmp_path / "run" / "checkpoint" / RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "rendering": {"background": "#ffffff"}}))
    seen = [(f"{number}.png", name, half_transparent(data)) for number, (_, name, data) in enumerate(photos)]
    folder, tables, shards = in_folders(seen, tmp_path / "folder"), tmp_path / "tables", tmp_path / "shards"
    rows = {"image": [data for _, _, data in seen], "label": [name for _, name, _ in seen]}
    tables.mkdir()
    pq.write_table(pa.table(rows), tables / "rows.parquet")
    convert(scan_folder(str(folder)), str(shards), division=Division(0.0, 0.0))
    (shards / "manifest.json").unlink()  # as others write them

    def loss(model: Path, *words: object) -> tuple[Any, str]:
        evaluate.main([str(model), "--data", *map(str, words), "--json"])
        printed = capsys.readouterr()
        (value,) = (value for name, value in flat_evaluation(printed.out).items() if name.endswith("/loss"))
        return pytest.approx(value, abs=1e-6), printed.err

    expected, _ = loss(tmp_path / "run", folder)
    assert loss(run, folder)[0] != expected
    for words in ([tables], [shards, "--split", "train"], [shards, "--split", "train", "--skip-bad"]):
        assert loss(tmp_path / "run", *words)[0] == expected, words
    white = tmp_path / "white"
    rendering = Encoding(rendering=Rendering.of({"background": "#ffffff"}))
    convert(scan_folder(str(folder)), str(white), division=Division(0.0, 0.0), encoding=rendering)
    found, notes = loss(tmp_path / "run", white, "--split", "train")
    assert found == expected
    assert "converted with" not in notes
    found, notes = loss(run, white, "--split", "train")
    assert found == expected
    assert "note: these images were converted with --background #ffffff, those of the model with none: they" in notes
    with pytest.raises(
        BadInput, match=r"must have the --window, --page and --background of .*, but got none; evaluate"
    ):
        evaluate.main([str(tmp_path / "run"), str(run), "--data", str(folder)])


def half_transparent(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        rgba = image.convert("RGBA")
    rgba.paste((0, 0, 0, 0), (0, 0, rgba.width // 2, rgba.height))
    file = io.BytesIO()
    rgba.save(file, "PNG")
    return file.getvalue()


def test_a_folder_of_save_to_disk_is_evaluated_and_system_folders_are_no_classes(
    asked: Evaluate, photos: Photos, tmp_path: Path
) -> None:
    rows = {"image": [data for _, _, data in photos], "label": [name for _, name, _ in photos]}
    import datasets

    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    folder = in_folders(photos, tmp_path / "split" / "val")
    (tmp_path / "split" / "lost+found").mkdir()
    found, _ = asked("--data", tmp_path / "saved")
    assert figures(found) == {
        name.replace("validation/", "test/"): value
        for name, value in asked("--data", folder.parent, "--split", "validation")[0].items()
        if name.startswith("validation/")
    }


def test_sources_that_cannot_be_evaluated_are_refused_in_one_line(
    asked: Evaluate, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = in_table(photos, tmp_path / "table")
    empty = tmp_path / "empty"
    empty.mkdir()
    other = in_folders([(file, "dodo", data) for file, _, data in photos], tmp_path / "other")
    twice = in_folders(photos, tmp_path / "twice")
    in_folders(photos, twice, str.upper)
    (tmp_path / "photo.jpg").write_bytes(photos[0][2])
    (tmp_path / "list.txt").write_text("a.jpg 0\n")
    cases: list[tuple[list[object], str]] = [
        ([empty], f"{empty}: must be a folder of class directories, but got none; give each class a directory"),
        (
            [tmp_path / "no"],
            f"{tmp_path}/no: must be a dataset, a folder of class directories, a CSV, Parquet or .txt "
            "list, or a folder of save_to_disk, but nothing is there; check the path",
        ),
        ([tmp_path / "photo.jpg"], f"{tmp_path}/photo.jpg: must be a dataset, a folder of class directories, a CSV"),
        (
            [table],
            f"{table}: the label column must be unambiguous, but got the columns path, species; pass --label-column",
        ),
        ([other], f"{other}: must have images of classes of the model, but got only 'dodo'; check the class names"),
        ([twice], f"{twice}: each class must be written in one way, but got '"),
        (
            [other, "--split", "test"],
            f"{other}: must have a test split, but got only train; leave --split out to use all",
        ),
        ([other, "--root", "x"], "--root: requires a table or a list that is not converted yet, but got "),
        (
            [tmp_path / "list.txt"],
            "--class-names: is required for a list of paths and numbers, but is missing; give a file",
        ),
        (
            ["embedded:caltech101-lt", "--root", "x"],
            "--root: requires a table or a list that is not converted yet, but got ",
        ),
    ]
    for words, message in cases:
        with pytest.raises(BadInput) as caught:
            asked("--data", *words)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"image": [b""], "label": ["a"]}), empty / "test-00000-of-00002.parquet")
    with pytest.raises(BadInput, match="empty/test: the names say 2 shards, but got 1 shard"):
        asked("--data", empty, "--skip-bad")
    for option in ("--skip-bad", "--old-test"):
        with pytest.raises(BadInput, match=f"^{option}: requires --data, but it is missing; add --data$"):
            asked(option)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(
        BadInput, match=r"^--workers: must be 1 on a cluster for images that are not converted, but got 2"
    ):
        asked("--data", in_folders(photos, tmp_path / "photos"), "--workers", 2)
    with pytest.raises(BadInput, match=r"^--gla: requires a dataset with validation images, but got .*; leave it out$"):
        asked("--data", tmp_path / "photos", "--gla")


def test_labels_that_are_numbers_require_the_names_they_stand_for(
    asked: Evaluate, photos: Photos, names: list[str], tmp_path: Path
) -> None:
    reverse = names[::-1]
    table = in_table([(f, str(reverse.index(n)), data) for f, n, data in photos], tmp_path / "table")
    words = ("--data", table, "--label-column", "species")
    with pytest.raises(BadInput, match="numeric labels require class names, but got none; pass --class-names FILE"):
        asked(*words)
    (tmp_path / "names.txt").write_text("\n".join(reverse))
    found, _ = asked(*words, "--class-names", tmp_path / "names.txt")
    expected, _ = asked("--data", in_folders(photos, tmp_path / "photos"))
    assert figures(found) == pytest.approx(figures(expected), abs=1e-6)


def test_an_old_test_split_of_the_same_data_is_refused(asked: Evaluate, small_data: str) -> None:
    with pytest.raises(BadInput, match=r"^--old-test: requires other images, but got .*; leave it out"):
        asked("--data", small_data, "--old-test")


def test_several_models_are_evaluated_together_and_say_that_no_results_of_theirs_are_stored(
    asked: Evaluate, run: Path, photos: Photos, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    folder = in_folders(photos, tmp_path / "photos")
    alone, _ = asked("--data", folder)
    found, _ = asked(tmp_path / "copy", "--data", folder)
    assert figures(found)["test/accuracy"] == pytest.approx(alone["test/accuracy"])
    assert list(found["members"]) == [str(run), str(tmp_path / "copy")]
    assert found["old_test_note"] == (
        "no comparison with the old test split: results are stored for the settings of the run only; add --old-test to "
        "evaluate it now"
    )
    found, _ = asked(tmp_path / "copy", "--data", folder, "--old-test")
    assert [row["difference"] for row in found["old_test"]["rows"]] == pytest.approx([0.0] * 3)


def test_nothing_is_left_in_the_temporary_folder(
    asked: Evaluate, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    folder = in_folders(photos, tmp_path / "photos")
    asked("--data", folder)
    next(folder.rglob("*.jpg")).write_bytes(b"")
    with pytest.raises(BadInput, match="got 0 bytes"):
        asked("--data", folder)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_per_class_and_confusion_are_those_of_the_new_images(
    asked: Evaluate, photos: Photos, names: list[str], tmp_path: Path
) -> None:
    folder = in_folders(photos, tmp_path / "photos")
    asked("--data", folder, "--per-class", tmp_path / "classes.csv", "--confusion", tmp_path / "confusion.csv")
    with (tmp_path / "classes.csv").open() as file:
        assert [int(row["images"]) for row in csv.DictReader(file)] == [3, 3, 3, 0, 0, 0, 0, 0]
    with (tmp_path / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["true"] for row in rows} == set(names[:3])
    assert sum(int(row["count"]) for row in rows) == 9


def test_without_stored_results_the_note_says_how_to_compare(
    asked: Evaluate, run: Path, photos: Photos, tmp_path: Path
) -> None:
    found, _ = asked("--data", in_folders(photos, tmp_path / "photos"))
    assert found["old_test"] is None
    assert found["old_test_note"] == (
        f"no comparison with the old test split: no results on it are stored with {run}; add --old-test to evaluate it now"
    )


def test_old_test_compares_the_same_classes(
    asked: Evaluate, run: Path, photos: Photos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = in_folders(photos, tmp_path / "photos")
    found, _ = asked("--data", folder, "--old-test")
    # The photos are the old test images of their classes, so nothing differs on these, whatever the other classes give.
    assert found["old_test"]["classes"] == 3
    rows = {row["metric"]: row for row in found["old_test"]["rows"]}
    assert list(rows)[:2] == ["accuracy", "mean_class_accuracy"]
    for name, row in rows.items():
        assert row["new"] == pytest.approx(found[f"test/{name}"])
        assert row["difference"] == pytest.approx(0)
        assert row["low"] < 0 < row["high"]
    low, high = found["intervals"]["accuracy"]
    assert 0 <= low <= found["test/accuracy"] <= high <= 1
    evaluate.main([str(run), "--data", str(folder), "--old-test"])
    printed = capsys.readouterr().out
    assert "New images and the old test split, 3 classes that both have: accuracy (%)" in printed
    assert re.search(r"new - old +\+0\.0 +\+0\.0", printed)
    assert re.search(r"^95% intervals \(%\): overall [\d.]+ to [\d.]+, mean class [\d.]+ to", printed, re.MULTILINE)


def test_stored_results_are_found_next_to_the_checkpoint(
    asked: Evaluate, run: Path, photos: Photos, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    shutil.copytree(run / "checkpoint", study / "best")
    assert read_old_test(str(study / "best")) is None
    (study / "best" / "metrics.json").write_text('{"test/accuracy": 0.5, "test/few": 0.25, "test/loss": 3}')
    assert read_old_test(str(study)) == OldTest({"accuracy": 0.5, "few": 0.25})
    label, predicted = np.array([0, 0, 0, 0, 7, 7]), np.array([0, 0, 0, 1, 1, 1])
    target = study / predictions_of("refit", 0)
    target.mkdir(parents=True)
    pq.write_table(
        pa.table({"label": label, "predicted": predicted, "confidence": np.full(6, 0.5)}), target / "test.parquet"
    )
    entry = {"label": "best found", "predictions": target.name, "test/accuracy": 0.5}
    (study / "study.json").write_text(json.dumps({"compared": [{"label": "zero-shot"}, entry]}))
    for where in (study, study / "best"):
        found = read_old_test(str(where))
        assert found is not None
        assert found.metrics == {"accuracy": 0.5}
        assert found.predictions is not None
        assert found.predictions.label.tolist() == label.tolist()
    trained = tmp_path / "trained"
    shutil.copytree(run / "checkpoint", trained / "checkpoint")
    (trained / "metrics.jsonl").write_text(
        '{"epoch": 1, "validation/accuracy": 1}\n{"epoch": 1, "test/accuracy": 0.75}\n'
    )
    assert read_old_test(str(trained / "checkpoint")) == OldTest({"accuracy": 0.75})
    (trained / "metrics.jsonl").write_text("{")
    with pytest.raises(BadInput, match=r"metrics.jsonl: invalid JSON: .*; copy the folder again"):
        read_old_test(str(trained))


GROUPS = np.array(["many", "few", "few"])


def of(label: list[int], predicted: list[int]) -> Predictions:
    return Predictions(np.array(label), np.array(predicted), np.full(len(label), 0.5))


def test_a_comparison_leaves_out_the_classes_that_only_one_side_has() -> None:
    new, old = of([0] * 10 + [1] * 10, [0] * 9 + [1] * 11), of([0] * 10 + [2] * 10, [0] * 6 + [1] * 4 + [2] * 10)
    found = compare(new, OldTest({}, old), GROUPS)
    assert found is not None
    assert found.classes == 1
    assert {row["metric"]: round(row["difference"], 6) for row in found.rows} == dict.fromkeys(
        ("accuracy", "mean_class_accuracy", "many"), 0.3
    )
    assert compare(of([1], [1]), OldTest({}, of([2], [2])), GROUPS) is None


def test_stored_accuracies_alone_are_compared_without_interval_and_with_a_note() -> None:
    found = NewResults.of(of([0, 0], [0, 1]), GROUPS, OldTest({"accuracy": 0.75, "few": 0.1}))
    assert found.comparison is not None
    assert found.comparison.rows == [{"metric": "accuracy", "new": 0.5, "old": 0.75, "difference": -0.25}]
    assert found.note == (
        "of the old test split only accuracies are stored: they have no intervals and are of all its classes, while the new "
        "images are of fewer; add --old-test to evaluate it now"
    )


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says() -> None:
    random, groups, hits = np.random.default_rng(0), ClassGroups.of([30] * 6).names, 0
    label = np.repeat(np.arange(6), 30)

    def drawn(accuracy: float) -> Interval:
        predicted = np.where(random.random(len(label)) < accuracy, label, (label + 1) % 6)
        return accuracy_intervals(Predictions(label, predicted, np.ones(len(label))), groups)["mean_class_accuracy"]

    for _ in range(60):
        found = difference(drawn(0.7), drawn(0.8))
        hits += found.low <= -0.1 <= found.high
    assert 51 <= hits <= 60  # of 95% of 60, at most one in 2,000 seeds would have fewer
