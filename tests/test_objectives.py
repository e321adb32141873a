"""Objectives on a small set: each has a value for every fraction of the images, or is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.storages import InMemoryStorage

from lift_ray.api.search import check_objectives
from lift_ray.data.dataset import Dataset
from lift_ray.data.longtail import keep_first
from lift_ray.data.open import open_dataset
from lift_ray.epoch_metrics import METRICS, EpochMetrics
from lift_ray.errors import BadInput
from lift_ray.methods.world import Ranks
from lift_ray.reporting.report import write_report
from lift_ray.reporting.trial_rows import TrialRow, best_row, pareto_front, write_json, write_rows
from lift_ray.searching.stopping import Stopping
from lift_ray.searching.study import Study
from lift_ray.searching.tables import pareto_table, trial_table
from lift_ray.settings.checks import OBJECTIVES
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.layout import SPACE
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

TRAIN = np.array([20, 12, 8, 5, 4, 3, 2, 1])  # thirds: few have at most 3 images
FRACTIONS = (0.05, 0.3, 1.0)
MAIN_OBJECTIVE = "validation/mean_class_accuracy"
SCHEDULERS: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "asha", "grace_epochs": 1, "reduction_factor": 2},
    {"kind": "median", "grace_epochs": 1, "min_trials": 1},
]


def held_out(small_data: str, validation: list[int]) -> Dataset:
    """The small data with few training images, and this many validation images of each class."""
    whole = open_dataset(small_data)
    splits = dict(whole.splits)
    for name, counts in (("train", TRAIN), ("validation", np.array(validation))):
        splits[name] = splits[name].take(keep_first(splits[name].labels, counts))
    return replace(whole, splits=splits, labelled_counts=TRAIN)


@pytest.fixture(scope="module")
def dataset(small_data: str) -> Dataset:
    """Classes of 20 to 1 training images, of which the rarest has no validation image."""
    return held_out(small_data, [3, 3, 2, 2, 1, 1, 1, 0])


@pytest.fixture(scope="module")
def histories(dataset: Dataset, small_clip: str) -> dict[float, list[EpochMetrics]]:
    """Metrics of the epochs of a linear probe, by data_frac."""
    workspace = Workspace(dataset, Ranks.alone())
    tree: dict[str, Any] = {
        "backbone": {"model": small_clip},
        "augment": {"kind": "none"},
        "tuner": {"kind": "linear_probe"},
    }
    optim = {"epochs": 2, "global_batch_size": 8}
    return {
        frac: list(Run(RunConfig.model_validate(tree | {"optim": optim | {"data_frac": frac}}), workspace).epochs())
        for frac in FRACTIONS
    }


def space(objectives: dict[str, str], scheduler: dict[str, Any] | None = None, **sections: Any) -> SpaceFile:
    return SpaceFile.model_validate(
        {
            "name": "s",
            "dataset": "d",
            "base": {"optim": {"epochs": 2}},
            "space": {"optim.data_frac": {"choices": list(FRACTIONS)}, "optim.lr": {"float": [0.01, 0.1]}},
            "objectives": objectives,
            "search": {"trials": 6, "scheduler": scheduler or {"kind": "none"}},
            **sections,
        }
    )


def searched(wanted: SpaceFile, histories: dict[float, list[EpochMetrics]]) -> list[TrialRow]:
    """The trials of a search whose epochs have these metrics."""
    study = Study(wanted, "d", InMemoryStorage())
    while (row := study.next()) is not None:
        for metrics in histories[row.values["optim.data_frac"]]:
            study.report(row, metrics)
            if Stopping(wanted, study.rows.values()).decide(row) == "stop":
                break
        study.end(row, "finished" if row.is_done else "pruned")
    return list(study.rows.values())


def report_of(wanted: SpaceFile, rows: list[TrialRow], out: Path) -> str:
    """The report page of these trials."""
    write_rows(rows, out)
    write_json({"name": "s", "dataset": "d", "space": wanted.model_dump(mode="json", by_alias=True)}, out / SPACE)
    return Path(write_report([str(out)])).read_text()


def modes(objective: str) -> dict[str, str]:
    """The objective as a space file has it; the size of a model is never the first."""
    mode = "min" if "loss" in objective or "error" in objective or objective == "trained_parameters" else "max"
    return {**({MAIN_OBJECTIVE: "max"} if objective == "trained_parameters" else {}), objective: mode}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_search_for_any_objective_ends_with_a_best_trial_and_a_report(
    objective: str, dataset: Dataset, histories: dict[float, list[EpochMetrics]], tmp_path: Path
) -> None:
    for scheduler in SCHEDULERS:
        wanted = space(modes(objective), scheduler)
        check_objectives(wanted, dataset)
        rows = searched(wanted, histories)
        assert all(objective in row.last for row in rows)
        assert best_row(rows, *wanted.objective) is not None
        assert pareto_front(rows, wanted.objectives)
    assert "finished trials" in report_of(wanted, rows, tmp_path)


def test_every_metric_of_every_fraction_is_a_number_of_the_same_groups(
    histories: dict[float, list[EpochMetrics]],
) -> None:
    for history in histories.values():
        assert set(METRICS) <= set(history[-1].validation)
        assert np.isfinite(list(history[-1].validation.values())).all()


def test_the_documentation_has_a_line_for_every_objective_with_the_right_direction() -> None:
    text = (Path(__file__).parent.parent / "docs" / "reference" / "metrics.md").read_text()
    table = text.partition("\n## Objectives\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    found = {name.strip("` "): mode for names, mode, *_ in rows for name in names.split(",")}
    assert found == {objective: modes(objective)[objective] for objective in OBJECTIVES}


@pytest.mark.parametrize("section", ["objectives", "constraints"])
@pytest.mark.parametrize(
    ("validation", "bounds", "group", "rule"),
    [
        ([3, 3, 2, 2, 1, 0, 0, 0], "auto", "few", "under 4 training images, and validation images of them"),
        ([0, 0, 0, 2, 1, 1, 1, 1], "auto", "many", "over 7 training images, and validation images of them"),
        ([3, 3, 2, 2, 1, 1, 1, 1], [20, 100], "many", "over 100 training images"),
        ([0, 3, 2, 2, 1, 1, 1, 1], [20, 100], "medium", "20 to 100 training images, and validation images of them"),
    ],
)
def test_a_metric_that_no_validation_image_can_give_is_refused(
    section: str, validation: list[int], bounds: Any, group: str, rule: str, small_data: str
) -> None:
    metric = f"validation/{group}"
    base = {"optim": {"epochs": 2}, "evaluation": {"group_bounds": bounds}}
    if section == "objectives":
        wanted = space({metric: "max"}, base=base)
    else:
        wanted = space({MAIN_OBJECTIVE: "max"}, base=base, constraints={metric: {"min": 0.1}})
    with pytest.raises(BadInput) as caught:
        check_objectives(wanted, held_out(small_data, validation))
    assert str(caught.value) == (
        f"{section}: {metric} requires classes with {rule}, but {small_data} has none; choose {MAIN_OBJECTIVE}"
    )


@pytest.mark.parametrize("objectives", [{"validation/few": "max"}, {"validation/few": "max", MAIN_OBJECTIVE: "max"}])
def test_a_group_that_is_missing_all_the_same_raises_no_error(
    objectives: dict[str, str], histories: dict[float, list[EpochMetrics]], tmp_path: Path
) -> None:
    """A search that is started from Python is not checked beforehand."""
    without = {
        frac: [
            replace(m, validation={name: m.validation[name] for name in m.validation if name != "few"}) for m in history
        ]
        for frac, history in histories.items()
    }
    for scheduler in SCHEDULERS if len(objectives) == 1 else SCHEDULERS[:1]:
        wanted = space(objectives, scheduler, constraints={"validation/few": {"min": 0.1}})
        rows = searched(wanted, without)
        assert {row.state for row in rows} <= {"finished", "pruned"}
        assert best_row(rows, *wanted.objective) is None
        assert pareto_front(rows, objectives) == []
        trial_table(rows, ["optim.lr"], "validation/few", "trials")
        pareto_table(pareto_front(rows, objectives), objectives)
    assert "No trial has finished yet" in report_of(wanted, rows, tmp_path)
