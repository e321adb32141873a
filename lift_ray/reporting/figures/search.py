"""Figures on the search itself: history, parallel coordinates, setting importance, trade-off, cost, scaling law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lift_ray.reporting.figures import charts
from lift_ray.reporting.figures.charts import (
    COLORS,
    STATES,
    Figure,
    axis,
    describe_trial,
    front_line,
    plain,
    plot_text,
    scale_of,
    scatter,
    spelled,
)
from lift_ray.reporting.scaling_law import Law, Point
from lift_ray.reporting.study_files import StudyFiles, Trial, numbers
from lift_ray.terminal.tables import short

MOST_LABELS = 5  # that fit on a phone
# worst to best: from blue to red and also from dark to bright
SHADES = ("#0072b2", "#4aa3a0", "#9aa33f", "#e08214", "#c2410c")

Axis = tuple[list[float | None], list[tuple[float, str, str]]]
"""Position of each trial's value in [0, 1] (None if it has none), and (position, label, side) of a few values."""


def history_figure(study: StudyFiles) -> Figure | None:
    """Objective of each trial in order of start, and the best so far."""
    metric, _ = study.objective
    trials = [t for t in study.trials if t.get(metric) is not None]
    if not trials:
        return None
    scale, title = scale_of(metric)
    traces, shown = [], study.drawn(trials)
    for state in [s for s in STATES if any(t["state"] == s for t in shown)]:
        here = [t for t in shown if t["state"] == state]
        traces.append(
            scatter(
                "markers",
                name="stopped early" if state == "pruned" else state,
                x=[t["number"] for t in here],
                y=(scale * numbers(here, metric)).round(4).tolist(),
                text=[describe_trial(t) for t in here],
                marker={
                    "symbol": STATES[state],
                    "size": 8,
                    "color": COLORS[0] if state == "finished" else COLORS[4],
                },
                hovertemplate="%{y:.2f}<br>%{text}<extra>%{fullData.name}</extra>",
            )
        )
    traces.append(
        scatter(
            "lines",
            name="best so far",
            x=[t["number"] for t in study.finished],
            y=(scale * best_so_far(study)).round(4).tolist(),
            line={"shape": "hv", "color": COLORS[2]},
            hoverinfo="skip",
        )
    )
    note = "Last validation value of each trial, in order of start."
    if (best := study.best_trial) and not study.is_best_on_top:
        note += f" Trial {best['number']} won on all folds."
    elif best:
        after = sum(t["number"] > best["number"] for t in study.trials)
        later = "; the trial after it is not better" if after == 1 else f"; none of the {after} later trials is better"
        note += f" Trial {best['number']} is the best{later if after else ''}."
    rows = [{"trial": t["number"], "state": t["state"], "epochs": t.get("epochs"), metric: t[metric]} for t in trials]
    layout = {"xaxis": axis("trial", rangemode="tozero"), "yaxis": axis(title)}
    return Figure("history", "Search history", note, traces, layout, rows)


def best_so_far(study: StudyFiles) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the best objective among the finished trials up to each of them."""
    metric, mode = study.objective
    best = np.maximum if mode == "max" else np.minimum
    return best.accumulate(numbers(study.finished, metric))


def parallel_figure(study: StudyFiles) -> Figure | None:
    """Parallel coordinates with a line for each trial; the axes are horizontal, so that a phone can show them."""
    metric, mode = study.objective
    trials = [t for t in study.trials if t.get(metric) is not None]
    if len(trials) < 2 or not study.settings:
        return None
    names = [*study.settings, metric]
    axes = {name: positions(trials, name, study.space.get(name, {})) for name in names}
    order = np.argsort(np.argsort(numbers(trials, metric) * (1 if mode == "max" else -1)))
    shades = zip(trials, order * len(SHADES) // len(trials), strict=True)
    traces = _polylines(axes, np.array([k if t["number"] in study.drawn_numbers else -1 for t, k in shades]))
    note = (
        "Each line is a trial; each row is a setting, from its lowest to its highest value. A setting matters if the strong "
        "lines of the best fifth meet at one value. Lines have a gap at settings that a trial does not have."
    )
    rows = [{"trial": t["number"], "state": t["state"], **{n: t.get(n) for n in names}} for t in trials]
    layout = {
        "xaxis": {"visible": False, "range": [-0.06, 1.06]},
        "yaxis": axis("", autorange="reversed", showticklabels=False),
        "annotations": _labels(axes),
        "height": 150 + 64 * len(names),
    }
    return Figure("parallel", "All settings of all trials", note, traces, layout, rows)


def _polylines(axes: Mapping[str, Axis], shade: np.ndarray[Any, np.dtype[np.int64]]) -> list[dict[str, Any]]:
    """Return a trace for the trials of each shade, the best trials on top; -1 is not drawn."""
    traces = []
    for k, color in enumerate(SHADES):
        words = {0: "worst fifth", len(SHADES) - 1: "best fifth"}
        here = np.flatnonzero(shade == k)
        if len(here):
            traces.append(
                scatter(
                    "lines+markers",
                    x=[x for i in here for x in (*(places[i] for places, _ in axes.values()), None)],
                    y=[y for _ in here for y in (*axes, None)],
                    name=words.get(k, ""),
                    connectgaps=False,
                    showlegend=k in words,
                    line={"color": color, "width": 1 + k / 2},
                    marker={"size": 4},
                    opacity=0.35 + 0.13 * k,
                    hoverinfo="skip",
                )
            )
    return traces


def _labels(axes: Mapping[str, Axis]) -> list[dict[str, Any]]:
    """Return the annotations of the horizontal axes: the setting above each, some of its values below."""
    names = [
        {
            "x": 0,
            "y": name,
            "text": spelled(name).replace(plain(name), f"<b>{plain(name)}</b>", 1),
            "showarrow": False,
            "yshift": 13,
            "xanchor": "left",
        }
        for name in axes
    ]
    values = [
        {
            "x": at,
            "y": name,
            "text": plot_text(text),
            "showarrow": False,
            "yshift": -12,
            "xanchor": side,
            "font": {"size": 10},
        }
        for name, (_, shown) in axes.items()
        for at, text, side in shown
    ]
    return names + values


def positions(trials: Sequence[Trial], name: str, param: Mapping[str, Any]) -> Axis:
    """Return the axis of a setting or metric in the parallel coordinates."""
    values = [t.get(name) for t in trials]
    if param.get("choices") or any(isinstance(v, str) for v in values):
        options = [str(v) for v in param.get("choices") or sorted({str(v) for v in values if v is not None})]
        at = {option: i / max(1, len(options) - 1) for i, option in enumerate(options)}
        sides = {0.0: "left", 1.0: "right"}
        shown = at if len(at) <= MOST_LABELS else {options[0]: 0.0, options[-1]: 1.0}
        return [None if v is None else at.get(str(v)) for v in values], [
            (p, o, sides.get(p, "center")) for o, p in shown.items()
        ]
    raw = numbers(trials, name)
    if np.isnan(raw).all():  # no trial has it: its `when` never held
        return [None] * len(raw), []
    line = np.log(raw) if param.get("log") else raw
    low, high = np.nanmin(line), np.nanmax(line)
    where = (line - low) / (high - low) if high > low else np.where(np.isnan(line), np.nan, 0.5)
    ends = [(0.0, short(float(np.nanmin(raw))), "left"), (1.0, short(float(np.nanmax(raw))), "right")]
    return [None if p != p else float(p) for p in where], ends


def importance_figure(
    study: StudyFiles, importances: Mapping[str, float], within: Mapping[str, float]
) -> Figure | None:
    """Importance of each setting for the objective.

    Args:
        importances: of the settings that all trials have.
        within: of the settings that only some trials have, among those trials.
    """
    if not importances:
        return None
    within = {name: value for name, value in within.items() if name not in importances}
    names = sorted(importances, key=lambda n: importances[n])
    some = sorted(within, key=lambda n: within[n])
    traces = []
    for label, values, order, place in (
        ("all trials", importances, names, 0),
        ("trials that have the setting", within, some, 2),
    ):
        if order:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": label,
                    "y": [spelled(n, "<br>") for n in order],
                    "x": charts.percents([values[n] for n in order]),
                    "marker": {"color": COLORS[place]},
                    "hovertemplate": "%{x:.0f}%<extra></extra>",
                }
            )
    note = (
        "Importance by PED-ANOVA (arXiv 2304.10255), which compares the settings of the better trials with those of all trials. "
        f"Most important here: {plain(names[-1])}. The estimate is rough if there are few trials."
    )
    if some:
        note += " A setting that only some trials have is ranked among those trials."
    order = [spelled(n, "<br>") for n in (*some, *names)]
    layout = {
        "xaxis": axis(f"importance{charts.PERCENT}", rangemode="tozero"),
        "height": 140 + 44 * len(order),
        "yaxis": axis("", categoryorder="array", categoryarray=order),
    }
    rows = [
        {"setting": n, "importance": values[n], "among": among}
        for values, among, order in ((importances, "all trials", names), (within, "trials that have it", some))
        for n in reversed(order)
    ]
    return Figure("importance", "Setting importance", note, traces, layout, rows)


def pareto_figure(study: StudyFiles) -> Figure | None:
    """First two objectives against each other, with the Pareto front over all objectives from study.json."""
    (first, first_mode), *others = study.objectives.items()
    trials = [t for t in study.finished if all(t.get(metric) is not None for metric in study.objectives)]
    if not others or not trials:
        return None
    second, second_mode = others[0]
    on_front = {row["trial"] for row in study.about.get("pareto", [])}
    (y_scale, y_title), (x_scale, x_title) = scale_of(first), scale_of(second)
    x, y = x_scale * numbers(trials, second), y_scale * numbers(trials, first)
    traces = []
    for is_on, label, place in ((False, "dominated", 4), (True, "Pareto-optimal", 2)):
        here = [
            i for i, t in enumerate(trials) if t["number"] in study.drawn_numbers and (t["number"] in on_front) == is_on
        ]
        if here:
            traces.append(
                scatter(
                    "markers",
                    name=label if on_front else "finished",
                    x=x[here].tolist(),
                    y=y[here].round(4).tolist(),
                    text=[describe_trial(trials[i]) for i in here],
                    marker={"color": COLORS[place], "symbol": charts.SYMBOLS[place], "size": 9},
                    hovertemplate="%{y:.2f} at %{x:,.4g}<br>%{text}<extra>%{fullData.name}</extra>",
                )
            )
    if len(others) == 1 and on_front:
        line = sorted((i for i, t in enumerate(trials) if t["number"] in on_front), key=lambda i: x[i])
        shape = {"shape": "hv" if second_mode == "min" else "vh"}
        trace = front_line(x[line].tolist(), y[line].tolist())
        traces.insert(0, trace | {"line": trace["line"] | shape})
    better = {"max": "higher is better", "min": "lower is better"}
    y_name, x_name = (title.removesuffix(charts.PERCENT) for title in (y_title, x_title))
    optimal = "1 trial is" if len(on_front) == 1 else f"{len(on_front)} trials are"
    note = f"Finished trials: {y_name} ({better[first_mode]}) against {x_name} ({better[second_mode]}). " + (
        f"{optimal} Pareto-optimal: no other trial is as good in every objective and better in one."
        if on_front
        else "The Pareto front is computed when the search ends."
    )
    if len(others) > 1:
        note += f" The front is over {len(study.objectives)} objectives; the data below has all of them."
    rows = [
        {"trial": t["number"], "on_front": t["number"] in on_front, **{m: t[m] for m in study.objectives}}
        for t in trials
    ]
    is_log = x.min() > 0 and x.max() >= 50 * x.min()
    layout = {"xaxis": charts.log_axis(x_title, x.tolist()) if is_log else axis(x_title), "yaxis": axis(y_title)}
    return Figure("pareto", "Trade-off between objectives", note, traces, layout, rows)


def worker_hours(trials: Sequence[Trial]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the hours that each trial trained and evaluated, on each of its workers."""
    seconds = np.nan_to_num(numbers(trials, "train_s")) + np.nan_to_num(numbers(trials, "evaluate_s"))
    hours: np.ndarray[Any, np.dtype[np.float64]] = seconds / 3600
    return hours


def unit_of(study: StudyFiles) -> tuple[int, str]:
    """Return the number of devices that a trial holds, and the unit of device time: GPU-hours or CPU-hours."""
    if each := study.about.get("each_trial"):
        return (
            (each["workers"] * each["gpus"], "GPU-hours")
            if each["gpus"]
            else (each["workers"] * each["cpus"], "CPU-hours")
        )
    scale = study.about.get("space", {}).get("scale", {})  # of an older search, whose space.json lacks each_trial
    nodes = study.about.get("machine", {}).get("nodes", [])
    gpu = scale.get("use_gpu", "auto")
    on_gpu = any(node.get("GPU", 0) > 0 for node in nodes) if gpu == "auto" else bool(gpu)
    workers = int(scale.get("workers_per_trial", 1))
    return (workers, "GPU-hours") if on_gpu else (workers * int(scale.get("cpus_per_worker", 1)), "CPU-hours")


def spent_on(study: StudyFiles) -> tuple[np.ndarray[Any, np.dtype[np.float64]], str]:
    """Return the cumulative device time up to each trial, in hours, or in minutes if the total is under an hour; and the unit."""
    devices, unit = unit_of(study)
    hours: np.ndarray[Any, np.dtype[np.float64]] = devices * np.cumsum(worker_hours(study.trials))
    return (60 * hours, unit.replace("hours", "minutes")) if not len(hours) or hours[-1] < 1 else (hours, unit)


def by_the_clock(study: StudyFiles) -> dict[int, float]:
    """Return the minutes from the start of the first trial to the end of each, by number; empty if they were not recorded."""
    began = [t["began_at"] for t in study.trials if t.get("began_at")]
    return {t["number"]: (t["ended_at"] - min(began)) / 60 for t in study.trials if began and t.get("ended_at")}


def cost_figure(study: StudyFiles) -> Figure | None:
    """Best value so far against the device time spent on trials."""
    metric, _ = study.objective
    finished = study.finished
    if not finished:
        return None
    spent, unit = spent_on(study)
    at = {t["number"]: round(float(h), 4) for t, h in zip(study.trials, spent, strict=True)}
    scale, title = scale_of(metric)
    so_far = scale * best_so_far(study)
    x = [at[t["number"]] for t in finished]
    is_better = np.diff(so_far, prepend=np.nan) != 0
    points = [i for i, t in enumerate(finished) if is_better[i] or t["number"] in study.drawn_numbers]
    traces = [
        scatter(
            "lines+markers",
            x=[x[i] for i in points],
            y=so_far[points].round(4).tolist(),
            showlegend=False,
            line={"shape": "hv", "color": COLORS[0]},
            marker={"size": 6},
            text=[describe_trial(finished[i]) for i in points],
            hovertemplate="after %{x:.2f} " + unit + ": %{y:.2f}<extra></extra>",
        )
    ]
    clock = by_the_clock(study)
    rows = [
        {
            "trial": t["number"],
            f"{unit} so far": h,
            "minutes by the clock": clock.get(t["number"]),
            f"best {metric} so far": float(b) / scale,
        }
        for t, h, b in zip(finished, x, so_far, strict=True)
    ]
    layout = {"xaxis": axis(f"{unit} spent on trials", rangemode="tozero"), "yaxis": axis(title)}
    return Figure("cost", "Cost of the search", cost_in_words(study), traces, layout, rows)


def cost_in_words(study: StudyFiles) -> str:
    """Return the device time in total and up to the best trial, and the training speed, in words."""
    spent, unit = spent_on(study)
    best, total, clock = study.best_trial, float(spent[-1]) if len(spent) else 0.0, by_the_clock(study)
    words = f"All trials together took {total:.2g} {unit}."
    if best is not None:
        until = float(spent[[t["number"] for t in study.trials].index(best["number"])])
        minutes = clock.get(best["number"])
        words += f" The best trial was found after {until:.2g} {unit}"
        words += f" ({minutes:.1f} minutes of wall-clock time)." if minutes else "."
    speed = numbers(study.trials, "train/images_per_s")
    if not np.isnan(speed).all():
        words += f" Median training speed of a trial: {np.nanmedian(speed):,.0f} images/s."
    times = study.about.get("time_s", {})
    if "total" in times:
        total, last = (times.get(name, 0.0) / 60 for name in ("total", "final comparison"))
        apart = max(clock.values(), default=0.0)
        if apart > total:  # the search was resumed: `times` covers its last start only
            words += f" The last trial ended {apart:.1f} minutes after the first began; the final comparison took {last:.1f} minutes."
        else:
            words += f" The whole search took {total:.1f} minutes, including {last:.1f} for the final comparison."
    return words


def scaling_figure(study: StudyFiles, law: Law) -> Figure | None:
    """Predicted against measured accuracy of the fitted trials and of the larger, held-out trials."""
    if not law.points:
        return None
    ends = [min(p.found for p in law.points), max(p.found for p in law.points)]
    points = [p for p in law.points if p.trial["number"] in study.drawn_numbers]
    traces = [
        _predicted("fitted", [p for p in points if not p.held_out], 0),
        _predicted("held out", [p for p in points if p.held_out], 2),
        charts.diagonal("perfect prediction", charts.percents(ends)),
    ]
    rows = [
        {
            "trial": p.trial["number"],
            **p.scales,
            "found": p.found,
            "predicted": p.predicted.value,
            "low": p.predicted.low,
            "high": p.predicted.high,
            "held_out": p.held_out,
        }
        for p in law.points
    ]
    note = "The figure shows the predictions of the law fitted to the smaller trials, with 95% intervals."
    layout = {"xaxis": axis(f"measured {charts.ACCURACY}"), "yaxis": axis(f"predicted {charts.ACCURACY}")}
    return Figure("scaling", "Scaling law: predicted and measured accuracy", note, traces, layout, rows)


def _predicted(label: str, points: Sequence[Point], place: int) -> dict[str, Any]:
    """Return a trace of predicted against measured accuracy, with 95% intervals."""
    color = COLORS[place]
    return scatter(
        "markers",
        name=label,
        x=charts.percents([p.found for p in points]),
        y=charts.percents([p.predicted.value for p in points]),
        text=[describe_trial(p.trial) for p in points],
        marker={"color": color, "symbol": charts.SYMBOLS[place], "size": 9},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [100 * (p.predicted.high - p.predicted.value) for p in points],
            "arrayminus": [100 * (p.predicted.value - max(0.0, p.predicted.low)) for p in points],
            "color": color,
            "thickness": 1,
        },
        hovertemplate="measured %{x:.1f}%, predicted %{y:.1f}%<br>%{text}<extra>%{fullData.name}</extra>",
    )
