"""Trials of a search as rows, for tables and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lift_ray.epoch_metrics import TRAINED_PARAMETERS, EpochMetrics
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import TRIALS, TRIALS_CSV

ENDED = ("finished", "pruned", "infeasible", "failed")


@dataclass
class TrialRow:
    """Trial of a search.

    Args:
        number: from 0, in order of start.
        values: values of the searched settings.
        num_epochs: epochs of the whole training.
        state: waiting (for a slot), running, finished (trained to the end), pruned (stopped early), infeasible (violates a
            constraint, not trained) or failed.
        history: metrics of each epoch, in order.
        error: text of the error of a failed trial.
        group: tuner kind, if each kind has its own number of trials.
        baseline: number of the baseline that this trial runs, None for other trials.
        began_at, ended_at: wall-clock time in seconds since 1970.
    """

    number: int
    values: dict[str, Any]
    num_epochs: int
    state: str = "running"
    history: list[EpochMetrics] = field(default_factory=list)
    error: str = ""
    group: str = ""
    baseline: int | None = None
    began_at: float | None = None
    ended_at: float | None = None

    @property
    def has_ended(self) -> bool:
        """True if the trial will not change any more."""
        return self.state in ENDED

    @property
    def last(self) -> EpochMetrics:
        """Metrics of the last finished epoch; before the first, none are known."""
        return self.history[-1] if self.history else EpochMetrics(0)

    @property
    def is_done(self) -> bool:
        """True if trained to the end; a run without training is done after its only evaluation, epoch 0."""
        return bool(self.history) and self.last.epoch >= self.num_epochs

    def seconds(self, name: str) -> float:
        """Return the sum of a time over the epochs."""
        return sum(metrics.seconds.get(name, 0.0) for metrics in self.history)


def best_row(rows: Iterable[TrialRow], metric: str, mode: str) -> TrialRow | None:
    """Return the finished trial with the best value, the first of several; None if none has finished."""
    finished = [row for row in rows if row.state == "finished" and metric in row.last]
    sign = 1 if mode == "max" else -1
    return max(finished, key=lambda row: (sign * row.last[metric], -row.number), default=None)


def best_of(rows: Iterable[TrialRow], objectives: Mapping[str, str]) -> TrialRow | None:
    """Return the finished trial with the best first objective, with ties broken by the others; None if none has finished."""
    front = pareto_front(rows, objectives)
    return front[0] if front else None


def pareto_front(rows: Iterable[TrialRow], objectives: Mapping[str, str]) -> list[TrialRow]:
    """Return the finished trials that no other trial dominates, sorted by the first objective, best first.

    A trial dominates another if it is at least as good in every objective and better in one.
    """
    finished = [row for row in rows if row.state == "finished" and all(metric in row.last for metric in objectives)]
    signs = {metric: 1 if mode == "max" else -1 for metric, mode in objectives.items()}
    points = {row.number: [round(sign * row.last[metric], 12) for metric, sign in signs.items()] for row in finished}
    front: list[TrialRow] = []
    best: list[list[float]] = []  # the points of the front, each once
    # In this order a trial can only be dominated by one before it, and then also by one of the front.
    for row in sorted(finished, key=lambda row: [-value for value in points[row.number]]):
        mine = points[row.number]
        if mine in best[-1:]:
            front.append(row)
        elif not any(all(a >= b for a, b in zip(theirs, mine, strict=True)) for theirs in best):
            front.append(row)
            best.append(mine)
    return front


def write_rows(rows: Iterable[TrialRow], folder: Path) -> None:
    """Write trials.parquet and trials.csv with a row for each trial, its settings and last metrics as columns.

    The files are renamed into place.
    """
    records = [
        {
            "number": row.number,
            "state": row.state,
            "epochs": len(row.history),
            **row.values,
            **row.last.flat("train", "cost", "unlabelled", "validation", "test"),
            TRAINED_PARAMETERS: row.last.trained_parameters,
            "train_s": row.seconds("train_s"),
            "evaluate_s": row.seconds("evaluate_s"),
            "began_at": row.began_at,
            "ended_at": row.ended_at,
            "error": row.error,
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(name for record in records for name in record))
    table = pa.table({name: _column([record.get(name) for record in records]) for name in columns})
    for name, write in ((TRIALS, pq.write_table), (TRIALS_CSV, pyarrow.csv.write_csv)):
        with replacing(folder / name) as temporary:
            write(table, temporary)


def _column(values: list[Any]) -> list[Any]:
    """Return values of one type: all as text if some are, as with the choices 16 and "[4, 8]" (a list) of one setting."""
    if not any(isinstance(value, str) for value in values):
        return values
    return [None if value is None else str(value) for value in values]


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file, renamed into place."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
