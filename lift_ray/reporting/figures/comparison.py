"""Figures about the test split: models against each other with intervals, classes, calibration."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from lift_ray.evaluation.metrics import GROUPS, RULES
from lift_ray.reporting.confidence import Interval, accuracy_intervals, reliability
from lift_ray.reporting.figures.charts import (
    ACCURACY,
    COLOURS,
    STYLES,
    SYMBOLS,
    WORDS,
    Figure,
    axis,
    log_axis,
    percents,
)
from lift_ray.reporting.study_files import BEST_FOUND, Predictions, StudyFiles

SHOWN = ("mean_class_accuracy", *GROUPS)
BETWEEN = (
    0.19  # of the distance between two models: the measures of one stand below each other, so that none hides another
)
NAME_WIDTH = 18  # letters of a line, so that a phone has room for the points


def compared_figure(study: StudyFiles) -> Figure | None:
    """Test accuracy of everything compared."""
    rows = [
        row
        for figures, answers in zip(study.compared, study.answers, strict=True)
        for row in _rows(study, "model", figures["label"], figures, answers)
    ]
    note = (
        "Accuracy on the test split, which the search did not see. Bars: 95% intervals by bootstrap over test images."
    )
    return _dots("compared", "Best against the yardsticks", note, "model", rows)


def studies_figure(studies: Sequence[StudyFiles]) -> Figure | None:
    """The best of each study on its test split."""
    rows = [
        row
        for study in studies
        if (found := study.entry(BEST_FOUND))
        for row in _rows(study, "study", study.name, *found)
    ]
    note = "The best of each study on its test split. Bars: 95% intervals by bootstrap over test images."
    return _dots("studies", "The studies side by side", note, "study", rows)


def _rows(
    study: StudyFiles, by: str, name: str, figures: dict[str, Any], answers: Predictions | None
) -> list[dict[str, Any]]:
    spread = accuracy_intervals(answers, study.groups) if answers and study.class_counts else {}
    out = []
    for measure in (*SHOWN, "accuracy"):
        if (value := figures.get(f"test/{measure}")) is not None:
            bar = spread.get(measure, Interval(value, value, value))
            out.append({by: name, "measure": WORDS[measure], "test": bar.value, "low": bar.low, "high": bar.high})
    return out


def _dots(name: str, title: str, note: str, by: str, rows: list[dict[str, Any]]) -> Figure | None:
    if not rows:
        return None
    names = list(dict.fromkeys(row[by] for row in rows))
    measures = [m for m in SHOWN if any(row["measure"] == WORDS[m] for row in rows)]
    traces = []
    for k, measure in enumerate(measures):
        here = [row for row in rows if row["measure"] == WORDS[measure]]
        colour, symbol, _ = STYLES[measure]
        shift = (k - (len(measures) - 1) / 2) * BETWEEN
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": WORDS[measure],
                "x": percents([row["test"] for row in here]),
                "y": [round(names.index(row[by]) + shift, 3) for row in here],
                "text": [row[by] for row in here],
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "color": colour,
                    "thickness": 1.5,
                    "width": 0,
                    "array": percents([row["high"] - row["test"] for row in here]),
                    "arrayminus": percents([row["test"] - row["low"] for row in here]),
                },
                "hovertemplate": "%{text}: %{x:.1f}%<extra>%{fullData.name}</extra>",
            }
        )
    ticks = ["<br>".join(textwrap.wrap(text, NAME_WIDTH)) for text in names]
    layout = {
        "xaxis": axis(ACCURACY),
        "height": 120 + 62 * len(names),
        "yaxis": axis(
            "", tickvals=list(range(len(names))), ticktext=ticks, range=[len(names) - 0.5, -0.5], showgrid=False
        ),
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": i - 0.5,
                "y1": i - 0.5,
                "line": {"color": "#808080", "width": 0.5},
            }
            for i in range(1, len(names))
        ],
    }
    return Figure(name, title, note, traces, layout, rows)


def classes_figure(study: StudyFiles) -> Figure | None:
    """Accuracy of each class against its training images."""
    found = study.entry(BEST_FOUND)
    if found is None or found[1] is None or not study.class_counts:
        return None
    answers, counts, groups = found[1], np.array(study.class_counts), study.groups
    total = np.bincount(answers.label, minlength=len(counts))
    correct = np.bincount(answers.label[answers.hits], minlength=len(counts))
    seen = np.flatnonzero(total)
    traces = []
    for group in [g for g in GROUPS if (groups[seen] == g).any()]:
        here = seen[groups[seen] == group]
        colour, symbol, _ = STYLES[group]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": group,
                "x": counts[here].tolist(),
                "y": percents(correct[here] / total[here]),
                "text": [study.class_names[k] for k in here],
                "marker": {"color": colour, "symbol": symbol, "size": 7, "opacity": 0.75},
                "hovertemplate": "%{text}<br>%{x} training images: %{y:.0f}%<extra></extra>",
            }
        )
    never = int((correct[seen] == 0).sum())
    rules = ", ".join(f"{group} {RULES[group]}" for group in GROUPS)
    note = f"Each point is a class, best found, on test. {never} of {len(seen)} classes are never recognised. Training images: {rules}."
    rows = [
        {
            "class": study.class_names[k],
            "group": str(groups[k]),
            "train_images": int(counts[k]),
            "test_images": int(total[k]),
            "correct": int(correct[k]),
        }
        for k in seen
    ]
    layout = {
        "xaxis": log_axis("training images of the class", counts[seen].tolist()),
        "yaxis": axis(ACCURACY, range=[-4, 104]),
    }
    return Figure("classes", "Classes: accuracy against frequency", note, traces, layout, rows)


def calibration_figure(study: StudyFiles) -> Figure | None:
    """Reliability diagram of the best and of zero-shot."""
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "perfect",
            "x": [0, 100],
            "y": [0, 100],
            "line": {"color": "#808080", "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    rows, errors = [], []
    for label, place in ((BEST_FOUND, 0), ("zero-shot", 2)):
        found = study.entry(label)
        if found is None or found[1] is None:
            continue
        bins = reliability(found[1])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "x": percents([b[0] for b in bins]),
                "y": percents([b[1] for b in bins]),
                "text": [f"{b[2]:,} images" for b in bins],
                "marker": {"color": COLOURS[place], "symbol": SYMBOLS[place], "size": 8},
                "line": {"color": COLOURS[place]},
                "hovertemplate": "says %{x:.0f}%, right %{y:.0f}%<br>%{text}<extra>%{fullData.name}</extra>",
            }
        )
        rows += [{"model": label, "confidence": b[0], "accuracy": b[1], "images": b[2]} for b in bins]
        errors.append(f"{label} {100 * sum(abs(b[0] - b[1]) * b[2] for b in bins) / len(found[1].label):.1f}%")
    if not rows:
        return None
    note = (
        "How often a prediction is right when the model says how sure it is; below the dotted line it is too sure. "
        f"Expected calibration error on test: {', '.join(errors)}."
    )
    layout = {"xaxis": axis("confidence in %", range=[0, 100]), "yaxis": axis(ACCURACY, range=[0, 100])}
    return Figure("calibration", "Calibration: can its confidence be trusted?", note, traces, layout, rows)
