"""python -m lift_ray.evaluate on several workers: the figures of one, each image counted once."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluation_json import flat_evaluation

from lift_ray import evaluate
from lift_ray.errors import BadInput
from lift_ray.inference.classifier import Classifier
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace


@pytest.fixture(scope="module")
def folder(small_data: str, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The results of a run: a checkpoint after one epoch, in checkpoint/."""
    out = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    config = {"backbone": {"model": small_clip}, "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.01}}
    run = Run(RunConfig.model_validate(config), Workspace(small_data, Ranks.alone()))
    run.train_epoch()
    run.save(out / "checkpoint")
    yield str(out)
    torch.set_num_threads(threads)


def evaluated(words: list[str], capsys: pytest.CaptureFixture[str], table: Path) -> tuple[dict[str, float], list[str]]:
    evaluate.main([*words, "--json", "--per-class", str(table)])
    with table.open() as file:
        return flat_evaluation(capsys.readouterr().out), [row["images"] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_workers_give_the_figures_of_one(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    words = [
        folder,
        "--split",
        "validation",
    ]  # test_backdoor.py has the test split, and a model with test-time ensembling
    alone, images = evaluated(words, capsys, tmp_path / "one.csv")
    together, images_together = evaluated([*words, "--workers", "2"], capsys, tmp_path / "two.csv")
    assert together == pytest.approx(alone, abs=1e-6)
    assert images_together == images == ["3"] * 8


def test_the_groups_are_those_of_the_checkpoint_and_a_note_says_how_they_were_made(
    folder: str, small_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tmp_path / "classes.csv"
    shutil.copytree(folder, tmp_path / "run")
    run = tmp_path / "run" / "checkpoint" / "run.json"
    about = json.loads(run.read_text())
    assert about["labelled_counts"] == about["class_counts"] == [24, 18, 14, 12, 10, 8, 6, 4]

    def groups(**changes: object) -> tuple[list[str], str]:
        run.write_text(json.dumps(about | changes))
        evaluate.main([str(tmp_path / "run"), "--data", small_data, "--per-class", str(classes)])
        with classes.open() as file:
            rows = list(csv.DictReader(file))
        assert [row["train_images"] for row in rows] == ["24", "18", "14", "12", "10", "8", "6", "4"]
        return [row["group"] for row in rows], capsys.readouterr().out.splitlines()[-1]

    thirds = ["many"] * 3 + ["medium"] * 2 + ["few"] * 3
    assert groups() == (thirds, "groups are thirds of the classes: few <= 8 training images, many >= 14")
    assert groups(labelled_counts=[1, 1, 30, 31, 200, 201, 202, 203])[0] == ["few"] * 2 + ["medium"] * 2 + ["many"] * 4
    del about["labelled_counts"], about["config"]["evaluation"]["group_bounds"]
    of_earlier_version, last_line = groups()
    assert of_earlier_version == ["medium"] + ["few"] * 7
    assert "balanced log loss" in last_line


def test_workers_that_do_not_fit_give_a_one_line_error(folder: str, ray_session: None) -> None:
    with pytest.raises(BadInput, match=r"scale: a trial must fit the cluster, but got 64 x \(1 CPU\)"):
        evaluate.main([folder, "--workers", "64"])


def test_a_folder_without_a_checkpoint_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        evaluate.main([str(tmp_path), "--workers", "2"])
    assert str(caught.value) == (
        f"{tmp_path}: must be a checkpoint folder, but there is no run.json; give the folder that contains it"
    )
    with pytest.raises(
        BadInput, match=r"^CHECKPOINT: must be a folder or a URL of object storage, but got nonsense://x"
    ):
        evaluate.main(["nonsense://x/y"])


def test_the_mode_of_test_time_ensembling_is_in_the_title_and_an_unknown_one_is_refused(
    folder: str, capsys: pytest.CaptureFixture[str], same_threads: None
) -> None:
    evaluate.main([folder])
    plain = capsys.readouterr().out
    evaluate.main([folder, "--tte", "ten_crops"])
    ten = capsys.readouterr().out
    assert "24 images, accuracy (%)" in plain
    assert "24 images, ten crops of each image, accuracy (%)" in " ".join(ten.split())
    with pytest.raises(BadInput, match=r"^--tte: unknown value 'fivecrop'; did you mean 'five_crops'\?$"):
        evaluate.main([folder, "--tte", "fivecrop"])


def test_the_training_images_are_evaluated_as_the_others_with_a_note_that_the_model_has_seen_them(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], same_threads: None
) -> None:
    evaluate.main([folder, "--split", "train", "--per-class", str(tmp_path / "classes.csv")])
    printed = capsys.readouterr()
    assert "train, 96 images, accuracy (%)" in printed.out
    assert printed.err.count("the model was trained on these images, so this accuracy is not held out") == 1
    with (tmp_path / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["images"] for row in rows] == [row["train_images"] for row in rows]
    from_api = Classifier.load(folder, temperature=1)
    found = from_api.evaluate(from_api.record.dataset, "train")
    assert found.metrics["accuracy"] == pytest.approx(sum(int(row["correct"]) for row in rows) / 96)
    assert found.notes == ["the model was trained on these images, so this accuracy is not held out"]
    assert not from_api.evaluate(from_api.record.dataset, "test").notes
    evaluate.main([folder])
    assert "held out" not in capsys.readouterr().err
