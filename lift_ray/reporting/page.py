"""The report: one HTML page that needs no network, and the numbers behind each figure as CSV."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lift_ray.errors import RunFailed
from lift_ray.reporting.confidence import heavy_tuning
from lift_ray.reporting.figures import charts, comparison, search
from lift_ray.reporting.figures.charts import HEAVY, Figure
from lift_ray.reporting.scaling_law import fit_law
from lift_ray.reporting.study_files import BEST_FOUND, StudyFiles
from lift_ray.reporting.summary import Cell, accuracy_rows, gain_rows, law_in_words, seed_rows, summary
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import PAGE

MOST_ROWS = 60  # of a table in the page; the CSV has all
TOGETHER = "together"


@dataclass(frozen=True)
class Example:
    """A class that goes wrong, with test images of it.

    Args:
        name, group, train_images: the class.
        right: recognised test images of all of them, as `0 of 10`.
        pictures: (data URI of a small JPEG, what it was taken for).
    """

    name: str
    group: str
    train_images: int
    right: str
    pictures: list[tuple[str, str]]


@dataclass(frozen=True)
class StudySection:
    """A study and what was computed for it elsewhere."""

    study: StudyFiles
    importances: Mapping[str, float] = field(default_factory=dict)
    importances_within: Mapping[str, float] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    without_examples: str = ""


def figures_of(chapter: StudySection) -> tuple[list[Figure], list[str]]:
    """The figures that the study has the numbers for, in reading order, and the names of those that it has not."""
    study = chapter.study
    law = fit_law(study, *search.unit_of(study))
    makers: dict[str, Callable[[], Figure | None]] = {
        "yardsticks": lambda: comparison.compared_figure(study),
        "does heavy fine-tuning hurt": lambda: charts.heavy_figure(study),
        "trade-off": lambda: search.pareto_figure(study),
        "accuracy against trained parameters": lambda: charts.size_figure(study),
        "tau in training": lambda: charts.tau_figure(study),
        "tau after training": lambda: charts.posthoc_figure(study),
        "tuner kinds": lambda: charts.kinds_figure(study),
        "classes": lambda: comparison.classes_figure(study),
        "calibration": lambda: comparison.calibration_figure(study),
        "history": lambda: search.history_figure(study),
        "all settings at once": lambda: search.parallel_figure(study),
        "importance of the settings": lambda: search.importance_figure(
            study, chapter.importances, chapter.importances_within
        ),
        "cost": lambda: search.cost_figure(study),
        "scaling": lambda: search.scaling_figure(law),
    }
    made = {name: make() for name, make in makers.items()}
    found = [figure for figure in made.values() if figure is not None]
    place = next((i for i, figure in enumerate(found) if figure.name in ("tau", "posthoc-tau")), len(found))
    widths = charts.width_figures(study)
    if len(study.objectives) < 2:
        made.pop("trade-off")
    missing = [name for name, figure in made.items() if figure is None] + ([] if widths else ["width"])
    return found[:place] + widths + found[place:], missing


def write_page(chapters: Sequence[StudySection], folder: Path) -> list[tuple[str, Figure]]:
    """folder/index.html and folder/NAME.csv, each renamed into place; returns the figures by the names of their files.

    Raises RunFailed when plotly is not installed, and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named: list[tuple[str, Figure]] = []
    sections = [_together(chapters)] if len(chapters) > 1 else []
    if len(chapters) > 1 and (both := comparison.studies_figure([c.study for c in chapters])):
        named.append(("studies", both))
        sections.append(_figure("studies", both))
    for index, chapter in enumerate(chapters):
        made, missing = figures_of(chapter)
        prefix = f"{index + 1}-" if len(chapters) > 1 else ""
        mine = [(prefix + figure.name, figure) for figure in made]
        named += mine
        sections.append(_chapter(chapter, mine, missing, index, alone=len(chapters) == 1))
    for name, figure in named:
        _write(folder / f"{name}.csv", as_csv(figure.rows))
    drawn = {name: {"data": figure.traces, "layout": figure.layout} for name, figure in named}
    names = ", ".join(chapter.study.name for chapter in chapters)
    parts = {
        "TITLE": escape(names),
        "NAVIGATION": _navigation(chapters, named),
        "BODY": "".join(sections),
        "FIGURES": json.dumps(drawn, allow_nan=False).replace("<", "\\u003c"),
        "PLOTLY": plotly_js(),
    }
    page = files("lift_ray.reporting").joinpath("page.html").read_text()
    head, *rest = page.split("{{")
    _write(folder / PAGE, head + "".join(parts[key] + text for key, text in (piece.split("}}", 1) for piece in rest)))
    return named


def plotly_js() -> str:
    """plotly.js as a whole; no part of it that is smaller comes with the Python package. Raises RunFailed."""
    spec = find_spec("plotly")  # not imported: only its file is wanted
    if spec is None or spec.origin is None:
        raise RunFailed("report: needs the package plotly, but it is not installed; pip install plotly")
    return (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """With a heading; nothing for None."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _navigation(chapters: Sequence[StudySection], named: Sequence[tuple[str, Figure]]) -> str:
    if len(chapters) > 1:
        links = [(f"study-{i + 1}", chapter.study.name) for i, chapter in enumerate(chapters)]
    else:
        links = [(name, figure.title.split(":")[0]) for name, figure in named]
    return "".join(f'<li><a href="#{escape(anchor)}">{escape(text)}</a></li>' for anchor, text in links)


def _together(chapters: Sequence[StudySection]) -> str:
    """The best of each study, and the question of heavy tuning to all studies of a data set at once."""
    rows: list[dict[str, Any]] = []
    for chapter in chapters:
        study = chapter.study
        best = next((row for row in accuracy_rows(study) if row["model"] == BEST_FOUND), {})
        rows.append(
            {"study": study.name, **{k: v for k, v in best.items() if k != "model"}, "trials": len(study.trials)}
        )
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys.append(keys.pop(keys.index("trials")))
    text = f"<p>The best of each study, test accuracy in %.</p>{_table([{k: row.get(k, '-') for k in keys} for row in rows])}"
    by_data: dict[str, list[StudyFiles]] = {}
    for chapter in chapters:
        by_data.setdefault(chapter.study.dataset, []).append(chapter.study)
    for dataset, studies in by_data.items():
        if len(studies) > 1:
            who = f"{', '.join(study.name for study in studies)} together, each with its own level ({dataset})"
            text += f"<h3>{HEAVY}</h3><p>{escape(heavy_tuning(*studies).answer)} From {escape(who)}.</p>"
    return f'<section id="{TOGETHER}"><h2>Side by side</h2>{text}</section>'


def _chapter(
    chapter: StudySection, named: Sequence[tuple[str, Figure]], missing: Sequence[str], index: int, *, alone: bool
) -> str:
    """A study, what was found first, then each figure with what it answers."""
    study, found = chapter.study, {figure.name: (name, figure) for name, figure in named}
    title = "" if alone else f'<h2 class="wide" id="study-{index + 1}">{escape(study.name)}</h2>'
    parts = [title + _found(study)]
    parts += [_figure(*found.pop("compared"))] if "compared" in found else []
    parts += [_numbers(study)] if study.compared else []
    answers = {"heavy": (HEAVY, heavy_tuning(study).answer)}
    answers["scaling"] = ("What would more training buy?", law_in_words(fit_law(study, *search.unit_of(study))))
    for name, (heading, text) in answers.items():
        if name not in found:
            parts.append(f"<section><h3>{escape(heading)}</h3><p>{escape(text)}</p></section>")
    for name, figure in found.values():
        parts.append(_figure(name, figure, answers["scaling"][1] if figure.name == "scaling" else ""))
        if figure.name == "classes":
            parts.append(_examples(chapter))
    if missing:
        text = f"Not shown, because this study has no numbers for it: {', '.join(missing)}."
        parts.append(f'<section class="missing"><p>{escape(text)}</p></section>')
    return "".join(parts)


def _found(study: StudyFiles) -> str:
    lead, *others = summary(study)
    more = "".join(f"<li>{escape(text)}</li>" for text in others)
    state = "" if study.is_done else " running"
    return (
        f'<section class="found"><h3>What it found</h3><p class="lead{state}">{escape(lead)}</p><ul>{more}</ul>'
        f'<p class="where">Data: {escape(study.dataset)}</p></section>'
    )


def _numbers(study: StudyFiles) -> str:
    tables = [
        (accuracy_rows(study), "Accuracy in %"),
        (gain_rows(study), "How much better the best is, in points"),
        (seed_rows(study), "Several seeds, accuracy on test in %, mean ± standard deviation"),
    ]
    text = "".join(_table(rows, caption) for rows, caption in tables if rows)
    note = (
        "<p>In small: 95% intervals by bootstrap over test images; gains pair the images.</p>"
        if gain_rows(study)
        else ""
    )
    return f"<section><h3>How sure</h3>{note}{text}</section>"


def _figure(name: str, figure: Figure, answer: str = "") -> str:
    data = base64.b64encode(as_csv(figure.rows).encode()).decode()
    more = f"<p>{len(figure.rows) - MOST_ROWS} more rows are in the CSV.</p>" if len(figure.rows) > MOST_ROWS else ""
    note = f"{answer} {figure.note}" if answer else figure.note
    return (
        f'<section id="{escape(name)}"><h3>{escape(figure.title)}</h3><p>{escape(note)}</p>'
        f'<div class="plot" data-figure="{escape(name)}" role="img" aria-label="{escape(figure.title)}. {escape(note)}"></div>'
        f'<details><summary>The numbers</summary><p><a download="{escape(name)}.csv" href="data:text/csv;base64,{data}">'
        f"{escape(name)}.csv</a></p>{_table(figure.rows[:MOST_ROWS])}{more}</details></section>"
    )


def _examples(chapter: StudySection) -> str:
    if not chapter.examples:
        why = f" ({escape(chapter.without_examples)})" if chapter.without_examples else ""
        return f"<section><h3>The worst classes</h3><p>There are no pictures to show{why}.</p></section>"
    cards = []
    for example in chapter.examples:
        pictures = "".join(
            f'<figure><img src="{uri}" alt="a test image of {escape(example.name)}">'
            f"<figcaption>taken for {escape(taken)}</figcaption></figure>"
            for uri, taken in example.pictures
        )
        cards.append(
            f"<li><h4>{escape(example.name)}</h4><p>{escape(example.group)}, {example.train_images} training images, "
            f'{escape(example.right)} recognised</p><div class="pictures">{pictures}</div></li>'
        )
    lead = "<h3>The worst classes</h3><p>Test images that the best model takes for something else.</p>"
    return f'<section class="wide">{lead}<ul class="cards">{"".join(cards)}</ul></section>'


def _table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    if not rows:
        return "<p>There is nothing yet.</p>"
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="table" tabindex="0"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, Cell):
        return escape(value.text) + (f"<small>{escape(value.below)}</small>" if value.below else "")
    if value is None:
        return ""
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))
