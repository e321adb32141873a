"""Several models that answer together: the mean by hand, one pass over the images, training, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embedded import LIFT_TINY
from evaluation_json import flat_evaluation

from lift_ray import evaluate
from lift_ray.data import decode, resolutions
from lift_ray.ensembles.combine import COMBINE, mean_logits, mean_probabilities
from lift_ray.ensembles.ensemble import Ensemble, model_of, prior_left
from lift_ray.ensembles.group_table import GroupGainTable
from lift_ray.errors import BadInput
from lift_ray.evaluation.evaluator import LogitBatch
from lift_ray.evaluation.metrics import PerClass
from lift_ray.inference import evaluate as evaluation
from lift_ray.inference.evaluate import EvaluationRequest, evaluate_here
from lift_ray.methods.prior import fit
from lift_ray.methods.world import Ranks
from lift_ray.model import backbone
from lift_ray.model.device import all_devices
from lift_ray.registry import LOSSES
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training import label_prior as priors
from lift_ray.training.label_prior import label_prior, loss_of
from lift_ray.training.predictor import SplitPredictor
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

OTHER = {"seed": 1, "backbone.resolution_px": 48, "evaluation.tte": "five_crops"}


@pytest.fixture(scope="module")
def small_clip() -> str:
    """One that knows something of the images, for a random one has no label prior that could be fitted."""
    return LIFT_TINY


def settings(small_clip: str, **overrides: Any) -> dict[str, Any]:
    tree = {
        "backbone": {"model": small_clip, "resolution_px": 32},
        "tuner": {"kind": "adaptformer", "bottleneck": 4},
        "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.05},
    }
    return apply_overrides(tree, overrides, RunConfig)


@pytest.fixture(scope="module")
def folders(workspace: Workspace, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints: one at 32 px, one at 48 px that looks at five crops."""
    out = tmp_path_factory.mktemp("models")
    for name, overrides in (("a", {}), ("b", OTHER)):
        run = Run(RunConfig.model_validate(settings(small_clip, **overrides)), workspace)
        run.train_epoch()
        run.save(out / name)
    return [str(out / "a"), str(out / "b")]


def alone(folder: str, workspace: Workspace, split: str = "test") -> torch.Tensor:
    """The logits of a split as a run by itself gives them, (N, K)."""
    from lift_ray.training import checkpoint

    record = checkpoint.read_record(Path(folder))
    model = SplitPredictor(RunConfig.model_validate(record.config), workspace, record.class_counts)
    checkpoint.load_weights(Path(folder), model)
    with torch.inference_mode():
        return torch.cat([batch.logits for batch in model.logits(workspace.dataset.split(split))])


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    evaluate.main([*words, "--json"])
    return flat_evaluation(capsys.readouterr().out)


def test_means_of_probabilities_and_logits_are_those_computed_by_hand() -> None:
    first, second = torch.tensor([[0.0, np.log(3.0)]]), torch.tensor([[np.log(4.0), 0.0]])
    assert torch.allclose(mean_logits([first, second], [1, 1]), torch.tensor([[np.log(2.0), np.log(3.0) / 2]]))
    assert torch.allclose(mean_logits([first, second], [3, 1]), torch.tensor([[np.log(4.0) / 4, 0.75 * np.log(3.0)]]))
    together = mean_probabilities([first, second], [1, 3]).softmax(1)
    assert together.tolist()[0] == pytest.approx([0.25 * 0.25 + 0.75 * 0.8, 0.25 * 0.75 + 0.75 * 0.2])


@pytest.mark.parametrize("combine", COMBINE)
def test_copies_of_one_model_are_that_model(combine: str) -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    made = COMBINE[combine]([logits] * 3, [1.0, 2.0, 0.5])
    assert torch.allclose(made.softmax(1), logits.softmax(1), atol=1e-6)


def test_copies_of_one_checkpoint_give_its_figures(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders[0], tmp_path / "copy")
    one, two = said(folders[:1], capsys), said([folders[0], str(tmp_path / "copy")], capsys)
    assert set(two) - set(one) == {"members", "best", "groups", "parameter_groups_kept", "disagreement", "cost"}
    assert {name: two[name] for name in one} == pytest.approx(
        one | {"trained_parameters": 2 * one["trained_parameters"]}, abs=1e-6
    )
    assert two["disagreement"] == [[folders[0], str(tmp_path / "copy"), 0]]
    assert two["groups"]["all"]["all"]["gain"] == pytest.approx(0)


@pytest.mark.parametrize("words", [[], ["--combine", "probabilities", "--weights", "2,1"]])
def test_two_checkpoints_are_the_mean_by_hand_of_what_each_gives_alone(
    folders: list[str], workspace: Workspace, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (alone(folder, workspace) for folder in folders)
    expected = (2 / 3 * first.softmax(1) + 1 / 3 * second.softmax(1)).log() if words else (first + second) / 2
    labels = torch.from_numpy(workspace.dataset.split("test").labels)
    found = said([*folders, *words], capsys)
    assert found["test/loss"] == pytest.approx(float(F.cross_entropy(expected, labels)), abs=1e-5)
    assert found["test/accuracy"] == (expected.argmax(1) == labels).double().mean().item()
    assert found["disagreement"][0][2] == (first.argmax(1) != second.argmax(1)).double().mean().item()
    losses = [found["members"][folder]["test/loss"] for folder in folders]
    assert losses == pytest.approx([float(F.cross_entropy(z, labels)) for z in (first, second)], abs=1e-5)


def test_each_image_is_decoded_once(folders: list[str], monkeypatch: pytest.MonkeyPatch, small_data: str) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(resolutions, "decode", lambda data: (decoded.append(data), decode.decode(data))[1])
    evaluate_here(EvaluationRequest(tuple(folders), small_data, "test"))
    assert len(decoded) == len(set(decoded)) == 24


@pytest.mark.slow
def test_workers_give_the_figures_of_one_process(
    folders: list[str], capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    alone, together = (said([*folders, *words], capsys) for words in ([], ["--workers", "2"]))
    for found in (alone, together):
        del found["cost"]["evaluate_s"]
    assert json.dumps(round_off(together)) == json.dumps(round_off(alone))


def round_off(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: round_off(value) for key, value in tree.items()}
    return (
        [round_off(item) for item in tree]
        if isinstance(tree, list)
        else round(tree, 4)
        if isinstance(tree, float)
        else tree
    )


def test_gla_is_its_formula_on_what_the_models_give_alone(
    folders: list[str], workspace: Workspace, small_clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Run(RunConfig.model_validate(settings(small_clip, **{"tuner.kind": "zero_shot"})), workspace)
    plain.save(tmp_path / "zero")
    prior = label_prior(workspace, plain.config)
    tuned, zero = alone(folders[0], workspace), alone(str(tmp_path / "zero"), workspace)
    held_out = workspace.dataset.split("validation")
    temperature = fit(alone(folders[0], workspace, "validation"), torch.from_numpy(held_out.labels)).temperature
    expected = tuned / temperature + zero / prior.temperature - prior.log_q  # the loss took the training prior out
    labels = torch.from_numpy(workspace.dataset.split("test").labels)
    found = said([folders[0], "--gla"], capsys)
    assert found["test/loss"] == pytest.approx(float(F.cross_entropy(expected, labels)), rel=1e-4)
    assert found["test/loss"] != pytest.approx(said(folders[:1], capsys)["test/loss"], rel=1e-2)
    assert "members" not in found


def test_what_a_loss_leaves_of_the_training_prior_is_known_for_every_loss() -> None:
    left = {kind: prior_left(RunConfig(loss=LOSSES.default(kind))) for kind in LOSSES}
    assert left == {
        **dict.fromkeys(("cross_entropy", "focal", "ldam"), 1.0),
        **dict.fromkeys(("logit_adjusted", "class_balanced", "reweighted", "balanced_softmax", "lade", "gla"), 0.0),
    }
    losses = [{"kind": "cross_entropy"}, {"tau": 0.25}, {"tau": 2.0}, {"kind": "gla"}]
    assert [prior_left(RunConfig.model_validate({"loss": loss})) for loss in losses] == [1, 0.75, -1, 0]


def test_the_groups_are_means_of_class_accuracies_and_gains_their_differences() -> None:
    crossed = GroupGainTable(["a", "b"], torch.zeros(4))
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    found = [[0, 0, 1, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 2, 3, 0]]
    members = [F.one_hot(torch.tensor(row), 4).float() for row in found]
    crossed.add(LogitBatch(members[0], labels, members=members))
    together = PerClass(np.array([2, 1, 2, 1]), np.array([2, 2, 2, 2]), np.array([2, 2, 2, 2]))
    p_groups = np.array(["few", "many", "many", "few"])
    report = crossed.result("test", together, np.array(["many", "many", "medium", "few"]), p_groups)
    assert report["groups"]["many"]["few"] == {
        "classes": 1,
        "mean": 1,
        "best": 1,
        "together": 1,
        "gain": 0,
        "gain_over_best": 0,
    }
    assert report["groups"]["many"]["many"] == {
        "classes": 1,
        "mean": 0.25,
        "best": 0.5,
        "together": 0.5,
        "gain": 0.25,
        "gain_over_best": 0,
    }
    assert report["groups"]["all"]["all"]["gain"] == 0.75 - 0.5
    assert {d: set(row) for d, row in report["groups"].items()} == {
        "many": {"many", "few", "all"},
        "medium": {"many", "all"},
        "few": {"few", "all"},
        "all": {"many", "few", "all"},
    }
    assert (report["best"], report["disagreement"]) == ("a", [["a", "b", 4 / 8]])
    assert set(
        crossed.result("test", together, np.array(["many", "many", "medium", "few"]), None)["groups"]["many"]
    ) == {"all"}


def test_the_table_and_the_words_below_it(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(folders)
    shown = capsys.readouterr().out
    for words in (
        "ensemble",
        "P-many",
        "D-few",
        "->",
        "images on which two models disagree (%): ",
        "classes that keep their parameter group if the validation images are resampled (%): P-many ",
        " trained parameters, ",
    ):
        assert words in shown


def test_the_loss_of_gla_trains_with_the_prior_of_the_foundation_model(workspace: Workspace, small_clip: str) -> None:
    config = RunConfig.model_validate(settings(small_clip, **{"loss.kind": "gla"}))
    run = Run(config, workspace)
    prior, counts = label_prior(workspace, run.config), torch.from_numpy(run.class_counts).float()
    logits, labels = torch.zeros(8, 8), torch.arange(8)
    expected = F.cross_entropy(logits + (counts / counts.sum()).log() + prior.log_q, labels)
    assert float(loss_of(run.config, workspace, counts)(logits, labels)) == pytest.approx(float(expected), rel=1e-5)
    assert np.isfinite(run.train_epoch()["train/loss"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["{a}", "--combine", "logits"],
            "--combine: requires at least 2 models, but got 1; give more checkpoints, or leave it out",
        ),
        (
            ["{a}", "--weights", "1"],
            "--weights: requires at least 2 models, but got 1; give more checkpoints, or leave it out",
        ),
        (
            ["{a}", "{b}", "--weights", "1,2,3"],
            "--weights: must contain one weight for each of the 2 models ({a}, {b}), but got 3; give 2, separated by commas",
        ),
        (
            ["{a}", "{b}", "--weights", "1,0"],
            "--weights: must be positive numbers separated by commas, but got '1,0'; try 2,1,1",
        ),
        (
            ["{a}", "{b}", "--weights", "one"],
            "--weights: must be positive numbers separated by commas, but got 'one'; try 2,1,1",
        ),
        (["{a}", "{b}", "--combine", "logit"], "--combine: unknown value 'logit'; did you mean 'logits'?"),
        (
            ["{a}", "{a}"],
            "CHECKPOINT: each must be given once, but got {a} twice; use --weights to give it more weight",
        ),
        (
            ["{a}", "{order}"],
            "{order}: must have the classes of {a} in the same order, but their order differs; "
            "combine models of one dataset",
        ),
        (
            ["{a}", "{fewer}"],
            "{fewer}: must have the classes of {a} in the same order, but it has 7 classes and the other 8, which differ in "
            "{last}; combine models of one dataset",
        ),
        (
            ["{a}", "{b}", "--gla", "--posthoc-tau", "1"],
            "--posthoc-tau: cannot be used with --gla, which removes the prior itself; leave one of them out",
        ),
        (
            ["{a}", "{tau}"],
            "--posthoc-tau: is required for models with different values (0.0, 0.5), but is missing; give one",
        ),
    ],
)
def test_models_that_cannot_be_combined_give_a_one_line_error(
    words: list[str], message: str, folders: list[str], tmp_path: Path
) -> None:
    names = dict(zip("ab", folders, strict=True)) | {n: str(tmp_path / n) for n in ("order", "fewer", "tau")}
    for name in ("order", "fewer", "tau"):
        shutil.copytree(folders[0], names[name])
        record = json.loads((Path(names[name]) / "run.json").read_text())
        names["last"] = record["class_names"][-1]
        if name == "order":
            record["class_names"].reverse()
        if name == "fewer":
            for key in ("class_names", "class_counts", "labelled_counts"):
                record[key].pop()
        record["config"]["evaluation"]["posthoc_tau"] = 0.5 if name == "tau" else 0.0
        (Path(names[name]) / "run.json").write_text(json.dumps(record))
    with pytest.raises(BadInput) as caught:
        evaluate.main([word.format(**names) for word in words])
    assert str(caught.value) == message.format(**names)


def test_gla_without_a_text_tower_gives_a_one_line_error_and_the_table_omits_parameter_groups(
    workspace: Workspace,
    small_clip: str,
    monkeypatch: pytest.MonkeyPatch,
    folders: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(backbone, "_load_open_clip", without_text(backbone._load_open_clip))
    with pytest.raises(BadInput) as caught:
        evaluate.main([folders[0], "--gla"])
    assert (
        str(caught.value)
        == f"GLA: requires a text tower, but {small_clip} has none; leave GLA out, or use another backbone"
    )
    assert {d: list(row) for d, row in said(folders, capsys)["groups"].items()} == {
        "many": ["all"],
        "medium": ["all"],
        "few": ["all"],
        "all": ["all"],
    }


def test_each_device_holds_models_in_turn_and_together_they_give_the_same_figures(
    folders: list[str], small_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = EvaluationRequest((*folders, folders[0] + "-again"), small_data, "test")
    shutil.copytree(folders[0], question.checkpoints[2], dirs_exist_ok=True)
    expected = evaluate_here(question)
    made, places = [], []
    trained = evaluation._trained
    monkeypatch.setattr(evaluation, "all_devices", lambda first: [first, torch.device("cpu", 0)])
    monkeypatch.setattr(evaluation, "Workspace", lambda *args: (made.append(Workspace(*args)), made[-1])[1])
    monkeypatch.setattr(
        evaluation, "_trained", lambda *args: (found := trained(*args), places.append(found[0].workspace))[0]
    )
    found = evaluate_here(question)
    assert [workspace.ranks.device for workspace in made] == [torch.device("cpu"), torch.device("cpu", 0)]
    assert [made.index(workspace) for workspace in places] == [0, 1, 0]
    assert found.figures == [pytest.approx(one, abs=1e-6) for one in expected.figures]
    assert found.rows == expected.rows


def test_several_gpus_are_used_in_turn_and_a_cpu_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all_devices(torch.device("cpu")) == [torch.device("cpu")]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    gpus = [torch.device("cuda"), torch.device("cuda", 1), torch.device("cuda", 2)]
    assert all_devices(torch.device("cuda")) == gpus


def test_the_members_of_one_checkpoint_are_also_distributed_over_the_devices(small_data: str, small_clip: str) -> None:
    workspaces = [Workspace(small_data, Ranks.alone()) for _ in range(2)]
    method = {"kind": "backdoor", "members": {"a": {}, "b": {"seed": 1}, "c": {"seed": 2}}}
    config = RunConfig.model_validate(settings(small_clip) | {"method": method})
    model = model_of(config, workspaces)
    assert isinstance(model, Ensemble)
    assert [workspaces.index(one.workspace) for one in model.models.values()] == [0, 1, 0]


def test_a_class_has_its_parameter_group_in_the_table_of_classes(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([*folders, "--per-class", str(tmp_path / "classes.csv"), "--json"])
    report = flat_evaluation(capsys.readouterr().out)
    with (tmp_path / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    for group in ("many", "medium", "few"):
        kept = [float(row["parameter_group_kept"]) for row in rows if row["parameter_group"] == group]
        assert len(kept) == report["groups"]["all"][group]["classes"]
        assert report["parameter_groups_kept"][group] == pytest.approx(sum(kept) / len(kept))
        assert 0 < report["parameter_groups_kept"][group] < 1  # 2 images of each class
    evaluate.main([folders[0], "--per-class", str(tmp_path / "one.csv")])
    assert "parameter_group" not in (tmp_path / "one.csv").read_text()


def test_a_prior_that_cannot_be_fitted_to_resampled_images_leaves_the_parameter_groups_out(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise ValueError("the label prior must settle")

    monkeypatch.setattr(priors, "resampled", fails)
    report = said(folders, capsys)
    assert "the label prior must settle" in report["no_parameter_groups"]
    assert list(report["groups"]["all"]) == ["all"]


def test_a_prior_that_cannot_be_fitted_gives_a_one_line_error_and_the_table_says_that_it_is_missing(
    folders: list[str], small_data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_fit(*args: Any, **options: Any) -> None:
        raise ValueError("the label prior must settle, but it still changed by 3 after 500 rounds")

    monkeypatch.setattr(priors, "fit", no_fit)
    message = f"{small_data} validation: the label prior must settle, but it still changed by 3 after 500 rounds"
    with pytest.raises(BadInput) as caught:
        evaluate.main([folders[0], "--gla"])
    assert str(caught.value) == f"{message}; GLA cannot be used with it"
    evaluate.main(folders)
    assert f"no parameter groups: {message}" in capsys.readouterr().out


def without_text(load: Callable[..., backbone.Backbone]) -> Callable[..., backbone.Backbone]:
    return lambda *args: replace(load(*args), text=None, projection=None)
