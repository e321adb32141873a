"""python -m lift_ray.report writes a page for every kind of study, from its files alone."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_study import make_trials, with_folds, write_study
from processes import wait_for

from lift_ray import report
from lift_ray.epoch_metrics import MAIN_METRIC
from lift_ray.errors import BadInput
from lift_ray.reporting import report as reporting
from lift_ray.reporting.confidence import Interval
from lift_ray.reporting.figures.search import cost_in_words, positions, unit_of
from lift_ray.reporting.importance import importances, importances_within
from lift_ray.reporting.page import StudySection, figures_of
from lift_ray.reporting.scaling_law import Law, Point
from lift_ray.reporting.study_files import StudyFiles, read_study
from lift_ray.reporting.summary import Cell, accuracy_rows, gain_rows, law_in_words, seed_rows, summary


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "out", make_trials(24))


def drawn_in(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    figures: dict[str, Any] = json.loads(found[1])
    return figures


def test_the_page_holds_every_figure_and_its_data_is_next_to_it(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not report.main([str(study)])
    assert capsys.readouterr().out == f"report: {study}/report/index.html\n"
    page = (study / "report" / "index.html").read_text()
    figures = drawn_in(page)
    assert set(figures) == {
        "compared",
        "heavy",
        "size",
        "width-tuner-bottleneck",
        "tau",
        "posthoc-tau",
        "kinds",
        "class-images",
        "classes",
        "confusion",
        "calibration",
        "history",
        "parallel",
        "importance",
        "cost",
        "scaling",
    }
    assert {path.stem for path in (study / "report").glob("*.csv")} == set(figures)
    assert not list((study / "report").glob("*.tmp"))
    with (study / "report" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == list(range(24))
    assert page.count('src="data:image/jpeg;base64,') == 8 * 3
    for figure in figures.values():
        go.Figure(figure)  # raises ValueError for what plotly does not know


def test_the_page_asks_for_nothing_from_elsewhere(study: Path) -> None:
    report.main([str(study)])
    page = (study / "report" / "index.html").read_text()
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # plotly.js names addresses, and asks for none
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', own) == []
    assert "url(" not in own
    assert "@import" not in own


def test_the_summary_says_what_won_by_how_much_and_how_certain_that_is(study: Path) -> None:
    lines = summary(read_study(study, "out"))
    best = read_study(study, "out").best_trial
    assert best
    assert re.fullmatch(
        r"Test accuracy of the best settings: 59\.\d% \(mean over classes, held out from the search\), "
        r"5\d\.\d points above zero-shot and 1[789]\.\d above the recipe\.",
        lines[0],
    )
    assert lines[1] == "Each difference is significant (bootstrap over test images)."
    assert re.match(
        r"Few-shot test accuracy: 5\d\.\d%, .* above the strongest baseline there \(the recipe\)\.", lines[2]
    )
    assert lines[3].startswith("Does heavy fine-tuning hurt the few-shot classes? ")
    assert "a single seed" in lines[4]
    assert lines[5].startswith(f"Best trial: {best['number']} ({best['tuner.kind']}, ")
    assert lines[6] == "24 trials: 20 finished, 4 stopped early."
    assert not any("95%" in line for line in lines), "the intervals stand in the table"


def test_a_loss_on_the_rare_classes_is_reported(study: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(study, tmp_path / "out"))
    about = json.loads((folder / "study.json").read_text())
    about["compared"][2]["test/few"] = about["compared"][1]["test/few"] - 0.1
    (folder / "study.json").write_text(json.dumps(about))
    assert "10.0 points below the strongest baseline there (the recipe)." in summary(read_study(folder, "out"))[2]


def test_equal_models_are_called_equal(tmp_path: Path) -> None:
    lines = summary(read_study(write_study(tmp_path / "out", make_trials(3), fractions=(0.1, 0.5, 0.5)), "out"))
    assert lines[0].endswith("points above zero-shot and equal to the recipe.")
    assert lines[1] == "The difference from the recipe may be due to chance (bootstrap over test images)."


def test_the_tables_hold_the_intervals_and_the_gains(study: Path) -> None:
    found = read_study(study, "out")
    best, gain = accuracy_rows(found)[-1]["mean class"], gain_rows(found)[1]["mean class"]
    assert isinstance(best, Cell)
    assert isinstance(gain, Cell)
    low, high = map(float, best.below.split("\u2013"))
    assert low < float(best.text) < high
    low, high = map(float, gain.below.split(" to "))
    assert 0 < low < float(gain.text) < high
    assert gain_rows(found)[1]["baseline"] == "the recipe"


def test_the_best_posthoc_tau_comes_with_its_selection_bias(tmp_path: Path) -> None:
    chosen = {"validation/posthoc_tau": 0.5, "validation/posthoc_optimism": 0.028}
    found = read_study(write_study(tmp_path / "out", make_trials(3, **chosen)), "out")
    found.posthoc[1]["validation/mean_class_accuracy"] = 0.35
    figure = next(figure for figure in figures_of(StudySection(found))[0] if figure.name == "posthoc-tau")
    assert figure.note.endswith(
        "Best post-hoc tau on validation: 0.5 (mean class accuracy 35.0%, about 2.8 points of it selection bias; 30.0% without "
        "adjustment)."
    )


def test_several_seeds_have_a_table_and_a_sentence(study: Path) -> None:
    found = read_study(study, "out")
    runs = [{"label": "best found", "seed": k, "test/mean_class_accuracy": v} for k, v in enumerate((0.5, 0.6))]
    found = replace(found, about=found.about | {"seeds": runs})
    (row,) = seed_rows(found)
    assert (row["model"], row["mean class"]) == ("best found, 2 seeds", Cell("55.0", "\u00b1 7.1"))
    assert "Over 2 seeds, the best settings reach 55.0 ± 7.1% on test" in "".join(summary(found))


def test_a_law_that_says_no_more_than_the_mean_is_one_sentence() -> None:
    def point(found: float, predicted: float, held_out: bool) -> Point:
        return Point({}, {}, found, Interval(predicted, 0, 1), held_out)

    small = [point(0.5, 0.5, False), point(0.6, 0.6, False)]
    assert law_in_words(Law("five lines", [*small, point(0.7, 0.69, True)])) == "five lines"
    assert law_in_words(Law("five lines", [*small, point(0.7, 0.9, True)])).startswith("Cannot tell: ")
    assert law_in_words(Law("too few")) == "too few"


def running(folder: Path) -> None:
    (folder / "study.json").unlink()


def nothing_finished(folder: Path) -> None:
    running(folder)
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    pq.write_table(
        pa.Table.from_pylist([t | {"state": "failed", "error": "the loss must be finite"} for t in table]),
        folder / "trials.parquet",
    )


def before_the_first_trial(folder: Path) -> None:
    about = json.loads((folder / "study.json").read_text())
    (folder / "space.json").write_text(json.dumps({name: about[name] for name in ("name", "dataset", "space")}))
    (folder / "study.json").unlink()
    (folder / "trials.parquet").unlink()


def without_predictions(folder: Path) -> None:
    shutil.rmtree(folder / "predictions")


def without_a_test_split(folder: Path) -> None:
    without_predictions(folder)
    about = json.loads((folder / "study.json").read_text())
    about["compared"] = [{k: v for k, v in found.items() if not k.startswith("test/")} for found in about["compared"]]
    (folder / "study.json").write_text(json.dumps(about))


def with_lost_data(folder: Path) -> None:
    about = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(about | {"dataset": str(folder / "gone")}))


def of_an_older_version(folder: Path) -> None:
    without_predictions(folder)
    about = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(
        json.dumps({k: v for k, v in about.items() if k not in ("posthoc_curve", "machine")})
    )


def as_it_is(folder: Path) -> None:
    pass


def chosen_on_folds(folder: Path) -> None:
    with_folds(folder)


def won_by_a_baseline(folder: Path) -> None:
    with_folds(folder, choice={"baseline": "the recipe"})


def not_held_out(folder: Path) -> None:
    with_folds(folder, held_out=False)
    without_a_test_split(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_it_is, "Test accuracy of the best settings: "),
        (running, "Best trial so far: "),
        (nothing_finished, "Error of a failed trial: the loss must be finite"),
        (before_the_first_trial, "No trial has finished yet."),
        (without_predictions, "Test accuracy of the best settings: "),
        (without_a_test_split, "This study has no test results."),
        (with_lost_data, "No images to show"),
        (of_an_older_version, "Test accuracy of the best settings: "),
        (chosen_on_folds, "Candidates by mean class accuracy: difference ± standard error"),
        (won_by_a_baseline, "The baseline the recipe is best: the search found nothing better."),
        (not_held_out, "The result of this search is not held out"),
    ],
)
@pytest.mark.parametrize("number", [1, 12])
def test_every_kind_of_study_gets_a_page(change: Any, words: str, number: int, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "out", make_trials(number))
    change(folder)
    assert not report.main([str(folder)])
    page = (folder / "report" / "index.html").read_text()
    assert words in page
    for figure in drawn_in(page).values():
        go.Figure(figure)


def test_plots_of_thousands_of_trials_draw_the_best_and_a_sample(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path / "out", make_trials(3000)), "out")
    drawn = study.drawn(study.trials)
    assert len(drawn) == 1000
    best = sorted(study.finished, key=lambda t: -t[MAIN_METRIC])[:250]
    assert {t["number"] for t in best} <= {t["number"] for t in drawn}
    figures = {figure.name: figure for figure in figures_of(StudySection(study))[0]}
    for name in ("size", "tau", "history", "parallel", "cost"):
        assert len(figures[name].rows) >= len(study.finished)
        points = {"parallel": len(study.settings) + 2, "size": 4, "tau": 4}  # of a trial
        marked = [trace for trace in figures[name].traces if "markers" in trace.get("mode", "")]
        assert 500 <= sum(len(trace["x"]) for trace in marked) / points.get(name, 1) <= 1050, name
    assert figures["cost"].traces[0]["y"][-1] == pytest.approx(100 * best[0][MAIN_METRIC], abs=0.01)
    assert "Plots show 1,000 of them" in summary(study)[-1]


def test_several_objectives_and_a_diverged_trial_get_a_page_with_the_front(tmp_path: Path) -> None:
    trials = make_trials(9)
    trials[3] |= {"validation/mean_class_accuracy": math.nan, "validation/few": math.nan, "state": "failed"}
    folder = write_study(tmp_path / "out", trials, objectives={"validation/few": "max", "trained_parameters": "min"})
    about = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(about | {"pareto": [{"trial": 0}, {"trial": 2}]}))
    assert not report.main([str(folder)])
    figures = drawn_in((folder / "report" / "index.html").read_text())
    assert "few accuracy (%)" in json.dumps(figures["history"])
    front = next(trace for trace in figures["pareto"]["data"] if trace["name"] == "Pareto-optimal")
    assert sorted(zip(front["x"], front["y"], strict=True)) == sorted(
        (trials[i]["trained_parameters"], round(100 * trials[i]["validation/few"], 4)) for i in (0, 2)
    )


def test_studies_stand_side_by_side_and_keep_apart(study: Path, tmp_path: Path) -> None:
    other = write_study(tmp_path / "other", make_trials(2), fractions=(0.1, 0.2, 0.3))
    assert not report.main([str(study), str(other), "--out", str(tmp_path / "both")])
    page = (tmp_path / "both" / "index.html").read_text()
    figures = drawn_in(page)
    assert {"studies", "1-history", "2-history"} <= set(figures)
    assert figures["studies"]["layout"]["yaxis"]["ticktext"] == ["study 1", "study 2"]
    assert re.findall(r'<h2 class="wide" id="(study-\d)">', page) == ["study-1", "study-2"]
    assert "Fitted jointly to study 1 and study 2, each with its own intercept (embedded:caltech101-lt)." in page


def test_the_best_is_found_after_some_minutes_of_wall_clock_time(tmp_path: Path) -> None:
    trials = [t | {"began_at": 1e9 + 60 * i, "ended_at": 1e9 + 60 * i + 90} for i, t in enumerate(make_trials(12))]
    found = read_study(write_study(tmp_path / "out", trials), "out")
    assert found.best
    assert f"{found.best + 1.5:.1f} minutes of wall-clock time)" in cost_in_words(found)
    found.about["time_s"] = {"total": 60.0, "final comparison": 30.0}  # of the last start of a search that was resumed
    assert "The last trial ended 12.5 minutes after the first began" in cost_in_words(found)
    found.about["time_s"]["total"] = 7200.0
    assert "The whole search took 120.0 minutes" in cost_in_words(found)


def test_hours_are_of_what_a_trial_held_while_the_search_still_runs(tmp_path: Path) -> None:
    """With `use_gpu: auto`, on a cluster whose GPU nodes have not started yet or have left."""
    folder = write_study(tmp_path / "out", make_trials(2))
    about = json.loads((folder / "study.json").read_text())
    running(folder)
    begun = {name: about[name] for name in ("name", "dataset", "space", "machine")}
    (folder / "space.json").write_text(json.dumps(begun | {"each_trial": {"workers": 4, "cpus": 2, "gpus": 1}}))
    assert unit_of(read_study(folder, "out")) == (4, "GPU-hours")
    (folder / "space.json").write_text(json.dumps(begun | {"each_trial": {"workers": 4, "cpus": 2, "gpus": 0}}))
    assert unit_of(read_study(folder, "out")) == (8, "CPU-hours")


def test_names_from_outside_are_text_and_not_html(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "out", make_trials(2))
    record = json.loads((folder / "best" / "run.json").read_text())
    evil = "</script><script>alert(1)</script>"
    (folder / "best" / "run.json").write_text(json.dumps(record | {"class_names": [evil] * len(record["class_names"])}))
    report.main([str(folder)])
    assert "<script>alert(1)" not in (folder / "report" / "index.html").read_text()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)


def half_a_json(folder: Path) -> None:
    (folder / "study.json").write_text('{"name": ')


def half_a_table(folder: Path) -> None:
    (folder / "trials.parquet").write_bytes(b"PAR1....")


def another_table(folder: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), folder / "trials.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            empty,
            r"^{out}: must contain the results of a search, but there is no study.json or trials.parquet; give the --out of python "
            r"-m lift_ray.tune$",
        ),
        (half_a_json, r"^{out}: invalid JSON in study.json: Expecting value: .*; copy the folder again$"),
        (half_a_table, r"^{out}: invalid Parquet in trials.parquet: .*; copy the folder again$"),
        (
            another_table,
            r"^{out}: must contain the results of a search, but 'number, state' is missing from study.json or trials.parquet; copy "
            r"the folder again$",
        ),
    ],
)
def test_bad_input_gives_a_one_line_error_and_leaves_nothing(change: Any, message: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "out", make_trials(2))
    change(folder)
    with pytest.raises(BadInput) as caught:
        report.main([str(folder)])
    assert re.match(message.format(out=re.escape(str(folder))), str(caught.value))
    assert "\n" not in str(caught.value)
    assert not (folder / "report").exists()


def test_a_report_that_fails_does_not_end_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = reporting.Output(str(tmp_path / "nothing"))
    assert reporting.try_report(out) is None
    assert capsys.readouterr().out.startswith("the report was not written: ")


def test_a_running_search_has_a_page_soon_though_the_first_try_fails(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trials.parquet").write_bytes(b"PAR1....")
    monkeypatch.setattr(reporting, "EVERY_S", 0.05)
    failed_twice, write, tries = threading.Event(), reporting.write_report, []

    def counted(*args: Any) -> Any:
        tries.append(args)
        if len(tries) == 3:
            failed_twice.set()
        return write(*args)

    monkeypatch.setattr(reporting, "write_report", counted)
    with reporting.kept_up_to_date(reporting.Output(str(tmp_path))):
        assert failed_twice.wait(100)
        shutil.copy(study / "trials.parquet", tmp_path / "whole")
        (tmp_path / "whole").replace(tmp_path / "trials.parquet")  # half a file would be another fault
        wait_for("the report", (tmp_path / "report" / "index.html").exists)
    assert "This search has not ended" in (tmp_path / "report" / "index.html").read_text()
    assert capsys.readouterr().out.count("the report was not written: ") == 1, "the same fault was told twice"


def test_the_setting_that_decides_is_the_most_important(study: Path) -> None:
    found = importances(read_study(study, "out"))
    assert set(found) == {"tuner.kind", "loss.tau", "optim.lr"}, "a setting that not every trial has was ranked"
    assert max(found, key=lambda name: found[name]) == "loss.tau"


def test_a_setting_that_some_kinds_have_is_ranked_among_their_trials(study: Path, tmp_path: Path) -> None:
    trials = make_trials(60)
    for trial in trials:  # here the width decides, among those that have one
        if trial["tuner.bottleneck"] is not None:
            trial["validation/mean_class_accuracy"] = 0.01 * trial["tuner.bottleneck"]
    found = read_study(write_study(tmp_path / "out", trials), "out")
    within = importances_within(found)
    assert set(within) == {"tuner.bottleneck"}
    assert within["tuner.bottleneck"] > 0.5
    made, _ = figures_of(StudySection(found, importances(found), within))
    drawn = next(figure for figure in made if figure.name == "importance")
    assert {row["setting"]: row["among"] for row in drawn.rows}["tuner.bottleneck"] == "trials that have it"


@pytest.mark.filterwarnings("error")
def test_choices_of_numbers_and_lists_are_reported_with_a_curve_over_the_numbers(tmp_path: Path) -> None:
    trials, choices = make_trials(60), [8, 16, "[4, 8]"]
    for trial in trials:
        if trial["tuner.bottleneck"] is not None:
            trial["tuner.bottleneck"] = str(choices[trial["number"] // 3 % 3])  # as in trials.parquet: one type
    folder = write_study(tmp_path / "out", trials)
    about = json.loads((folder / "study.json").read_text())
    about["space"]["space"]["tuner.bottleneck"] |= {"choices": choices, "int": None, "log": False}
    (folder / "study.json").write_text(json.dumps(about))
    found = read_study(folder, "out")
    assert {trial["tuner.bottleneck"] for trial in found.trials} == {*choices, None}
    within = importances_within(found)
    made, _ = figures_of(StudySection(found, importances(found), within))
    drawn = next(figure for figure in made if figure.name == "width-tuner-bottleneck")
    assert {row["tuner.bottleneck"] for row in drawn.rows} == {8, 16}
    assert "tuner.bottleneck" in within


def test_too_few_trials_have_no_importances(tmp_path: Path) -> None:
    assert importances(read_study(write_study(tmp_path / "out", make_trials(5)), "out")) == {}


def test_figures_without_numbers_are_named_and_not_drawn() -> None:
    made, missing = figures_of(StudySection(StudyFiles("out", "none", "", {"validation/few": "max"}, {}, [])))
    assert made == []
    assert len(missing) == 16


def test_markup_in_class_names_settings_and_baselines_is_text_in_every_figure(tmp_path: Path) -> None:
    evil = "<b>bold</b> </script> [red]"
    folder = with_folds(write_study(tmp_path / "out", [{**trial, "head.kind": evil} for trial in make_trials(12)]))
    record = json.loads((folder / "best" / "run.json").read_text())
    record["class_names"] = [f"{evil} {number}" for number in range(len(record["class_names"]))]
    (folder / "best" / "run.json").write_text(json.dumps(record))
    about = json.loads((folder / "study.json").read_text())
    for one in about["compared"]:
        one["label"] = one["label"].replace("the recipe", evil)
    (folder / "study.json").write_text(json.dumps(about))
    assert not report.main([str(folder)])
    page = (folder / "report" / "index.html").read_text()
    drawn = json.dumps(drawn_in(page))
    assert "&lt;b&gt;bold" in drawn
    assert "<b>bold" not in drawn
    assert "</script> [red]" not in page


@pytest.mark.filterwarnings("error")
def test_a_setting_that_no_trial_has_yet_is_an_empty_axis() -> None:
    """The first trials of a search may all be linear probes, which have no bottleneck."""
    trials = [{"number": 0, "loss.tau": 1.0}, {"number": 1, "loss.tau": 0.5, "tuner.bottleneck": None}]
    assert positions(trials, "tuner.bottleneck", {"int": [2, 8], "log": True}) == ([None, None], [])
    assert positions(trials, "loss.tau", {})[0] == [1.0, 0.0]
