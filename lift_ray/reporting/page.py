"""Report page: one HTML file that needs no network, and the data of each figure as CSV."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lift_ray.reporting.confidence import heavy_tuning
from lift_ray.reporting.figures import charts, comparison, search
from lift_ray.reporting.figures.charts import HEAVY, Figure
from lift_ray.reporting.scaling_law import fit_law
from lift_ray.reporting.study_files import BEST_FOUND, StudyFiles
from lift_ray.reporting.summary import (
    Row,
    accuracy_rows,
    compared_split,
    gain_rows,
    law_in_words,
    listed,
    seed_rows,
    summary,
)
from lift_ray.reporting.templates import template
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import PAGE

ACCURACY_CAPTIONS = {"test": "Test accuracy (%), held out from the search", "validation": "Validation accuracy (%)"}
MOST_ROWS = 60  # of a table on the page; the CSV has all


@dataclass(frozen=True)
class Example:
    """Class with low test accuracy, and misclassified test images of it.

    Args:
        name, group, train_images: the class.
        right: number of correctly classified test images, as `0 of 10`.
        images: (data URI of a small JPEG, predicted class) of each.
    """

    name: str
    group: str
    train_images: int
    right: str
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
        "accuracy by class frequency": lambda: comparison.classes_figure(study),
        "calibration": lambda: comparison.calibration_figure(study),
        "search history": lambda: search.history_figure(study),
        "all settings of all trials": lambda: search.parallel_figure(study),
        "setting importance": lambda: search.importance_figure(study, section.importances, section.importances_within),
        "cost": lambda: search.cost_figure(study),
        "scaling law": lambda: search.scaling_figure(law),
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
    shows_classes: bool


@dataclass(frozen=True)
class _StudyView:
    """Study as the template shows it."""

    name: str
    dataset: str
    is_running: bool
    summary: Sequence[str]
    has_comparison: bool
    has_gains: bool
    tables: Sequence[tuple[str, Sequence[Row]]]
    questions: Sequence[tuple[str, str]]
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
        _write(folder / f"{name}.csv", as_csv(figure.rows))
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
        heavy_answers=_heavy_answers(studies),
        side_by_side=_drawn("studies", side_by_side) if side_by_side else None,
        figures={name: {"data": figure.traces, "layout": figure.layout} for name, figure in named},
        plotly_js=get_plotlyjs(),
    )
    _write(folder / PAGE, page)
    return named


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with a heading; None is an empty field."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _best_of_each(studies: Sequence[StudyFiles]) -> list[Row]:
    rows: list[dict[str, Any]] = []
    for study in studies:
        best = next((row for row in accuracy_rows(study) if row["model"] == BEST_FOUND), {})
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
    study, shown = section.study, {figure.name for _, figure in named}
    answers = {
        "heavy": (HEAVY, heavy_tuning(study).answer),
        "scaling": ("What would more training gain?", law_in_words(fit_law(study, *search.unit_of(study)))),
    }
    drawn = {
        figure.name: _drawn(name, figure, answers["scaling"][1] if figure.name == "scaling" else "")
        for name, figure in named
    }
    gains = gain_rows(study)
    tables = [
        (ACCURACY_CAPTIONS[compared_split(study)], accuracy_rows(study)),
        ("Gain of the best settings in test accuracy (percentage points)", gains),
        ("Test accuracy (%) over seeds, mean ± standard deviation", seed_rows(study)),
    ]
    return _StudyView(
        name=study.name,
        dataset=study.dataset,
        is_running=not study.is_done,
        summary=summary(study),
        has_comparison=bool(study.compared),
        has_gains=bool(gains),
        tables=[(caption, rows) for caption, rows in tables if rows],
        questions=[answer for name, answer in answers.items() if name not in shown],
        compared=drawn.pop("compared", None),
        figures=list(drawn.values()),
        missing=missing,
        examples=section.examples,
        without_examples=section.without_examples,
    )


def _drawn(name: str, figure: Figure, answer: str = "") -> _Drawn:
    return _Drawn(
        name=name,
        title=figure.title,
        note=f"{answer} {figure.note}" if answer else figure.note,
        csv_base64=base64.b64encode(as_csv(figure.rows).encode()).decode(),
        rows=figure.rows[:MOST_ROWS],
        rows_left=max(0, len(figure.rows) - MOST_ROWS),
        shows_classes=figure.name == "classes",
    )
