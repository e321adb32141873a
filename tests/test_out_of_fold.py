"""Out-of-fold predictions: what the slots write, what is read back, and the temperature that is fitted on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_run import run_config

from lift_ray import evaluate as evaluate_verb
from lift_ray.data.folds import EVERYTHING, Folds, training_view
from lift_ray.data.open import open_dataset
from lift_ray.data.paths import image_paths
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.evaluation.evaluator import LogitBatch, evaluate
from lift_ray.evaluation.resampling import all_metrics
from lift_ray.inference.calibration import calibrated, fit_temperature
from lift_ray.inference.classifier import Classifier
from lift_ray.methods.world import Ranks
from lift_ray.searching import logit_writer
from lift_ray.searching.predictions import files_of, logits_name, read_out_of_fold
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import OUT_OF_FOLD_FILE
from lift_ray.storage.output import Output
from lift_ray.training.checkpoint import read_record
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

TAUS = (0.0, 0.5, 2.0)


def config(clip: str) -> RunConfig:
    tree = {"backbone": {"model": clip}, "augment": {"kind": "none"}, "tuner": {"kind": "linear_probe"}}
    return run_config(tree | {"optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.1}}, {})


@pytest.fixture
def run(workspace: Workspace, small_clip: str) -> Run:
    run = Run(config(small_clip), workspace)
    list(run.epochs())
    return run


def test_the_written_predictions_give_the_metrics_of_an_evaluation_for_each_tau(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_writer, "ROW_GROUP_ROWS", 7)  # of 24 images
    out, split, model = Output(str(tmp_path)), run.workspace.dataset.split("validation"), run.predictor
    with logit_writer.logit_writer(out, 3, 1, run.ranks, model.class_counts, TAUS) as writer:
        found = evaluate(model, split, TAUS, counters=[writer])
    read = read_out_of_fold(out, 3, [1], TAUS)
    assert read.label.tolist() == split.labels.tolist()
    for tau, at_tau in zip(TAUS, found.at_tau, strict=True):
        assert all_metrics(read.at(tau), model.groups.names) == pytest.approx(at_tau.metrics, abs=1e-6)
    [(_, _, name)] = files_of(3, [1], logits_name)
    table = pq.read_table(tmp_path / name)
    logits = torch.cat([batch.logits for batch in model.logits(split)]).detach()
    assert np.allclose(np.array(table["logits"].to_pylist()), logits.numpy(), atol=1e-6)


def test_the_parts_of_several_ranks_are_read_in_the_order_of_the_images(tmp_path: Path) -> None:
    counts, logits = np.array([5, 3]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    for rank, here in ((1, slice(2, 3)), (0, slice(0, 2))):
        ranks = Ranks(rank, 2, torch.device("cpu"))
        with logit_writer.logit_writer(Output(str(tmp_path)), 0, 2, ranks, counts, TAUS) as writer:
            writer.add(LogitBatch(logits[here], labels[here]))
    read = read_out_of_fold(Output(str(tmp_path)), 0, [0, 2], TAUS)
    assert read.label.tolist() == [0, 1, 1]
    assert read.fold.tolist() == [2, 2, 2]
    assert read.at(0.0).predicted.tolist() == [0, 1, 0]
    shifted = logits - 2 * torch.tensor([5 / 8, 3 / 8]).log()
    assert read.at(2.0).loss.tolist() == pytest.approx(
        torch.nn.functional.cross_entropy(shifted, labels, reduction="none").tolist(), abs=1e-5
    )


@pytest.mark.parametrize("fold", [2, 3])
def test_the_model_of_a_fold_is_trained_and_validated_on_its_images(
    workspace: Workspace, small_clip: str, fold: int
) -> None:
    """With cached features, which all folds share, it is the same as on a workspace of its own."""
    view = Folds(3, train_on_separate=True).view(workspace.dataset, fold)
    shared, alone = Run(config(small_clip), workspace.on(view)), Run(config(small_clip), Workspace(view, Ranks.alone()))
    assert shared.train.num_samples == view.split("train").num_samples < workspace.dataset.split("train").num_samples
    [one], [other] = list(shared.epochs()), list(alone.epochs())
    assert one.validation == pytest.approx(other.validation, abs=1e-6)
    assert one.train["loss"] == pytest.approx(other.train["loss"], abs=1e-6)


def test_folds_compute_the_frozen_features_of_an_image_once(workspace: Workspace, small_clip: str) -> None:
    fresh = Workspace(workspace.dataset, Ranks.alone())
    calls: list[int] = []
    frozen = fresh.frozen
    for fold in (1, 2, 3, EVERYTHING):
        view = fresh.on(Folds(3, train_on_separate=True).view(fresh.dataset, fold))
        view.frozen = lambda *args: calls.append(len(args[3])) or frozen(*args)  # type: ignore[func-returns-value, method-assign]
        list(Run(config(small_clip), view).epochs())
    whole = sum(workspace.dataset.split(name).num_samples for name in ("train", "validation"))
    assert sum(number for number in calls if number > 8) <= whole, "features of an image were computed twice"


def test_a_run_on_everything_validates_nothing(workspace: Workspace, small_clip: str, tmp_path: Path) -> None:
    view = training_view(workspace.dataset, "train+validation")
    run = Run(config(small_clip), workspace.on(view))
    assert run.train.num_samples == 96 + 24
    [metrics] = list(run.epochs())
    assert not metrics.validation
    assert run.evaluate("test").metrics["accuracy"] > 0
    run.save(tmp_path / "checkpoint")
    again = Run(config(small_clip), workspace.on(view))
    again.load(tmp_path / "checkpoint")
    assert again.history == run.history
    assert read_record(tmp_path / "checkpoint").train_on == "train+validation"


def test_the_temperature_is_fitted_on_out_of_fold_logits_if_they_are_there(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "best"
    run.save(folder)
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 8, 50), random.normal(size=(50, 8)).astype(np.float32)
    table = pa.table({"label": pa.array(labels, pa.int32()), "logits": list(logits)})
    pq.write_table(table, folder / OUT_OF_FOLD_FILE)
    found = calibrated(folder, Classifier(folder, Ranks.alone()))
    assert found.num_images == 50
    assert found.temperature == pytest.approx(fit_temperature(torch.tensor(logits), torch.tensor(labels)), rel=1e-4)
    assert str(found).startswith(f"temperature {found.temperature:.3f}, fitted on 50 out-of-fold images of ")


def test_an_evaluation_says_that_the_model_was_trained_on_these_images(
    workspace: Workspace, small_clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(config(small_clip), workspace.on(training_view(workspace.dataset, "train+validation")))
    list(run.epochs())
    run.save(tmp_path / "checkpoint")
    evaluate_verb.main([str(tmp_path / "checkpoint"), "--split", "validation"])
    assert "note: the model was trained on these images, so this accuracy is not held out\n" in capsys.readouterr().err
    evaluate_verb.main([str(tmp_path / "checkpoint")])
    assert "note:" not in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"^--gla: requires validation images that the models have not seen, but "):
        evaluate_verb.main([str(tmp_path / "checkpoint"), "--gla"])


def test_a_model_that_was_trained_on_everything_is_not_calibrated_on_its_training_images(
    workspace: Workspace, small_clip: str, tmp_path: Path
) -> None:
    run = Run(config(small_clip), workspace.on(training_view(workspace.dataset, "train+validation")))
    list(run.epochs())
    run.save(tmp_path / "checkpoint")
    found = calibrated(tmp_path / "checkpoint", Classifier(tmp_path / "checkpoint", Ranks.alone()))
    assert found.temperature == 1.0
    assert str(found) == "not calibrated: no labeled image was held out from training (temperature 1)"


def test_the_paths_of_images_are_those_in_the_shards(small_data: str) -> None:
    dataset = open_dataset(small_data)
    view = Folds(3).view(dataset, 2).split("validation")
    paths = image_paths(view)
    assert len(paths) == len(set(paths)) == view.num_samples
    with RowReader(view) as reader:
        images = reader.read(np.arange(view.num_samples))
    stored = {}
    for file in sorted(Path(small_data).glob("train-*.parquet")):
        stored |= {cell["path"]: cell["bytes"] for cell in pq.read_table(file)["image"].to_pylist()}
    assert images == [stored[path] for path in paths]


def test_images_without_a_path_are_named_by_file_and_row(tmp_path: Path, small_data: str) -> None:
    for file in sorted(Path(small_data).glob("*.parquet")):
        table = pq.read_table(file)
        image = pa.array([{"bytes": cell["bytes"]} for cell in table["image"].to_pylist()])
        stripped = pa.table({"image": image, "label": table["label"]}).replace_schema_metadata(table.schema.metadata)
        pq.write_table(stripped, tmp_path / file.name)
    split = open_dataset(str(tmp_path)).split("validation")
    file = split.shards[0].url.rsplit("/", 1)[-1]
    assert image_paths(split)[:2] == [f"{file}:0", f"{file}:1"]
