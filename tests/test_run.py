"""One run without Ray: it learns, repeats itself, goes on from a checkpoint, and is the same on two ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from evaluation_json import flat_evaluation
from made_run import run_config, untimed
from safetensors.torch import save

from lift_ray import evaluate
from lift_ray.data.open import open_dataset
from lift_ray.epoch_metrics import EpochMetrics, named
from lift_ray.errors import BadInput, RunFailed
from lift_ray.inference.evaluate import evaluate_checkpoint
from lift_ray.methods.world import Ranks, join_group
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import RunFile
from lift_ray.storage.output import Output
from lift_ray.training import checkpoint, loop
from lift_ray.training.checkpoint_manager import CheckpointManager, CheckpointPolicy
from lift_ray.training.events import EpochEnded, RunStarted, StepsDone
from lift_ray.training.loop import StepCallback, trained_epochs
from lift_ray.training.plan import plan
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

EPOCHS = 3
Figures = list[dict[str, float]]


def settings(clip: str, **overrides: Any) -> RunConfig:
    tree = {"backbone": {"model": clip}, "optim": {"epochs": EPOCHS, "global_batch_size": 16, "lr": 0.01}}
    return run_config(tree, overrides)


@pytest.fixture(scope="module")
def trained(
    workspace: Workspace, small_clip: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Figures, list[Path], Run]:
    """The undisturbed run: the figures and the checkpoint of every epoch."""
    run, figures, folders = Run(settings(small_clip), workspace), [], []
    for epoch, found in enumerate(run.epochs(), 1):
        figures.append(found)
        folders.append(tmp_path_factory.mktemp("epoch") / f"checkpoint-{epoch}")
        run.save(folders[-1])
    return untimed(figures), folders, run


@pytest.mark.parametrize("kind", ["adaptformer", "lora", "clip_adapter", "linear_probe"])
def test_the_loss_falls_and_the_figures_are_complete(workspace: Workspace, small_clip: str, kind: str) -> None:
    run = Run(settings(small_clip, tuner__kind=kind), workspace)
    figures = list(run.epochs())
    assert [f["epoch"] for f in figures] == [1, 2, 3]
    assert figures[-1]["train/loss"] < 0.95 * figures[0]["train/loss"]
    assert set(figures[0].flat()) == {
        "epoch",
        "trained_parameters",
        "train/loss",
        "train/accuracy",
        "train/images_per_s",
        "time/train_s",
        "time/data_wait_s",
        "time/evaluate_s",
        *(
            f"validation/{name}"
            for name in (
                "accuracy",
                "mean_class_accuracy",
                "loss",
                "balanced_log_loss",
                "many",
                "medium",
                "few",
                "worst_class",
                "harmonic_mean",
                "geometric_mean",
                "macro_f1",
                "calibration_error",
            )
        ),
    }
    assert figures[0]["trained_parameters"] == sum(p.numel() for p in run.model.trained().values())


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(
    workspace: Workspace, small_clip: str, trained: tuple[Figures, list[Path], Run]
) -> None:
    assert untimed(Run(settings(small_clip), workspace).epochs()) == trained[0]
    assert untimed(Run(settings(small_clip, seed=1), workspace).epochs()) != trained[0]


def test_a_run_does_not_disturb_the_random_numbers_of_others(workspace: Workspace, small_clip: str) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    workspace.build(workspace.resolve(settings(small_clip)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("done", [1, 2])
def test_resuming_from_a_checkpoint_equals_the_undisturbed_run_exactly(
    workspace: Workspace, small_clip: str, trained: tuple[Figures, list[Path], Run], done: int
) -> None:
    figures, folders, whole = trained
    run = Run(settings(small_clip), workspace)
    run.load(folders[done - 1])
    assert run.epoch == done
    assert untimed(run.history) == figures[:done]
    assert untimed(run.epochs()) == figures[done:]
    for name, value in whole.model.stored().items():
        assert torch.equal(run.model.stored()[name], value), name


def test_adamw_learns_and_resumes_inside_an_epoch_exactly(
    workspace: Workspace, small_clip: str, tmp_path: Path
) -> None:
    config = settings(small_clip, optim__optimizer="adamw", optim__lr=0.01)
    whole, stopped, again = (Run(config, workspace) for _ in range(3))
    figures = untimed(whole.epochs())
    assert figures[-1]["train/loss"] < 0.95 * figures[0]["train/loss"]
    stopped.train_epoch()
    coming = stopped.batches()
    stopped.train_step(next(coming))
    stopped.save(tmp_path / "inside")
    again.load(tmp_path / "inside")
    assert (again.epoch, again.step) == (1, 1)
    assert untimed(again.epochs())[-1]["train/loss"] == figures[-1]["train/loss"]
    for name, value in whole.model.stored().items():
        assert torch.equal(again.model.stored()[name], value), name
    with pytest.raises(BadInput, match="must have the same settings"):
        Run(settings(small_clip), workspace).load(tmp_path / "inside")


def test_a_checkpoint_holds_its_run_and_replaces_the_one_before(
    trained: tuple[Figures, list[Path], Run], small_data: str, tmp_path: Path
) -> None:
    _, folders, run = trained
    record = checkpoint.read_record(folders[0])
    assert (record.epoch, record.step, record.dataset) == (1, 6, small_data)
    assert record.class_counts == record.labelled_counts == [24, 18, 14, 12, 10, 8, 6, 4]
    assert record.groups.names.tolist() == ["many"] * 3 + ["medium"] * 2 + ["few"] * 3
    assert RunConfig.model_validate(record.config).digest() == record.digest == run.config.digest()
    for _ in range(2):
        run.save(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "optimizer.safetensors",
        "per_class.csv",
        "run.json",
        "state.safetensors",
        "weights.safetensors",
    ]


def train_as_rank(rank: int, port: int, data: str, config: dict[str, Any], out: str) -> None:
    torch.set_num_threads(1)
    join_group(rank, 2, "127.0.0.1", port, torch.device("cpu"))
    run = Run(RunConfig.model_validate(config), Workspace(data, Ranks(rank, 2, torch.device("cpu"))))
    figures = list(run.epochs())
    Path(out, f"{rank}.json").write_text(json.dumps(untimed(figures)))
    torch.distributed.destroy_process_group()


def test_two_ranks_train_what_one_does(
    small_data: str,
    small_clip: str,
    trained: tuple[Figures, list[Path], Run],
    tmp_path: Path,
    as_two_ranks: Callable[..., None],
) -> None:
    as_two_ranks(train_as_rank, small_data, settings(small_clip).to_dict(), str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for alone, together in zip(trained[0], first, strict=True):
        assert together["train/loss"] == pytest.approx(alone["train/loss"], abs=1e-4)
        assert together["validation/loss"] == pytest.approx(alone["validation/loss"], abs=1e-4)
        for name in ("accuracy", "mean_class_accuracy", "medium", "few"):
            assert together[f"validation/{name}"] == pytest.approx(alone[f"validation/{name}"], abs=1e-12)


def test_a_linear_probe_trains_the_classifier_alone(workspace: Workspace, small_clip: str) -> None:
    run = Run(settings(small_clip, tuner__kind="linear_probe"), workspace)
    assert list(run.model.trained()) == ["head.weight"]
    assert run.num_trained == 8 * 64


def test_zero_shot_trains_nothing_and_is_evaluated(workspace: Workspace, small_clip: str, tmp_path: Path) -> None:
    run = Run(settings(small_clip, tuner__kind="zero_shot"), workspace)
    assert (run.num_trained, run.num_epochs, [figures["epoch"] for figures in run.epochs()]) == (0, 0, [0])
    before = run.evaluate("test")
    run.save(tmp_path / "zero")
    (figures,), rows = evaluate_checkpoint(tmp_path / "zero", workspace.dataset.uri, "test")
    assert sum(row["images"] for row in rows) == 24
    assert figures.pop("trained_parameters") == 0
    assert figures == pytest.approx(named("test", before.metrics), abs=1e-6)


def test_a_checkpoint_has_the_figures_that_its_run_had(
    small_data: str, trained: tuple[Figures, list[Path], Run]
) -> None:
    (figures,), _ = evaluate_checkpoint(trained[1][-1], small_data, "validation")
    expected = {k: v for k, v in trained[0][-1].items() if k.startswith("validation/")}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_patches_are_left_out_in_training_alone(
    workspace: Workspace, small_clip: str, trained: tuple[Figures, list[Path], Run]
) -> None:
    run = Run(settings(small_clip, augment__patch_dropout=0.5), workspace)
    assert (
        run.evaluate("validation").metrics["loss"]
        == Run(settings(small_clip), workspace).evaluate("validation").metrics["loss"]
    )
    tokens: list[int] = []
    hook = run.model.tower.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    figures = [run.train_epoch()["train/loss"], run.evaluate("validation").metrics["loss"]]
    hook.remove()
    assert tokens == [9] * 6 + [17]
    assert figures[0] != trained[0][0]["train/loss"]


def test_a_run_at_random_start_and_plain_loss_learns_too(workspace: Workspace, small_clip: str) -> None:
    run = Run(settings(small_clip, head__init="random", loss__kind="cross_entropy", tuner__blocks=[1]), workspace)
    losses = [figures["train/loss"] for figures in run.epochs()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"optim__global_batch_size": 97},
            "optim.global_batch_size: must be at most the 96 training images, but got 97; lower it",
        ),
        (
            {"backbone__precision": "bf16"},
            "backbone.precision: must be fp32 on a CPU, but got bf16; set backbone.precision=fp32, or use a GPU",
        ),
        ({"tuner__blocks": [0, 2]}, "tuner.blocks: must lie in 0 ... 1, but got [0, 2]; name at least one"),
        ({"backbone__model": "ViT-B-61"}, "backbone.model: unknown model 'ViT-B-61'; did you mean 'ViT-B-16'?"),
    ],
)
def test_settings_that_do_not_fit_data_or_machine_give_a_one_line_error(
    workspace: Workspace, small_clip: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput) as caught:
        Run(settings(small_clip, **overrides), workspace)
    assert str(caught.value) == message


def test_a_batch_that_ranks_cannot_share_gives_a_one_line_error(small_data: str, small_clip: str) -> None:
    workspace = Workspace(small_data, Ranks(0, 3, torch.device("cpu")))
    with pytest.raises(BadInput) as caught:
        Run(settings(small_clip), workspace)
    assert str(caught.value) == (
        "optim.global_batch_size: must be divisible by 3 workers, but got 16; use 15, or 2 workers"
    )


def test_the_whole_training_split_can_be_one_batch(workspace: Workspace, small_clip: str) -> None:
    run = Run(settings(small_clip, optim__global_batch_size=96, optim__epochs=1), workspace)
    assert run.steps_per_epoch == 1
    assert len(list(run.epochs())) == 1


@pytest.mark.parametrize("lr", [1e9, 1e300])
def test_a_run_that_diverges_fails_in_one_line(workspace: Workspace, small_clip: str, lr: float) -> None:
    run = Run(settings(small_clip, optim__lr=lr), workspace)
    with pytest.raises(RunFailed) as caught:
        list(run.epochs())
    assert str(caught.value).startswith("epoch 1, step 2: the training loss must be finite, but got ")
    assert str(caught.value).endswith(") in fp32; lower optim.lr")
    assert f" with optim.lr={lr:g} (at that step " in str(caught.value)


def broken(folder: Path, file: str, data: bytes | None) -> None:
    if data is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(data)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        (
            "run.json",
            None,
            "{folder}: must be a checkpoint folder, but there is no run.json; give the folder that contains it",
        ),
        ("run.json", b"{", "{folder}/run.json: invalid checkpoint record: "),
        ("run.json", b"[]", "{folder}/run.json: invalid checkpoint record: "),
        ("run.json", b"\xff\xfe", "{folder}/run.json: invalid checkpoint record: "),
        ("run.json", b'{"format_version": 1}', "{folder}/run.json: invalid checkpoint record: "),
        (
            "run.json",
            b'{"format_version": 1, "config": {}, "digest": "", "dataset": "", "class_names": [], "class_counts": [], "epoch": 0, '
            b'"epochs": 1}',
            "{folder}/run.json: invalid checkpoint record: unknown key 'epochs'; copy the folder again",
        ),
        (
            "run.json",
            b'{"format_version": 9}',
            "{folder}: must be a checkpoint of format 1, but got 9; use the version of lift_ray that wrote it",
        ),
        (
            "run.json",
            b"<html>",
            "{folder}/run.json: invalid checkpoint record: it is an HTML page; copy the folder again",
        ),
        ("weights.safetensors", None, "{folder}/weights.safetensors: cannot be read: [Errno 2] No such file"),
        (
            "weights.safetensors",
            b"version https://git-lfs.github.com/spec/v1",
            "{folder}/weights.safetensors: must be a safetensors file, but it is a Git LFS pointer; run git lfs pull",
        ),
        (
            "weights.safetensors",
            save({"other": torch.zeros(1)}),
            "{folder}/weights.safetensors: does not match the settings next to it: ",
        ),
        ("optimizer.safetensors", None, "{folder}/optimizer.safetensors: cannot be read: [Errno 2] No such file"),
        (
            "optimizer.safetensors",
            b"",
            "{folder}/optimizer.safetensors: must be a safetensors file, but it is an empty file; copy or download it again",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_read_gives_a_one_line_error(
    workspace: Workspace,
    small_clip: str,
    trained: tuple[Figures, list[Path], Run],
    tmp_path: Path,
    file: str,
    data: bytes | None,
    message: str,
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained[1][0], folder)
    broken(folder, file, data)
    with pytest.raises(BadInput) as caught:
        Run(settings(small_clip), workspace).load(folder)
    assert str(caught.value).startswith(message.format(folder=folder))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_other_settings_is_refused(
    workspace: Workspace, small_clip: str, trained: tuple[Figures, list[Path], Run]
) -> None:
    with pytest.raises(BadInput) as caught:
        Run(settings(small_clip, loss__tau=0.5), workspace).load(trained[1][0])
    assert str(caught.value) == (
        f"{trained[1][0]}: must have the same settings, but loss was "
        "{'kind': 'logit_adjusted', 'label_smoothing': 0.0, 'tau': 1.0} and is now "
        "{'kind': 'logit_adjusted', 'label_smoothing': 0.0, 'tau': 0.5}; use another --out, or the settings it started with"
    )


def test_weights_of_another_shape_are_refused(
    workspace: Workspace, small_clip: str, trained: tuple[Figures, list[Path], Run]
) -> None:
    run = Run(settings(small_clip, tuner__bottleneck=3), workspace)
    with pytest.raises(BadInput, match=r"next to it: the checkpoint does not fit the model: tuner.adaptformer.0.down"):
        checkpoint.load_weights(trained[1][0], run.model)


def test_evaluate_prints_the_figures_of_the_run_as_json_and_as_a_table(
    trained: tuple[Figures, list[Path], Run], small_data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(trained[1][-1])
    assert evaluate.main([folder, "--split", "validation", "--json"]) is None
    figures = flat_evaluation(capsys.readouterr().out)
    expected = {k: v for k, v in trained[0][-1].items() if k.startswith("validation/")}
    assert {k: v for k, v in figures.items() if "/" in k} == pytest.approx(expected, abs=1e-6)  # on other threads
    assert evaluate.main([folder, "--data", small_data, "--split", "validation"]) is None
    table = capsys.readouterr().out
    assert f"{100 * figures['validation/accuracy']:.1f}" in table
    assert "24 images, accuracy (%)" in table


def test_evaluate_takes_the_classes_of_the_model_from_a_dataset_with_more(
    trained: tuple[Figures, list[Path], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(trained[1][0]), "--data", "embedded:caltech101-lt", "--json"])
    printed = capsys.readouterr()
    classes = flat_evaluation(printed.out)["classes"]
    assert (classes["with_images"], classes["of_model"], len(classes["unknown"])) == (8, 8, 92)
    number = sum(classes["unknown"].values())
    assert f"note: left out {number:,} images of 92 classes that the model does not have: '" in printed.err


def test_evaluate_works_on_a_dataset_with_only_a_test_split(
    trained: tuple[Figures, list[Path], Run], small_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in Path(small_data).glob("test-*.parquet"):
        shutil.copy(shard, tmp_path)
    assert list(open_dataset(str(tmp_path)).splits) == ["test"]
    seen = []
    for data in (small_data, str(tmp_path)):
        evaluate.main([str(trained[1][-1]), "--data", data, "--json"])
        seen.append(flat_evaluation(capsys.readouterr().out))
    assert seen[0].items() <= seen[1].items()
    assert set(seen[1]) - set(seen[0]) == {"classes", "skipped", "intervals", "old_test", "old_test_note"}
    assert {"test/medium", "test/few"} <= set(seen[0])
    with pytest.raises(
        BadInput, match=r"must have a validation split, but got only test; convert again with --validation-frac 0.1"
    ):
        evaluate.main([str(trained[1][-1]), "--data", str(tmp_path), "--split", "validation"])


def test_a_fraction_of_the_data_is_the_first_images_of_each_class(workspace: Workspace, small_clip: str) -> None:
    whole = Run(settings(small_clip), workspace)
    half = Run(settings(small_clip, optim__data_frac=0.5), workspace)
    least = Run(settings(small_clip, optim__data_frac=0.001, optim__global_batch_size=8), workspace)
    assert half.class_counts.tolist() == [round(n / 2) for n in whole.class_counts.tolist()]
    for part in (half, least):
        assert part.predictor.groups.names.tolist() == whole.predictor.groups.names.tolist()
    assert half.steps_per_epoch == whole.steps_per_epoch // 2
    assert least.class_counts.tolist() == [1] * len(whole.class_counts)
    for label in range(len(whole.class_counts)):
        rows = whole.train.rows[whole.train.labels == label]
        assert half.train.rows[half.train.labels == label].tolist() == rows[: len(rows) // 2].tolist()


def test_cached_features_are_those_of_the_fraction(workspace: Workspace, small_data: str, small_clip: str) -> None:
    own = {"tuner__kind": "linear_probe", "augment__kind": "none"}
    list(Run(settings(small_clip, **own), workspace).epochs())  # keeps those of the whole split
    found = list(Run(settings(small_clip, **own, optim__data_frac=0.5), workspace).epochs())
    alone = list(Run(settings(small_clip, **own, optim__data_frac=0.5), Workspace(small_data, Ranks.alone())).epochs())
    assert untimed(found) == untimed(alone)


def test_a_plan_needs_no_weights_but_reports_every_other_mistake(small_data: str, small_clip: str) -> None:
    data = open_dataset(small_data)

    def planned(clip: str, **overrides: Any) -> dict[str, str]:
        tree = {"name": "planned", "dataset": small_data, **settings(clip, **overrides).model_dump()}
        return plan(RunFile.model_validate(tree), data, 1, 300)[1]

    lines = planned("local-dir:/nowhere/at/all")
    assert lines["trained parameters and memory"].startswith(
        "unknown; backbone.model: local-dir:/nowhere/at/all could not be loaded ("
    )
    assert lines["steps"].startswith("6 an epoch, 18 in all;")
    assert "trained parameters" in planned(small_clip)
    with pytest.raises(BadInput, match=r"^tuner.blocks: must lie in 0 ... 1, but got \[0, 2\]"):
        planned(small_clip, tuner__blocks=[0, 2])


def test_metrics_that_a_search_adds_to_an_epoch_are_in_its_checkpoint(
    workspace: Workspace, small_clip: str, tmp_path: Path
) -> None:
    def checkpoints() -> CheckpointManager:
        return CheckpointManager(Output(str(tmp_path)), CheckpointPolicy(keep=1, keep_best=False))

    def complete(metrics: EpochMetrics) -> EpochMetrics:
        return replace(metrics, num_epochs=EPOCHS, seconds={**metrics.seconds, "begin_s": 7.0})

    first = trained_epochs(Run(settings(small_clip), workspace), checkpoints(), complete)
    assert isinstance(next(first), RunStarted)
    assert isinstance(next(first), EpochEnded)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch-0001"]
    restarted = next(trained_epochs(Run(settings(small_clip), workspace), checkpoints(), complete))
    assert isinstance(restarted, RunStarted)
    assert [(metrics.num_epochs, metrics.seconds["begin_s"]) for metrics in restarted.history] == [(EPOCHS, 7.0)]


def test_the_first_event_after_a_restart_has_no_steps_from_before_it(workspace: Workspace, small_clip: str) -> None:
    told: list[StepsDone] = []
    run = Run(settings(small_clip), workspace)
    batches = run.batches()
    for _ in range(4):
        run.train_step(next(batches))
    callback = StepCallback(run.ranks, told.append, lambda: "")  # type: ignore[arg-type]
    callback.start(run)
    run.train_step(next(batches))
    callback._told_at = -loop.TELL_EVERY_S
    callback(run)
    assert [(event.epoch, event.step) for event in told] == [(0, 5)]
    assert told[0].figures["loss"] == pytest.approx(run.losses[4, 0].item())
