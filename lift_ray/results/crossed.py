"""What several models gain together: by data group and parameter group, and how often they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import rich.table
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.results.metrics import GROUPS, PerClass, class_groups
from lift_ray.results.tables import accuracy_table, console, percent
from lift_ray.results.tally import Tally

ANY = "all"
FURTHER = ("worst_class", "harmonic_mean", "geometric_mean", "macro_f1", "calibration_error")


class Crossed:
    """Counts beside the evaluation of several models together: each alone, and how often two of them differ.

    Args:
        names: of the M models.
        num_classes: K.
        device: where the logits are.
    """

    def __init__(self, names: Sequence[str], num_classes: int, device: torch.device) -> None:
        self.names = list(names)
        self._alone = [Tally(num_classes, device) for _ in names]
        self._differ = torch.zeros(len(names), len(names), dtype=torch.int64, device=device)

    def add(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Count a batch: logits (B, K) of each model, labels (B,)."""
        for tally, mine in zip(self._alone, logits, strict=True):
            tally.add(mine, labels)
        found = torch.stack([mine.argmax(1) for mine in logits])
        self._differ += (found[:, None] != found[None]).sum(-1)

    def tensors(self) -> list[Tensor]:
        """What the caller must sum over the ranks, in place, before `result`."""
        return [self._differ, *(tensor for tally in self._alone for tensor in tally.tensors())]

    def result(
        self, split: str, together: PerClass, train_counts: NDArray[np.int64], p_groups: NDArray[np.str_] | None
    ) -> dict[str, Any]:
        """The report, JSON throughout.

        Args:
            together: counts by class of the models together.
            train_counts: (K,), what makes a class many, medium or few in the data (D).
            p_groups: (K,), the same by label prior of the foundation models (P); None where that is not known.

        Returns:
            members: {name: metrics as `split/name`}. best: the member with the best mean class accuracy on this very split, so
            that what is gained over it is rather too small. groups: {D: {P: cell}}, D and P many, medium, few or all, of
            the means of class accuracies: classes (their number), mean (of the members), best, together, gain (together -
            mean), gain_over_best; cells without classes are left out. disagreement: [name, name, share of images].
        """
        members = [tally.result(train_counts) for tally in self._alone]
        best = max(range(len(members)), key=lambda m: members[m][0]["mean_class_accuracy"])
        images = int(together.total.sum())
        differ = self._differ.cpu().numpy()
        return {
            "members": {
                name: {f"{split}/{metric}": value for metric, value in figures.items()}
                for name, (figures, _) in zip(self.names, members, strict=True)
            },
            "best": self.names[best],
            "groups": _groups([classes for _, classes in members], best, together, train_counts, p_groups),
            "disagreement": [
                [self.names[a], self.names[b], differ[a, b] / images] for a, b in combinations(range(len(members)), 2)
            ],
        }


def _groups(
    members: Sequence[PerClass], best: int, together: PerClass, train_counts: NDArray[np.int64],
    p_groups: NDArray[np.str_] | None,
) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
    seen = together.total > 0
    d_groups = class_groups(train_counts)
    shares = [classes.correct[seen] / classes.total[seen] for classes in (*members, together)]
    out: dict[str, dict[str, dict[str, float]]] = {}
    for d in (*GROUPS, ANY):
        for p in (*GROUPS, ANY):
            here = ((d_groups == d) | (d == ANY))[seen] & (
                np.full(seen.sum(), p == ANY) if p_groups is None else ((p_groups == p) | (p == ANY))[seen]
            )
            if here.any():
                *alone, after = (float(share[here].mean()) for share in shares)
                mean = sum(alone) / len(alone)
                out.setdefault(d, {})[p] = {
                    "classes": int(here.sum()), "mean": mean, "best": alone[best], "together": after,
                    "gain": after - mean, "gain_over_best": after - alone[best],
                }  # fmt: skip
    return out


def crossed_table(report: Mapping[str, Any]) -> rich.table.Table:
    """Class accuracy in percent by data group (rows) and parameter group (columns): mean of the members -> together, gain."""
    groups = report["groups"]
    table = rich.table.Table(
        title="mean of the models alone -> together (gain), by data group D and parameter group P",
        title_justify="left", box=rich.box.SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("")
    columns = [p for p in (*GROUPS, ANY) if any(p in row for row in groups.values())]
    for p in columns:
        table.add_column(f"P-{p}", justify="right", no_wrap=True)
    for d, row in groups.items():
        table.add_row(f"D-{d}", *(_cell(row[p]) if p in row else "-" for p in columns))
    return table


def _cell(cell: dict[str, float]) -> str:
    return f"{percent(cell['mean'])} -> {percent(cell['together'])} ({100 * cell['gain']:+.1f})"


def print_found(
    title: str, split: str, shown: Sequence[tuple[str, Mapping[str, float]]], report: Mapping[str, Any]
) -> None:
    """Print the accuracies of an evaluation, of the members of several models first.

    Args:
        shown: (label, metrics as `split/name`), for each strength of the post-hoc adjustment.
        report: of `Crossed.result`, empty for one model.
    """
    screen = console()
    screen.print(accuracy_table(title, split, [*report.get("members", {}).items(), *shown]))
    for label, figures in shown:
        values = (f"{name.replace('_', ' ')} {percent(figures[f'{split}/{name}'])}" for name in FURTHER)
        print(f"{label}: {', '.join(values)}")
    if report:
        screen.print(crossed_table(report))
        print("\n".join(_words(report)))


def _words(report: Mapping[str, Any]) -> list[str]:
    """What the table does not show, in words: gain by data group, how often two models differ, and what it cost."""
    gains = [
        f"{d} {100 * row[ANY]['gain']:+.1f} ({100 * row[ANY]['gain_over_best']:+.1f})"
        for d, row in report["groups"].items()
    ]
    differ = [f"{a} and {b} {percent(share)}" for a, b, share in report["disagreement"]]
    lines = [f"gain over the mean of the models (over the best of them here, {report['best']}): {', '.join(gains)}",
             f"images on which two models differ, in %: {', '.join(differ)}"]  # fmt: skip
    if cost := report.get("cost"):
        lines.append(f"cost: {cost['trained_parameters']:,} trained parameters, {cost['train_s']:.0f} s of training steps, "
                     f"{cost['evaluate_s']:.1f} s for this evaluation")  # fmt: skip
    return lines
