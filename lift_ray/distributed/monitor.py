"""A search as it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from rich.console import Group
from rich.live import Live
from rich.text import Text

from lift_ray.distributed.slot import DIVERGED, PROBLEM
from lift_ray.results.output import Output
from lift_ray.results.rows import TrialRow, best_row, describe, write_rows
from lift_ray.results.tables import console, trial_table
from lift_ray.settings.space import SpaceFile


class Monitor(tune.Callback):  # type: ignore[misc]
    """Keeps the rows of a search, shows them, and rewrites the trials table whenever a trial ends.

    Args:
        out: for trials.parquet and trials.csv.
    """

    def __init__(self, space: SpaceFile, out: Output) -> None:
        self.space, self.out = space, out
        self.rows: dict[str, TrialRow] = {}
        self.began = time.monotonic()
        self.first_step_s: float | None = None
        self.last_result_s = 0.0
        self.console = console()
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles callbacks with its own state; a terminal cannot be pickled.
        return self.__dict__ | {"console": None, "live": None}

    def __enter__(self) -> Monitor:
        if self.live:
            self.live.start()
            self._show()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            self.live = None
            self.console.print(self._table(limit=10_000))
        if self.rows:
            self._write()

    def row(self, trial: Any) -> TrialRow:
        """The row of a Tune trial, made when it is first seen."""
        if trial.trial_id not in self.rows:
            values = {k: v for k, v in trial.config.items() if k in self.space.space}
            epochs = self.space.config(values).optim.epochs
            self.rows[trial.trial_id] = TrialRow(trial_number(trial), trial.trial_id, values, epochs)
            self.rows = dict(sorted(self.rows.items(), key=lambda item: item[1].number))
        return self.rows[trial.trial_id]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial was handed to a slot."""
        self.row(trial).state = "running"
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch is done."""
        now = time.monotonic() - self.began
        if self.first_step_s is None:
            self.first_step_s = now - result.get("time/train_s", 0) - result.get("time/evaluate_s", 0)
        self.last_result_s = now
        figures = {k: v for k, v in result.items() if k in ("epoch", "trained_parameters") or k.split("/")[0] in
                   ("train", "validation", "time")}  # fmt: skip
        row = self.row(trial)
        row.error = result.get(DIVERGED) or result.get(PROBLEM) or ""
        if row.error:
            return
        row.num_epochs = result["num_epochs"]
        row.history = [f for f in row.history if f["epoch"] < figures["epoch"]] + [figures]
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ran to its end or was stopped early."""
        row = self.row(trial)
        self._end(row, "failed" if row.error else "finished" if row.is_done else "pruned")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for good."""
        row = self.row(trial)
        row.error = error_line(trial)
        self._end(row, "failed")

    def _write(self) -> None:
        write_rows(self.rows.values(), self.out.folder)
        self.out.publish()

    def _end(self, row: TrialRow, state: str) -> None:
        row.state = state
        self._write()
        if not self.live and self.console:
            value = row.last.get(self.space.objective[0])
            self.console.print(
                f"{time.monotonic() - self.began:5.0f} s  trial {row.number:3d} {state:8s} "
                f"epoch {len(row.history)}/{row.num_epochs}  "
                f"{'' if value is None else f'{value:.4f}'}  {describe(row.values)} {row.error}".rstrip(),
                soft_wrap=True,
            )
        self._show()

    def _show(self) -> None:
        if self.live:
            self.live.update(
                Group(self._table(limit=max(5, self.console.height - 10)), Text(self._status())), refresh=True
            )

    def _table(self, limit: int) -> Any:
        return trial_table(
            list(self.rows.values()), list(self.space.space), self.space.objective[0], self.space.name, limit
        )

    def _status(self) -> str:
        rows, seconds = list(self.rows.values()), time.monotonic() - self.began
        ended = sum(row.state != "running" for row in rows)
        best = best_row(rows, *self.space.objective)
        parts = [f"{ended} of {self.space.search.trials} trials", f"{seconds:.0f} s"]
        if ended:
            left = seconds / ended * (self.space.search.trials - ended)
            parts += [f"{3600 * ended / seconds:.0f} trials/h", f"about {left / 60:.1f} min left"]
        if best:
            parts.append(f"best {best.last[self.space.objective[0]]:.4f}: {describe(best.values)}")
        return "  |  ".join(parts) if rows else "starting Ray and loading the tower ..."


def trial_number(trial: Any) -> int:
    """From 0, in the order in which the search made the trials."""
    return int(trial.experiment_tag.split("_")[0]) - 1


def error_line(trial: Any) -> str:
    """The last line of what a trial raised."""
    lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no error text"
