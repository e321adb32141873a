"""Tables that fit a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table
from rich.console import Console, RenderableType
from rich.text import Text

from lift_ray.epoch_metrics import ACCURACIES, GROUPS, EpochMetrics
from lift_ray.text import printable

Named = EpochMetrics | Mapping[str, float]  # metrics by their flat names
TTE_ROW = ", TTE"  # end of the label of a model that is evaluated again, with test-time ensembling
TTE_WORDS = {
    "off": "",
    "five_crops": "five crops of each image",
    "ten_crops": "ten crops of each image",
    "augmented": "random crops of each image",
}
HEADINGS = ("overall", "mean class", *GROUPS)  # of ACCURACIES


class PlainTable(rich.table.Table):
    """Table that shows strings as they are: a name such as `[lora] r8` is no markup, and its control characters are escaped.

    Args:
        headings: names of the first columns.
        title: its title; "" for none.
        more: arguments of `rich.table.Table`.
    """

    def __init__(self, *headings: str, title: str = "", **more: Any) -> None:
        super().__init__(*headings, title=plain(title, "table.title") if title else None, **more)

    def add_column(self, header: RenderableType = "", *args: Any, **more: Any) -> None:
        """Add a column, as `rich.table.Table.add_column`."""
        super().add_column(_as_text(header), *args, **more)

    def add_row(self, *cells: RenderableType | None, **more: Any) -> None:
        """Add a row, as `rich.table.Table.add_row`; a cell with a style is a `Text`."""
        super().add_row(*map(_as_text, cells), **more)


def plain(text: object, style: str = "") -> Text:
    """Return text for a line or a cell, without markup, newlines and control characters."""
    return Text(printable(text).replace("\n", "\\n"), style)


def _as_text(cell: Any) -> Any:
    return plain(cell) if isinstance(cell, str) else cell


def console(*, error: bool = False) -> Console:
    """Return the console of stdout, or of stderr: as wide as the terminal, or 110 columns without one. It reads no markup."""
    out = Console(stderr=error, highlight=False, markup=False, emoji=False)
    if not out.is_terminal:
        out.width = 110
    return out


def tte_in_words(mode: str) -> str:
    """Return the crops of a mode of `evaluation.tte`; "" for off."""
    return TTE_WORDS.get(mode, mode)


def tte_note(modes: Mapping[str, str], best: str) -> str:
    """Return what to know about test-time ensembling in a comparison, whose rows should all have the same; "" if none has it.

    Args:
        modes: mode of `evaluation.tte` of each row by its label.
        best: label of the row that the others are compared with.
    """
    if set(modes.values()) <= {"off"}:
        return ""
    rows = {label: mode for label, mode in modes.items() if not label.endswith(TTE_ROW)}
    usual = rows.get(best, "off")
    others = {label: mode for label, mode in rows.items() if mode != usual}
    all_rows = "all rows" if not others else "most rows"
    notes = [f"Test-time ensembling: {tte_in_words(usual) or 'none'}, in {all_rows}."]
    if len(rows) < len(modes):
        notes[0] = (
            f"Test-time ensembling: the mean over {tte_in_words('five_crops')}, in the rows marked TTE only, so compare these with "
            "each other; best/ uses it only with evaluation.tte=five_crops."
        )
    for label, mode in others.items():
        notes.append(
            f"{label} is evaluated with {tte_in_words(mode) or 'one crop of each image'}, but {best} with "
            f"{tte_in_words(usual) or 'one'}: give both the same evaluation.tte before you compare them."
        )
    return " ".join(notes)


def titled(title: str, **more: Any) -> PlainTable:
    """Return an empty table with its title on the left; arguments of `rich.table.Table`."""
    return PlainTable(title=title, title_justify="left", **{"box": rich.box.SIMPLE_HEAD, **more})


def percent(value: float | None) -> str:
    """Format a fraction as percent: 0.4567 -> 45.7."""
    return "-" if value is None else f"{100 * value:.1f}"


def accuracy_table(title: str, split: str, rows: Sequence[tuple[str, Named]]) -> PlainTable:
    """Return a table of the accuracy (%) of each named model, overall and by group; the best of each column is bold.

    For models with several logits (ULFine), rows for the linear head and the prototypes follow.
    """
    rows = [row for label, figures in rows for row in ((label, figures), *_further(split, figures))]
    table = titled(title)
    table.add_column("", overflow="fold")
    best = {
        name: max((figures.get(f"{split}/{name}", -1.0) for _, figures in rows), default=-1.0) for name in ACCURACIES
    }
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, figures in rows:
        values = [(figures.get(f"{split}/{name}"), best[name]) for name in ACCURACIES]
        table.add_row(label, *(plain(percent(v), "bold" if v == top else "") for v, top in values))
    return table


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format the mean and standard deviation of at least two fractions as percent: `45.7 ± 0.8`."""
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def seeds_table(runs: Sequence[Mapping[str, Any]]) -> PlainTable:
    """Return a table of the test accuracy of settings that were trained with several seeds (`SearchResult.seeds`)."""
    table = titled("Test accuracy (%), several seeds, mean ± standard deviation")
    for heading in ("", "seeds", *HEADINGS):
        table.add_column(heading, justify="right" if heading else "left")
    for label in dict.fromkeys(run["label"] for run in runs):
        mine = [run for run in runs if run["label"] == label]
        values = [[run[f"test/{name}"] for run in mine if f"test/{name}" in run] for name in ACCURACIES]
        table.add_row(label, str(len(mine)), *(mean_and_deviation(v) if len(v) > 1 else "-" for v in values))
    return table


def _further(split: str, figures: Named) -> list[tuple[str, dict[str, float]]]:
    found = {
        logits: {
            f"{split}/{name}": figures[key] for name in ACCURACIES if (key := f"{split}/{name}_{logits}") in figures
        }
        for logits in ("linear", "similarity")
    }
    return [(f"  its {logits} logits", own) for logits, own in found.items() if own]


def describe(values: Mapping[str, Any]) -> str:
    """Describe a trial's settings in one line: `adaptformer, bottleneck 8, tau 1, lr 0.02`."""
    parts = [str(values["tuner.kind"])] if "tuner.kind" in values else []
    parts += [
        f"{name.partition('.')[2] or name} {short(value)}" for name, value in values.items() if name != "tuner.kind"
    ]
    return ", ".join(parts)


def short(value: Any) -> str:
    """Format a value for a narrow column."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
