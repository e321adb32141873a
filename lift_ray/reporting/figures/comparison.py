"""Figures that compare models: accuracy with intervals, calibration."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from lift_ray.epoch_metrics import GROUPS, MAIN
from lift_ray.reporting.confidence import Interval, accuracy_intervals, reliability
from lift_ray.reporting.figures.charts import (
    ACCURACY,
    COLORS,
    STYLES,
    SYMBOLS,
    WORDS,
    Figure,
    axis,
    diagonal,
    percents,
    plot_text,
    scatter,
)
from lift_ray.reporting.study_files import BEST_FOUND, ZERO_SHOT, Predictions, StudyFiles
from lift_ray.text import count

SHOWN = (MAIN, *GROUPS)
# vertical distance between the measures of a model, where models are 1 apart: no point hides another
BETWEEN = 0.19
NAME_WIDTH = 18  # letters in a line, which leaves room for the points on a phone


def compared_figure(study: StudyFiles) -> Figure | None:
    """Test accuracy of each compared model."""
    rows = [
        row
        for figures, predictions in zip(study.compared, study.predictions, strict=True)
        for row in _rows(study, "model", figures["label"], figures, predictions)
    ]
    note = "Test accuracy, held out from the search. Bars: 95% bootstrap intervals over test images."
    if study.choice.baseline:
        note = f"The baseline {study.choice.baseline} is best. {note}"
    return _dots("compared", "Best settings compared with the baselines", note, "model", rows)


def studies_figure(studies: Sequence[StudyFiles]) -> Figure | None:
    """Test accuracy of the best settings of each study."""
    rows = [row for study in studies if (found := study.winner) for row in _rows(study, "study", study.name, *found)]
    note = "Test accuracy, held out from each search. Bars: 95% bootstrap intervals over test images."
    return _dots("studies", "Best settings of each study", note, "study", rows)


def _rows(
    study: StudyFiles, by: str, name: str, figures: dict[str, Any], predictions: Predictions | None
) -> list[dict[str, Any]]:
    spread = accuracy_intervals(predictions, study.groups) if predictions and study.class_counts else {}
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
        color, symbol, _ = STYLES[measure]
        shift = (k - (len(measures) - 1) / 2) * BETWEEN
        traces.append(
            scatter(
                "markers",
                name=WORDS[measure],
                x=percents([row["test"] for row in here]),
                y=[round(names.index(row[by]) + shift, 3) for row in here],
                text=[plot_text(row[by]) for row in here],
                marker={"color": color, "symbol": symbol, "size": 9},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "color": color,
                    "thickness": 1.5,
                    "width": 0,
                    "array": percents([row["high"] - row["test"] for row in here]),
                    "arrayminus": percents([row["test"] - row["low"] for row in here]),
                },
                hovertemplate="%{text}: %{x:.1f}%<extra>%{fullData.name}</extra>",
            )
        )
    ticks = ["<br>".join(map(plot_text, textwrap.wrap(text, NAME_WIDTH))) for text in names]
    layout = {
        "xaxis": axis(f"test {ACCURACY}"),
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


def calibration_figure(study: StudyFiles) -> Figure | None:
    """Reliability diagram of the best settings and of zero-shot."""
    traces = [diagonal("perfect", [0, 100])]
    rows, errors = [], []
    split, best = study.measured or ("test", None)
    plain = [(f["label"], p) for f, p in zip(study.compared, study.predictions, strict=True) if split == "test"]
    shown = [(BEST_FOUND, best), *((label, p) for label, p in plain if label.startswith(ZERO_SHOT))]
    for (label, predictions), place in zip(shown, (0, 2, 4, 3, 1), strict=False):  # as many as there are colors
        if predictions is None:
            continue
        bins = reliability(predictions)
        traces.append(
            scatter(
                "lines+markers",
                name=plot_text(label),
                x=percents([b[0] for b in bins]),
                y=percents([b[1] for b in bins]),
                text=[f"{count(b[2], 'image')}" for b in bins],
                marker={"color": COLORS[place], "symbol": SYMBOLS[place], "size": 8},
                line={"color": COLORS[place]},
                hovertemplate="confidence %{x:.0f}%, accuracy %{y:.0f}%<br>%{text}<extra>%{fullData.name}</extra>",
            )
        )
        rows += [{"model": label, "confidence": b[0], "accuracy": b[1], "images": b[2]} for b in bins]
        errors.append(f"{label} {100 * sum(abs(b[0] - b[1]) * b[2] for b in bins) / len(predictions.label):.1f}%")
    if not rows:
        return None
    note = (
        f"{split.capitalize()} accuracy of predictions at each level of confidence; below the dotted line the model is overconfident. "
        f"Expected calibration error: {', '.join(errors)}."
    )
    layout = {"xaxis": axis("confidence (%)", range=[0, 100]), "yaxis": axis(f"{split} {ACCURACY}", range=[0, 100])}
    return Figure("calibration", "Calibration: can the confidence be trusted?", note, traces, layout, rows)
