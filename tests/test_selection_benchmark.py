"""benchmarks/selection.py: its figures are those of real searches, and are computed from lines that are written once."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record
import selection
from rich.console import Console

from lift_ray.data.dataset import Dataset
from lift_ray.data.open import open_dataset

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def setup(small_clip: str) -> selection.Setup:
    """Searches of three trials, one of which is no baseline, with three folds."""
    return selection.Setup("small", {"model": small_clip}, block=1, trials=3, folds=3, best=1, epochs=2, batch=16)


@pytest.fixture(scope="module")
def whole(small_data: str) -> Dataset:
    """The small data without a validation split, so that it is drawn."""
    return selection.train_and_test(open_dataset(small_data))


@pytest.fixture(scope="module")
def lines(setup: selection.Setup, whole: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that was interrupted after its first seed, and run again."""
    path = tmp_path_factory.mktemp("selection") / "selection.jsonl"
    selection.measured(setup, whole, SEEDS[:1], path, 1, 60)
    first = path.read_bytes()
    path.write_bytes(first + first[: len(first) // 2])
    selection.measured(setup, whole, SEEDS, path, 1, 60)
    assert path.read_bytes().startswith(first)
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_seed_is_repeated_after_an_interruption(lines: Path, setup: selection.Setup, whole: Dataset) -> None:
    assert [row["seed"] for row in rows_of(lines)] == list(SEEDS)
    before = lines.read_bytes()
    assert selection.measured(setup, whole, SEEDS, lines, 1, 0) == rows_of(lines)
    assert lines.read_bytes() == before


def test_lines_of_other_settings_are_not_counted(lines: Path, setup: selection.Setup, whole: Dataset) -> None:
    assert selection.measured(replace(setup, epochs=3), whole, SEEDS, lines, 1, minutes=-1) == []


def test_a_line_has_each_rule_and_each_trial_with_both_estimates(lines: Path) -> None:
    for row in rows_of(lines):
        number = {name: row["winners"][name] for name in row["winners"]}
        by_trial = {trial["trial"]: trial for trial in row["trials"]}
        assert len(by_trial) == 3
        assert row["test"][selection.TODAY] == by_trial[number[selection.TODAY]]["test"]
        held_out = [trial["hold_out"]["mean_class_accuracy"] for trial in by_trial.values()]
        assert by_trial[number[selection.TODAY]]["hold_out"]["mean_class_accuracy"] == max(held_out)
        tested = [trial["test"]["mean_class_accuracy"] for trial in by_trial.values()]
        assert row["test"][selection.ORACLE]["mean_class_accuracy"] == max(tested)
        assert all(trial["out_of_fold"] != trial["hold_out"] for trial in by_trial.values())
        assert {"linear probe, refit", "last block, refit"} < set(row["test"])
        # A tau that is not recommended is not used.
        used = "with" if row["posthoc"]["recommended"] else "without"
        assert row["test"][selection.WINNER] == row["posthoc"][used]


def test_trainings_are_counted_by_their_purpose(lines: Path) -> None:
    """Two or three trials are confirmed on two further folds; the winner and both baselines are trained again."""
    for row in rows_of(lines):
        confirmed = {0, 1, row["winners"][selection.TODAY]}
        assert row["trainings"]["search"] == 3
        assert row["trainings"]["confirm"] == 2 * len(confirmed)
        assert row["trainings"]["refit"] == len({0, 1, row["winners"][selection.CONFIRMED]})


def made(seed: int, today: float, winner: float, *, recommended: bool) -> dict[str, Any]:
    both = {"mean_class_accuracy", "few"}
    trials = [
        {name: dict.fromkeys(both, value) for name, value in zip(("hold_out", "out_of_fold", "test"), of, strict=True)}
        for of in ((0.3, 0.1, 0.2), (0.2, 0.2, 0.4), (0.1, 0.4, 0.6))
    ]
    return {
        "seed": seed,
        "validation": "drawn",
        "images": {"train": 8, "validation": 2, "test": 5},
        "winners": {selection.TODAY: 1, selection.CONFIRMED: 1 + seed},
        "test": {selection.TODAY: dict.fromkeys(both, today), selection.WINNER: dict.fromkeys(both, winner)},
        "trials": trials,
        "posthoc": {
            "recommended": recommended,
            "without": dict.fromkeys(both, winner - 0.01),
            "with": dict.fromkeys(both, winner),
        },
        "trainings": {"search": 12, "confirm": 12 + seed, "refit": 3},
        "search_s": 1.0,
        "all_s": 2.0,
    }


def test_the_summary_is_that_of_a_computation_by_hand() -> None:
    """Differences 0.10, 0.04 and -0.02: mean 0.04, standard deviation 0.06, standard error 0.06 / sqrt(3)."""
    rows = [made(0, 0.5, 0.6, recommended=True), made(1, 0.5, 0.54, recommended=False)]
    rows.append(made(2, 0.52, 0.5, recommended=False))
    found = selection.summary(rows)
    winner = found["rules"][selection.WINNER]["few"]
    assert winner["mean"] == pytest.approx((0.6 + 0.54 + 0.5) / 3)
    expected = {"mean": 0.04, "error": 0.06 / 3**0.5, "number": 3, "above": 2}
    assert winner["difference"] == pytest.approx(expected)
    assert found["correlation"]["hold_out"]["few"]["pearson"]["mean"] == pytest.approx(-1)
    # (-4/30, -1/30, 5/30) and (-0.2, 0, 0.2): 0.06 / sqrt(0.14 / 3 * 0.08)
    assert found["correlation"]["out_of_fold"]["few"]["pearson"]["mean"] == pytest.approx(
        0.06 / (0.14 / 3 * 0.08) ** 0.5
    )
    assert found["correlation"]["out_of_fold"]["few"]["spearman"]["mean"] == pytest.approx(1)
    assert found["posthoc"]["recommended"]["few"]["mean"] == pytest.approx(0.01)
    assert found["posthoc"]["not recommended"]["few"]["number"] == 2
    assert (found["kept"], found["trainings"]["confirm"]) == (1, 13)
    text = " ".join(selection.sentences(found))
    assert "mean class +4.0 ± 3.5 (more than the standard error)" in text
    rows[0]["test"][selection.WINNER] = {"mean_class_accuracy": 0.5, "few": 0.5}
    assert "few +0.7 ± 1.8 (not more than the standard error)" in " ".join(selection.sentences(selection.summary(rows)))


def test_equal_values_share_a_rank_and_a_constant_has_no_correlation() -> None:
    assert selection.ranks([0.2, 0.1, 0.2, 0.5]) == [1.5, 0, 1.5, 3]
    assert np.isnan(selection.pearson([1, 1, 1], [1, 2, 3]))


def test_the_tables_fit_a_terminal(lines: Path) -> None:
    found, screen = selection.summary(rows_of(lines)), Console(width=110, record=True, file=io.StringIO())
    screen.print(selection.rules_table(found, "title"))
    screen.print(selection.correlation_table(found))
    text = screen.export_text()
    assert "confirmed, refit" in text
    assert "out-of-fold" in text
    assert "…" not in text


def test_a_folder_is_cut_to_its_largest_classes_and_its_validation_split_may_be_the_test_split(small_data: str) -> None:
    """Classes of 24, 18, 14, 12, 10 ... training images; the profile of 12 to 3 images of the first four."""
    source = open_dataset(small_data)
    found = selection.open_set(small_data, 4, 12, 4)
    assert set(found.splits) == {"train", "test"}
    assert sorted(found.split("train").class_counts(4).tolist()) == [3, 5, 8, 12]
    assert found.split("test").class_counts(4).tolist() == [3, 3, 3, 3]
    names = {source.class_names[source.split("train").labels[row]] for row in found.split("train").rows}
    assert names == set(found.class_names)
    without = replace(source, splits={name: source.split(name) for name in ("train", "validation")})
    test = selection.train_and_test(without).split("test")
    assert (test.name, test.key) == ("test", source.split("validation").key)


def test_a_single_search_tells_no_error() -> None:
    text = " ".join(selection.sentences(selection.summary([made(0, 0.5, 0.6, recommended=False)])))
    assert "mean class +10.0 (one search tells no error)" in text
    assert selection.coefficient(selection.mean_error([])) == "-"
    assert selection.coefficient(selection.mean_error([0.5])) == "0.50"


def test_a_validation_split_of_its_own_is_trained_on_in_a_refit_and_the_sentences_say_so(
    setup: selection.Setup, small_data: str, tmp_path: Path
) -> None:
    whole = open_dataset(small_data)
    rows = selection.measured(setup, whole, [0], tmp_path / "selection.jsonl", 1, 60)
    (row,) = rows
    assert row["trainings"]["refit"] == len({0, 1, row["winners"][selection.CONFIRMED]})
    assert row["test"][selection.CONFIRMED] != row["test"][selection.WINNER]
    assert "search.refit: true" in " ".join(selection.sentences(selection.summary(rows)))


def test_the_command_prints_both_tables_and_records_a_row_without_folders_of_this_machine(
    small_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    words = "--classes 8 --largest 12 --imbalance 3 --trials 3 --folds 3 --best 1 --epochs 1 --batch 16 --seeds 0 1"
    selection.main(["--set", small_data, *words.split(), "--cores", "1", "--out", str(tmp_path / "out"), "--record"])
    printed = capsys.readouterr().out
    assert "seed 0: " in printed
    assert "seeds left: 1, about" in printed
    assert "Test accuracy over 2 searches" in printed
    assert "Correlation with test" in printed
    row = json.loads((tmp_path / "selection.jsonl").read_text())
    assert row["command"] == f"python benchmarks/selection.py --set data {words} --record"
    assert row["seeds"] == [0, 1]
    assert row["figures"]["rules"]["confirmed, refit"]["few"]["difference"]["number"] == 2
