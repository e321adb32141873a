"""The winner of a search: chosen from out-of-fold predictions, with its post-hoc tau, and trained again on everything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.storages import InMemoryStorage
from played import DATA, HELD_OUT, Played, accuracy_of, play, space, write_out_of_fold

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.reporting.study_files import BEST_FOUND
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching.confirmation import (
    Choice,
    PosthocChoice,
    candidates,
    choose,
    compared_baselines,
    decides_by,
    fold_jobs,
    posthoc_choice,
)
from lift_ray.searching.final_comparison import SearchResult, comparison, final, trained
from lift_ray.searching.jobs import EvaluationJob, TrainJob
from lift_ray.searching.predictions import OutOfFold
from lift_ray.searching.state import Search
from lift_ray.searching.study import Study
from lift_ray.settings.search import TAUS, ScaleConfig
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.output import Output
from lift_ray.terminal.tables import tte_note

GROUPS = np.array(["many", "few"])


def confirmed(**search: Any) -> SpaceFile:
    return space(
        2, **{"scheduler": {"kind": "none"}, "trials": 6, "folds": 3, "confirm": {"best": 2}, "tte_best": 0, **search}
    )


def found(wanted: SpaceFile, out: Path, worker: Played | None = None, **data: Any) -> tuple[SearchResult, Played]:
    search = Search(Study(wanted, "d", InMemoryStorage()), Output(str(out)), replace(DATA, **data))
    played = play(search, worker)
    result = search.result({})
    assert result
    return result, played


def trial(number: int, accuracy: float, baseline: int | None = None, parameters: int = 8) -> TrialRow:
    metrics = EpochMetrics(1, validation={"mean_class_accuracy": accuracy}, trained_parameters=parameters, num_epochs=1)
    values = {"optim.lr": 0.1, "loss.tau": 1.0}
    return TrialRow(number, values, 1, "finished", [metrics], baseline=baseline)


def chosen(wanted: SpaceFile, out: Path, rows: Sequence[TrialRow], accuracies: Sequence[float]) -> Choice:
    """Choose among trials with these out-of-fold accuracies."""
    results = {}
    for row, accuracy in zip(rows, accuracies, strict=True):
        for fold, job in enumerate(fold_jobs(wanted, row), 1):
            results[job.key] = write_out_of_fold(Output(str(out)), row.number, fold, accuracy, TAUS)
    return choose(wanted, rows, results, DATA, Output(str(out)))


def test_the_best_trials_and_all_baselines_are_confirmed() -> None:
    rows = [trial(0, 0.1, baseline=0), trial(1, 0.5), trial(2, 0.9), trial(3, 0.7)]
    assert [row.number for row in candidates(confirmed(), rows)] == [2, 3, 0]
    assert [row.number for row in candidates(confirmed(confirm=None), rows)] == [2]
    rows[2].state = "pruned"
    assert [row.number for row in candidates(confirmed(), rows)] == [3, 1, 0]


def test_of_baselines_with_one_name_the_best_is_compared_once_all_have_ended() -> None:
    rates = [{"name": "probe", "optim.lr": lr, "loss.tau": 1.0} for lr in (0.1, 0.3, 1.0)]
    wanted = confirmed(confirm={"best": 1}).model_copy(
        update={"baselines": [*rates, {"name": "recipe", "optim.lr": 0.1, "loss.tau": 0.0}]}
    )
    rows = [trial(0, 0.2, 0), trial(1, 0.4, 1), trial(2, 0.3, 2), trial(3, 0.1, 3), trial(4, 0.9)]

    def compared(rows: Sequence[TrialRow], *, is_over: bool) -> list[int]:
        return [row.number for row in compared_baselines(wanted, rows, is_over=is_over)]

    assert compared(rows, is_over=False) == [1, 3]
    assert [row.number for row in candidates(wanted, rows)] == [4, 1, 3]
    rows[2].state = "running"
    assert compared(rows, is_over=False) == compared(rows[:2] + rows[3:], is_over=False) == [3]
    assert compared(rows, is_over=True) == [1, 3]
    rows[1].state = rows[2].state = "failed"
    assert compared(rows, is_over=False) == [0, 3], "one of them is enough"


def test_of_baselines_with_one_name_one_is_tested_and_repeated(tmp_path: Path) -> None:
    rates = [{"name": "probe", "optim.lr": lr, "loss.tau": 1.0} for lr in (0.01, 0.3, 1.0)]
    wanted = confirmed(confirm={"best": 1}, seeds_best=2).model_copy(update={"baselines": rates})
    result, played = found(wanted, tmp_path)
    labels = [label for label, _ in result.compared]
    assert labels.count("probe") == 1
    tested = {key.split()[1] for key in played.began if key.startswith("evaluate") and " test " in key}
    assert "trial-0001" in tested
    assert not {"trial-0000", "trial-0002"} & tested
    assert {one["label"] for one in result.seeds} <= {"best found", "probe"}


def test_each_candidate_is_trained_on_each_further_fold_and_evaluated_on_the_first() -> None:
    first, *further = fold_jobs(confirmed(folds=4), trial(5, 0.5))
    assert isinstance(first, EvaluationJob)
    assert (first.checkpoint, first.split, first.taus) == ("checkpoints/0005/epoch-0001", "validation", TAUS)
    assert [job.key for job in further] == ["train 5 fold 2", "train 5 fold 3", "train 5 fold 4"]


def test_the_winner_is_the_best_over_all_folds_and_not_on_the_first(tmp_path: Path) -> None:
    rows = [trial(0, 0.1, baseline=0), trial(1, 0.9), trial(2, 0.8)]
    choice = chosen(confirmed(), tmp_path, rows, [0.3, 0.4, 0.6])
    assert [one.row.number for one in choice.candidates] == [2, 1, 0]
    assert choice.num_images == 3 * HELD_OUT
    values = [one.value for one in choice.candidates]
    assert values == pytest.approx([0.6, 0.4, 0.3], abs=1e-9)
    assert [one.difference for one in choice.candidates] == pytest.approx([0.0, -0.2, -0.3], abs=1e-9)
    assert choice.figures["mean_class_accuracy"] == values[0]


def test_a_baseline_can_win(tmp_path: Path) -> None:
    choice = chosen(confirmed(), tmp_path, [trial(0, 0.1, baseline=0), trial(1, 0.9), trial(2, 0.8)], [0.7, 0.4, 0.6])
    assert choice.row.baseline == 0


def test_smaller_is_preferred_only_within_one_standard_error(tmp_path: Path) -> None:
    rows = [trial(0, 0.1, 0, parameters=1), trial(1, 0.9, parameters=900), trial(2, 0.8, parameters=10)]
    smaller = confirmed(confirm={"best": 2, "prefer": "smaller"})
    assert chosen(confirmed(), tmp_path, rows, [0.2, 0.65, 0.65]).row.number == 1
    choice = chosen(smaller, tmp_path, rows, [0.2, 0.65, 0.65])
    assert choice.row.number == 2, "as good as the best, and smaller"
    assert [one.row.number for one in choice.candidates] == [2, 1, 0]
    assert chosen(smaller, tmp_path, rows, [0.2, 0.65, 0.6]).row.number == 1, (
        "each class differs by the same, so the error is 0"
    )


def test_a_candidate_that_diverged_on_a_fold_is_left_out(tmp_path: Path) -> None:
    wanted, rows = confirmed(), [trial(0, 0.1, baseline=0), trial(1, 0.9), trial(2, 0.8)]
    chosen(wanted, tmp_path, rows, [0.3, 0.9, 0.6])
    done: dict[str, dict[str, Any]] = {job.key: {"parts": 1} for row in rows for job in fold_jobs(wanted, row)}
    done["train 1 fold 3"] = {}
    choice = choose(wanted, rows, done, DATA, Output(str(tmp_path)))
    assert [one.row.number for one in choice.candidates] == [2, 0]
    done |= {"train 0 fold 2": {}, "train 2 fold 2": {}}
    assert choose(wanted, rows, done, DATA, Output(str(tmp_path))).row.number == 1, "all diverged: the best trial stays"


def predictions(hits: Sequence[float], number: int = 400, seed: int = 0) -> OutOfFold:
    """Return predictions of two classes with this probability of a correct one for each tau."""
    random = np.random.default_rng(seed)
    label = np.arange(number) % 2
    right = random.random((number, 1)) < np.array(hits)
    predicted = np.where(right, label[:, None], 1 - label[:, None])
    ones = np.ones(predicted.shape)
    return OutOfFold([0.0, 0.5, 1.0], label, np.ones(number, np.int64), predicted, 0.5 * ones, ones)


def test_a_tau_is_recommended_only_if_its_gain_is_larger_than_its_bias() -> None:
    better = posthoc_choice(predictions([0.5, 0.8, 0.6]), 0.0, "mean_class_accuracy", "max", GROUPS)
    assert (better.is_recommended, better.tau) == (True, 0.5)
    assert better.gain == pytest.approx(0.3, abs=0.05)
    own = posthoc_choice(predictions([0.5, 0.8, 0.6]), 0.5, "mean_class_accuracy", "max", GROUPS)
    assert (own.gain, own.is_recommended, own.tau) == (0.0, False, 0.5)


def test_a_tau_whose_gain_is_noise_is_seldom_recommended() -> None:
    """All taus are equally good here, with independent errors: in two of three cases another one has a gain that means nothing."""
    number = 200
    random, recommended, gained = np.random.default_rng(1), 0, 0
    for seed in range(100):
        base = predictions([0.5, 0.5, 0.5], number, seed)
        right = random.random((number, 3)) < 0.5
        predicted = np.where(right, base.label[:, None], 1 - base.label[:, None])
        one = posthoc_choice(replace(base, predicted=predicted), 0.0, "mean_class_accuracy", "max", GROUPS)
        recommended, gained = recommended + one.is_recommended, gained + (one.gain > 0)
    assert gained >= 55
    assert recommended < gained / 2


def test_a_loss_is_minimized() -> None:
    base = predictions([0.5, 0.5, 0.5])
    lower = replace(base, loss=base.loss * np.array([1.0, 0.5, 2.0]))
    assert posthoc_choice(lower, 0.0, "loss", "min", GROUPS).tau == 0.5


def test_out_of_fold_predictions_are_compared_by_the_first_objective_if_images_measure_it() -> None:
    wanted = space()
    assert decides_by(wanted) == ("mean_class_accuracy", "max")
    assert decides_by(wanted.model_copy(update={"objectives": {"validation/few": "max"}})) == ("few", "max")
    assert decides_by(wanted.model_copy(update={"objectives": {"trained_parameters": "min"}})) == (
        "mean_class_accuracy",
        "max",
    )


def test_a_search_confirms_and_refits_and_does_nothing_twice(tmp_path: Path) -> None:
    result, worker = found(confirmed(), tmp_path, retrains=True)
    assert len(worker.began) == len(set(worker.began))
    best = result.choice.row.number
    compared = {one.row.number for one in result.choice.candidates}
    folds = {f"train {number} fold {fold}" for number in compared for fold in (2, 3)}
    refits = {f"train {number} refit" for number in {0, best}}
    assert {key for key in worker.began if key.startswith("train") and key.count(" ") > 1} == folds | refits
    assert result.final.checkpoint == f"checkpoints/{best:04d}-refit/epoch-0002"
    tested = [key for key in worker.began if key.startswith("evaluate") and " test " in key]
    assert tested, "the models of the test table"
    assert all("refit" in key or "zero-shot" in key for key in tested), "are trained again, those of the baselines too"


def test_without_new_images_nothing_is_trained_again(tmp_path: Path) -> None:
    result, worker = found(confirmed(confirm=None, folds=1), tmp_path, retrains=False)
    assert not [key for key in worker.began if "refit" in key or "fold" in key]
    assert result.final.checkpoint == f"checkpoints/{result.choice.row.number:04d}/epoch-0002"
    assert result.choice.row.last["validation/mean_class_accuracy"] == max(
        row.last["validation/mean_class_accuracy"] for row in result.rows
    )


def test_a_search_without_a_test_split_tests_nothing(tmp_path: Path) -> None:
    wanted = confirmed().model_copy(update={"test": "none"})
    result, worker = found(wanted, tmp_path, retrains=True)
    assert not [key for key in worker.began if " test " in key]
    assert all("test/mean_class_accuracy" not in figures for _, figures in result.compared)


def test_a_fold_leaves_its_predictions_and_no_checkpoint(tmp_path: Path) -> None:
    wanted, data = confirmed(), replace(DATA, retrains=True)
    search = Search(Study(wanted, "d", InMemoryStorage()), Output(str(tmp_path)), data)
    folders = []
    for number in (0, 1):
        folders.append(tmp_path / "checkpoints" / f"{number:04d}-fold-2")
        folders[-1].mkdir(parents=True)
    play(search)
    compared = {one.row.number for one in search.result({}).choice.candidates}  # type: ignore[union-attr]
    assert [folder.exists() for folder in folders] == [number not in compared for number in (0, 1)]
    for number in compared:
        assert (tmp_path / "out_of_fold" / f"{number:04d}-fold-2" / "part-0-of-1.parquet").exists()


def test_a_refit_that_diverges_keeps_the_model_of_the_trial(tmp_path: Path) -> None:
    class Diverging(Played):
        def _fault(self, job: TrainJob) -> Any:
            if job.is_refit:
                self.faults = {str(job.number): "diverge"}
            yield from super()._fault(job)
            self.faults = {}

    result, _ = found(confirmed(), tmp_path, Diverging(), retrains=True)
    assert result.final.refit is None
    assert result.final.checkpoint == f"checkpoints/{result.choice.row.number:04d}/epoch-0002"


def test_the_played_accuracy_decides(tmp_path: Path) -> None:
    """The winner of the played searches above is the trial with the highest accuracy, which their predictions have."""
    result, _ = found(confirmed(), tmp_path)
    wanted = confirmed()
    best = max(accuracy_of(wanted.config(row.values).to_dict()) for row in result.rows)
    assert result.choice.candidates[0].value == pytest.approx(best, abs=0.02)
    assert json.dumps(result.choice.curve)


def test_a_refit_by_ray_train_is_found_although_a_resumed_search_refits_in_slots(tmp_path: Path) -> None:
    row, data = trial(3, 0.5), replace(DATA, retrains=True)
    wanted, elsewhere = confirmed(), confirmed().model_copy(update={"scale": ScaleConfig(refit_workers=4)})
    for space_file in (wanted, elsewhere):
        by_train = final(space_file, row, {"train 3 refit": {"workers": 4}}, data)
        in_slot = final(space_file, row, {"train 3 refit": {"trained_parameters": 8}}, data)
        assert by_train.checkpoint == "checkpoints/0003-refit/checkpoint"
        assert in_slot.checkpoint == "checkpoints/0003-refit/epoch-0001"
        assert final(space_file, row, {"train 3 refit": {}}, data) == trained(space_file, row)


def test_a_candidate_whose_losses_are_not_finite_never_wins(tmp_path: Path) -> None:
    wanted = confirmed().model_copy(update={"objectives": {"validation/loss": "min"}})
    rows = [trial(0, 0.1, baseline=0), trial(1, 0.9)]
    for row in rows:
        row.history = [replace(row.last, validation={"loss": 1.0 - 0.1 * row.number})]
    chosen(wanted, tmp_path, rows, [0.5, 0.5])
    for fold in (1, 2, 3):
        path = tmp_path / "out_of_fold" / f"0001-fold-{fold}" / "part-0-of-1.parquet"
        table = pq.read_table(path)
        bad = pa.array([[float("nan")] * len(TAUS)] * len(table), table["loss"].type)
        pq.write_table(table.set_column(table.column_names.index("loss"), "loss", bad), path)
    results: dict[str, dict[str, Any]] = {job.key: {"parts": 1} for row in rows for job in fold_jobs(wanted, row)}
    choice = choose(wanted, rows, results, DATA, Output(str(tmp_path)))
    assert [one.row.number for one in choice.candidates] == [0, 1]


def test_baselines_are_tested_with_the_tau_that_is_recommended_for_them_too(tmp_path: Path) -> None:
    rows = [trial(0, 0.1, baseline=0), trial(1, 0.9)]
    choice = chosen(confirmed(), tmp_path, rows, [0.3, 0.6])
    winner, other = choice.candidates
    with_tau = replace(other, posthoc=PosthocChoice(0.0, 0.5, 0.2, 0.1))
    both = replace(choice, candidates=[winner, with_tau])
    labels = [entry.label for entry in comparison(confirmed(), rows, {}, DATA, both)]
    assert labels == ["zero-shot", "baseline 1", "baseline 1, tau 0.5", "best found"]


def test_without_a_test_split_only_the_winner_is_trained_again(tmp_path: Path) -> None:
    wanted = confirmed().model_copy(update={"test": "none"})
    result, worker = found(wanted, tmp_path, retrains=True)
    assert [key for key in worker.began if "refit" in key] == [f"train {result.choice.row.number} refit"]


def test_test_time_ensembling_is_in_all_rows_of_a_comparison_or_in_rows_of_its_own(tmp_path: Path) -> None:
    rows = [trial(0, 0.4, baseline=0), trial(1, 0.9)]

    def modes(wanted: SpaceFile) -> dict[str, str]:
        choice = chosen(wanted, tmp_path, rows, [0.4, 0.9])
        return {entry.label: entry.model.tte for entry in comparison(wanted, rows, {}, DATA, choice)}

    plain = confirmed(confirm=None, tte_best=1)
    assert set(modes(plain).values()) == {"off", "five_crops"}
    assert [label for label, mode in modes(plain).items() if mode != "off"] == ["best found, TTE"]
    everywhere = plain.model_copy(update={"base": {**plain.base, "evaluation": {"tte": "ten_crops"}}})
    assert set(modes(everywhere).values()) == {"ten_crops"}, "zero-shot and the baselines too"
    assert "best found, TTE" not in modes(everywhere)


def test_the_note_on_test_time_ensembling_names_a_baseline_that_has_another() -> None:
    same = {"zero-shot": "five_crops", "probe": "five_crops", BEST_FOUND: "five_crops"}
    assert tte_note({BEST_FOUND: "off", "probe": "off"}, BEST_FOUND) == ""
    assert tte_note(same, BEST_FOUND) == "Test-time ensembling: five crops of each image, in all rows."
    assert "best/ uses it only with" in tte_note(
        {"probe": "off", BEST_FOUND: "off", "best found, TTE": "five_crops"}, BEST_FOUND
    )
    assert tte_note({**same, "probe": "off"}, BEST_FOUND).endswith(
        "probe is evaluated with one crop of each image, but best found with five crops of each image: give both the same "
        "evaluation.tte before you compare them."
    )
