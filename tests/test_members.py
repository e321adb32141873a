"""Training `method: backdoor`: by the verb, on Ray, killed and resumed; in a search; and settings that make no run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_json import flat_evaluation
from made_run import assert_same_tensors
from pydantic import ValidationError
from safetensors.torch import load_file

from lift_ray import evaluate, train
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.ensembles.ensemble import model_of
from lift_ray.errors import BadInput, RunFailed
from lift_ray.evaluation.evaluator import evaluate as evaluate_split
from lift_ray.methods.world import Ranks
from lift_ray.searching.backdoor_trial import BackdoorTrial, trial_of
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import read_run
from lift_ray.storage.output import Output
from lift_ray.training import loop
from lift_ray.training.run import Position, Run
from lift_ray.training.workspace import Workspace

pytestmark = pytest.mark.usefixtures("same_threads")
MEMBERS = {"plain": {}, "other": {"seed": 1, "loss.kind": "cross_entropy"}, "probe": {"tuner.kind": "linear_probe"}}


def tree(small_clip: str, **method: Any) -> dict[str, Any]:
    return {
        "backbone": {"model": small_clip},
        "tuner": {"kind": "adaptformer", "bottleneck": 4},
        "optim": {"epochs": 2, "lr": 0.05, "global_batch_size": 16},
        "method": {"kind": "backdoor", "members": MEMBERS, **method},
    }


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, small_data: str, small_clip: str) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(json.dumps({"name": "three", "dataset": small_data, **tree(small_clip, weights={"probe": 2.0})}))
    return path


@pytest.fixture(scope="module")
def trained(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of three members, undisturbed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train.main([str(run_file), "--no-ray", "--out", str(out)])
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "weights.safetensors")


def test_members_are_ordinary_runs_and_their_checkpoint_answers_as_all_of_them(
    trained: Path, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(trained / "members" / name) for name in MEMBERS]
    found = []
    for words in ([str(trained)], [*folders, "--weights", "1,1,2"], [str(trained), "--combine", "probabilities"]):
        evaluate.main([*words, "--json"])
        found.append(flat_evaluation(capsys.readouterr().out))
    assert found[0]["test/loss"] == pytest.approx(found[1]["test/loss"], abs=1e-6)
    assert found[0]["test/loss"] != pytest.approx(found[2]["test/loss"], abs=1e-4)
    assert list(found[0]["members"]) == list(MEMBERS)
    written = json.loads((trained / "together.json").read_text())
    assert written["test/loss"] == pytest.approx(found[0]["test/loss"], abs=1e-6)
    assert written["cost"]["trained_parameters"] == sum(t.numel() for t in weights(trained).values())
    assert written["cost"]["train_s"] > 0
    train.main([str(run_file), "method.members={plain: {}, x: {seed: 3}}", "method.weights={}", "--dry-run"])
    assert capsys.readouterr().out.count("# trained parameters") == 2


def test_an_ensemble_is_compared_with_its_old_test_on_images_that_are_not_converted(
    trained: Path, small_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = open_dataset(small_data).split("test")
    with RowReader(split) as reader:
        images = reader.read(np.arange(split.num_samples))
    for number, (label, image) in enumerate(zip(split.labels, images, strict=True)):
        folder = tmp_path / open_dataset(small_data).class_names[label]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(image)
    evaluate.main([str(trained), "--data", str(tmp_path), "--json"])
    found = flat_evaluation(capsys.readouterr().out)
    assert list(found["members"]) == list(MEMBERS)
    written = json.loads((trained / "together.json").read_text())
    for row in found["old_test"]["rows"]:
        assert row["old"] == written[f"test/{row['metric']}"]
        assert row["difference"] == pytest.approx(0, abs=1e-6)


def test_a_member_is_what_its_settings_alone_train(trained: Path, run_file: Path, tmp_path: Path) -> None:
    other = ["method=lift", "seed=1", "loss.kind=cross_entropy"]
    train.main([str(run_file), *other, "--no-ray", "--out", str(tmp_path / "alone")])
    assert_same_tensors(trained / "members" / "other", tmp_path / "alone")
    stored = weights(trained)
    assert all(torch.equal(stored[f"other/{name}"], value) for name, value in weights(tmp_path / "alone").items())


@pytest.mark.slow
def test_ray_trains_members_side_by_side_to_the_same_models(
    trained: Path, run_file: Path, tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([str(run_file), "method.use=other+probe", "--out", str(tmp_path / "out")])
    for name in ("other", "probe"):
        assert_same_tensors(tmp_path / "out" / "members" / name, trained / "members" / name)
    shown = capsys.readouterr().out
    assert "s  probe: epoch 2/2" in shown
    assert "images on which two models disagree (%): other and probe" in shown


def test_a_killed_run_resumes_inside_a_member_and_leaves_the_finished_ones_alone(
    trained: Path, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, steps = tmp_path / "out", []

    class Notice(loop.StepCallback):
        """SIGTERM comes inside the second member."""

        def __call__(self, at: Position, evaluated: float = 0.0) -> None:
            steps.append(at.step)
            if isinstance(at, Run) and at.config.seed == 1 and (at.epoch, at.step) == (1, 3):
                os.kill(os.getpid(), signal.SIGTERM)
            super().__call__(at, evaluated)

    monkeypatch.setattr(loop, "StepCallback", Notice)
    with pytest.raises(RunFailed, match=r"members/other: stopped by SIGTERM; .*; continue with --resume"):
        train.main([str(run_file), "--no-ray", "--out", str(out)])
    monkeypatch.undo()
    assert not (out / "checkpoint").exists()
    finished = (out / "members" / "plain" / "checkpoint" / "run.json").stat().st_mtime_ns
    capsys.readouterr()
    train.main([str(run_file), "--no-ray", "--out", str(out), "--resume"])
    shown = capsys.readouterr().out
    assert "plain: already finished" in shown
    assert "continuing from epoch 2, step " in shown
    assert (out / "members" / "plain" / "checkpoint" / "run.json").stat().st_mtime_ns == finished
    assert_same_tensors(out, trained)


def test_a_trial_gains_a_model_an_epoch_and_shares_them_with_other_trials(
    small_data: str, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, output, epochs = Workspace(small_data, Ranks.alone()), Output(str(tmp_path)), []
    train_epoch = Run.train_epoch
    monkeypatch.setattr(Run, "train_epoch", lambda run: (epochs.append(run.config.seed), train_epoch(run))[1])
    first = trial_of(RunConfig.model_validate(tree(small_clip, use="plain+other")), workspace, output)
    assert isinstance(first, BackdoorTrial)
    figures = list(first.epochs())
    assert [one["epoch"] for one in figures] == [1, 2] == list(range(1, first.num_epochs + 1))
    assert epochs == [0, 0, 1, 1]
    alone = Run(RunConfig.model_validate(tree(small_clip) | {"method": "lift"}), workspace)
    list(alone.epochs())
    assert figures[0]["validation/loss"] == pytest.approx(alone.history[-1]["validation/loss"], abs=1e-6)
    first.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "per_class.csv").exists()
    again = trial_of(first.config, workspace, output)
    again.load(tmp_path / "saved")
    assert again.history == first.history
    assert list(again.epochs()) == []
    examined = model_of(first.config, [workspace])
    examined.load_stored(load_file(tmp_path / "saved" / "weights.safetensors"))
    assert evaluate_split(examined, workspace.dataset.split("validation")).metrics["loss"] == pytest.approx(
        figures[1]["validation/loss"], abs=1e-6
    )
    epochs.clear()
    second = trial_of(RunConfig.model_validate(tree(small_clip)), workspace, output)
    assert [one["validation/loss"] for one in second.epochs()][:2] == [one["validation/loss"] for one in figures]
    assert epochs == [0, 0]
    shared, own = second.history[0], first.history[0]
    assert "time/train_s" not in shared
    assert shared["cost/train_s"] == own["cost/train_s"] == own["time/train_s"] > 0
    assert isinstance(trial_of(alone.config, workspace, output), Run)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"members": {"a": {}}}, "method.members: must have at least 2 items, but got {'a': {}}; change it"),
        (
            {"members": {"a": {}, "b": {"backbone.modl": 1}}},
            "method: members.b backbone.modl: unknown key 'modl'; did you mean 'model'?",
        ),
        (
            {"members": {"a": {}, "b": {"optim.lr": -1.0}}},
            "method: members.b optim.lr: must be greater than 0, but got -1.0; change it",
        ),
        (
            {"members": {"a": {}, "b": {"method.kind": "loft"}}},
            "method: members.b method.kind: must not be set, since a member is a single model; remove it",
        ),
        ({"members": {"a": {}, "b": {}}, "use": "a+c"}, "method: use must name members, but got 'c'; known: a, b"),
        (
            {"members": {"a": {}, "b": {}}, "use": "a"},
            "method: use must name at least 2 members, each once, but got 'a'; write a+b",
        ),
        (
            {"members": {"a": {}, "b": {}}, "use": "a+a"},
            "method: use must name at least 2 members, each once, but got 'a+a'; write a+b",
        ),
        (
            {"members": {"a": {}, "b": {}}, "weights": {"aa": 1.0}},
            "method: weights must name members, but got 'aa'; did you mean 'a'?",
        ),
        (
            {"members": {"a": {}, "b": {}}, "weights": {"a": 0.0}},
            "method.weights.a: must be greater than 0, but got 0.0; change it",
        ),
        (
            {"members": {"a": {}, "b": {}}, "combine": "mean"},
            "method.combine: unknown value 'mean'; known: logits, probabilities",
        ),
    ],
)
def test_members_that_form_no_valid_run_give_a_one_line_error(
    method: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"dataset": "embedded:caltech101-lt", "method": {"kind": "backdoor", **method}}))
    with pytest.raises(BadInput) as caught:
        read_run(path)
    assert str(caught.value) == f"{path}:1 {message}"


def test_a_bad_member_is_a_problem_of_the_run_wherever_it_comes_from() -> None:
    with pytest.raises(ValidationError, match=r"members\.b tuner\.bottleneck"):
        RunConfig.model_validate({"method": {"kind": "backdoor", "members": {"a": {}, "b": {"tuner.bottleneck": 0}}}})


def test_an_ensemble_is_no_member_of_another(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint", tmp_path / "copy")
    with pytest.raises(BadInput) as caught:
        evaluate.main([str(trained / "members" / "plain"), str(tmp_path / "copy")])
    assert str(caught.value) == (
        f"{tmp_path / 'copy'}: must be a single model, but got an ensemble of 3 (plain, other, probe); evaluate it alone, or pass its "
        "members"
    )
