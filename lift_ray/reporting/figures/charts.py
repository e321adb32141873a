"""Figures of a report: Plotly's JSON as plain dicts, the data behind each figure, and a note in words.

The dicts are drawn by plotly.js as they are. `plotly.graph_objects` is left to the tests, which validate the dicts with it: its
import takes longer than making the page, and it adds its default template to each figure.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lift_ray.epoch_metrics import (
    ACCURACIES,
    GROUPS,
    LOSSES,
    MAIN,
    MAIN_METRIC,
    POSTHOC_OPTIMISM,
    POSTHOC_TAU,
    TRAINED_PARAMETERS,
)
from lift_ray.reporting.confidence import (
    FEWEST_POINTS,
    FEWEST_SIZES,
    heavy_tuning,
    is_grid,
    regression_intervals,
    sized,
)
from lift_ray.reporting.study_files import StudyFiles, Trial, numbers
from lift_ray.terminal.tables import HEADINGS, describe
from lift_ray.text import printable

# colors that are distinct for all kinds of color vision, on white and on black; symbols and dashes repeat the distinction
STYLES = {
    "many": ("#1b7fc4", "circle", "solid"),
    "medium": ("#00996b", "square", "dash"),
    "few": ("#d55e00", "diamond", "dot"),
    MAIN: ("#8a63d2", "x", "dashdot"),
    "accuracy": ("#808080", "triangle-up", "longdash"),
}
COLORS = [color for color, _, _ in STYLES.values()]
SYMBOLS = [symbol for _, symbol, _ in STYLES.values()]
WORDS = dict(zip(ACCURACIES, HEADINGS, strict=True))
STATES = {
    "finished": "circle",
    "pruned": "circle-open",
    "running": "triangle-up-open",
    "failed": "x",
    "infeasible": "cross",
}


@dataclass(frozen=True)
class Figure:
    """Figure of the page.

    Args:
        name: name of its CSV file, without the suffix.
        title: heading on the page.
        note: description below the heading.
        traces, layout: Plotly's data and layout.
        rows: data behind the figure, all rows with the same keys.
        table, caption: rows that are always shown below the figure, and their caption.
    """

    name: str
    title: str
    note: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    caption: str = ""


SETTINGS = {
    "tuner.kind": "tuner",
    "tuner.bottleneck": "bottleneck width",
    "tuner.length": "prompt length",
    "tuner.ratio": "fraction of weights tuned",
    "tuner.blocks": "tuned blocks",
    "tuner.blocks.last": "last blocks tuned",
    "loss.tau": "tau in training",
    "loss.kind": "loss",
    "optim.lr": "learning rate",
    "optim.global_batch_size": "batch size",
    "augment.patch_dropout": "patch dropout",
    "augment.kind": "cropping",
    "head.kind": "classifier",
    "head.init": "classifier initialization",
    "head.context": "learned context tokens",
    "head.tuner.kind": "tuner of the text tower",
    "head.tuner.bottleneck": "bottleneck width in the text tower",
    "head.projections": "projections trained",
}


def plain(name: str) -> str:
    """Return a setting or metric in words."""
    return SETTINGS.get(name, name.rsplit("/", 1)[-1].rsplit(".", 1)[-1].replace("_", " "))


def plot_text(name: str) -> str:
    """Return a name as text for Plotly, which would read `<b>` in it as markup."""
    return html.escape(printable(name), quote=False)


def spelled(name: str, between: str = " ") -> str:
    """Return a setting in words, followed by its key in small print."""
    return f"{plain(name)}{between}<span style='font-size:0.8em'>{name}</span>" if "." in name else plain(name)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis with a title."""
    return {"title": {"text": title}, "automargin": True, **more}


def log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis with ticks at powers of ten, and at 2 and 5 times these if the range is short."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in powers for m in ((1, 2, 5) if high < 50 * low else (1,))]
    return axis(title, type="log", tickvals=ticks, ticktext=[short_count(v) for v in ticks])


def short_count(value: float) -> str:
    """Return a number with a unit prefix: 20000 -> 20k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


PERCENT = " (%)"
ACCURACY = f"accuracy{PERCENT}"
HEAVY = "Does heavy fine-tuning hurt the few-shot classes?"


def percents(values: Any) -> list[float | None]:
    """Return fractions in percent: 0.4567 -> 45.67. None and NaN become None."""
    return [None if v is None or v != v else round(100 * float(v), 3) for v in values]


def scatter(mode: str, **more: Any) -> dict[str, Any]:
    """Return a scatter trace; the mode is markers, lines or both."""
    return {"type": "scatter", "mode": mode, **more}


def diagonal(name: str, ends: Sequence[float | None]) -> dict[str, Any]:
    """Return the dotted line on which x and y are equal."""
    return scatter("lines", name=name, x=ends, y=ends, line={"color": "#808080", "dash": "dot"}, hoverinfo="skip")


def cloud(trials: Sequence[Trial], x: Sequence[Any], measure: str, **more: Any) -> dict[str, Any]:
    """Return a scatter trace of validation accuracy with a point for each trial."""
    color, symbol, _ = STYLES[measure]
    trace = scatter(
        "markers",
        name=WORDS[measure],
        x=list(x),
        y=percents(numbers(trials, f"validation/{measure}")),
        text=[describe_trial(t) for t in trials],
        marker={"color": color, "symbol": symbol, "size": 8},
        hovertemplate="%{y:.1f}%<br>%{text}<extra>%{fullData.name}</extra>",
    )
    return trace | more


def describe_trial(trial: Trial) -> str:
    """Return number and settings of a trial in a line, as text for Plotly."""
    return plot_text(f"trial {trial['number']}: {describe_settings(trial)}")


def describe_settings(trial: Trial) -> str:
    """Return the settings of a trial in a line."""
    return describe({n: v for n, v in trial.items() if v is not None and "." in n})


def measures_of(trials: Sequence[Trial], wanted: Sequence[str] = (*GROUPS, MAIN)) -> list[str]:
    """Return the wanted measures that at least one trial has on validation."""
    return [m for m in wanted if any(t.get(f"validation/{m}") is not None for t in trials)]


def size_figure(study: StudyFiles) -> Figure | None:
    """Accuracy against trained parameters, with the Pareto front."""
    trials = [t for t in study.finished if t.get(TRAINED_PARAMETERS) and t.get(MAIN_METRIC) is not None]
    if len({t[TRAINED_PARAMETERS] for t in trials}) < 2:
        return None
    shown = study.drawn(trials)
    traces = [cloud(shown, [t[TRAINED_PARAMETERS] for t in shown], measure) for measure in measures_of(trials)]
    front = small_front(trials)
    traces.insert(
        0,
        front_line([t[TRAINED_PARAMETERS] for t in front], percents(numbers(front, MAIN_METRIC))),
    )
    least = min(front, key=lambda t: t[TRAINED_PARAMETERS])
    most = front[-1]
    note = (
        "Finished trials on validation. The line is the Pareto front of mean class accuracy: no smaller trial is better. It runs "
        f"from {value_of(least)} with {least[TRAINED_PARAMETERS]:,.0f} trained parameters to {value_of(most)} with "
        f"{most[TRAINED_PARAMETERS]:,.0f}."
    )
    if least is most:
        note = (
            "Finished trials on validation. No larger trial beats the best of the smallest: "
            f"mean class accuracy {value_of(least)} with {least[TRAINED_PARAMETERS]:,.0f} trained parameters."
        )
    on_front = {t["number"] for t in front}
    rows = [
        {
            "trial": t["number"],
            TRAINED_PARAMETERS: t[TRAINED_PARAMETERS],
            **{m: t.get(f"validation/{m}") for m in ACCURACIES},
            "on_front": t["number"] in on_front,
        }
        for t in trials
    ]
    return Figure(
        "size",
        "Accuracy against trained parameters",
        note,
        traces,
        {
            "xaxis": log_axis("trained parameters", [t[TRAINED_PARAMETERS] for t in trials]),
            "yaxis": axis(f"validation {ACCURACY}"),
        },
        rows,
    )


def front_line(x: Sequence[float], y: Sequence[float | None]) -> dict[str, Any]:
    """Return a Pareto front as a trace."""
    return scatter(
        "lines",
        name="Pareto front",
        x=list(x),
        y=list(y),
        hoverinfo="skip",
        line={"color": "#808080", "width": 1.5, "shape": "hv"},
    )


def value_of(trial: Trial) -> str:
    """Return the validation mean class accuracy of a trial as text."""
    return f"{100 * trial[MAIN_METRIC]:.1f}%"


def small_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that beat every smaller or equally small trial in mean class accuracy, smallest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t[TRAINED_PARAMETERS], -t[MAIN_METRIC])):
        if not front or trial[MAIN_METRIC] > front[-1][MAIN_METRIC]:
            front.append(trial)
    return front


def curve(study: StudyFiles, setting: str, name: str, title: str, note: str) -> Figure | None:
    """Accuracy of the finished trials against one searched number, with the mean at each value of a discrete setting."""
    every = numbers(study.finished, setting)  # NaN for a choice that is a list, such as a bottleneck for each block
    trials = [t for t, value in zip(study.finished, every, strict=True) if not np.isnan(value)]
    x = numbers(trials, setting)
    if len(np.unique(x)) < 2:
        return None
    traces, param, shown = [], study.space.get(setting, {}), study.drawn(trials)
    for measure in measures_of(trials):
        traces.append(cloud(shown, numbers(shown, setting).tolist(), measure))
        y, places = numbers(trials, f"validation/{measure}"), np.unique(x)
        color, _, dash = STYLES[measure]
        if param.get("choices") or param.get("step"):
            means = percents([y[x == place].mean() for place in places])
            traces.append(
                scatter(
                    "lines",
                    x=places.tolist(),
                    y=means,
                    showlegend=False,
                    line={"color": color, "dash": dash},
                    hoverinfo="skip",
                )
            )
    is_log = x.min() > 0 and (param.get("log") or (param.get("choices") and x.max() >= 50 * x.min()))
    rows = [
        {"trial": t["number"], setting: t[setting], **{m: t.get(f"validation/{m}") for m in ACCURACIES}} for t in trials
    ]
    named = spelled(setting)
    layout = {"xaxis": log_axis(named, x.tolist()) if is_log else axis(named), "yaxis": axis(f"validation {ACCURACY}")}
    return Figure(name, title, note, traces, layout, rows)


def width_figures(study: StudyFiles) -> list[Figure]:
    """A curve for each searched number of the tuner: bottleneck, prompt length, fraction of weights."""
    widths = [n for n in study.settings if n.startswith(("tuner.", "extra_tuner.")) and not n.endswith("kind")]
    note = "Finished trials on validation; other settings vary too. A line joins the means if the setting has discrete values."
    found = [curve(study, n, f"width-{n.replace('.', '-')}", f"Accuracy by {plain(n)}", note) for n in widths]
    return [figure for figure in found if figure is not None]


def tau_figure(study: StudyFiles) -> Figure | None:
    """Accuracy against the strength of the logit adjustment in training."""
    note = f"{tau_effect(study.finished)} Finished trials on validation; other settings vary too."
    return curve(study, "loss.tau", "tau", "Logit adjustment in training (tau)", note)


def tau_effect(trials: Sequence[Trial]) -> str:
    """Describe how many-shot and few-shot accuracy change with tau in training, from lines through the trials."""
    found = []
    for group in ("few", "many"):
        known = [t for t in trials if t.get("loss.tau") is not None and t.get(f"validation/{group}") is not None]
        tau, accuracy = numbers(known, "loss.tau"), numbers(known, f"validation/{group}")
        if len(known) < FEWEST_POINTS or len(np.unique(tau)) < FEWEST_SIZES:
            continue
        design = np.column_stack([np.ones(len(tau)), tau])
        slope = regression_intervals(design, accuracy, np.array([[0.0, 1.0]]))[0]
        change = f"{'rises' if slope.value > 0 else 'falls'} by {100 * abs(slope.value):.1f} points per unit of tau"
        found.append(f"{group}-shot accuracy {change if slope.excludes_zero else 'has no clear trend'}")
    meant = "Tau in training is meant to shift accuracy from the many-shot to the few-shot classes. "
    return meant + (
        f"Here {' and '.join(found)}." if found else "There are too few trials to tell whether it does here."
    )


def posthoc_figure(study: StudyFiles) -> Figure | None:
    """Accuracy of the best trial against the strength of the logit adjustment after training."""
    points = study.posthoc
    if len(points) < 2:
        return None
    traces = []
    for measure in [m for m in (*GROUPS, MAIN) if all(p.get(f"validation/{m}") is not None for p in points)]:
        color, symbol, dash = STYLES[measure]
        traces.append(
            scatter(
                "lines+markers",
                name=WORDS[measure],
                x=[p["tau"] for p in points],
                y=percents([p[f"validation/{measure}"] for p in points]),
                line={"color": color, "dash": dash},
                marker={"color": color, "symbol": symbol, "size": 8},
                hovertemplate="tau %{x}: %{y:.1f}%<extra>%{fullData.name}</extra>",
            )
        )
    rows = [{"tau": p["tau"], **{m: p.get(f"validation/{m}") for m in ACCURACIES}} for p in points]
    return Figure(
        "posthoc-tau",
        "Post-hoc logit adjustment (tau)",
        f"The logits of the best trial are adjusted after training. {posthoc_advice(study) or _best_tau(study)}",
        traces,
        {"xaxis": axis("post-hoc tau"), "yaxis": axis(f"{study.estimate} {ACCURACY}")},
        rows,
    )


def posthoc_advice(study: StudyFiles) -> str:
    """Say whether a post-hoc tau is recommended, with its gain and the bias of the gain; "" for a study that does not know it."""
    found = study.about.get("posthoc", {})
    if "recommended" not in found:
        return ""
    scale, title = scale_of(found.get("metric", study.choice.metric))
    measure, digits = title.removesuffix(PERCENT), ".1f" if scale == 100 else ".2g"
    points = f"{{:{digits}}} points" if scale == 100 else f"{{:{digits}}}"
    gain, bias = (scale * found.get(name, missing) for name, missing in (("gain", 0.0), ("bias", math.inf)))
    luck = "its selection bias" + (f" (about {bias:{digits}})" if math.isfinite(bias) else ", which is unknown")
    images = f"{study.estimate} predictions"
    if found["recommended"]:
        return (
            f"Post-hoc tau {found.get('tau', 0):g} is recommended: on {images} it gains {points.format(gain)} of {measure}, "
            f"more than {luck}."
        )
    if gain <= 0:
        return f"No post-hoc tau improves the {measure} on {images}."
    return f"No post-hoc tau is recommended: the best one gains {points.format(gain)} of {measure} on {images}, not more than {luck}."


def _best_tau(study: StudyFiles) -> str:
    """Return the best post-hoc tau of a study that does not say whether it is recommended."""
    points = [p for p in study.posthoc if p.get(MAIN_METRIC) is not None]
    if not points:
        return ""
    top = max(points, key=lambda p: p[MAIN_METRIC])
    if top is points[0]:
        return f"On validation, no post-hoc tau improves the mean class accuracy of {value_of(top)}."
    return (
        f"Best post-hoc tau on validation: {top['tau']:g} (mean class accuracy {value_of(top)}{_bias(study, top['tau'])}; "
        f"{value_of(points[0])} without adjustment)."
    )


def _bias(study: StudyFiles, tau: float) -> str:
    """Return the part of the best accuracy that comes from selecting tau on the same images, in words, if it is known."""
    best = study.best_trial or {}
    optimism = best.get(f"validation/{POSTHOC_OPTIMISM}")
    if optimism is None or best.get(f"validation/{POSTHOC_TAU}") != tau:
        return ""
    return f", about {100 * optimism:.1f} points of it selection bias"


def kinds_figure(study: StudyFiles) -> Figure | None:
    """Distribution of the objective for each tuner kind."""
    metric, _ = study.objective
    trials = [t for t in study.finished if t.get("tuner.kind")]
    kinds = sorted({t["tuner.kind"] for t in trials})
    if len(kinds) < 2:
        return None
    by_kind = {kind: [t for t in trials if t["tuner.kind"] == kind] for kind in kinds}
    kinds.sort(key=lambda kind: -float(np.median(numbers(by_kind[kind], metric))))
    scale, title = scale_of(metric)
    draws_all = len(study.drawn(trials)) == len(trials)
    traces = [
        {
            "type": "box",
            "name": f"{kind} ({len(by_kind[kind])})",
            "x": (scale * numbers(by_kind[kind], metric)).round(4).tolist(),
            "orientation": "h",
            "boxpoints": "all" if draws_all else "outliers",  # the box is that of all trials
            "jitter": 0.4,
            "pointpos": 0,
            "text": [describe_trial(t) for t in by_kind[kind]],
            "fillcolor": "rgba(0,0,0,0)",
            "line": {"color": "#808080", "width": 1},
            "marker": {"color": COLORS[0], "size": 6},
            "hovertemplate": "%{x:.2f}<br>%{text}<extra></extra>",
            "showlegend": False,
        }
        for kind in reversed(kinds)
    ]
    note = (
        "Finished trials of each kind on validation, with the number of trials in parentheses. The order is by median: "
        f"{kinds[0]} is best. The more trials a kind has, the better its best trial tends to be."
    )
    rows = [
        {"tuner.kind": t["tuner.kind"], "trial": t["number"], metric: t[metric]}
        for kind in kinds
        for t in by_kind[kind]
    ]
    layout = {"xaxis": axis(title), "yaxis": axis(""), "height": 160 + 52 * len(kinds)}
    return Figure("kinds", "Tuner kinds", note, traces, layout, rows)


def scale_of(metric: str) -> tuple[float, str]:
    """Return the factor and the axis title of a metric: accuracies are shown in percent."""
    name = metric.rsplit("/", 1)[-1]
    if "/" not in metric or name in LOSSES:
        return 1.0, name.replace("_", " ")
    return 100.0, f"{WORDS[name]} accuracy{PERCENT}" if name in WORDS else f"{name.replace('_', ' ')}{PERCENT}"


def heavy_figure(study: StudyFiles) -> Figure | None:
    """Few-shot accuracy against trained parameters, with the 95% interval of the fitted line."""
    heavy = heavy_tuning(study)
    if heavy.curve is None:
        return None
    x, low, high = heavy.curve
    band = scatter(
        "lines",
        x=[*x.tolist(), *x[::-1].tolist()],
        y=percents([*high, *low[::-1]]),
        fill="toself",
        fillcolor="rgba(213,94,0,0.18)",
        line={"width": 0},
        name="95% interval",
        hoverinfo="skip",
    )
    counted = {t["number"] for t in heavy.trials}
    others = study.drawn([t for t in sized(study) if t["number"] not in counted])
    points = cloud(heavy.trials, [t[TRAINED_PARAMETERS] for t in heavy.trials], "few", name="best of its size")
    faint = cloud(
        others,
        [t[TRAINED_PARAMETERS] for t in others],
        "few",
        name="other trials",
        opacity=0.7,
        marker={"color": "#808080", "symbol": "diamond-open", "size": 7},
    )
    rows = [
        {
            "trial": t["number"],
            TRAINED_PARAMETERS: t[TRAINED_PARAMETERS],
            "few": t["validation/few"],
            "best_of_its_size": t["number"] in counted,
        }
        for t in sized(study)
    ]
    note = heavy.answer
    if not is_grid(study):
        note += " Other settings vary too; a grid over sizes gives the cleanest answer (search_spaces/heavy.yaml)."
    return Figure(
        "heavy",
        HEAVY,
        note,
        [band, *([faint] if others else []), points],
        {"xaxis": log_axis("trained parameters", x.tolist()), "yaxis": axis(f"few-shot validation {ACCURACY}")},
        rows,
    )
