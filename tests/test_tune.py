"""python -m lift_ray.tune on real Ray processes: reused slots, output files, resumed searches, bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import torch
from browser import seen_in_browser
from evaluation_json import flat_evaluation
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pyarrow import fs
from safetensors.torch import load_file

from lift_ray import evaluate, train, tune
from lift_ray.errors import BadInput
from lift_ray.settings.run_file import read_run

TRIALS = 8


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """Output that the search of `searched` printed."""
    return []


@pytest.fixture(scope="module")
def searched(space_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None, printed: list[str]) -> Path:
    out = tmp_path_factory.mktemp("searched") / "out"
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        assert not tune.main([str(space_file), "--out", str(out)])
    printed += screen.getvalue().splitlines()
    return out


def stored(out: Path) -> list[optuna.trial.FrozenTrial]:
    """Return Optuna's trials in the order of their numbers, read with Optuna's own loader."""
    storage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    trials = optuna.load_study(study_name="e2e", storage=storage).trials
    return sorted((t for t in trials if "trial" in t.user_attrs), key=lambda t: t.user_attrs["trial"]["number"])


def epochs(trial: optuna.trial.FrozenTrial) -> list[dict[str, Any]]:
    return [trial.user_attrs[f"epoch {i}"] for i in range(1, 1 + sum(k.startswith("epoch ") for k in trial.user_attrs))]


def test_a_search_writes_what_it_promises(searched: Path) -> None:
    table = pq.read_table(searched / "trials.parquet").to_pylist()
    assert [row["number"] for row in table] == list(range(TRIALS))
    assert {row["state"] for row in table} <= {"finished", "pruned"}
    finished = [row for row in table if row["state"] == "finished"]
    assert all(row["epochs"] == 3 for row in finished)
    assert table[0]["tuner.kind"] == "adaptformer"
    assert table[0]["state"] == "finished", "a baseline must never be stopped early"
    assert all((row["tuner.bottleneck"] is None) == (row["tuner.kind"] == "linear_probe") for row in table)
    assert json.loads((searched / "space.json").read_text())["each_trial"] == {"workers": 1, "cpus": 1, "gpus": 0}
    assert all(row["began_at"] < row["ended_at"] for row in table)
    study = json.loads((searched / "study.json").read_text())
    best = max(finished, key=lambda row: row["validation/mean_class_accuracy"])
    assert study["best"]["trial"] == best["number"]
    own = "best found, tau 0" if study["posthoc"]["recommended"] else "best found"
    labels = [row["label"] for row in study["compared"]]
    assert labels == ["zero-shot", "the recipe", *dict.fromkeys((own, "best found")), "best found, TTE"]
    assert study["tte"] == {label: "five_crops" if label == "best found, TTE" else "off" for label in labels}
    found = next(row for row in study["compared"] if row["label"] == own)
    assert found["validation/mean_class_accuracy"] == best["validation/mean_class_accuracy"]
    assert all("test/mean_class_accuracy" in row for row in study["compared"])


def test_a_search_ends_with_its_page_that_a_browser_shows(searched: Path, printed: list[str], tmp_path: Path) -> None:
    page = searched / "report" / "index.html"
    assert printed[-1] == f"report: {page}"
    seen = seen_in_browser(page, 1280, tmp_path)
    assert [seen["plots"] - seen["drawn"], seen["unnamed"], seen["requests"]] == [0, 0, []]


def test_trials_share_the_processes_of_their_slots(searched: Path) -> None:
    loads = [figures["time/load_s"] > 0 for trial in stored(searched) for figures in epochs(trial)]
    assert 0 < sum(loads) <= (os.cpu_count() or 1) < TRIALS


def test_finished_trials_hold_the_best_tau_after_training_and_what_the_choice_gains(searched: Path) -> None:
    table = pq.read_table(searched / "trials.parquet").to_pylist()
    for row in table:
        tau = row["validation/posthoc_tau"]
        assert (tau is not None) == (row["state"] == "finished")
        if tau is not None:
            assert row["validation/posthoc_mean_class_accuracy"] >= row["validation/mean_class_accuracy"] - 1e-9
            assert row["validation/posthoc_optimism"] >= 0


def test_early_stopped_trials_reach_optuna_as_pruned(searched: Path) -> None:
    trials = stored(searched)
    table = pq.read_table(searched / "trials.parquet").to_pylist()
    states = {"finished": optuna.trial.TrialState.COMPLETE, "pruned": optuna.trial.TrialState.PRUNED}
    assert len(trials) == TRIALS
    for row, match in zip(table, trials, strict=True):
        assert match.params["optim.lr"] == row["optim.lr"]
        assert match.state == states[row["state"]]
        assert match.value == pytest.approx(row["validation/mean_class_accuracy"])


def test_the_best_run_file_and_checkpoint_can_be_used(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = json.loads((searched / "study.json").read_text())
    config = read_run(searched / "best.yaml").config
    assert config.digest() == study["best"]["digest"]
    assert not train.main([str(searched / "best.yaml"), "--dry-run"])
    assert config.tuner.kind in capsys.readouterr().out
    assert not evaluate.main([str(searched), "--json"])
    figures = flat_evaluation(capsys.readouterr().out)
    found = next(row for row in study["compared"] if row["label"] == "best found")
    assert figures["test/accuracy"] == pytest.approx(found["test/accuracy"])


def test_a_second_search_into_the_same_folder_is_refused(searched: Path, space_file: Path) -> None:
    with pytest.raises(BadInput) as caught:
        tune.main([str(space_file), "--out", str(searched)])
    assert str(caught.value) == (
        f"{searched}: must be a new folder, but it already contains a search; add --resume to continue it, or give another --out"
    )


def test_a_search_with_two_workers_per_trial_finds_what_one_worker_finds(
    searched: Path, space_file: Path, tmp_path: Path, ray_session: None
) -> None:
    out = tmp_path / "out"
    words = ["search.trials=1", "scale.workers_per_trial=2", "search.scheduler.kind=none", "search.tte_best=0"]
    assert not tune.main([str(space_file), *words, "--out", str(out)])
    alone, together = (pq.read_table(folder / "trials.parquet").to_pylist()[0] for folder in (searched, out))
    assert together["optim.lr"] == alone["optim.lr"] == 0.02
    assert together["train/loss"] == pytest.approx(alone["train/loss"], abs=1e-4)
    assert together["validation/loss"] == pytest.approx(alone["validation/loss"], abs=1e-4)


@pytest.mark.slow
def test_a_refit_on_ray_train_workers_gives_the_model_of_a_refit_in_a_slot(
    space_file: Path, tmp_path: Path, ray_session: None
) -> None:
    words = ["search.trials=2", "search.scheduler.kind=none", "search.tte_best=0", "search.refit=true"]
    for workers in (1, 2):
        out = ["--out", str(tmp_path / str(workers))]
        assert not tune.main([str(space_file), *words, f"scale.refit_workers={workers}", *out])
    studies = [json.loads((tmp_path / name / "study.json").read_text()) for name in ("1", "2")]
    for study in studies:
        assert study["refit"] == {"data": "train+validation", "retrained": True, "images": 96 + 24}
    slot, together = (study["compared"][-1] for study in studies)
    assert together["label"] == "best found"
    assert together["test/loss"] == pytest.approx(slot["test/loss"], abs=1e-3)
    one, other = (load_file(tmp_path / name / "best" / "weights.safetensors") for name in ("1", "2"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)
    run = read_run(tmp_path / "2" / "best.yaml")
    assert run.train_on == "train+validation"


@pytest.mark.slow
def test_best_yaml_of_a_refit_trains_the_model_in_best(space_file: Path, tmp_path: Path, ray_session: None) -> None:
    out = tmp_path / "out"
    words = ["search.trials=2", "search.scheduler.kind=none", "search.tte_best=0", "search.refit=true"]
    assert not tune.main([str(space_file), *words, "--out", str(out)])
    assert not train.main([str(out / "best.yaml"), "--no-ray", "--out", str(tmp_path / "again")])
    one = load_file(out / "best" / "weights.safetensors")
    other = load_file(tmp_path / "again" / "checkpoint" / "weights.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_search_in_object_storage_is_complete_and_continues_where_it_stopped(
    space_file: Path, bucket: str, tmp_path: Path, ray_session: None
) -> None:
    url = bucket.format("study")
    words = ["search.scheduler.kind=none", "search.tte_best=0", "search.seeds_best=2", "scale.max_concurrent=1"]
    storage, folder = fs.FileSystem.from_uri(url)

    def downloaded(name: str) -> Path:
        fs.copy_files(folder, str(tmp_path / name), source_filesystem=storage)
        return tmp_path / name

    def trained_at() -> int:
        """Trial 0 with another seed."""
        info = storage.get_file_info(f"{folder}/checkpoints/1000001/epoch-0003/run.json")
        return int(info.mtime_ns)

    assert not tune.main([str(space_file), *words, "search.trials=2", "--out", url])
    before, first = stored(downloaded("before")), trained_at()
    with pytest.raises(BadInput, match="must be a new folder, but it already contains a search"):
        tune.main([str(space_file), *words, "search.trials=2", "--out", url])
    assert not tune.main([str(space_file), *words, "search.trials=3", "--out", url, "--resume"])
    assert trained_at() == first, "a run with another seed was done twice"
    out = downloaded("after")
    study = json.loads((out / "study.json").read_text())
    runs = {(run["label"], run["seed"]): run["test/mean_class_accuracy"] for run in study["seeds"]}
    labels = {"best found", "the recipe"} if study["best"]["trial"] else {"best found"}
    assert set(runs) == {(label, seed) for label in labels for seed in (0, 1)}
    compared = {found["label"]: found["test/mean_class_accuracy"] for found in study["compared"]}
    assert "best found" in compared
    assert all(runs[label, 0] == compared[label] for label in labels)
    after = stored(out)
    assert [epochs(trial) for trial in after[:2]] == [epochs(trial) for trial in before]
    assert [row["state"] for row in pq.read_table(out / "trials.parquet").to_pylist()] == ["finished"] * 3
    assert {path.name for path in out.iterdir()} >= {"trials.csv", "best.yaml"}
    assert {path.name for path in (out / "best").iterdir()} >= {"run.json", "weights.safetensors", "metrics.json"}


@pytest.mark.slow  # test_engine.py has the claim for slots that train nothing
def test_input_that_only_a_slot_finds_bad_ends_the_search(space_file: Path, tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(BadInput) as caught:
        tune.main([str(space_file), "base.backbone.model=ViT-B-61", "--out", str(tmp_path / "out")])
    assert str(caught.value) == "backbone.model: unknown model 'ViT-B-61'; did you mean 'ViT-B-16'?"


def test_a_trial_that_fits_no_node_is_refused_before_anything_starts(
    space_file: Path, tmp_path: Path, ray_session: None
) -> None:
    with pytest.raises(BadInput, match=r"^scale: a trial must fit the cluster, but got 64 x \(1 CPU\) for 1 node"):
        tune.main(
            [
                str(space_file),
                "scale.workers_per_trial=64",
                "base.optim.global_batch_size=64",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert not list(tmp_path.glob("out/trials*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["base.optim.global_batch_size=15", "scale.workers_per_trial=2"],
            "command line base.optim.global_batch_size: must be divisible by 2 workers, but got 15; use 16, or 1 worker",
        ),
        (
            ["dataset=embedded:caltech101"],
            "embedded:caltech101: must name a dataset in the package, but got 'caltech101'; did you mean 'caltech101-lt'?",
        ),
        (
            ["search.trails=4"],
            "command line search.trails: unknown key 'trails'; did you mean 'trials'?",
        ),
        (
            ["serch.trials=4"],
            "command line serch.trials: unknown key 'serch'; did you mean 'search'?",
        ),
        (
            ["trials"],
            "command line: settings must be written key=value, but got 'trials'; for example, loss.tau=0.5",
        ),
    ],
)
def test_bad_input_is_found_without_ray(words: list[str], message: str, space_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        tune.main([str(space_file), *words, "--out", str(tmp_path / "out")])
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_an_objective_over_an_empty_group_is_refused(space_file: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(space_file.read_text() + "objectives: {validation/many: max}\n")
    with pytest.raises(
        BadInput, match=r"objectives: validation/many requires classes with over 100 training images, but"
    ):
        tune.main([str(space), "base.evaluation.group_bounds=[20, 100]", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["search.folds=4", "base.optim.global_batch_size=80"],
            "optim.global_batch_size: must be at most the 64 training images, but got 80; lower it",
        ),
        (
            ["base.optim.data_frac=0.5", "base.optim.global_batch_size=80"],
            "optim.global_batch_size: must be at most the 48 training images, but got 80; lower it",
        ),
        (
            ["search.folds=99"],
            "search.folds: must leave images or groups for each fold, but got none in fold 98; lower it",
        ),
        (["search.folds=2"], "search: folds must be 1 or at least 3, but got 2"),
        (["search.confirm.best=2"], "search: confirm requires folds of at least 3, but got 1; set search.folds: 4"),
    ],
)
def test_folds_that_cannot_be_trained_are_refused_before_anything_starts(
    settings: list[str], message: str, space_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        tune.main([str(space_file), *settings, "--out", str(tmp_path / "out"), "--dry-run"])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_states_the_folds_the_further_trainings_and_the_groups(
    space_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["search.folds=3", "search.confirm.best=2", "search.refit=true", "search.seeds_best=2"]
    tune.main([str(space_file), *settings, "--dry-run"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "validation 24 images; folds 2 to 3 divide the 96 training images" in printed
    assert "best/ trained on 120 images (train and validation)" in printed
    assert (
        "after the trials 10 more trainings, up to 30 epochs: the best 2 and the baselines on folds 2 to 3" in printed
    )
