"""`tune --dry-run` finds faults that would end a search after its start, without writing files or starting Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from lift_ray import train, tune
from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.errors import BadInput, Stopped
from lift_ray.searching.driver_lock import study_in
from lift_ray.settings.checks import read_space
from lift_ray.storage.output import Output


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, space_file: Path, small_data: str) -> Path:
    """The folder of a search that was killed after its first epoch."""
    out = tmp_path_factory.mktemp("started") / "out"
    with study_in(Output(str(out)), read_space(space_file), small_data, url=None, resume=False) as study:
        row = study.next()
        assert row is not None
        study.report(row, EpochMetrics(1, validation={"mean_class_accuracy": 0.5}, num_epochs=3))
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base.backbone.model=ViT-B-61"], "backbone.model: unknown model 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        (
            ["base.backbone.model=ViT-B-16"],
            "backbone.pretrained: must be a tag of ViT-B-16 or a weights file, but got None; known: ",
        ),
        (
            ["base.backbone.model=ViT-B-16", "base.backbone.pretrained=openia"],
            "backbone.pretrained: must be a tag of ViT-B-16 or a weights file, but got 'openia'; did you mean 'openai'?",
        ),
        (
            ["base.backbone.model=local-dir:/none"],
            "backbone.model: must be a folder with open_clip_config.json, but got local-dir:/none",
        ),
        (
            ["base.backbone.precision=fp16", "scale.use_gpu=false"],
            "backbone.precision: fp16 requires a GPU, but scale.use_gpu is false; ",
        ),
        (
            ["base.optim.global_batch_size=4096"],
            "optim.global_batch_size: must be at most the 96 training images, but got 4,096; lower it",
        ),
        (["--log-to", "mlfow"], "--log-to: unknown service 'mlfow'; did you mean 'mlflow'?"),
        (
            ["--out", "{started}"],
            "{started}: must be a new folder, but it already contains a search; add --resume to continue it, or",
        ),
        (
            ["--out", "{started}", "--resume", "base.optim.epochs=5", "search.trials=80"],
            "--resume: the settings must be those the search started with, but got base.optim.epochs: 3 -> 5; "
            "restore them, or give another --out",
        ),
    ],
)
def test_a_dry_run_finds_what_would_fail_later(
    words: list[str], message: str, started: Path, space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.format(started=started) for word in words]
    with pytest.raises(BadInput) as caught:
        tune.main([str(space_file), *words, "--dry-run"])
    assert str(caught.value).startswith(message.format(started=started))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run_file(small_data: str, tmp_path: Path) -> Path:
    """A run file whose folder is the working directory of a user."""
    (tmp_path / "run.yaml").write_text(f"dataset: {small_data}\noptim: {{epochs: 1, global_batch_size: 8}}\n")
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optim.global_batch_size=4096"],
            "optim.global_batch_size: must be at most the 96 training images, but got 4,096; lower it",
        ),
        (
            ["optim.data_frac=0.05", "optim.global_batch_size=96"],
            "optim.global_batch_size: must be at most the 8 training images, but got 96; lower it",
        ),
        (["--log-to", "mlfow"], "--log-to: unknown service 'mlfow'; did you mean 'mlflow'?"),
        (
            ["backbone.precision=fp16", "--no-ray"],
            "backbone.precision: must be fp32 on a CPU, but got fp16; set backbone.precision=fp32, or use a GPU",
        ),
        (["backbone.model=ViT-B-61"], "backbone.model: unknown model 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        (
            ["--out", "{taken}"],
            "{taken}: must be a new folder, but it already contains a run; add --resume, or use another --out",
        ),
        (
            ["--out", "{taken}", "--resume", "optim.lr=0.5", "loss.tau=2", "tuner.kind=lora"],
            "{taken}/run.yaml: the settings must be those the run started with, but got ",
        ),
        (["--resume"], "--resume: requires the run to continue, but --out is missing; add --out FOLDER"),
    ],
)
def test_a_dry_run_of_train_finds_what_would_fail_later(
    words: list[str], message: str, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "run.yaml").write_text(run_file.read_text())
    with pytest.raises(BadInput) as caught:
        train.main([str(run_file), *(word.format(taken=taken) for word in words), "--dry-run"])
    assert str(caught.value).startswith(message.format(taken=taken))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "taken"]


def test_a_resume_with_other_settings_shows_what_differs(run_file: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "run.yaml").write_text(run_file.read_text())
    with pytest.raises(BadInput) as caught:
        train.main([str(run_file), "--out", str(taken), "--resume", "--dry-run", "optim.lr=0.5", "loss.tau=2"])
    assert str(caught.value) == (
        f"{taken}/run.yaml: the settings must be those the run started with, but got loss.tau: 1.0 -> 2.0, "
        "optim.lr: 0.02 -> 0.5; restore them, or give another --out"
    )


def test_the_folder_of_a_run_that_failed_before_its_first_checkpoint_is_not_taken(
    run_file: Path, tmp_path: Path
) -> None:
    words = [str(run_file), "--no-ray", "--out", str(tmp_path / "out")]
    with pytest.raises(BadInput, match="ViT-B-61"):
        train.main([*words, "backbone.model=ViT-B-61"])
    assert not (tmp_path / "out" / "run.yaml").exists()
    train.main([*words, "tuner.kind=zero_shot"])
    with pytest.raises(BadInput, match="already contains a run"):
        train.main(words)


def test_a_run_that_was_stopped_before_its_first_checkpoint_can_be_resumed(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(run_file), "--out", str(tmp_path / "out"), "--no-ray"]

    def stopped(job: object, progress: object) -> None:
        raise Stopped("stopped by SIGTERM; there is no checkpoint yet; continue with --resume", 143)

    with monkeypatch.context() as patch:
        patch.setattr("lift_ray.api.fit.train_alone", stopped)
        with pytest.raises(Stopped):
            train.main(words)
    train.main([*words, "--resume"])
    assert (tmp_path / "out" / "checkpoint").is_dir()
