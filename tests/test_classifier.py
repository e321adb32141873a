"""lift_ray.Classifier: a trained model in a Python program gives what every verb gives."""

from __future__ import annotations

import csv
import importlib
import io
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_json import flat_evaluation
from PIL import Image

import lift_ray as lr
from lift_ray import evaluate, export, predict
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.inference.serve_http import Options
from lift_ray.inference.serve_model import ModelReplica
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace


@pytest.fixture(scope="module")
def where(small_data: str, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a run of one epoch."""
    out = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    config = {
        "backbone": {"model": small_clip, "interpolation": "bilinear"},
        "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.05},
        "evaluation": {"posthoc_tau": 0.5},
    }
    run = Run(RunConfig.model_validate(config), Workspace(small_data, Ranks.alone()))
    list(run.epochs())
    run.save(out / "checkpoint")
    torch.set_num_threads(threads)
    return str(out)


@pytest.fixture(scope="module")
def files(small_data: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The test images as files, the first of which is turned by its EXIF."""
    folder = tmp_path_factory.mktemp("photos")
    split = open_dataset(small_data).split("test")
    paths = [folder / f"{number:02d}.jpg" for number in range(split.num_samples)]
    with RowReader(split) as reader:
        for path, data in zip(paths, reader.read(np.arange(len(paths))), strict=True):
            path.write_bytes(data)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(paths[0]).save(paths[0], exif=exif)
    return paths


@pytest.fixture(scope="module")
def clf(where: str) -> lr.Classifier:
    return lr.Classifier.load(where)


def test_importing_the_package_is_quick_and_loads_neither_torch_nor_ray() -> None:
    code = (
        "import time; began = time.process_time(); import lift_ray, sys; print(time.process_time() - began);"
        "print(*sys.modules); assert 'Classifier' in dir(lift_ray)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    seconds, modules = zip(*(run.stdout.splitlines() for run in runs), strict=True)
    assert not {"torch", "ray", "numpy", "pydantic"} & set(modules[0].split())
    assert statistics.median(map(float, seconds)) < 0.15


def test_every_public_name_is_there_and_an_unknown_one_is_not() -> None:
    assert all(getattr(lr, name) is not None for name in lr.__all__)
    with pytest.raises(AttributeError, match="module 'lift_ray' has no attribute 'Clasifier'"):
        lr.Clasifier  # type: ignore[attr-defined]  # noqa: B018


def test_all_ways_to_give_an_image_are_one_image(clf: lr.Classifier, files: list[Path]) -> None:
    expected = clf.predict_proba(files)
    pillow = [Image.open(path) for path in files]
    assert expected.shape == (len(files), len(clf.classes))
    assert expected.dtype == np.float32
    assert np.allclose(expected.sum(1), 1, atol=1e-5)
    for images in ([path.read_bytes() for path in files], list(map(str, files)), [f"file://{path}" for path in files]):
        assert np.array_equal(clf.predict_proba(images), expected)
    # two JPEG decoders round differently; the first image is also turned
    assert np.abs(clf.predict_proba(pillow) - expected).max() < 2e-3
    arrays = [np.asarray(image) for image in pillow[1:]]
    from_arrays = clf.predict_proba(arrays)
    assert np.array_equal(from_arrays, clf.predict_proba(pillow[1:]))
    assert np.array_equal(from_arrays, clf.predict_proba([torch.tensor(array).permute(2, 0, 1) for array in arrays]))
    gray = [array[..., 0] for array in arrays]
    assert np.array_equal(clf.predict_proba(gray), clf.predict_proba([Image.fromarray(array) for array in gray]))
    assert clf.predict_proba([]).shape == (0, len(clf.classes))


def test_an_image_of_16_bits_is_refused_as_every_verb_refuses_it(clf: lr.Classifier) -> None:
    deep = Image.fromarray(np.full((60, 60), 40_000, np.uint16))
    encoded = io.BytesIO()
    deep.save(encoded, "PNG")
    for image in deep, encoded.getvalue():
        with pytest.raises(lr.BadInput, match="--window"):
            clf.predict([image])


def test_the_api_predict_serve_and_onnx_give_the_same_probabilities(
    where: str, clf: lr.Classifier, files: list[Path], tmp_path: Path
) -> None:
    found = clf.predict_proba(files)
    assert clf.calibration.num_images > 0  # fitted, so the temperature matters
    assert clf.calibration.temperature != 1
    predict.main([where, *map(str, files), "--out", str(tmp_path / "o.csv"), "--top", str(len(clf.classes))])
    with (tmp_path / "o.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, probabilities, best in zip(rows, found, clf.predict(files, top=2), strict=True):
        assert [row["class_1"], row["class_2"]] == [name for name, _ in best]
        assert [float(row["probability_1"]), float(row["probability_2"])] == pytest.approx(
            [p for _, p in best], abs=1e-6
        )
        by_name = {row[f"class_{k}"]: float(row[f"probability_{k}"]) for k in range(1, len(clf.classes) + 1)}
        assert [by_name[name] for name in clf.classes] == pytest.approx(probabilities.tolist(), abs=1e-6)
    batch = torch.from_numpy(np.stack([np.moveaxis(clf.image(path.read_bytes()), -1, 0) for path in files]))
    replica = ModelReplica(Options(checkpoint=where))
    assert np.abs(replica._of_batch(list(batch.numpy())) - found).max() < 1e-6
    export.main([where, "--out", str(tmp_path / "exported"), "--format", "onnx"])
    session = importlib.import_module("onnxruntime").InferenceSession(tmp_path / "exported" / "model.onnx")
    logits = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
    assert np.abs(torch.softmax(logits / clf.calibration.temperature, 1).numpy() - found).max() < 1e-6
    with torch.inference_mode():
        assert torch.allclose(clf.module(batch), logits, atol=1e-4)


def test_embeddings_are_the_features_that_the_classifier_sees(clf: lr.Classifier, files: list[Path]) -> None:
    features = torch.from_numpy(clf.embed(files))
    assert features.shape == (len(files), 64)
    with torch.inference_mode():
        logits = clf.model.classify(features) - clf.offset
    assert np.allclose(torch.softmax(logits / clf.calibration.temperature, 1), clf.predict_proba(files), atol=1e-6)


def test_evaluate_gives_the_figures_of_the_verb_for_a_dataset_and_for_a_folder(
    where: str,
    clf: lr.Classifier,
    small_data: str,
    files: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate.main([where, "--data", small_data, "--json"])
    shown = flat_evaluation(capsys.readouterr().out)
    for data in small_data, open_dataset(small_data):
        found = clf.evaluate(data)
        assert found.metrics["few"] == pytest.approx(shown["test/few"], abs=1e-9)
        assert {row["class"] for row in found.per_class} == set(clf.classes)
    folder = tmp_path / clf.classes[0]
    folder.mkdir()
    for path in files[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    found = clf.evaluate(tmp_path)
    right = [best[0][0] == clf.classes[0] for best in clf.predict(files[:3])]
    assert found.metrics["accuracy"] == pytest.approx(np.mean(right))
    assert any("have no images here" in note for note in found.notes)


def test_a_model_knows_its_validation_metrics(clf: lr.Classifier) -> None:
    assert 0 <= clf.metrics["mean_class_accuracy"] <= 1


def test_the_temperature_and_tau_can_be_given_and_threads_stay_as_they_are(where: str, files: list[Path]) -> None:
    threads = torch.get_num_threads()
    plain, strong = lr.Classifier.load(where, temperature=1), lr.Classifier.load(where, temperature=1, posthoc_tau=2.0)
    assert plain.calibration.temperature == 1
    assert np.abs(plain.predict_proba(files) - strong.predict_proba(files)).max() > 1e-3
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "images: must be a list of images, but got str; put it into a list"),
        (["no.jpg"], "images[0]: no.jpg: must be a readable file, but nothing is there; check the path"),
        ([b"GIF8 broken"], "images[0]: bytes: must be an image that can be read, but got "),
        (
            [np.zeros((8, 8, 3), np.float32)],
            "images[0]: images: must be uint8 (H, W), (H, W, 1) or (H, W, 3), but got float32 (8, 8, 3); convert it",
        ),
        ([torch.zeros(8, 8, dtype=torch.uint8)], "images[0]: images: must be uint8 (3, H, W) or (1, H, W), but got "),
        ([7], "images[0]: images: must be paths, bytes, Pillow images, arrays or tensors, but got int"),
    ],
)
def test_what_is_no_image_gives_one_line_with_its_number(clf: lr.Classifier, images: object, message: str) -> None:
    with pytest.raises(lr.BadInput) as caught:
        clf.predict(images)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_more_classes_than_there_are_and_a_folder_without_a_model_give_one_line(
    clf: lr.Classifier, tmp_path: Path
) -> None:
    with pytest.raises(lr.BadInput, match=r"^top: must be 1 to \d+, but got 0$"):
        clf.predict([], top=0)
    with pytest.raises(lr.BadInput, match="must be a checkpoint folder"):
        lr.Classifier.load(tmp_path)
