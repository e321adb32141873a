"""Tables of trials that fit a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lift_ray.epoch_metrics import ACCURACIES, GROUPS
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching.confirmation import Choice
from lift_ray.terminal.tables import HEADINGS, PlainTable, describe, percent, short, titled

STYLES = {
    "running": "cyan",
    "finished": "green",
    "pruned": "dim",
    "failed": "red",
    "waiting": "cyan",
    "infeasible": "dim",
}


def pareto_table(rows: Sequence[TrialRow], objectives: Mapping[str, str]) -> PlainTable:
    """Return the Pareto front of a search with several objectives: settings, and each objective's value."""
    table = titled("Pareto front")
    table.add_column("trial", justify="right")
    for metric, mode in objectives.items():
        table.add_column(f"{metric.rsplit('/', 1)[-1].replace('_', ' ')}, {mode}", justify="right")
    table.add_column("settings", overflow="fold")
    for row in rows:
        found = (row.last[metric] for metric in objectives)
        values = [f"{value:,.0f}" if value == int(value) and value > 1 else f"{value:.4f}" for value in found]
        table.add_row(str(row.number), *values, describe(row.values))
    return table


def candidate_table(choice: Choice, labels: Sequence[str]) -> PlainTable:
    """Return the trials that were compared on out-of-fold predictions, the winner first, with their difference from it."""
    title = f"Confirmed on {choice.num_images:,} out-of-fold images: {measure(choice.metric)}"
    table = titled(title)
    table.add_column("")
    for name in ("trained parameters", "post-hoc tau", measure(choice.metric), "difference", "standard error"):
        table.add_column(name, justify="right")
    for label, one in zip(labels, choice.candidates, strict=True):
        is_winner = one is choice.candidates[0]
        table.add_row(
            label,
            f"{one.row.last.trained_parameters or 0:,}",
            f"{one.posthoc.tau:g}",
            _value(one.value, choice.metric),
            "" if is_winner else _value(one.difference, choice.metric, "+"),
            "" if is_winner else _value(one.error, choice.metric),
            style="bold" if is_winner else "",
        )
    return table


def measure(metric: str) -> str:
    """Return the name of a metric in words: `mean class accuracy`, `accuracy of few`."""
    return f"accuracy of {metric}" if metric in GROUPS else metric.replace("_", " ")


def points(value: float, metric: str) -> str:
    """Return a difference of a metric: `2.1 points` of a percentage, or a plain number for a loss."""
    return f"{_value(value, metric)}{'' if 'loss' in metric else ' points'}"


def _value(value: float, metric: str, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if "loss" in metric else f"{100 * value:{sign}.1f}"


def curve_table(rows: Sequence[TrialRow], names: Sequence[str]) -> PlainTable:
    """Return a grid's finished trials in the order of their settings, with their trained parameters and validation accuracy."""
    table = titled("Grid: validation accuracy (%)")
    for name in (*names, "trained parameters", *HEADINGS):
        table.add_column(name, justify="right")
    finished = [row for row in rows if row.state == "finished"]
    for row in sorted(finished, key=lambda row: [_in_order(row.values.get(name)) for name in names]):
        accuracies = (percent(row.last.validation.get(name)) for name in ACCURACIES)
        values = (short(row.values.get(name, "")) for name in names)
        table.add_row(*values, f"{row.last.trained_parameters or 0:,.0f}", *accuracies)
    return table


def _in_order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    return (not is_number, float(value) if is_number else 0.0, str(value))


def trial_table(rows: Sequence[TrialRow], names: Sequence[str], metric: str, title: str, limit: int = 20) -> PlainTable:
    """Return the latest trials; cells of settings that a trial does not have stay empty."""
    table = titled(title, collapse_padding=True, pad_edge=False)
    table.add_column("trial", justify="right")
    for name in names:
        table.add_column(
            "tuner" if name == "tuner.kind" else name.partition(".")[2] or name,
            justify="left" if name.endswith("kind") else "right",
            no_wrap=name.endswith("kind"),
        )
    for heading in (
        "epoch",
        metric.rsplit("/", 1)[-1].removesuffix("_accuracy").replace("_", " "),
        *GROUPS,
        "images/s",
    ):
        table.add_column(heading, justify="right")
    table.add_column("state")
    for row in rows[-limit:]:
        value, speed = row.last.get(metric), row.last.train.get("images_per_s")
        table.add_row(
            str(row.number),
            *(short(row.values.get(name, "")) for name in names),
            f"{len(row.history)}/{row.num_epochs}",
            ("-" if value is None else f"{value:.3f}") if metric.endswith("loss") else percent(value),
            *(percent(row.last.validation.get(group)) for group in GROUPS),
            "-" if speed is None else short(round(speed)),
            row.state,
            style=STYLES[row.state],
        )
    return table
