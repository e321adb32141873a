"""The report says how the winner was chosen, on which images, and for which classes this is uncertain."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from made_study import make_trials, with_folds, write_study

from lift_ray import report
from lift_ray.reporting.class_rows import class_table
from lift_ray.reporting.figures.charts import posthoc_advice, posthoc_figure, tau_effect
from lift_ray.reporting.page import StudySection, figures_of
from lift_ray.reporting.report import worst_classes
from lift_ray.reporting.study_files import OUT_OF_FOLD_PATH, Predictions, StudyFiles, read_study
from lift_ray.reporting.summary import Cell, estimate_rows, gain_rows, summary
from lift_ray.reporting.winner import candidate_rows, choice_in_words, refit_in_words, unseen_in_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_folds(write_study(tmp_path_factory.mktemp("study") / "out", make_trials(12)))


@pytest.fixture
def study(folder: Path) -> StudyFiles:
    return read_study(folder, "out")


def changed(study: StudyFiles, **about: Any) -> StudyFiles:
    """The study with other entries of study.json; those of `choice` are replaced one by one."""
    if "choice" in about:
        about["choice"] = study.about["choice"] | about["choice"]
    return replace(study, about=study.about | about)


def test_the_headline_begins_with_the_baseline_if_one_won(study: StudyFiles) -> None:
    lead = summary(changed(study, choice={"baseline": "the recipe"}))[0]
    assert lead.startswith(
        "The baseline the recipe is best: the search found nothing better. Its test accuracy: 59.6% (mean over classes, held out "
        "from the search), 50.4 points above zero-shot."
    )
    assert "the recipe." not in lead[30:], "a baseline was compared with itself"


def test_a_baseline_that_won_may_stand_in_the_comparison_under_its_own_name_alone(study: StudyFiles) -> None:
    alone = replace(study, compared=study.compared[:2], predictions=study.predictions[:2])
    alone = changed(alone, choice={"baseline": "the recipe"})
    assert (
        "Its test accuracy: 41.5% (mean over classes, held out from the search), 32.3 points above" in summary(alone)[0]
    )
    assert [row["baseline"] for row in gain_rows(alone)] == ["zero-shot"]
    assert {"classes", "calibration"} <= {figure.name for figure in figures_of(StudySection(alone))[0]}


@pytest.mark.parametrize(
    ("baseline", "first"),
    [
        (None, "The result of this search is not held out, because there is no test split (test: none)."),
        (
            "the recipe",
            "The baseline the recipe is best: the search found nothing better; this result is not held out, because there is no test "
            "split (test: none).",
        ),
    ],
)
def test_the_first_sentence_says_if_the_result_is_not_held_out(study: StudyFiles, baseline: str, first: str) -> None:
    compared = [{k: v for k, v in f.items() if not k.startswith("test/")} for f in study.compared]
    none = changed(
        replace(study, compared=compared, predictions=[None] * 3), held_out=False, choice={"baseline": baseline}
    )
    lines = summary(none)
    assert lines[0] == f"{first} Expect slightly lower accuracy on new images."
    assert re.match(
        r"Out-of-fold estimate of the mean class accuracy: 5\d\.\d%\. These predictions also chose", lines[1]
    )
    assert [row["images"] for row in estimate_rows(none)] == ["out-of-fold estimate"]
    drawn = {figure.name: figure for figure in figures_of(StudySection(none))[0]}
    assert drawn["classes"].layout["yaxis"]["title"]["text"] == "out-of-fold accuracy (%)"


def test_the_out_of_fold_estimate_stands_beside_the_test_result(study: StudyFiles) -> None:
    estimate, test = estimate_rows(study)
    assert (estimate["images"], test["images"]) == ("out-of-fold estimate", "test")
    for row in (estimate, test):
        cell = row["mean class"]
        assert isinstance(cell, Cell)
        low, high = map(float, cell.below.split("\u2013"))
        assert low < float(cell.text) < high
    assert any("points below the test result" in line for line in summary(study))


def test_candidates_have_their_difference_and_its_standard_error(study: StudyFiles) -> None:
    rows = candidate_rows(study)
    assert [(row["difference"], row["within one standard error"]) for row in rows] == [
        ("winner", "yes"),
        ("-0.8 ± 1.2", "yes"),
        ("-6.0 ± 2.0", "no"),
    ]
    words = choice_in_words(study)
    assert (
        "has the highest mean class accuracy on all 2,118 out-of-fold predictions (41.0%); trial 5 is within one"
        in words
    )


def test_a_difference_without_a_known_error_is_not_called_close_or_far(study: StudyFiles) -> None:
    candidates = [{k: v for k, v in one.items() if k != "error"} for one in study.about["choice"]["candidates"]]
    rows = candidate_rows(changed(study, choice={"candidates": candidates}))
    assert [(row["difference"], row["within one standard error"]) for row in rows[1:]] == [
        ("-0.8 ± unknown", "-"),
        ("-6.0 ± unknown", "-"),
    ]


def test_a_smaller_winner_is_not_called_the_highest(study: StudyFiles) -> None:
    candidates = [dict(one) for one in study.about["choice"]["candidates"]]
    candidates[1]["difference"] = 0.008
    words = choice_in_words(changed(study, choice={"candidates": candidates, "prefer": "smaller"}))
    assert "has the fewest trained parameters within one standard error of the best mean class accuracy" in words


def test_a_search_without_confirmation_has_no_candidates_and_speaks_of_validation(study: StudyFiles) -> None:
    one = changed(study, choice={"folds": 1, "candidates": study.about["choice"]["candidates"][:1]})
    assert candidate_rows(one) == []
    assert choice_in_words(one) == ""
    assert estimate_rows(one)[0]["images"] == "validation estimate"
    assert "out-of-fold" not in " ".join(summary(one))


@pytest.mark.parametrize("is_on_top", [True, False])
def test_the_best_trial_is_called_the_highest_of_the_search_only_if_it_is(study: StudyFiles, is_on_top: bool) -> None:
    top = study.top_trial
    assert top
    other = next(t["number"] for t in study.finished if t["number"] != top["number"])
    found = replace(study, best=top["number"] if is_on_top else other)
    assert ("is the highest of" in " ".join(summary(found))) == is_on_top
    history = next(figure for figure in figures_of(StudySection(found))[0] if figure.name == "history")
    assert history.note.endswith("won on all folds.") != is_on_top


@pytest.mark.parametrize(
    ("refit", "words"),
    [
        ({}, ""),
        (
            {"data": "train+validation", "retrained": True, "images": 3100},
            "The model in best/ was trained again with the best settings, on the training and validation images (3,100 images).",
        ),
        (
            {"data": "train", "retrained": True},
            "The model in best/ was trained again with the best settings, on the training split.",
        ),
        (
            {"data": "train", "retrained": False, "images": 9},
            "The model in best/ is that of the best trial, trained on the training split (9 images).",
        ),
    ],
)
def test_what_best_was_trained_on_is_said(study: StudyFiles, refit: dict[str, Any], words: str) -> None:
    assert refit_in_words(changed(study, refit=refit)) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, ""),
        (1, "1 class has no out-of-fold image and does not count in the choice of the winner: a."),
        (3, "3 classes have no out-of-fold image and do not count in the choice of the winner: a, b and c."),
        (
            7,
            "7 classes have no out-of-fold image and do not count in the choice of the winner: a, b, c, d, e and 2 more.",
        ),
    ],
)
def test_classes_that_no_image_measures_are_named(study: StudyFiles, number: int, words: str) -> None:
    assert unseen_in_words(changed(study, unseen=list("abcdefg"[:number]))) == words


def test_the_groups_are_those_of_the_study_with_their_bounds_and_note(study: StudyFiles) -> None:
    names = ["few"] * 60 + ["medium"] * 30 + ["many"] * 10
    note = "groups are thirds of the classes: few <= 11 training images, many >= 40"
    found = changed(study, groups={"names": names, "few_below": 12, "many_above": 39, "note": note})
    assert found.groups.tolist() == names
    assert found.class_groups.rules == {"many": "over 39", "medium": "12 to 39", "few": "under 12"}
    assert f"G{note[1:]}." in summary(found)
    drawn = next(figure for figure in figures_of(StudySection(found))[0] if figure.name == "class-images")
    assert [trace["name"] for trace in drawn.traces] == ["many (10)", "medium (30)", "few (60)"]
    assert "many over 39, medium 12 to 39, few under 12" in drawn.note


@pytest.mark.parametrize(
    ("posthoc", "words"),
    [
        (
            {"tau": 0.5, "gain": 0.02, "bias": 0.007, "recommended": True},
            "Post-hoc tau 0.5 is recommended: on out-of-fold predictions it gains 2.0 points of mean class accuracy, more than its "
            "selection bias (about 0.7).",
        ),
        (
            {"tau": 0.0, "gain": 0.004, "bias": 0.007, "recommended": False},
            "No post-hoc tau is recommended: the best one gains 0.4 points of mean class accuracy on out-of-fold predictions, not "
            "more than its selection bias (about 0.7).",
        ),
        (
            {"tau": 0.0, "gain": 0.0, "bias": 0.007, "recommended": False},
            "No post-hoc tau improves the mean class accuracy on out-of-fold predictions.",
        ),
        (
            {"tau": 0.0, "gain": 0.004, "recommended": False},
            "No post-hoc tau is recommended: the best one gains 0.4 points of mean class accuracy on out-of-fold predictions, not "
            "more than its selection bias, which is unknown.",
        ),
    ],
)
def test_a_posthoc_tau_is_advised_only_if_it_is_recommended(
    study: StudyFiles, posthoc: dict[str, Any], words: str
) -> None:
    found = changed(study, posthoc=posthoc)
    assert posthoc_advice(found) == words
    assert (words in summary(found)) == posthoc["recommended"]
    figure = posthoc_figure(found)
    assert figure
    assert figure.note.endswith(words)
    assert figure.layout["yaxis"]["title"]["text"] == "out-of-fold accuracy (%)"


@pytest.mark.parametrize(
    ("few", "many", "words"),
    [
        (
            0.1,
            -0.05,
            "few-shot accuracy rises by 10.0 points per unit of tau and many-shot accuracy falls by 5.0 points",
        ),
        (
            -0.1,
            0.0,
            "few-shot accuracy falls by 10.0 points per unit of tau and many-shot accuracy has no clear trend.",
        ),
        (None, -0.05, "Here many-shot accuracy falls by 5.0 points per unit of tau."),
        (None, None, "There are too few trials to tell whether it does here."),
    ],
)
def test_the_sentence_about_tau_fits_what_the_plot_shows(few: float | None, many: float | None, words: str) -> None:
    taus, random = np.linspace(0, 2, 12), np.random.default_rng(0)
    noise = random.normal(0, 1e-6, 12)
    trials = [
        {
            "loss.tau": float(tau),
            "validation/few": None if few is None else 0.3 + few * tau + e,
            "validation/many": None if many is None else 0.6 + (many * tau + e if many else 0.01 * (-1) ** i),
        }
        for i, (tau, e) in enumerate(zip(taus, noise, strict=True))
    ]
    assert words in tau_effect(trials)


def test_questions_without_an_answer_are_lines_of_one_list(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "out", make_trials(2))
    report.main([str(folder)])
    page = (folder / "report" / "index.html").read_text()
    assert "<h3>Does heavy fine-tuning hurt the few-shot classes?</h3>" not in page
    (left,) = re.findall(r"<h3>What this study cannot tell</h3><ul>(.*?)</ul>", page, re.DOTALL)
    assert left.count("<li>") == 3
    assert "effect of heavy fine-tuning" not in left, "the same was said twice"
    assert "Does heavy fine-tuning hurt the few-shot classes? Cannot tell: at least 5 sizes" in left
    assert "What would more training gain? Cannot tell: " in left


METRICS = ("accuracy", "mean_class_accuracy", "many", "medium", "few")


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_that_no_image_gives_is_missing_and_no_error(metric: str, folder: Path, tmp_path: Path) -> None:
    """For example few, if no few-shot class has a validation image."""
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    shutil.rmtree(out / "predictions")
    objective = "validation/medium" if metric == "mean_class_accuracy" else "validation/mean_class_accuracy"

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(one) for one in value]
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k.split("/")[-1] != metric or "/" not in k}
        return value

    about = without(json.loads((out / "study.json").read_text()))
    about["space"]["objectives"] = {objective: "max"}
    (out / "study.json").write_text(json.dumps(about))
    table = pq.read_table(out / "trials.parquet")
    pq.write_table(table.drop_columns([f"validation/{metric}"]), out / "trials.parquet")
    assert not report.main([str(out)])


def small_classes() -> Predictions:
    """Class 0: 1 image, wrong. Class 1: 2 of 20 right. Class 2: 8 of 10 right. Class 3: none."""
    label = np.array([0] + [1] * 20 + [2] * 10)
    hit = np.array([False] + [True] * 2 + [False] * 18 + [True] * 8 + [False] * 2)
    return Predictions(label, np.where(hit, label, 3), np.ones(len(label)))


def of_small_classes() -> StudyFiles:
    compared = [{"label": "best found", "test/accuracy": 0.5}]
    about = {"best": {}}
    return StudyFiles(
        "out",
        "s",
        "nowhere",
        {"validation/few": "max"},
        {},
        [],
        compared,
        [small_classes()],
        about=about,
        class_names=list("abcd"),
        class_counts=[3, 30, 300, 5],
    )


def test_a_class_with_one_test_image_is_uncertain_and_not_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    from lift_ray.reporting import report as reporting

    class Opened:
        labels = small_classes().label

        def split(self, name: str) -> Opened:
            return self

    class Reader:
        def __init__(self, *args: Any, **more: Any) -> None: ...
        def __enter__(self) -> Reader:
            return self

        def __exit__(self, *args: object) -> None: ...
        def read(self, rows: Any) -> list[bytes]:
            return [b""] * len(rows)

    monkeypatch.setattr(reporting, "open_dataset", lambda *args, **more: Opened())
    monkeypatch.setattr(reporting, "RowReader", Reader)
    monkeypatch.setattr(reporting, "thumbnail", lambda image: "")
    examples, _ = worst_classes(of_small_classes())
    assert [(example.name, example.right, example.is_uncertain) for example in examples] == [
        ("b", "2 of 20", False),
        ("a", "0 of 1", True),
        ("c", "8 of 10", False),
    ]


def test_the_table_of_classes_has_what_the_page_sorts_by() -> None:
    assert class_table(of_small_classes()) == {
        "few_images": 5,
        "columns": [("class", "text"), ("group", "text"), ("training images", "number"), ("test (%)", "accuracy")],
        "rows": [
            ["a", "few", 3, [0, 1]],
            ["b", "medium", 30, [2, 20]],
            ["c", "many", 300, [8, 10]],
            ["d", "few", 5, None],
        ],
    }


def test_of_a_remote_study_no_out_of_fold_logits_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = fsspec.filesystem("memory"), []
    store.put(f"{folder}/", "/remote-choice/", recursive=True)
    real = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path, **more: (read.append((str(path), more)), real(path, **more))[1])
    assert not report.main(["memory://remote-choice", "--out", str(tmp_path / "page")])
    assert "out-of-fold predictions (41.0%)" in (tmp_path / "page" / "index.html").read_text()
    columns = [more["columns"] for path, more in read if path.endswith(OUT_OF_FOLD_PATH)]
    assert columns == [["label", "predicted", "confidence"]] * 2, "from the store, then from the local copy"
