"""Report page: one HTML file that needs no network, and the data of each figure as CSV."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lift_ray.reporting.class_rows import ClassTable, class_table
from lift_ray.reporting.confidence import FEW_IMAGES, heavy_tuning
from lift_ray.reporting.csv_files import as_csv, write_csv
from lift_ray.reporting.figures import charts, classes, comparison, search
from lift_ray.reporting.figures.charts import HEAVY, Figure
from lift_ray.reporting.scaling_law import fit_law
from lift_ray.reporting.study_files import StudyFiles
from lift_ray.reporting.summary import (
    Row,
    accuracy_rows,
    compared_split,
    estimate_rows,
    gain_rows,
    law_in_words,
    open_questions,
    seed_rows,
    summary,
)
from lift_ray.reporting.templates import template
from lift_ray.reporting.winner import candidate_rows, listed, measure_of, winner_label
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import PAGE

ACCURACY_CAPTIONS = {"test": "Test accuracy (%), held out from the search", "validation": "Validation accuracy (%)"}
ASKED = ("effect of heavy fine-tuning", "scaling law")  # figures that `open_questions` stands for
MOST_ROWS = 60  # of a table on the page; the CSV has all
MOST_CSV_BYTES = 1_000_000  # of a CSV inside the page; a larger one is only next to it


@dataclass(frozen=True)
class Example:
    """Class with low test accuracy, and misclassified test images of it.

    Args:
        name, group, train_images: the class.
        right: number of correctly classified test images, as `0 of 10`.
        is_uncertain: there are too few test images to be sure that the class is a bad one.
        images: (data URI of a small JPEG, predicted class) of each.
    """

    name: str
    group: str
    train_images: int
    right: str
    is_uncertain: bool
    images: list[tuple[str, str]]


@dataclass(frozen=True)
class StudySection:
    """Study with what was computed for its section of the page.

    Args:
        importances: of the settings that all trials have.
        importances_within: of the settings that only some trials have, among those trials.
        examples: classes with the lowest test accuracy.
        without_examples: reason why there are no examples.
    """

    study: StudyFiles
    importances: Mapping[str, float] = field(default_factory=dict)
    importances_within: Mapping[str, float] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    without_examples: str = ""


def figures_of(section: StudySection) -> tuple[list[Figure], list[str]]:
    """Return the figures that the study has data for, in reading order, and the names of the others."""
    study = section.study
    law = fit_law(study, *search.unit_of(study))
    makers: dict[str, Callable[[], Figure | None]] = {
        "comparison with the baselines": lambda: comparison.compared_figure(study),
        "effect of heavy fine-tuning": lambda: charts.heavy_figure(study),
        "trade-off between objectives": lambda: search.pareto_figure(study),
        "accuracy against trained parameters": lambda: charts.size_figure(study),
        "logit adjustment in training": lambda: charts.tau_figure(study),
        "post-hoc logit adjustment": lambda: charts.posthoc_figure(study),
        "tuner kinds": lambda: charts.kinds_figure(study),
        "images per class": lambda: classes.images_figure(study),
        "accuracy by class frequency": lambda: classes.classes_figure(study),
        "confusions": lambda: classes.confusion_figure(study),
        "calibration": lambda: comparison.calibration_figure(study),
        "search history": lambda: search.history_figure(study),
        "all settings of all trials": lambda: search.parallel_figure(study),
        "setting importance": lambda: search.importance_figure(study, section.importances, section.importances_within),
        "cost": lambda: search.cost_figure(study),
        "scaling law": lambda: search.scaling_figure(study, law),
    }
    made = {name: make() for name, make in makers.items()}
    found = [figure for figure in made.values() if figure is not None]
    place = next((i for i, figure in enumerate(found) if figure.name in ("tau", "posthoc-tau")), len(found))
    widths = charts.width_figures(study)
    if len(study.objectives) < 2:
        made.pop("trade-off between objectives")
    missing = [name for name, figure in made.items() if figure is None] + ([] if widths else ["tuner width"])
    return found[:place] + widths + found[place:], missing


@dataclass(frozen=True)
class _Drawn:
    """Figure as the template shows it, with the first of its rows."""

    name: str
    title: str
    note: str
    csv_base64: str
    rows: Sequence[Mapping[str, Any]]
    rows_left: int
    table: Sequence[Mapping[str, Any]]
    caption: str
    shows_classes: bool


@dataclass(frozen=True)
class _StudyView:
    """Study as the template shows it."""

    name: str
    dataset: str
    is_running: bool
    summary: Sequence[str]
    has_comparison: bool
    has_intervals: bool
    tables: Sequence[tuple[str, Sequence[Row]]]
    groups: str
    class_table: ClassTable | None
    questions: Sequence[str]
    compared: _Drawn | None
    figures: Sequence[_Drawn]
    missing: Sequence[str]
    examples: Sequence[Example]
    without_examples: str


def write_page(sections: Sequence[StudySection], folder: Path) -> list[tuple[str, Figure]]:
    """Write folder/index.html and folder/NAME.csv, each renamed into place. Return the figures with the names of their files.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    studies, several = [section.study for section in sections], len(sections) > 1
    side_by_side = comparison.studies_figure(studies) if several else None
    named: list[tuple[str, Figure]] = [("studies", side_by_side)] if side_by_side else []
    views = []
    for number, section in enumerate(sections, 1):
        made, missing = figures_of(section)
        mine = [(f"{number}-{figure.name}" if several else figure.name, figure) for figure in made]
        named += mine
        views.append(_study_view(section, mine, missing))
    for name, figure in named:
        write_csv(figure.rows, folder / f"{name}.csv")
    if several:
        links = [(f"study-{number}", study.name) for number, study in enumerate(studies, 1)]
    else:
        links = [(name, figure.title.split(":")[0]) for name, figure in named]
    page = template("lift_ray.reporting", "page.html").render(
        title=", ".join(study.name for study in studies),
        links=links,
        studies=views,
        best_of_each=_best_of_each(studies) if several else [],
        heavy_question=HEAVY,
        few_images=FEW_IMAGES,
        heavy_answers=_heavy_answers(studies),
        side_by_side=_drawn("studies", side_by_side) if side_by_side else None,
        class_tables=[view.class_table for view in views],
        figures={name: {"data": figure.traces, "layout": figure.layout} for name, figure in named},
        plotly_js=get_plotlyjs(),
    )
    with replacing(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return named


def _best_of_each(studies: Sequence[StudyFiles]) -> list[Row]:
    rows: list[dict[str, Any]] = []
    for study in studies:
        best = next((row for row in accuracy_rows(study) if row["model"] == winner_label(study)), {})
        rows.append(
            {"study": study.name, **{k: v for k, v in best.items() if k != "model"}, "trials": len(study.trials)}
        )
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys.append(keys.pop(keys.index("trials")))
    return [{k: row.get(k, "-") for k in keys} for row in rows]


def _heavy_answers(studies: Sequence[StudyFiles]) -> list[str]:
    """Return the answer on heavy fine-tuning for each dataset that several studies share."""
    by_dataset: dict[str, list[StudyFiles]] = {}
    for study in studies:
        by_dataset.setdefault(study.dataset, []).append(study)
    return [
        f"{heavy_tuning(*same).answer} Fitted jointly to {listed([study.name for study in same])}, each with its own intercept "
        f"({dataset})."
        for dataset, same in by_dataset.items()
        if len(same) > 1
    ]


def _study_view(section: StudySection, named: Sequence[tuple[str, Figure]], missing: Sequence[str]) -> _StudyView:
    study, law = section.study, fit_law(section.study, *search.unit_of(section.study))
    answers = {"scaling": law_in_words(law)}
    drawn = {figure.name: _drawn(name, figure, answers.get(figure.name, "")) for name, figure in named}
    gains, questions = gain_rows(study), open_questions(study, law) if study.finished else []
    tables = [
        (ACCURACY_CAPTIONS[compared_split(study)], accuracy_rows(study)),
        ("Gain of the best settings in test accuracy (percentage points)", gains),
        (
            f"Best settings, {study.estimate} estimate{' and test result' if study.has_test else ''} (%)",
            estimate_rows(study),
        ),
        (f"Candidates by {measure_of(study.choice.metric)}: difference \u00b1 standard error", candidate_rows(study)),
        ("Test accuracy (%) over seeds, mean ± standard deviation", seed_rows(study)),
    ]
    return _StudyView(
        name=study.name,
        dataset=study.dataset,
        is_running=not study.is_done,
        summary=summary(study),
        has_comparison=bool(study.compared),
        has_intervals=study.measured is not None,
        tables=[(caption, rows) for caption, rows in tables if rows],
        groups=", ".join(f"{group} ({rule})" for group, rule in study.class_groups.rules.items()),
        class_table=class_table(study),
        questions=questions,
        compared=drawn.pop("compared", None),
        figures=list(drawn.values()),
        missing=[name for name in missing if not questions or name not in ASKED],
        examples=section.examples,
        without_examples=section.without_examples,
    )


def _drawn(name: str, figure: Figure, answer: str = "") -> _Drawn:
    data = as_csv(figure.rows).encode()
    return _Drawn(
        name=name,
        title=figure.title,
        note=f"{answer} {figure.note}" if answer else figure.note,
        csv_base64=base64.b64encode(data).decode() if len(data) <= MOST_CSV_BYTES else "",
        rows=figure.rows[:MOST_ROWS],
        rows_left=max(0, len(figure.rows) - MOST_ROWS),
        table=figure.table,
        caption=figure.caption,
        shows_classes=figure.name == "classes",
    )
