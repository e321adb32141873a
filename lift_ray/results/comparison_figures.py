"""Figures that hold models against each other on the test split, with intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from lift_ray.results.evidence import Interval, accuracy_intervals
from lift_ray.results.figures import ACCURACY, STYLES, WORDS, Figure, axis, percents
from lift_ray.results.metrics import GROUPS
from lift_ray.results.studies import BEST, Answers, StudyFiles

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
        row for study in studies if (found := study.entry(BEST)) for row in _rows(study, "study", study.name, *found)
    ]
    note = "The best of each study on its test split. Bars: 95% intervals by bootstrap over test images."
    return _dots("studies", "The studies side by side", note, "study", rows)


def _rows(
    study: StudyFiles, by: str, name: str, figures: dict[str, Any], answers: Answers | None
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
        traces.append({
            "type": "scatter", "mode": "markers", "name": WORDS[measure], "x": percents([row["test"] for row in here]),
            "y": [round(names.index(row[by]) + shift, 3) for row in here], "text": [row[by] for row in here],
            "marker": {"color": colour, "symbol": symbol, "size": 9},
            "error_x": {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 0,
                        "array": percents([row["high"] - row["test"] for row in here]),
                        "arrayminus": percents([row["test"] - row["low"] for row in here])},
            "hovertemplate": "%{text}: %{x:.1f}%<extra>%{fullData.name}</extra>",
        })  # fmt: skip
    ticks = ["<br>".join(textwrap.wrap(text, NAME_WIDTH)) for text in names]
    layout = {
        "xaxis": axis(ACCURACY), "height": 120 + 62 * len(names),
        "yaxis": axis("", tickvals=list(range(len(names))), ticktext=ticks, range=[len(names) - 0.5, -0.5], showgrid=False),
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": i - 0.5, "y1": i - 0.5,
                    "line": {"color": "#808080", "width": 0.5}} for i in range(1, len(names))],
    }  # fmt: skip
    return Figure(name, title, note, traces, layout, rows)
