"""The figures of a report: plotly's JSON as plain dicts, the numbers behind each, and what it shows in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lift_ray.evaluation.metrics import GROUPS
from lift_ray.reporting.confidence import MEASURES, heavy_tuning, is_grid, sized
from lift_ray.reporting.study_files import StudyFiles, Trial, numbers
from lift_ray.terminal.tables import describe

# colours that differ for all kinds of colour vision and stand out on white and on black; symbols and dashes say the same again
STYLES = {
    "many": ("#1b7fc4", "circle", "solid"),
    "medium": ("#00996b", "square", "dash"),
    "few": ("#d55e00", "diamond", "dot"),
    "mean_class_accuracy": ("#8a63d2", "x", "dashdot"),
    "accuracy": ("#808080", "triangle-up", "longdash"),
}
COLOURS = [colour for colour, _, _ in STYLES.values()]
SYMBOLS = [symbol for _, symbol, _ in STYLES.values()]
WORDS = {"accuracy": "overall", "mean_class_accuracy": "mean class"} | {name: name for name in GROUPS}
STATES = {
    "finished": "circle",
    "pruned": "circle-open",
    "running": "triangle-up-open",
    "failed": "x",
    "infeasible": "cross",
}


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Args:
        name: of its CSV file.
        title: heading.
        note: what it shows, in words.
        traces, layout: plotly's.
        rows: the numbers behind it, all with the same keys.
    """

    name: str
    title: str
    note: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


SETTINGS = {
    "tuner.kind": "kind of tuner",
    "tuner.bottleneck": "width of the bottleneck",
    "tuner.length": "prompt length",
    "tuner.ratio": "share of weights tuned",
    "tuner.blocks": "tuned blocks",
    "loss.tau": "tau in training",
    "loss.kind": "loss",
    "optim.lr": "learning rate",
    "optim.global_batch_size": "batch size",
    "augment.patch_dropout": "patches left out",
    "augment.kind": "cropping",
    "head.kind": "kind of classifier",
    "head.init": "start of the classifier",
}


def plain(name: str) -> str:
    """A setting or metric in words."""
    return SETTINGS.get(name, name.rsplit("/", 1)[-1].rsplit(".", 1)[-1].replace("_", " "))


def spelled(name: str, between: str = " ") -> str:
    """The same, with the setting's own name in small."""
    return f"{plain(name)}{between}<span style='font-size:0.8em'>{name}</span>" if "." in name else plain(name)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a heading."""
    return {"title": {"text": title}, "automargin": True, **more}


def log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic one for positive values, numbered at powers of ten, and at 2 and 5 times these where there are few."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in powers for m in ((1, 2, 5) if high < 50 * low else (1,))]
    return axis(title, type="log", tickvals=ticks, ticktext=[short_count(v) for v in ticks])


def short_count(value: float) -> str:
    """20000 -> 20k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


ACCURACY = "accuracy in %"
HEAVY = "Does heavy fine-tuning hurt here?"


def percents(values: Any) -> list[float | None]:
    """0.4567 -> 45.67; None stays."""
    return [None if v is None or v != v else round(100 * float(v), 3) for v in values]


def cloud(trials: Sequence[Trial], x: Sequence[Any], measure: str, **more: Any) -> dict[str, Any]:
    """A point for each trial, validation accuracy upwards."""
    colour, symbol, _ = STYLES[measure]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": WORDS[measure],
        "x": list(x),
        "y": percents(numbers(trials, f"validation/{measure}")),
        "text": [tell(t) for t in trials],
        "marker": {"color": colour, "symbol": symbol, "size": 8},
        "hovertemplate": "%{y:.1f}%<br>%{text}<extra>%{fullData.name}</extra>",
        **more,
    }


def tell(trial: Trial) -> str:
    """A trial in a line."""
    values = {n: v for n, v in trial.items() if v is not None and "." in n}
    return f"trial {trial['number']}: {describe(values)}"


def measures_of(trials: Sequence[Trial], wanted: Sequence[str] = (*GROUPS, "mean_class_accuracy")) -> list[str]:
    """Those that some trial has on validation."""
    return [m for m in wanted if any(t.get(f"validation/{m}") is not None for t in trials)]


def size_figure(study: StudyFiles) -> Figure | None:
    """Accuracy against trained parameters, and the front of what no smaller trial beats."""
    trials = [t for t in study.finished if t.get("trained_parameters")]
    if len({t["trained_parameters"] for t in trials}) < 2:
        return None
    x = [t["trained_parameters"] for t in trials]
    traces = [cloud(trials, x, measure) for measure in measures_of(trials)]
    front = small_front(trials)
    traces.insert(
        0,
        front_line(
            [t["trained_parameters"] for t in front], percents(numbers(front, "validation/mean_class_accuracy"))
        ),
    )
    least = min(front, key=lambda t: t["trained_parameters"])
    most = front[-1]
    note = (
        "Each finished trial, on validation. The line is the Pareto front of mean class accuracy: no trial with fewer trained "
        f"parameters is better. It runs from {value_of(least)} with {least['trained_parameters']:,.0f} parameters to "
        f"{value_of(most)} with {most['trained_parameters']:,.0f}."
    )
    if least is most:
        note = (
            f"Each finished trial, on validation. None is better in mean class accuracy than one of the smallest: "
            f"{value_of(least)} with {least['trained_parameters']:,.0f} trained parameters."
        )
    on_front = {t["number"] for t in front}
    rows = [
        {
            "trial": t["number"],
            "trained_parameters": t["trained_parameters"],
            **{m: t.get(f"validation/{m}") for m in MEASURES},
            "on_front": t["number"] in on_front,
        }
        for t in trials
    ]
    return Figure(
        "size",
        "Accuracy against trained parameters",
        note,
        traces,
        {"xaxis": log_axis("trained parameters", x), "yaxis": axis(ACCURACY)},
        rows,
    )


def front_line(x: Sequence[float], y: Sequence[float | None]) -> dict[str, Any]:
    """A Pareto front as a trace."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": list(x),
        "y": list(y),
        "hoverinfo": "skip",
        "line": {"color": "#808080", "width": 1.5, "shape": "hv"},
    }


def value_of(trial: Trial) -> str:
    """Its mean class accuracy in words."""
    return f"{100 * trial['validation/mean_class_accuracy']:.1f}%"


def small_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that are better in mean class accuracy than every one with as few trained parameters, smallest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t["trained_parameters"], -t["validation/mean_class_accuracy"])):
        if not front or trial["validation/mean_class_accuracy"] > front[-1]["validation/mean_class_accuracy"]:
            front.append(trial)
    return front


def curve(study: StudyFiles, setting: str, name: str, title: str, note: str) -> Figure | None:
    """Accuracy of the finished trials against one number that was searched, with the mean at each value when they are few."""
    trials = [t for t in study.finished if t.get(setting) is not None]
    x = numbers(trials, setting)
    if len(np.unique(x)) < 2:
        return None
    traces, param = [], study.space.get(setting, {})
    for measure in measures_of(trials):
        traces.append(cloud(trials, x.tolist(), measure))
        y, places = numbers(trials, f"validation/{measure}"), np.unique(x)
        colour, _, dash = STYLES[measure]
        if param.get("choices") or param.get("step"):
            means = percents([y[x == place].mean() for place in places])
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": places.tolist(),
                    "y": means,
                    "showlegend": False,
                    "line": {"color": colour, "dash": dash},
                    "hoverinfo": "skip",
                }
            )
    is_log = x.min() > 0 and (param.get("log") or (param.get("choices") and x.max() >= 50 * x.min()))
    rows = [
        {"trial": t["number"], setting: t[setting], **{m: t.get(f"validation/{m}") for m in MEASURES}} for t in trials
    ]
    named = spelled(setting)
    layout = {"xaxis": log_axis(named, x.tolist()) if is_log else axis(named), "yaxis": axis(ACCURACY)}
    return Figure(name, title, note, traces, layout, rows)


def width_figures(study: StudyFiles) -> list[Figure]:
    """A curve for each number of the tuner that was searched: bottleneck, prompt length, share of weights."""
    widths = [n for n in study.settings if n.startswith(("tuner.", "extra_tuner.")) and not n.endswith("kind")]
    note = "Finished trials on validation; a line joins the means where the values are few. Other settings differ between the points."
    found = [curve(study, n, f"width-{n.replace('.', '-')}", f"How wide: {plain(n)}", note) for n in widths]
    return [figure for figure in found if figure is not None]


def tau_figure(study: StudyFiles) -> Figure | None:
    """Strength of the logit adjustment in training."""
    note = "A larger tau in training moves accuracy from the many to the few. Finished trials on validation; other settings differ too."
    return curve(study, "loss.tau", "tau", "Tau in training: how strongly to adjust", note)


def posthoc_figure(study: StudyFiles) -> Figure | None:
    """What other taus after training do to the best trial."""
    points = study.posthoc
    if len(points) < 2:
        return None
    traces = []
    for measure in [m for m in (*GROUPS, "mean_class_accuracy") if f"validation/{m}" in points[0]]:
        colour, symbol, dash = STYLES[measure]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": WORDS[measure],
                "x": [p["tau"] for p in points],
                "y": percents([p[f"validation/{measure}"] for p in points]),
                "line": {"color": colour, "dash": dash},
                "marker": {"color": colour, "symbol": symbol, "size": 8},
                "hovertemplate": "tau %{x}: %{y:.1f}%<extra>%{fullData.name}</extra>",
            }
        )
    top = max(points, key=lambda p: p["validation/mean_class_accuracy"])
    gain = f"tau {top['tau']:g} gives the best mean class accuracy, {value_of(top)}; without it it is {value_of(points[0])}."
    if top is points[0]:
        gain = f"none gives a better mean class accuracy than without, {value_of(top)}."
    note = f"The best trial, its logits adjusted again after training, which costs nothing. On validation {gain}"
    rows = [{"tau": p["tau"], **{m: p.get(f"validation/{m}") for m in MEASURES}} for p in points]
    return Figure(
        "posthoc-tau",
        "Tau after training: how strongly to adjust",
        note,
        traces,
        {"xaxis": axis("tau after training"), "yaxis": axis(ACCURACY)},
        rows,
    )


def kinds_figure(study: StudyFiles) -> Figure | None:
    """Tuner kinds as distributions of the objective."""
    metric, _ = study.objective
    trials = [t for t in study.finished if t.get("tuner.kind")]
    kinds = sorted({t["tuner.kind"] for t in trials})
    if len(kinds) < 2:
        return None
    by_kind = {kind: [t for t in trials if t["tuner.kind"] == kind] for kind in kinds}
    kinds.sort(key=lambda kind: -float(np.median(numbers(by_kind[kind], metric))))
    scale, title = scale_of(metric)
    traces = [
        {
            "type": "box",
            "name": f"{kind} ({len(by_kind[kind])})",
            "x": (scale * numbers(by_kind[kind], metric)).round(4).tolist(),
            "orientation": "h",
            "boxpoints": "all",
            "jitter": 0.4,
            "pointpos": 0,
            "text": [tell(t) for t in by_kind[kind]],
            "fillcolor": "rgba(0,0,0,0)",
            "line": {"color": "#808080", "width": 1},
            "marker": {"color": COLOURS[0], "size": 6},
            "hovertemplate": "%{x:.2f}<br>%{text}<extra></extra>",
            "showlegend": False,
        }
        for kind in reversed(kinds)
    ]
    note = (
        f"Finished trials of each kind on validation (their number in brackets), best median first: {kinds[0]}. A kind that was "
        "tried more often also had more chances."
    )
    rows = [
        {"tuner.kind": t["tuner.kind"], "trial": t["number"], metric: t[metric]}
        for kind in kinds
        for t in by_kind[kind]
    ]
    layout = {"xaxis": axis(title), "yaxis": axis(""), "height": 160 + 52 * len(kinds)}
    return Figure("kinds", "Tuner kinds", note, traces, layout, rows)


def scale_of(metric: str) -> tuple[float, str]:
    """What to multiply a metric with, and what to call it: accuracies are shown in percent."""
    name = metric.rsplit("/", 1)[-1]
    if "/" not in metric or name == "loss":
        return 1.0, name.replace("_", " ")
    return 100.0, f"{WORDS[name]} accuracy in %" if name in WORDS else f"{name.replace('_', ' ')} in %"


def heavy_figure(study: StudyFiles) -> Figure | None:
    """Few-shot accuracy against trained parameters, with the fitted line's interval."""
    heavy = heavy_tuning(study)
    if heavy.curve is None:
        return None
    x, low, high = heavy.curve
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": [*x.tolist(), *x[::-1].tolist()],
        "y": percents([*high, *low[::-1]]),
        "fill": "toself",
        "fillcolor": "rgba(213,94,0,0.18)",
        "line": {"width": 0},
        "name": "95% interval",
        "hoverinfo": "skip",
    }
    counted = {t["number"] for t in heavy.trials}
    others = [t for t in sized(study) if t["number"] not in counted]
    points = cloud(heavy.trials, [t["trained_parameters"] for t in heavy.trials], "few", name="best of its size")
    faint = cloud(
        others,
        [t["trained_parameters"] for t in others],
        "few",
        name="others",
        opacity=0.7,
        marker={"color": "#808080", "symbol": "diamond-open", "size": 7},
    )
    rows = [
        {
            "trial": t["number"],
            "trained_parameters": t["trained_parameters"],
            "few": t["validation/few"],
            "best_of_its_size": t["number"] in counted,
        }
        for t in sized(study)
    ]
    note = heavy.answer
    if not is_grid(study):
        note += (
            " They differ in other settings too: a grid over the size answers most cleanly (search_spaces/heavy.yaml)."
        )
    return Figure(
        "heavy",
        HEAVY,
        note,
        [band, *([faint] if others else []), points],
        {"xaxis": log_axis("trained parameters", x.tolist()), "yaxis": axis("few-shot accuracy in %")},
        rows,
    )
