"""Tables that fit a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
from rich.console import Console

from lift_ray.results.rows import TrialRow, describe, short

ACCURACIES = ("accuracy", "mean_class_accuracy", "many", "medium", "few")
HEADINGS = ("overall", "mean class", "many", "medium", "few")
STYLES = {
    "running": "cyan",
    "finished": "green",
    "pruned": "dim",
    "failed": "red",
    "waiting": "cyan",
    "infeasible": "dim",
}


def console() -> Console:
    """Where people read: the terminal's width, or 110 columns when there is none."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=110)


def percent(value: float | None) -> str:
    """0.4567 -> 45.7."""
    return "-" if value is None else f"{100 * value:.1f}"


def accuracy_table(title: str, split: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> rich.table.Table:
    """Accuracy in percent for each named model, overall and by group; the best of each column stands out.

    Models with several logits (ULFine) have those of the linear head and of the prototypes below their own.
    """
    rows = [row for label, figures in rows for row in ((label, figures), *_further(split, figures))]
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    best = {
        name: max((figures.get(f"{split}/{name}", -1.0) for _, figures in rows), default=-1.0) for name in ACCURACIES
    }
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, figures in rows:
        values = [(figures.get(f"{split}/{name}"), best[name]) for name in ACCURACIES]
        table.add_row(label, *(f"[bold]{percent(v)}[/bold]" if v == top else percent(v) for v, top in values))
    return table


def mean_and_deviation(values: Sequence[float]) -> str:
    """Fractions as percent, `45.7 ± 0.8`: mean and standard deviation of at least two."""
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def seeds_table(runs: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    """Test accuracy of settings that were trained with several seeds, as `SearchResult.seeds` has them."""
    table = rich.table.Table(
        title="Test accuracy (%), several seeds, mean ± standard deviation",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    for heading in ("", "seeds", *HEADINGS):
        table.add_column(heading, justify="right" if heading else "left")
    for label in dict.fromkeys(run["label"] for run in runs):
        mine = [run for run in runs if run["label"] == label]
        values = [[run[f"test/{name}"] for run in mine if f"test/{name}" in run] for name in ACCURACIES]
        table.add_row(label, str(len(mine)), *(mean_and_deviation(v) if len(v) > 1 else "-" for v in values))
    return table


def _further(split: str, figures: Mapping[str, float]) -> list[tuple[str, dict[str, float]]]:
    found = {
        logits: {
            f"{split}/{name}": figures[key] for name in ACCURACIES if (key := f"{split}/{name}_{logits}") in figures
        }
        for logits in ("linear", "similarity")
    }
    return [(f"  its {logits} logits", own) for logits, own in found.items() if own]


def pareto_table(rows: Sequence[TrialRow], objectives: Mapping[str, str]) -> rich.table.Table:
    """The front of a search with several objectives: settings, and each objective's value."""
    table = rich.table.Table(title="Pareto front", title_justify="left", box=rich.box.SIMPLE_HEAD)
    table.add_column("trial", justify="right")
    for metric, mode in objectives.items():
        table.add_column(f"{metric.rsplit('/', 1)[-1].replace('_', ' ')}, {mode}", justify="right")
    table.add_column("settings", overflow="fold")
    for row in rows:
        figures = (row.last[metric] for metric in objectives)
        values = [f"{value:,.0f}" if value == int(value) and value > 1 else f"{value:.4f}" for value in figures]
        table.add_row(str(row.number), *values, describe(row.values))
    return table


def curve_table(rows: Sequence[TrialRow], names: Sequence[str]) -> rich.table.Table:
    """A grid's finished trials in the order of their settings: what was set, how much is trained, and validation accuracy."""
    table = rich.table.Table(title="the grid, validation accuracy in %", title_justify="left", box=rich.box.SIMPLE_HEAD)
    for name in (*names, "trained parameters", *HEADINGS):
        table.add_column(name, justify="right")
    finished = [row for row in rows if row.state == "finished"]
    for row in sorted(finished, key=lambda row: [_in_order(row.values.get(name)) for name in names]):
        accuracies = (percent(row.last.get(f"validation/{name}")) for name in ACCURACIES)
        values = (short(row.values.get(name, "")) for name in names)
        table.add_row(*values, f"{row.last.get('trained_parameters', 0):,.0f}", *accuracies)
    return table


def _in_order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    return (not is_number, float(value) if is_number else 0.0, str(value))


def trial_table(
    rows: Sequence[TrialRow], names: Sequence[str], metric: str, title: str, limit: int = 20
) -> rich.table.Table:
    """The running trials and the latest others; settings that a trial does not have stay empty."""
    table = rich.table.Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    table.add_column("trial", justify="right")
    for name in names:
        table.add_column(
            "tuner" if name == "tuner.kind" else name.rsplit(".", 1)[-1],
            justify="left" if name.endswith("kind") else "right",
            no_wrap=name.endswith("kind"),
        )
    for heading in (
        "epoch",
        metric.rsplit("/", 1)[-1].removesuffix("_accuracy").replace("_", " "),
        "many",
        "medium",
        "few",
        "images/s",
    ):
        table.add_column(heading, justify="right")
    table.add_column("state")
    for row in rows[-limit:]:
        figures: Mapping[str, Any] = row.last
        split = metric.split("/")[0]
        value = figures.get(metric)
        shown = [percent(figures.get(f"{split}/{group}")) for group in ("many", "medium", "few")]
        table.add_row(
            str(row.number), *(short(row.values.get(name, "")) for name in names), f"{len(row.history)}/{row.num_epochs}",
            ("-" if value is None else f"{value:.3f}") if metric.endswith("loss") else percent(value), *shown,
            short(round(figures["train/images_per_s"])) if "train/images_per_s" in figures else "-", row.state,
            style=STYLES[row.state],
        )  # fmt: skip
    return table
