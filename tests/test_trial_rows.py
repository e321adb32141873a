"""Trials as rows: the best one, the files, tables that fit a terminal."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.reporting.trial_rows import TrialRow, best_row, write_json, write_rows
from lift_ray.searching.tables import trial_table
from lift_ray.terminal.tables import accuracy_table, describe, percent

METRIC = "validation/mean_class_accuracy"


def row(number: int, state: str, *values: float, **settings: object) -> TrialRow:
    history = [
        EpochMetrics(
            i,
            train={"images_per_s": 101.4},
            seconds={"train_s": 1.5, "evaluate_s": 0.5},
            validation={"mean_class_accuracy": v, "many": v},
            trained_parameters=800,
        )
        for i, v in enumerate(values, 1)
    ]
    return TrialRow(number, {name.replace("__", "."): v for name, v in settings.items()}, 3, state, history)


ROWS = [
    row(0, "finished", 0.1, 0.2, 0.5, tuner__kind="adaptformer", tuner__bottleneck=8, optim__lr=0.02),
    row(1, "finished", 0.3, 0.4, 0.4, tuner__kind="linear_probe", optim__lr=0.123456),
    row(2, "pruned", 0.9, tuner__kind="lora", tuner__bottleneck=2, optim__lr=0.1),
    row(3, "running", tuner__kind="lora", tuner__bottleneck=4, optim__lr=0.1),
    TrialRow(4, {"tuner.kind": "lora", "optim.lr": 3.0}, 3, "failed", [], "RunFailed: [bold]x[/] lower optim.lr"),
]


def test_the_best_is_a_finished_trial_by_its_last_epoch() -> None:
    assert best_row(ROWS, METRIC, "max") is ROWS[0]
    assert best_row(ROWS, METRIC, "min") is ROWS[1]
    assert best_row(ROWS[2:], METRIC, "max") is None
    assert best_row(ROWS, "validation/few", "max") is None
    assert best_row([], METRIC, "max") is None


def test_a_row_sums_its_seconds_and_knows_its_last_figures() -> None:
    assert (ROWS[0].seconds("train_s"), ROWS[0].seconds("evaluate_s"), ROWS[0].seconds("other_s")) == (4.5, 1.5, 0.0)
    assert ROWS[0].last[METRIC] == 0.5
    assert ROWS[3].last == EpochMetrics(0)


def test_a_trial_is_described_in_a_line() -> None:
    assert describe(ROWS[0].values) == "adaptformer, bottleneck 8, lr 0.02"
    assert describe(ROWS[1].values) == "linear_probe, lr 0.123"
    assert describe({"loss.tau": 1.0, "tuner.kind": "lora"}) == "lora, tau 1"


def test_rows_come_back_from_parquet_and_csv_with_gaps_where_a_trial_has_no_value(tmp_path: Path) -> None:
    write_rows(ROWS, tmp_path)
    table = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    with (tmp_path / "trials.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trials.csv", "trials.parquet"]
    assert [record["number"] for record in table] == [0, 1, 2, 3, 4]
    assert [record["tuner.bottleneck"] for record in table] == [8, None, 2, 4, None]
    assert [record[METRIC] for record in table] == [0.5, 0.4, 0.9, None, None]
    assert [record["epochs"] for record in table] == [3, 3, 1, 0, 0]
    assert [record["trained_parameters"] for record in table] == [800, 800, 800, None, None]
    assert table[4]["error"] == "RunFailed: [bold]x[/] lower optim.lr"
    assert not any(name.startswith("time/") for name in table[0])
    assert list(lines[0]) == list(table[0])
    for line, record in zip(lines, table, strict=True):
        for name, value in record.items():
            assert (float(line[name]) if isinstance(value, int | float) else line[name]) == (
                "" if value is None else value
            )


def test_whole_and_broken_numbers_of_one_setting_share_a_column(tmp_path: Path) -> None:
    write_rows([row(0, "finished", 0.1, optim__lr=1), row(1, "finished", 0.2, optim__lr=0.5)], tmp_path)
    assert pq.read_table(tmp_path / "trials.parquet").column("optim.lr").to_pylist() == [1.0, 0.5]


def test_numbers_beside_text_in_one_setting_are_text(tmp_path: Path) -> None:
    """As with `choices: [16, [4, 8]]`: Parquet has one type for a column."""
    rows = [row(0, "finished", 0.1, tuner__bottleneck=16), row(1, "finished", 0.2, tuner__bottleneck="[4, 8]")]
    write_rows([*rows, row(2, "failed")], tmp_path)
    assert pq.read_table(tmp_path / "trials.parquet").column("tuner.bottleneck").to_pylist() == ["16", "[4, 8]", None]


def test_rows_replace_those_written_before(tmp_path: Path) -> None:
    write_rows(ROWS[:1], tmp_path)
    write_rows(ROWS, tmp_path)
    assert pq.read_table(tmp_path / "trials.parquet").num_rows == 5


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    for value in (1, 2):
        write_json({"a": value}, tmp_path / "x.json")
        assert json.loads((tmp_path / "x.json").read_text()) == {"a": value}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def rendered(table: object, width: int = 80) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0.0"), (0.4567, "45.7"), (1.0, "100.0")])
def test_accuracies_are_shown_in_percent(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_an_accuracy_table_fits_80_columns_and_leaves_missing_groups_open() -> None:
    figures = {"test/accuracy": 0.5, "test/mean_class_accuracy": 0.25, "test/medium": 1.0}
    lines = rendered(accuracy_table("test", "test", [("zero-shot", {}), ("a long name " * 9, figures)]))
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert [words.count(word) for word in ("50.0", "25.0", "100.0")] == [1, 1, 1]
    assert "zero-shot" in words
    assert words.count("-") == 7


def test_an_accuracy_table_without_rows_is_its_headings() -> None:
    assert "mean class" in " ".join(rendered(accuracy_table("t", "test", [])))


@pytest.mark.parametrize("metric", [METRIC, "validation/loss"])
def test_a_trial_table_fits_80_columns_in_every_state(metric: str) -> None:
    names = ["tuner.kind", "tuner.bottleneck", "loss.tau", "optim.lr"]
    lines = rendered(trial_table(ROWS, names, metric, "e2e"))
    assert max(map(len, lines)) <= 80
    assert len(rendered(trial_table(ROWS * 10, names, metric, "e2e", limit=3), 200)) < 12
    wide = "\n".join(rendered(trial_table(ROWS, names, metric, "e2e"), 200))
    for word in ("finished", "pruned", "running", "failed", "3/3", "0/3", "0.123", "101"):
        assert word in wide
