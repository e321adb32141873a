"""Figures on single classes: images, accuracy by frequency, confusions."""

from __future__ import annotations

from typing import Any

import numpy as np

from lift_ray.epoch_metrics import GROUPS
from lift_ray.reporting.confusion import Confusions
from lift_ray.reporting.figures.charts import (
    ACCURACY,
    STYLES,
    Figure,
    axis,
    log_axis,
    percents,
    plot_text,
    scatter,
)
from lift_ray.reporting.study_files import StudyFiles
from lift_ray.text import count

MOST_CLASSES = 40  # of a heat map that stays readable
MOST_PAIRS = 15
NAME_LENGTH = 18  # of a class on an axis
ROW_PX = 17
RIGHT, WRONG = "27,127,196", "213,94,0"  # blue and orange, with opacity on either theme


def images_figure(study: StudyFiles) -> Figure | None:
    """Training images of each class, sorted, by group."""
    counts, groups = np.array(study.class_counts), study.groups
    if not len(counts) or counts.max() < 1:
        return None
    order = sorted(range(len(counts)), key=lambda k: (GROUPS.index(groups[k]), -counts[k], k))
    traces = []
    for group in GROUPS:
        places = [place for place, k in enumerate(order) if groups[k] == group]
        if not places:
            continue
        color = STYLES[group][0]
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        # two points for each class, so that a group of one class has a width
        traces.append(
            scatter(
                "lines",
                name=f"{group} ({len(places)})",
                x=[place + side for place in places for side in (0.5, 1.5)],
                y=[max(int(counts[order[place]]), 0.5) for place in places for _ in range(2)],
                text=[
                    f"{plot_text(study.class_names[order[p]])}: {count(int(counts[order[p]]), 'image')}"
                    for p in places
                    for _ in range(2)
                ],
                fill="tozeroy",
                fillcolor=f"rgba({red},{green},{blue},0.5)",
                line={"color": color, "width": 1},
                hovertemplate="%{text}<extra></extra>",
            )
        )
    rules = ", ".join(f"{group} {study.class_groups.rules[group]}" for group in GROUPS)
    least = int(counts.min())
    spread = f"{least:,} to {counts.max():,} training images" + (
        f" (imbalance {counts.max() / least:,.0f})" if least else ""
    )
    note = f"{count(len(counts), 'class')} with {spread}. Groups by number of training images: {rules}."
    rows = [
        {"rank": i + 1, "class": study.class_names[k], "group": str(groups[k]), "train_images": int(counts[k])}
        for i, k in enumerate(order)
    ]
    vertical = log_axis("training images", [max(least, 1), int(counts.max())])
    low, high = np.log10(max(least, 1)) - 0.3, np.log10(counts.max()) + 0.1
    layout = {"xaxis": axis("class, by group and number of images"), "yaxis": {**vertical, "range": [low, high]}}
    return Figure("class-images", "Images per class", note, traces, layout, rows)


def classes_figure(study: StudyFiles) -> Figure | None:
    """Accuracy of each class against its number of training images."""
    if study.measured is None or not study.class_counts:
        return None
    split, predictions = study.measured
    counts, groups = np.array(study.class_counts), study.groups
    total = np.bincount(predictions.label, minlength=len(counts))
    correct = np.bincount(predictions.label[predictions.hits], minlength=len(counts))
    seen = np.flatnonzero(total)
    traces = []
    for group in [g for g in GROUPS if (groups[seen] == g).any()]:
        here = seen[groups[seen] == group]
        color, symbol, _ = STYLES[group]
        traces.append(
            scatter(
                "markers",
                name=group,
                x=counts[here].tolist(),
                y=percents(correct[here] / total[here]),
                text=[f"{plot_text(study.class_names[k])} ({correct[k]} of {total[k]})" for k in here],
                marker={"color": color, "symbol": symbol, "size": 7, "opacity": 0.75},
                hovertemplate="%{text}<br>%{x} training images: %{y:.0f}%<extra></extra>",
            )
        )
    never = int((correct[seen] == 0).sum())
    rules = ", ".join(f"{group} {study.class_groups.rules[group]}" for group in GROUPS)
    note = (
        f"Each point is a class; {split} accuracy of the best settings. Classes with zero accuracy: {never} of {len(seen)}. "
        f"Groups by number of training images: {rules}."
    )
    rows = [
        {
            "class": study.class_names[k],
            "group": str(groups[k]),
            "train_images": int(counts[k]),
            f"{split.replace('-', '_')}_images": int(total[k]),
            "correct": int(correct[k]),
        }
        for k in seen
    ]
    layout = {
        "xaxis": log_axis("training images of the class", np.maximum(counts[seen], 1).tolist()),
        "yaxis": axis(f"{split} {ACCURACY}", range=[-4, 104]),
    }
    return Figure("classes", "Accuracy by class frequency", note, traces, layout, rows)


def confusion_figure(study: StudyFiles) -> Figure | None:
    """Fraction of each class that is classified as each other class, and the most confused pairs."""
    split, predictions = (study.estimate, study.out_of_fold) if study.out_of_fold else study.measured or ("", None)
    if predictions is None or not study.class_names:
        return None
    found = Confusions.of(predictions.label, predictions.predicted, study.class_names)
    pairs = found.most_confused(MOST_PAIRS)
    counts = np.array(study.class_counts)
    shown = sorted(found.classes(MOST_CLASSES), key=lambda k: (GROUPS.index(study.groups[k]), -counts[k]))
    note = (
        f"{count(len(predictions.label), f'{split} prediction')} of the best settings: rows are true classes, columns predicted "
        "classes, both from many to few training images. Blue is right, orange wrong; the stronger the color, the larger the "
        "fraction of the true class."
    )
    if len(shown) < len(study.class_names):
        note += (
            f" Shown are the {len(shown)} most confused of {len(study.class_names):,} classes; the CSV file has all."
        )
    table = [
        {
            "true class": pair["true"],
            "predicted as": pair["predicted"],
            "images": f"{pair['count']:,}",
            "of the class": f"{100 * pair['fraction']:.0f}%",
        }
        for pair in pairs
    ]
    return Figure(
        "confusion",
        "Confusions between classes",
        note,
        _heat_map(found, shown),
        _square(study.class_names, shown),
        found.rows(),
        table=table,
        caption="Most confused pairs",
    )


def _heat_map(found: Confusions, shown: list[int]) -> list[dict[str, Any]]:
    """Return a trace of the right predictions, on the diagonal, and one of the wrong ones; each has its own scale of colors."""
    matrix, totals = found.matrix(shown), found.totals[shown]
    names = [plot_text(found.names[k]) for k in shown]
    diagonal, places = np.eye(len(shown), dtype=bool), [str(i) for i in range(len(shown))]
    wrong = np.where(diagonal, 0, matrix) / np.maximum(totals, 1)[:, None]
    highest, traces = max(1.0, 100 * float(wrong.max())), []
    for color, here in ((RIGHT, diagonal), (WRONG, ~diagonal)):
        cells = (matrix > 0) & here
        traces.append(
            {
                "type": "heatmap",
                "x": places,
                "y": places,
                "z": [percents(row) for row in np.where(cells, matrix / np.maximum(totals, 1)[:, None], np.nan)],
                "text": [
                    [
                        f"{a}<br>predicted: {b}<br>{n} of {count(int(of), 'image')}"
                        for b, n in zip(names, row, strict=True)
                    ]
                    for a, row, of in zip(names, matrix, totals, strict=True)
                ],
                "zmin": 0,
                "zmax": 100 if here is diagonal else highest,
                "colorscale": [[0, f"rgba({color},0.08)"], [1, f"rgba({color},1)"]],
                "showscale": False,
                "hoverongaps": False,
                "hovertemplate": "%{text} (%{z:.0f}%)<extra></extra>",
            }
        )
    return traces


def _square(names: list[str], shown: list[int]) -> dict[str, Any]:
    """Return the layout. The axes show as many class names as fit: they are aliases of the positions, because names may be equal."""
    places = [str(i) for i in range(len(shown))]
    one = {
        "type": "category",
        "categoryarray": places,
        "categoryorder": "array",
        "labelalias": {place: plot_text(_short(names[k])) for place, k in zip(places, shown, strict=True)},
        "showgrid": False,
        "nticks": 0,
    }
    return {
        "xaxis": axis("predicted class", **one, tickangle=-90),
        "yaxis": axis("true class", **one, autorange="reversed"),
        "height": 220 + ROW_PX * max(len(shown), 8),
    }


def _short(name: str) -> str:
    """Return a class name that fits on an axis; both ends stay, because names often differ in one of them."""
    end = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - end - 1]}\u2026{name[-end:]}"
