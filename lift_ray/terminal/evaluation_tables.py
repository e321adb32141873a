"""Tables and text about the gain of an ensemble. torch is not imported, because the driver of a search uses this module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lift_ray.epoch_metrics import ACCURACIES, FURTHER, GROUPS, LOSSES
from lift_ray.evaluation.metrics import ANY
from lift_ray.terminal.tables import HEADINGS, PlainTable, accuracy_table, console, describe, percent, titled
from lift_ray.text import say


def crossed_table(report: Mapping[str, Any]) -> PlainTable:
    """Return a table of class accuracy (%) by data group (rows) and parameter group (columns): mean of the members -> ensemble."""
    groups = report["groups"]
    table = titled("Class accuracy (%): mean of the members -> ensemble (gain), by data group D and parameter group P")
    table.add_column("")
    columns = [p for p in (*GROUPS, ANY) if any(p in row for row in groups.values())]
    for p in columns:
        table.add_column(f"P-{p}", justify="right", no_wrap=True)
    for d, row in groups.items():
        table.add_row(f"D-{d}", *(_cell(row[p]) if p in row else "-" for p in columns))
    return table


def print_crossed(report: Mapping[str, Any]) -> None:
    """Print the table of `crossed_table`, and how certain its parameter groups are."""
    console().print(crossed_table(report))
    if kept := report.get("parameter_groups_kept"):
        shares = ", ".join(f"P-{p} {100 * share:.0f}" for p, share in kept.items())
        say(f"classes that keep their parameter group if the validation images are resampled (%): {shares}")
    if why := report.get("no_parameter_groups"):
        say(f"no parameter groups: {why}")


def together_table(found: Sequence[Mapping[str, Any]]) -> PlainTable:
    """Return a table of the test accuracy (%) of several ensembles (search.final_comparison.ensemble_results)."""
    title = "Ensembles, test accuracy (%); gain over the mean and over the best of their members"
    table = titled(title, collapse_padding=True, pad_edge=False)
    table.add_column("")
    for heading in (*HEADINGS[1:], "gain", "over best", "differ", "train s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in sorted(found, key=lambda one: describe(one["values"])):
        report = one["report"]
        whole, differ = report["groups"][ANY][ANY], [share for _, _, share in report["disagreement"]]
        table.add_row(
            describe(one["values"]),
            *(percent(one.get(f"test/{name}")) for name in ACCURACIES[1:]),
            f"{100 * whole['gain']:+.1f}",
            f"{100 * whole['gain_over_best']:+.1f}",
            f"{100 * sum(differ) / len(differ):.0f}",
            f"{report['cost']['train_s']:.0f}",
        )
    return table


def confused_table(pairs: Sequence[Mapping[str, Any]]) -> PlainTable:
    """Return a table of the most confused pairs of classes (rows of `Confusions.most_confused`)."""
    table = titled("Most confused classes: images, and their fraction of the true class (%)")
    for heading in ("true class", "predicted as"):
        table.add_column(heading, overflow="fold")
    for heading in ("images", "fraction"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in pairs:
        table.add_row(pair["true"], pair["predicted"], f"{pair['count']:,}", percent(pair["fraction"]))
    return table


def intervals_line(intervals: Mapping[str, tuple[float, float]]) -> str:
    """Describe 95% intervals in one line. `intervals` has (low, high) by accuracy (ACCURACIES)."""
    words = [
        f"{heading} {percent(intervals[name][0])} to {percent(intervals[name][1])}"
        for name, heading in zip(ACCURACIES, HEADINGS, strict=True)
        if name in intervals
    ]
    return f"95% intervals (%): {', '.join(words)}"


def compared_table(rows: Sequence[Mapping[str, Any]], title: str) -> PlainTable:
    """Return a table of the accuracy (%) on new images and on the old test split (rows of `reporting.old_test.Comparison`)."""
    table, by_name = titled(title), {row["metric"]: row for row in rows}
    table.add_column("")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    there = [by_name.get(name) for name in ACCURACIES]
    for label, name in (("new images", "new"), ("old test split", "old")):
        table.add_row(label, *(percent(row[name]) if row else "-" for row in there))
    table.add_row("new - old", *(f"{100 * row['difference']:+.1f}" if row else "-" for row in there))
    if any(row and "low" in row for row in there):
        ends = [f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}" if row else "-" for row in there]
        table.add_row("95% interval", *ends)
    return table


def _cell(cell: dict[str, float]) -> str:
    return f"{percent(cell['mean'])} -> {percent(cell['together'])} ({100 * cell['gain']:+.1f})"


def print_found(
    title: str, split: str, shown: Sequence[tuple[str, Mapping[str, float]]], report: Mapping[str, Any]
) -> None:
    """Print the accuracies of an evaluation; those of the members of an ensemble come first.

    Args:
        title: title of the table.
        split: the split.
        shown: (label, metrics as `split/name`), for each strength of the post-hoc adjustment.
        report: result of `GroupGainTable.result`; empty for a single model.
    """
    screen = console()
    screen.print(accuracy_table(title, split, [*report.get("members", {}).items(), *shown]))
    for label, figures in shown:
        values = [f"{name.replace('_', ' ')} {percent(figures[f'{split}/{name}'])}" for name in FURTHER]
        values += [f"{name.replace('_', ' ')} {figures[f'{split}/{name}']:.3f}" for name in LOSSES]
        say(f"{label}: {', '.join(values)}")
    if shown and "unlabelled/recall" in (figures := shown[0][1]):
        say(f"pseudo-labels of the last epoch (%): {', '.join(_pseudo_labels(figures))}")
    if report:
        print_crossed(report)
        say(*_words(report))


def _pseudo_labels(figures: Mapping[str, float]) -> list[str]:
    """Describe the quality of an epoch's pseudo-labels, over all classes and by data group."""
    out = []
    for group, ending in ((ANY, ""), *((group, f"_{group}") for group in GROUPS)):
        if f"unlabelled/recall{ending}" in figures:
            names = (f"unlabelled/{name}{ending}" for name in ("precision", "recall", "pseudo_labels"))
            precision, recall, number = (figures.get(name) for name in names)
            out.append(f"{group} precision {percent(precision)} recall {percent(recall)} ({number or 0:,.0f})")
    return out


def _words(report: Mapping[str, Any]) -> list[str]:
    """Describe the gain by data group, the disagreement between members, and the cost, which the table does not show."""
    gains = [
        f"{d} {100 * row[ANY]['gain']:+.1f} ({100 * row[ANY]['gain_over_best']:+.1f})"
        for d, row in report["groups"].items()
    ]
    differ = [f"{a} and {b} {percent(share)}" for a, b, share in report["disagreement"]]
    lines = [
        f"gain over the mean of the members (over the best one here, {report['best']}): {', '.join(gains)}",
        f"images on which two models disagree (%): {', '.join(differ)}",
    ]
    if cost := report.get("cost"):
        lines.append(
            f"cost: {cost['trained_parameters']:,} trained parameters, {cost['train_s']:.0f} s of training steps, "
            f"{cost['evaluate_s']:.1f} s for this evaluation"
        )
    return lines
