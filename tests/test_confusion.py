"""Confusions: counts of pairs of classes, their place on the page, and python -m lift_ray.evaluate --confusion."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import duckdb
import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from made_study import make_trials, with_folds, write_study

from lift_ray import evaluate, report
from lift_ray.methods.world import Ranks
from lift_ray.reporting.confusion import Confusions
from lift_ray.reporting.figures.classes import MOST_CLASSES, confusion_figure
from lift_ray.reporting.study_files import read_study
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

LABEL = np.array([0, 0, 0, 1, 1, 1, 1, 2])
PREDICTED = np.array([0, 1, 1, 1, 0, 0, 2, 0])


def small() -> Confusions:
    return Confusions.of(LABEL, PREDICTED, ["a", "b", "c"])


def test_only_pairs_with_images_are_counted() -> None:
    assert [tuple(row.values()) for row in small().rows()] == [
        ("a", "a", 1),
        ("a", "b", 2),
        ("b", "a", 2),
        ("b", "b", 1),
        ("b", "c", 1),
        ("c", "a", 1),
    ]
    assert small().totals.tolist() == [3, 4, 1]
    assert small().matrix([0, 1, 2]).tolist() == [[1, 2, 0], [2, 1, 1], [1, 0, 0]]
    assert small().matrix([0, 2]).tolist() == [[1, 0], [1, 0]]


def test_the_most_confused_pair_has_the_most_images_and_then_the_larger_fraction() -> None:
    pairs = small().most_confused(3)
    assert [(pair["true"], pair["predicted"], pair["count"]) for pair in pairs] == [
        ("a", "b", 2),
        ("b", "a", 2),
        ("c", "a", 1),
    ]
    assert [pair["fraction"] for pair in pairs] == pytest.approx([2 / 3, 1 / 2, 1])


def test_of_many_classes_the_most_confused_are_shown() -> None:
    label = np.concatenate([np.full(9, 50), np.full(5, 7), np.arange(60)])
    predicted = np.concatenate([np.full(9, 3), np.full(5, 8), np.arange(60)])
    found = Confusions.of(label, predicted, [str(k) for k in range(60)])
    assert found.classes(4) == [3, 7, 8, 50]
    assert found.classes(3) == [3, 50], "half a pair would be shown"
    assert found.classes(60) == list(range(60))


def test_no_error_is_no_confusion() -> None:
    found = Confusions.of(LABEL, LABEL, ["a", "b", "c"])
    assert found.most_confused(5) == []
    assert found.classes(2) == []


def test_the_page_shows_the_out_of_fold_confusions_and_the_csv_has_all(tmp_path: Path) -> None:
    folder = with_folds(write_study(tmp_path / "out", make_trials(3)))
    assert not report.main([str(folder)])
    table = pq.read_table(folder / "best" / "out_of_fold.parquet")
    with (folder / "report" / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["true", "predicted", "count"]
    assert sum(int(row["count"]) for row in rows) == table.num_rows
    assert min(int(row["count"]) for row in rows) == 1
    study = read_study(folder, "out")
    figure = confusion_figure(study)
    assert figure
    first, second = study.class_names[:2]
    assert figure.table[0] == {"true class": first, "predicted as": second, "images": "10", "of the class": "33%"}
    assert len(figure.traces[0]["z"]) <= MOST_CLASSES < len(study.class_names)
    go.Figure({"data": figure.traces, "layout": figure.layout})
    page = (folder / "report" / "index.html").read_text()
    assert f"<td>{first}</td><td>{second}</td><td>10</td><td>33%</td>" in page


def test_the_queries_of_the_documentation_run(tmp_path: Path) -> None:
    folder = with_folds(write_study(tmp_path / "out", make_trials(3)))
    text = (Path(__file__).parent.parent / "docs" / "reference" / "files.md").read_text()
    wrong, by_fold = (
        duckdb.sql(query.replace("runs/mine", str(folder))).fetchall()
        for query in re.findall("```sql\n(.*?)```", text, re.DOTALL)
    )
    found = read_study(folder, "out").out_of_fold
    assert found
    assert len(wrong) == 20
    assert [row[3] for row in wrong] == sorted(found.confidence[~found.hits], reverse=True)[:20]
    assert [row[0] for row in by_fold] == [1, 2, 3, 4]
    assert sum(row[1] for row in by_fold) == len(found.label)
    assert sum(row[1] * row[2] for row in by_fold) == pytest.approx(found.hits.sum())


def test_evaluate_writes_the_confusions_of_the_split(
    small_data: str, small_clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"backbone": {"model": small_clip}, "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.01}}
    run = Run(RunConfig.model_validate(config), Workspace(small_data, Ranks.alone(use_gpu=False, num_cpus=1)))
    run.save(tmp_path / "checkpoint")
    out, table = tmp_path / "confusion.csv", tmp_path / "classes.csv"
    words = [str(tmp_path), "--split", "validation", "--confusion", str(out), "--per-class", str(table)]
    assert not evaluate.main(words)
    printed = capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    with table.open() as file:
        classes = {row["class"]: row for row in csv.DictReader(file)}
    for name, row in classes.items():
        mine = [other for other in rows if other["true"] == name]
        assert sum(int(other["count"]) for other in mine) == int(row["images"])
        assert sum(int(other["count"]) for other in mine if other["predicted"] == name) == int(row["correct"])
    pairs = [row for row in rows if row["true"] != row["predicted"]]
    assert pairs
    assert "Most confused classes" in printed
    shown = printed.split("Most confused classes")[1]
    assert sum(line.rstrip().endswith(tuple("0123456789")) for line in shown.splitlines()) == min(10, len(pairs))
