"""python -m lift_ray.predict: one row per image, also after being killed."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_json import flat_evaluation
from made_run import predicted_by
from PIL import Image
from processes import stopping_itself, wait_until_it_stops

from lift_ray import evaluate, export, predict, serve
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput, RunFailed
from lift_ray.inference import classifier
from lift_ray.inference import predict as prediction
from lift_ray.inference.calibration import fit_temperature
from lift_ray.inference.image_files import ImageReader, find_images
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training import checkpoint
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace


@pytest.fixture(scope="module")
def trained(small_data: str, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A checkpoint after one epoch, and the class and probability of each test image in its own evaluation."""
    out = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    config = {
        "backbone": {"model": small_clip},
        "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.05},
        "evaluation": {"posthoc_tau": 0.5},
    }
    run = Run(RunConfig.model_validate(config), Workspace(small_data, Ranks.alone()))
    run.train_epoch()
    run.save(out / "checkpoint")
    _, table = predicted_by(run)
    torch.set_num_threads(threads)
    return out, np.stack([table["predicted"].to_numpy(), table["confidence"].to_numpy()])


@pytest.fixture(scope="module")
def photos(small_data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 24 test images as files in their order, one of which is broken, next to a text file."""
    folder = tmp_path_factory.mktemp("photos")
    split = open_dataset(small_data).split("test")
    with RowReader(split) as reader:
        for number, data in enumerate(reader.read(np.arange(24))):
            (folder / f"{number:02d}.jpg").write_bytes(data[:500] if number == 7 else data)
    (folder / "notes.txt").write_text("no image")
    return folder


def repeated(data: str, times: int, path: Path) -> Path:
    """The 24 test images, repeated `times` times in one shard."""
    shard = pq.read_table(next(Path(data).glob("test-*.parquet")))
    pq.write_table(pa.concat_tables([shard] * times), path, row_group_size=50)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_folder_gives_the_predictions_of_the_evaluation_and_a_broken_image_still_has_a_row(
    trained: tuple[Path, np.ndarray], photos: Path, small_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, (classes, confidences) = trained
    names = open_dataset(small_data).class_names
    predict.main([str(where), str(photos), "--out", str(tmp_path / "o.csv"), "--temperature", "1", "--top", "3"])
    assert "24 images, 1 of them unreadable (see column error)" in capsys.readouterr().out
    rows = rows_of(tmp_path / "o.csv")
    assert [Path(row["file"]).name for row in rows] == [f"{n:02d}.jpg" for n in range(24)]
    assert [n for n, row in enumerate(rows) if row["error"]] == [7]
    assert rows[7]["class_1"] == ""
    for n, row in enumerate(rows):
        if n != 7:
            assert row["class_1"] == names[int(classes[n])]
            assert float(row["probability_1"]) == pytest.approx(confidences[n], abs=1e-4)
            assert float(row["probability_1"]) >= float(row["probability_2"]) >= float(row["probability_3"])
    assert json.loads((tmp_path / "o.csv.json").read_text())["calibration"]["temperature"] == 1


def test_the_list_of_what_was_left_out_belongs_to_the_predictions_beside_it(
    trained: tuple[Path, np.ndarray], photos: Path, tmp_path: Path
) -> None:
    out, listed = tmp_path / "o.csv", tmp_path / "o.csv.left_out.txt"

    def run(*images: Path) -> None:
        predict.main([str(trained[0]), *map(str, images), "--out", str(out), "--temperature", "1"])

    listed.mkdir()  # as bad as a full disk
    with pytest.raises(RunFailed, match=rf"^{out}: could not write the predictions: .*; check the disk, then rerun"):
        run(photos)
    assert not out.exists()
    listed.rmdir()
    run(photos)
    assert listed.read_text() == f"{photos}/notes.txt: no image suffix\n"
    out.unlink()
    run(photos / "00.jpg")
    assert not listed.exists()


def test_an_image_that_cannot_be_decoded_is_a_row_with_its_reason_whatever_is_wrong_with_it(
    trained: tuple[Path, np.ndarray], photos: Path, tmp_path: Path
) -> None:
    good, bomb, avif, line = (photos / "00.jpg").read_bytes(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    Image.effect_noise((64, 64), 90).save(avif, "AVIF")
    Image.new("1", (1, 1_000_000), 1).save(line, "PNG")
    reasons = {
        "a.jpg": (good, ""),
        "b.png": (bomb.getvalue(), "400,000,000 pixels, more than 178,956,970"),
        "c.jpg": (avif.getvalue()[:-900], "a broken AVIF image"),
        "d.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "bytes of no known format"),
        "e.png": (line.getvalue(), ""),
        "f.jpg": (b"", "no image"),
        "g.jpg": (good[:-300], "image file is truncated"),
        "h.heic": (good, ""),
    }
    for name, (data, _) in reasons.items():
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / name).write_bytes(data)
    predict.main([str(trained[0]), str(tmp_path / "odd"), "--out", str(tmp_path / "o.csv"), "--temperature", "1"])
    for row, (name, (_, reason)) in zip(rows_of(tmp_path / "o.csv"), reasons.items(), strict=True):
        assert Path(row["file"]).name == name
        assert row["error"].startswith(reason)
        assert bool(row["error"]) == bool(reason) == (not row["class_1"])


def test_shards_in_parts_give_the_same_rows_with_the_fitted_temperature(
    trained: tuple[Path, np.ndarray], small_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, (classes, _) = trained
    monkeypatch.setattr(classifier, "BATCH", 5)
    names, out = open_dataset(small_data).class_names, tmp_path / "o.parquet"
    images = find_images([f"{small_data}/test-*.parquet"])
    calls: list[tuple[int, int]] = []
    job = prediction.Job(str(where), images, top=2, part=7)
    done = prediction.predict(job, out, lambda *call: calls.append(call))
    assert calls == [(0, 24), (7, 24), (14, 24), (21, 24), (24, 24)]
    table = pq.read_table(out)
    assert table["row"].to_pylist() == list(range(24))
    assert table["class_1"].to_pylist() == [names[int(k)] for k in classes]
    about = json.loads(table.schema.metadata[b"lift_ray"])["calibration"]
    assert about["temperature"] == done.calibration.temperature != 1
    assert (about["dataset"], about["num_images"]) == (small_data, 24)
    assert json.loads((where / "checkpoint" / "calibration.json").read_text()) == about
    assert not list(tmp_path.glob("*.parts"))


def test_another_posthoc_tau_gives_the_accuracy_that_evaluate_says_and_its_own_calibration(
    trained: tuple[Path, np.ndarray], small_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, named = f"{small_data}/test-*.parquet", {}
    names, labels = np.array(open_dataset(small_data).class_names), open_dataset(small_data).split("test").labels
    for tau in ("0", "0.5", "3"):
        words = [] if tau == "0.5" else ["--posthoc-tau", tau]  # 0.5 is the run's own
        predict.main([str(trained[0]), shards, "--out", str(tmp_path / f"{tau}.parquet"), *words])
        capsys.readouterr()
        evaluate.main([str(trained[0]), "--posthoc-tau", tau, "--json"])
        named[tau] = np.array(pq.read_table(tmp_path / f"{tau}.parquet")["class_1"])
        accuracy = float(np.mean(named[tau] == names[labels]))
        assert accuracy == pytest.approx(flat_evaluation(capsys.readouterr().out)["test/accuracy"])
    assert (named["3"] != named["0"]).any()
    fitted = [json.loads(path.read_text()) for path in (trained[0] / "checkpoint").glob("calibration*.json")]
    assert len({each["error_before"] for each in fitted}) == 3


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # in Ray Serve
def test_an_ensemble_is_refused_with_the_path_of_one_member(tmp_path: Path, photos: Path) -> None:
    config = {"method": {"kind": "backdoor", "members": {"plain": {}, "other": {}}}}
    about = {
        "config": config,
        "digest": "",
        "dataset": "x",
        "class_names": ["a"],
        "class_counts": [1],
        "epoch": 1,
        "step": 0,
    }
    folder = tmp_path / "out" / "checkpoint"
    (tmp_path / "out" / "members" / "plain").mkdir(parents=True)
    checkpoint.save(folder, {}, checkpoint.Record(**about))
    rule = (
        f"^{folder}: must be a single model, but got an ensemble of 2 .plain, other.; "
        f"pass one of its members: {tmp_path}/out/members/plain$"
    )
    for verb, words in (
        (predict, [str(photos), "--out", str(tmp_path / "o.csv")]),
        (export, ["--out", str(tmp_path / "e")]),
        (serve, ["--port", "65001"]),
    ):
        with pytest.raises(BadInput, match=rule):
            verb.main([str(tmp_path / "out"), *words])
    (tmp_path / "out" / "members" / "plain").rename(tmp_path / "out" / "members" / "0123abcd")
    with pytest.raises(BadInput, match=f"pass one of its members: a folder in {tmp_path}/out/members$"):
        export.main([str(folder), "--out", str(tmp_path / "e")])


def test_the_fitted_temperature_is_the_one_that_the_labels_were_drawn_with() -> None:
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 10, generator=random)
    labels = torch.multinomial(torch.softmax(logits / 1.7, 1), 1, generator=random).squeeze(1)
    assert fit_temperature(logits, labels) == pytest.approx(1.7, rel=0.03)


def test_a_killed_prediction_that_is_rerun_loses_nothing_and_repeats_nothing(
    trained: tuple[Path, np.ndarray], small_data: str, tmp_path: Path
) -> None:
    out, parts = tmp_path / "o.parquet", tmp_path / "o.parquet.parts"
    repeated(small_data, 100, tmp_path / "many.parquet")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lift_ray.inference.image_files import find_images\n"
        "from lift_ray.inference.predict import Job, predict\n"
        "job = Job(sys.argv[1], find_images([sys.argv[2]]), part=100)\n"
        "predict(job, Path(sys.argv[3]), lambda done, total: done >= 300 and os.kill(os.getpid(), signal.SIGSTOP))"
    )
    words = [sys.executable, "-c", code, str(trained[0]), str(tmp_path / "many.parquet"), str(out)]
    killed = subprocess.Popen(words)
    wait_until_it_stops(killed)
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL
    kept = {path.name: path.read_bytes() for path in parts.glob("part-*")}
    assert len(kept) == 3
    assert not out.exists()
    calls: list[int] = []
    job = prediction.Job(str(trained[0]), find_images([str(tmp_path / "many.parquet")]), part=100)
    prediction.predict(job, out, lambda done, total: calls.append(done))
    assert calls == list(range(100 * len(kept), 2401, 100))  # only what was missing
    table = pq.read_table(out)
    assert table["row"].to_pylist() == list(range(2400))
    for name, data in kept.items():
        first = 100 * int(name.removeprefix("part-").removesuffix(".parquet"))
        part = pq.read_table(pa.BufferReader(data))
        assert table.slice(first, 100).replace_schema_metadata(None).equals(part)
    of_image = np.array(table["class_1"].to_pylist()).reshape(100, 24)
    assert (of_image == of_image[0]).all()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("o.", ".o"))] == ["o.parquet"]


def test_two_ray_workers_give_the_rows_of_one(
    trained: tuple[Path, np.ndarray], small_data: str, tmp_path: Path, ray_session: None
) -> None:
    images = find_images([f"{small_data}/test-*.parquet", f"{small_data}/validation-*.parquet"])
    job = prediction.Job(str(trained[0]), images, part=10)
    prediction.predict(job, tmp_path / "one.parquet", lambda done, total: None)
    prediction.predict(job, tmp_path / "two.parquet", lambda done, total: None, workers=2)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert one.drop_columns([f"probability_{n}" for n in range(1, 6)]).equals(
        two.drop_columns([f"probability_{n}" for n in range(1, 6)])
    )
    np.testing.assert_allclose(one["probability_1"].to_numpy(), two["probability_1"].to_numpy(), atol=1e-6)


@pytest.mark.slow
def test_the_command_killed_and_rerun_writes_the_bytes_of_an_undisturbed_one(
    trained: tuple[Path, np.ndarray], small_data: str, tmp_path: Path
) -> None:
    many = repeated(small_data, 171, tmp_path / "many.parquet")  # three of the verb's parts

    def words(name: str) -> list[str]:
        return [str(trained[0]), str(many), "--out", str(tmp_path / name)]

    killed = subprocess.Popen([*stopping_itself("predict", "done"), *words("killed.csv")])
    wait_until_it_stops(killed)
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL
    assert len(list((tmp_path / "killed.csv.parts").glob("part-*"))) == 1
    assert not (tmp_path / "killed.csv").exists()
    assert subprocess.run([sys.executable, "-m", "lift_ray.predict", *words("killed.csv")]).returncode == 0
    predict.main(words("whole.csv"))
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert [int(row["row"]) for row in rows_of(tmp_path / "killed.csv")] == list(range(4104))


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_is_started_again_and_no_row_is_lost_or_twice(
    trained: tuple[Path, np.ndarray], small_data: str, tmp_path: Path, ray_session: None
) -> None:
    many = repeated(small_data, 40, tmp_path / "many.parquet")

    def workers() -> set[psutil.Process]:
        found = set()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if process.name().startswith("ray::Worker"):
                    found.add(process)
        return found

    of_earlier_tests = workers()

    def advance(done: int, total: int) -> None:
        seen.update(workers() - of_earlier_tests)
        if done and not killed:
            killed.append(next(iter(seen)))
            killed[0].kill()

    seen: set[psutil.Process] = set()
    killed: list[psutil.Process] = []
    job = prediction.Job(str(trained[0]), find_images([str(many)]), temperature=1.0, part=60)
    prediction.predict(job, tmp_path / "two.parquet", advance, workers=2)
    assert len(seen) == 3
    prediction.predict(job, tmp_path / "one.parquet", lambda done, total: None)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert two.drop_columns("probability_1").equals(one.drop_columns("probability_1"))
    np.testing.assert_allclose(two["probability_1"], one["probability_1"], atol=1e-5)


def test_parts_of_another_job_are_refused(trained: tuple[Path, np.ndarray], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.csv"
    job = prediction.Job(str(trained[0]), find_images([str(photos)]))
    (tmp_path / "o.csv.parts").mkdir()
    prediction._checked(job, tmp_path / "o.csv.parts")
    with pytest.raises(
        BadInput, match=r"o.csv.parts: must hold parts of the same images, checkpoint and options, but it holds"
    ):
        predict.main([str(trained[0]), str(photos), "--out", str(out), "--top", "2"])
    assert not out.exists()


def test_images_are_found_by_folder_pattern_and_column(photos: Path, tmp_path: Path) -> None:
    assert len(find_images([str(photos)])) == 24
    assert len(find_images([f"{photos}/1*.jpg", f"file://{photos}/03.jpg"])) == 11
    data = [(photos / f"{n:02d}.jpg").read_bytes() for n in range(4)] + [None]
    pq.write_table(pa.table({"photo": pa.array(data, pa.binary())}), tmp_path / "x.parquet", row_group_size=2)
    found = find_images([str(tmp_path)], "photo")
    reader = ImageReader(found)
    assert list(reader.read(1, 5)) == data[1:]
    reader.close()
    assert found.places(3, 5) == ([str(tmp_path / "x.parquet")] * 2, [3, 4])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["{photos}", "--out", "o.txt"],
            "--out: must be a local .parquet or .csv file, but got o.txt; choose such a name",
        ),
        (["{photos}/none", "--out", "{tmp}/o.csv"], "nothing is there; check the path"),
        (["{photos}/*.png", "--out", "{tmp}/o.csv"], "but got none; check the path"),
        (
            ["{photos}", "--image-column", "x", "--out", "{tmp}/o.csv"],
            "--image-column: requires Parquet shards, but got images (",
        ),
        (["{data}", "--image-column", "x", "--out", "{tmp}/o.csv"], "must have the column x, but got image, label"),
        (
            ["{data}", "{photos}", "--out", "{tmp}/o.csv"],
            "but got another file; run predict on images and shards separately",
        ),
        (
            ["{photos}", "--top", "9", "--out", "{tmp}/o.csv"],
            "--top: must be at most 8, the number of classes, but got 9; lower it",
        ),
    ],
)
def test_bad_input_gives_a_one_line_error(
    words: list[str], message: str, trained: tuple[Path, np.ndarray], photos: Path, small_data: str, tmp_path: Path
) -> None:
    filled = [word.format(photos=photos, data=small_data, tmp=tmp_path) for word in words]
    with pytest.raises(BadInput) as caught:
        predict.main([str(trained[0]), *filled])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("o.csv"))


@pytest.mark.parametrize(("num_classes", "columns"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 5)])
def test_a_model_of_few_classes_gives_as_many_columns_as_classes(
    num_classes: int, columns: int, tmp_path: Path
) -> None:
    names = [f"class {k}" for k in range(num_classes)]
    record = checkpoint.Record({"method": {"kind": "lift"}}, "", "", names, [1] * num_classes, 1)
    checkpoint.save(tmp_path / "few", {"x": torch.zeros(1)}, record)
    image = tmp_path / "1.png"
    image.write_bytes(b"")
    job = prediction._checked(prediction.Job(str(tmp_path / "few"), find_images([str(image)])), tmp_path)
    assert job.top == columns
    predictor: Any = object.__new__(prediction.Predictor)
    predictor._job, predictor._names = job, np.array(names)
    predictor._classifier = SimpleNamespace(
        probabilities=lambda images, temperature: torch.full((len(images), num_classes), 1 / num_classes)
    )
    _, table = predictor._table(1.0, ((0, 0, 1), torch.zeros(1, 3, 8, 8), [None]))
    assert len(table) == 1
    assert [name for name in table.column_names if name.startswith("class_")] == [
        f"class_{place}" for place in range(1, columns + 1)
    ]
    assert sum(table[f"probability_{place}"][0].as_py() for place in range(1, columns + 1)) == pytest.approx(
        columns / num_classes
    )
    with pytest.raises(BadInput, match=f"^--top: must be at most {num_classes}, the number of classes, but got 9;"):
        prediction._checked(replace(job, top=9), tmp_path)


def test_a_checkpoint_without_its_weights_is_bad_input_and_no_full_disk(tmp_path: Path) -> None:
    record = checkpoint.Record({"method": {"kind": "lift"}}, "", "", ["a", "b"], [1, 1], 1)
    checkpoint.save(tmp_path / "few", {}, record)
    (tmp_path / "few" / "weights.safetensors").unlink()
    (tmp_path / "1.png").write_bytes(b"")
    job = prediction.Job(str(tmp_path / "few"), find_images([str(tmp_path / "1.png")]))
    with pytest.raises(BadInput, match=r"weights.safetensors: cannot be read: .*No such file"):
        prediction.predict(job, tmp_path / "out.csv", lambda done, total: None)
