"""Trials as rows: what a search did, for tables, files and people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import TRIALS, TRIALS_CSV

ENDED = ("finished", "pruned", "infeasible", "failed")


@dataclass
class TrialRow:
    """One trial of a search.

    Args:
        number: from 0, in the order of starting.
        values: the searched settings.
        state: waiting (for a slot), running, finished (trained to its end), pruned (stopped early), infeasible (breaks a
            constraint, so not trained) or failed.
        history: the figures of each epoch, in order.
        group: the tuner kind, when each kind has trials of its own.
        baseline: the number of the baseline that it is.
        began_at, ended_at: by the clock, in seconds since 1970.
    """

    number: int
    values: dict[str, Any]
    num_epochs: int
    state: str = "running"
    history: list[dict[str, float]] = field(default_factory=list)
    error: str = ""
    group: str = ""
    baseline: int | None = None
    began_at: float | None = None
    ended_at: float | None = None

    @property
    def has_ended(self) -> bool:
        """Nothing more will come of it."""
        return self.state in ENDED

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last epoch done."""
        return self.history[-1] if self.history else {}

    @property
    def is_done(self) -> bool:
        """Trained to its end; a run that trains nothing is done with its one evaluation, epoch 0."""
        return bool(self.history) and self.last["epoch"] >= self.num_epochs

    def seconds(self, name: str) -> float:
        """Sum of one time/ figure over the epochs."""
        return sum(figures.get(f"time/{name}", 0.0) for figures in self.history)


def best_row(rows: Iterable[TrialRow], metric: str, mode: str) -> TrialRow | None:
    """The finished trial with the best value, the first of several; None when none has finished."""
    finished = [row for row in rows if row.state == "finished" and metric in row.last]
    sign = 1 if mode == "max" else -1
    return max(finished, key=lambda row: (sign * row.last[metric], -row.number), default=None)


def pareto_front(rows: Iterable[TrialRow], objectives: Mapping[str, str]) -> list[TrialRow]:
    """The finished trials that no other beats or equals in every objective and beats in one, best first objective first."""
    finished = [row for row in rows if row.state == "finished" and all(metric in row.last for metric in objectives)]
    signs = {metric: 1 if mode == "max" else -1 for metric, mode in objectives.items()}
    points = {row.number: [round(sign * row.last[metric], 12) for metric, sign in signs.items()] for row in finished}
    front = [
        row
        for row in finished
        if not any(
            theirs != points[row.number] and all(a >= b for a, b in zip(theirs, points[row.number], strict=True))
            for theirs in points.values()
        )
    ]
    return sorted(front, key=lambda row: [-value for value in points[row.number]])


def write_rows(rows: Iterable[TrialRow], folder: Path) -> None:
    """trials.parquet and trials.csv: a row for each trial, settings and last figures as columns, renamed into place."""
    records = [
        {
            "number": row.number,
            "state": row.state,
            "epochs": len(row.history),
            **row.values,
            **{k: v for k, v in row.last.items() if "/" in k and not k.startswith("time/")},
            "trained_parameters": row.last.get("trained_parameters"),
            "train_s": row.seconds("train_s"),
            "evaluate_s": row.seconds("evaluate_s"),
            "began_at": row.began_at,
            "ended_at": row.ended_at,
            "error": row.error,
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(name for record in records for name in record))
    table = pa.table({name: [record.get(name) for record in records] for name in columns})
    for name, write in ((TRIALS, pq.write_table), (TRIALS_CSV, pyarrow.csv.write_csv)):
        with replacing(folder / name) as temporary:
            write(table, temporary)


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """JSON, renamed into place."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
